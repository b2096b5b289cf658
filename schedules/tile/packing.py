"""Rows that several query heads share: where few queries read the same head of keys, a tile's rows are those of a
group.

Packed row ``r`` is query ``r % seqlen_q`` of the group's head ``r // seqlen_q``.  The keys are then read once for the
group, and not once for each of its heads.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.tile.geometry import Geometry, Tensor
from schedules.tile.sequences import Sequence


@dataclass(frozen=True)
class PackedRows:
    """The rows of ``heads`` query heads from ``head`` on, of a tensor laid out as q; a row source as for keys.

    The queries are ``seqlen`` ones, from position ``begin`` of the tensor on.
    """

    tensor: Tensor
    batch: Expr
    head: Expr
    heads: Expr
    seqlen: Expr
    begin: Expr | int = 0

    @property
    def sequence(self) -> Sequence:
        """All rows, counted through."""
        return Sequence(0, self.heads * self.seqlen)

    def position(self, row: Expr) -> Expr:
        """The query of a row."""
        return T.truncmod(row, self.seqlen)

    def head_of(self, row: Expr) -> Expr:
        """The query head of a row."""
        return self.head + T.truncdiv(row, self.seqlen)

    def offset(self, row: Expr, column: Expr) -> Expr:
        """Elements of the flat tensor before a column of a row."""
        return self.tensor.offset(self.batch, self.head_of(row), self.place(row), column)

    def output_offset(self, output: Tensor, row: Expr, column: Expr) -> Expr:
        """The same of the output, which has rows in the same order."""
        return output.offset(self.batch, self.head_of(row), self.place(row), column)

    def moved(self, cursor: Expr, row: Expr, distance: Expr) -> Expr:
        """Offset of the row ``distance`` rows from ``row``, whose own is ``cursor``."""
        return cursor + (self.offset(row + distance, 0) - self.offset(row, 0))

    def number(self, geometry: Geometry, row: Expr) -> Expr:
        """Number of a row among all of the output in the order (batch, heads, seqlen_q), int64."""
        return geometry.lse_offset(self.batch, self.head_of(row), self.place(row))

    def place(self, row: Expr) -> Expr:
        """Where the query of a row is in the tensor."""
        return Sequence(self.begin, self.seqlen).at(self.position(row))

    def at(self, batch: Expr, head: Expr) -> PackedRows:
        """The same of another batch and first head."""
        return dataclasses.replace(self, batch=batch, head=head)

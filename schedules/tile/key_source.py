"""Where the keys (or the values) of a head lie in memory: from the number of a key to an address.

A kernel walks over tiles of keys and needs the address of a row of each.  There are three ways to ask, for three ways
to copy:

* ``offset(key, column)``: the element itself, in the flat tensor;
* ``moved(cursor, key, distance)``: the offset of the row ``distance`` keys from ``key``, where ``cursor`` is that of
  ``key``: one multiply-add, or none, where the keys are contiguous, and what a thread that copies row by row keeps;
* ``box(key)``: position, head and batch of a tile's first key, as TMA counts them.

Nothing else in a kernel knows how keys are laid out.  Keys on pages (:class:`PagedRows`) have no cursors: a thread
looks up where each of its rows is, and may do so before it needs them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.tile.sequences import Sequence


class RowTensor(Protocol):
    """What a source needs of a tensor ``(batch, heads, positions, columns)`` with run-time strides."""

    def offset(self, b: Expr, h: Expr, row: Expr, column: Expr) -> Expr:
        """Elements before ``[b, h, row, column]``."""

    sizes: dict

    def rows_offset(self, rows: Expr) -> Expr:
        """Elements from one row to the one that is ``rows`` rows on."""


class KeySource(Protocol):
    """Where a head's keys, or its values, are."""

    def offset(self, key: Expr, column: Expr) -> Expr:
        """Elements of the flat tensor before a column of a key."""

    def moved(self, cursor: Expr, key: Expr, distance: Expr) -> Expr:
        """Offset of the row that is ``distance`` keys from ``key``, whose own is ``cursor``."""

    def box(self, key: Expr) -> tuple[Expr, Expr, Expr]:
        """Position, head and batch of a key: the coordinates of a box of TMA."""


@dataclass(frozen=True)
class ContiguousRows:
    """The rows of one head one after the other: those of ``sequence`` in ``tensor[batch, head]``.

    A :class:`KeySource`; queries always lie so.
    """

    tensor: RowTensor
    batch: Expr
    head: Expr
    sequence: Sequence

    def offset(self, key: Expr, column: Expr) -> Expr:
        return self.tensor.offset(self.batch, self.head, self.sequence.at(key), column)

    def moved(self, cursor: Expr, key: Expr, distance: Expr) -> Expr:
        return cursor + self.tensor.rows_offset(distance)

    def box(self, key: Expr) -> tuple[Expr, Expr, Expr]:
        return self.sequence.at(key), self.head, self.batch


@dataclass(frozen=True)
class PagedRows:
    """The rows of one head on pages: key ``j`` of ``sequence`` is row ``j % page_size`` of page ``entry(j //
    page_size)`` of ``tensor``, whose ``batch`` are pages.
    """

    tensor: RowTensor
    entry: Callable[[Expr], Expr]
    head: Expr
    sequence: Sequence

    def split(self, key: Expr) -> tuple[Expr, Expr]:
        """Number of a key's page among those of the sequence, and the key's row in it."""
        size = self.tensor.sizes["seq"]
        page = T.truncdiv(key, size)
        return page, key - page * size

    def offset(self, page: Expr, row: Expr, column: Expr) -> Expr:
        """Elements of the flat tensor before a column of a row of a page, by its number in the table."""
        return self.tensor.offset(page, self.head, row, column)

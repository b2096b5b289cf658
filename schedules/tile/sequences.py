"""Where a sequence begins and ends: how a batch's rows and keys lie in the tensors.

A kernel asks once for each work tile, of the queries and of the keys of its batch, for a :class:`Sequence`.  It counts
positions from the sequence's own first one, and only addresses (of rows in :class:`schedules.tile.geometry.Tensor`, of
keys in :mod:`schedules.tile.key_source`) begin at ``offset``.  Masks and scores see ``length``, so that each sequence
is attended to as if it were alone.

Today sequences are dense: they all have the lengths of the launch and begin at the tensor's first position.  Sequences
of different lengths, packed one after the other, are another class with the same method, which reads both numbers on
the device.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tvm.ir import Expr


@dataclass(frozen=True)
class Sequence:
    """``length`` positions of a tensor, from position ``offset`` on."""

    offset: Expr | int
    length: Expr

    def at(self, position: Expr) -> Expr:
        """Where a position of the sequence is in the tensor."""
        return position if isinstance(self.offset, int) and self.offset == 0 else self.offset + position

    def with_length(self, length: Expr) -> Sequence:
        """The same with another expression for its length."""
        return dataclasses.replace(self, length=length)


@dataclass(frozen=True)
class Dense:
    """Every batch has ``seqlen`` positions, from the first of its own on."""

    seqlen: Expr

    def of(self, batch: Expr) -> Sequence:
        """The sequence of a batch."""
        return Sequence(0, self.seqlen)

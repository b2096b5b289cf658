"""Where a sequence begins and ends: how a batch's rows and keys lie in the tensors.

A kernel asks once for each work tile, of the queries and of the keys of its batch, for a :class:`Sequence`.  It counts
positions from the sequence's own first one, and only addresses (of rows in :class:`schedules.tile.geometry.Tensor`, of
keys in :mod:`schedules.tile.key_source`) begin at ``offset``.  Masks and scores see ``length``, so that each sequence
is attended to as if it were alone.

Sequences are *dense*, all of the lengths of the launch, each from the first position of a batch entry of its own; or
*ragged*, of different lengths, packed one after the other in tensors without a batch axis, where the device says where
each begins (:class:`Ragged`); keys on pages have lengths alone (:class:`Lengths`).  Which rows of which sequence a
block computes follows from sizes alone where they are dense; where they are ragged, row tiles have *slots*, which a
block looks up (:func:`find_sequence`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T


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

    @property
    def usual_length(self) -> Expr:
        """What to count with where any sequence's length will do."""
        return self.seqlen

    def tiles(self, rows: int) -> Expr:
        """How many tiles of ``rows`` rows each has."""
        return T.truncdiv(self.seqlen + (rows - 1), rows)

    def of(self, batch: Expr) -> Sequence:
        """The sequence of a batch."""
        return Sequence(0, self.seqlen)


@dataclass(frozen=True)
class Ragged:
    """Sequence ``i`` of ``batch`` has the positions from ``starts[i]`` to ``starts[i + 1]`` of the tensor's ``total``.

    ``starts`` is a flat view of ``batch + 1`` int32 on the device, which never fall.  What follows the last sequence is
    one more, number ``batch``, so that every position is in some sequence.  Whatever ``starts`` may hold, no position
    is outside the tensor.
    """

    starts: object
    batch: Expr
    total: Expr

    @property
    def usual_length(self) -> Expr:
        """Their mean length."""
        return T.truncdiv(self.total, self.batch)

    def begin(self, sequence: Expr) -> Expr:
        """First position of a sequence."""
        return T.min(T.max(self.starts[sequence], 0), self.total)

    def end(self, sequence: Expr) -> Expr:
        """The position after the last one of a sequence."""
        return T.Select(sequence < self.batch, self.begin(T.min(sequence + 1, self.batch)), self.total)

    def of(self, sequence: Expr) -> Sequence:
        """The sequence of a number."""
        begin = self.begin(sequence)
        return Sequence(begin, T.max(self.end(sequence) - begin, 0))

    def tiles(self, rows: int) -> Expr:
        """How many slots there are for tiles of ``rows`` rows of all sequences: it follows from sizes alone."""
        return T.truncdiv(self.total, rows) + (self.batch + 1)

    def first_slot(self, sequence: Expr, rows: int) -> Expr:
        """The first slot of a sequence, which has those up to the next one's: as many as its tiles, or one more.

        There are at most ``floor((begin + length) / rows) - floor(begin / rows) + 1`` tiles in ``length`` positions.
        """
        return T.truncdiv(self.begin(sequence), rows) + sequence

    def by_slot(self, rows: int, slot: Expr) -> Callable[[Expr], Expr]:
        """Whether a slot is a sequence's, or a later one's."""
        return lambda sequence: self.first_slot(sequence, rows) <= slot

    def by_position(self, position: Expr) -> Callable[[Expr], Expr]:
        """Whether a position of the tensor is a sequence's, or a later one's."""
        return lambda sequence: self.begin(sequence) <= position


@dataclass(frozen=True)
class Lengths:
    """Sequence ``i`` of ``batch`` has ``lengths[i]`` positions, at most ``most``, each counted from its own first one.

    ``lengths`` is a flat view of ``batch`` int32 on the device.  Sequence number ``batch`` has the last one's.
    """

    lengths: object
    batch: Expr
    most: Expr

    @property
    def usual_length(self) -> Expr:
        """The most that one may have."""
        return self.most

    def of(self, sequence: Expr) -> Sequence:
        """The sequence of a number."""
        length = self.lengths[T.min(sequence, self.batch - 1)]
        return Sequence(0, T.min(T.max(length, 0), self.most))


_COUNT_LANES = """
__forceinline__ __device__ int count_lanes(int predicate) {
  return __popc(__ballot_sync(0xffffffffu, predicate));
}
"""


def count_lanes(predicate: Expr) -> Expr:
    """In how many lanes of the warp, all of which ask, a predicate holds."""
    return T.cuda.func_call("count_lanes", T.Cast("int32", predicate), source_code=_COUNT_LANES, return_type="int32")


@T.inline
def _find_last(ragged: Ragged, has_begun, lane, sequence):
    """Set ``sequence`` to the last one that ``has_begun``: a whole warp searches, 32 sequences at a time."""
    sequence = 0
    left: T.int32 = ragged.batch + 1
    while left > 1:
        step: T.int32 = T.truncdiv(left + 31, 32)
        mine: T.int32 = sequence + lane * step
        begun = T.meta_var(has_begun(T.min(mine, ragged.batch)))
        passed: T.int32 = T.max(count_lanes(T.And(lane * step < left, begun)) - 1, 0) * step
        sequence = sequence + passed
        left = T.min(left - passed, step)


@T.inline
def find_sequence(ragged: Ragged, rows, slot, lane, sequence):
    """Set ``sequence`` to the one that has a slot, by a whole warp."""
    _find_last(ragged, ragged.by_slot(rows, slot), lane, sequence)


@T.inline
def find_owner(ragged: Ragged, position, lane, sequence):
    """Set ``sequence`` to the one that has a position of the tensor, the last one after them all; by a whole warp."""
    _find_last(ragged, ragged.by_position(position), lane, sequence)

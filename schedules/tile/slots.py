"""The work tile that a slot stands for, where sequences are ragged: looked up by one warp, kept in shared memory.

No register holds any of it throughout a loop over keys: whoever needs a number reads it where it is needed.
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.tile.sequences import Ragged, Sequence, find_sequence
from schedules.tile.smem import TILE_ALIGNMENT
from schedules.tile.tile_scheduler import WorkTile

#: int32 of a :class:`FoundTile`, and where each number is.
WORDS = 8
BYTES = TILE_ALIGNMENT  # of a block that has one before its tiles
_SEQUENCE, _HEAD, _M_BLOCK, _QUERY, _QUERIES, _KEY, _KEYS, _OTHER = range(8)


@T.meta_class
class FoundTile:
    """A row tile of a sequence, in ``WORDS`` int32 of shared memory from ``words[first]`` on."""

    def __init__(self, words, first: Expr | int = 0):
        self.words, self.first = words, first

    def _word(self, i: int) -> Expr:
        return self.words[self.first + i]

    @property
    def sequence(self) -> Expr:
        """Number of the sequence; that of the last one for the rows after it, which see no keys."""
        return self._word(_SEQUENCE)

    @property
    def head(self) -> Expr:
        """The query head."""
        return self._word(_HEAD)

    @property
    def m_block(self) -> Expr:
        """Which of the sequence's row tiles; negative if there is none."""
        return self._word(_M_BLOCK)

    @property
    def exists(self) -> Expr:
        """Whether there is a tile."""
        return self.m_block >= 0

    @property
    def other(self) -> Expr:
        """A further row tile of the same sequence and head, which is to follow; −1 if there is none."""
        return self._word(_OTHER)

    @property
    def queries(self) -> Sequence:
        """The sequence's rows."""
        return Sequence(self._word(_QUERY), self._word(_QUERIES))

    @property
    def keys(self) -> Sequence:
        """The sequence's keys."""
        return Sequence(self._word(_KEY), self._word(_KEYS))

    @T.inline
    def look_up(self, queries: Ragged, keys: Ragged, rows, item: WorkTile, lane):
        """A whole warp: find the tile of ``rows`` rows whose slot is the m-block of ``item``, long ones first.

        A lane writes it; others may read it after a barrier.
        """
        found: T.int32 = 0
        find_sequence(queries, rows, item.m_block, lane, found)
        if lane == 0:
            length: T.int32 = queries.of(found).length
            tiles: T.int32 = T.truncdiv(length + (rows - 1), rows)
            m_block = T.meta_var(tiles - 1 - (item.m_block - queries.first_slot(found, rows)))
            self.write(queries, keys, found, item.head, m_block, length)

    @T.inline
    def look_up_keys(self, queries: Ragged, keys: Ragged, rows, slot, lane):
        """A whole warp: find the tile of ``rows`` keys whose slot it is, the first ones first.

        ``m_block`` is then its number among those of its sequence, and ``head`` the same even if there is no such tile.
        Those after the last sequence no row sees.
        """
        found: T.int32 = 0
        find_sequence(keys, rows, slot, lane, found)
        if lane == 0:
            own = T.meta_var(keys.of(found))
            number: T.int32 = slot - keys.first_slot(found, rows)
            length: T.int32 = own.length
            self.write(queries, keys, found, number, T.Select(number * rows < length, number, -1), 0)
            self.words[self.first + _KEYS] = length
            if found < queries.batch:
                self.words[self.first + _QUERIES] = queries.of(found).length
            self.words[self.first + _OTHER] = T.Cast("int32", T.And(number == 0, found < queries.batch))

    @property
    def begins(self) -> Expr:
        """Whether the slot of a tile of keys is a sequence's first one."""
        return self._word(_OTHER) != 0

    @T.inline
    def write(self, queries: Ragged, keys: Ragged, found, head, m_block, length):
        """One lane: what there is to know of an m-block of sequence ``found``, which has ``length`` rows."""
        own = T.meta_var(queries.of(found))
        others = T.meta_var(keys.of(found))
        self.words[self.first + _SEQUENCE] = T.min(found, queries.batch - 1)
        self.words[self.first + _HEAD] = head
        self.words[self.first + _M_BLOCK] = m_block
        self.words[self.first + _QUERY] = own.offset
        self.words[self.first + _QUERIES] = length
        self.words[self.first + _KEY] = others.offset
        self.words[self.first + _KEYS] = T.Select(found < queries.batch, others.length, 0)

    @T.inline
    def follow(self, m_block):
        """One lane: m-block ``m_block`` of the same sequence and head is to follow, if it isn't −1."""
        self.words[self.first + _OTHER] = m_block

    @T.inline
    def take_other(self, before):
        """One lane: the row tile that is to follow another one."""
        for i in T.unroll(WORDS):
            self.words[self.first + i] = before.words[before.first + i]
        self.words[self.first + _M_BLOCK] = before.other
        self.words[self.first + _OTHER] = -1

    @T.inline
    def leave_out(self):
        """One lane: there is no tile after all."""
        self.words[self.first + _M_BLOCK] = -1


@T.meta_class
class Own:
    """The sequences of a :class:`FoundTile`: for whoever asks for that of a batch entry."""

    def __init__(self, sequence: Sequence):
        self.sequence = sequence

    def of(self, batch: Expr) -> Sequence:
        """The tile's own sequence."""
        return self.sequence

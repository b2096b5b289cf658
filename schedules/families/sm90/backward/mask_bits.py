"""Weights whose mask is asked while the step before ends: a bit for each score is all that is left of it.

Of the joint launch, whose consumers have no registers for ids beside scores.  A lane reads or computes what the mask
has of one query in 32, and has that of its own columns from other lanes.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T

from schedules.definition.pattern import Site
from schedules.families.mma.registers import anew
from schedules.tile.levels import from_lane
from schedules.tile.mask_terms import MaskTerms
from schedules.tile.mask_walks import Walked
from schedules.tile.weights import Weights

_LANES = _BITS = 32


@T.meta_class
class MaskBits(Weights):
    """Weights of one m-tile of keys, by ``columns`` queries a step, a multiple of 64."""

    #: Nothing is read where a score is.
    reads = False

    def __init__(self, pattern: Walked, at: Site, columns: int, lane, site_anew: Callable[[], Site], **options):
        Weights.__init__(self, pattern, at, columns, True, asks_once=True, **options)
        self.columns, self.lane, self.site_anew = columns, lane, site_anew
        self.asked = MaskTerms(pattern, 2, transposed=True, branches=False)
        self.of_lanes = T.alloc_local([columns // _LANES * max(1, len(self.asked.of_columns))], "int32")
        self.bits = T.alloc_local([columns // 2 // _BITS], "uint32")

    @T.inline
    def fetch(self, row0, column0, last):
        """Ask the mask of a step; ``row0`` and ``column0`` are this lane's first query and key, ``last`` the step's
        last query."""
        at = T.meta_var(self.site_anew())
        # what follows from these isn't kept in registers
        column: T.int32 = self.fragment.column(anew(self.lane))
        key: T.int32 = anew(column0)
        for r in T.unroll(2):
            self.asked.set_row(at, r, self.position(row0, key, 0, 0, r, 0))
        self.read_columns(at, last - (self.columns - 1) + self.lane, key)
        for w in T.unroll(self.columns // 2 // _BITS):
            self.bits[w] = T.uint32(0)
            for n in T.unroll(_BITS // 4):
                g = T.meta_var(w * (_BITS // 4) + n)
                self.take_columns(g, column)
                for r in T.unroll(2):
                    for e in T.unroll(2):
                        seen = T.meta_var(self.asked.sees(at, r, e, self.position(row0, key, 0, g, r, e)))
                        bit = T.meta_var(T.shift_left(T.uint32(1), T.Cast("uint32", n * 4 + r * 2 + e)))
                        self.bits[w] = T.bitwise_or(self.bits[w], T.Select(seen, bit, T.uint32(0)))

    def read_columns(self, at, query, key):
        """Have what the mask keeps of ``query``, and of every 32nd after it."""
        terms = self.asked.of_columns
        for x in range(self.columns // _LANES):
            for k, value in enumerate(self.asked.values(terms, at, (query + x * _LANES, key))):
                T.buffer_store(self.of_lanes, value, [x * len(terms) + k])

    def take_columns(self, g, column):
        """Have what it keeps of the two queries of group ``g``; ``column`` is this lane's first one of a group."""
        count, first = len(self.asked.of_columns), g * self.fragment.group
        for e in range(2):
            lane = column + T.truncmod(first, _LANES) + e
            for k in range(count):
                kept = self.of_lanes[T.truncdiv(first, _LANES) * count + k]
                T.buffer_store(self.asked.in_columns, from_lane(kept, lane), [e * count + k])

    def _seen(self, at, place, interval, masked):
        if not masked:
            return None
        _, g, r, e = place
        bit = T.shift_left(T.uint32(1), T.Cast("uint32", T.truncmod(g, _BITS // 4) * 4 + r * 2 + e))
        return T.bitwise_and(self.bits[T.truncdiv(g, _BITS // 4)], bit) != T.uint32(0)

"""Online softmax of a consumer warpgroup: what :mod:`schedules.tile.softmax` has, and steps without a maximum.

A row is checked after such a step: ``pack`` sums a lane's probabilities of the step, and ``overflowed`` says whether a
sum has left the range in which float16 certainly held every probability.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern, Site
from schedules.families.sm90.packing import Rows
from schedules.families.sm90.tensor_tile import FetchedTensors
from schedules.tile.dtypes import element_type
from schedules.tile.fragment import M16N8
from schedules.tile.functions import accurate
from schedules.tile.geometry import flat
from schedules.tile.score import LOG2_E, NEGATIVE_INFINITY
from schedules.tile.softmax import LOWEST, OnlineSoftmax
from schedules.tile.static import static

#: Largest sum of a lane's probabilities in a step without a maximum; a float16 holds 65504.
SUM_LIMIT = 8192.0
#: Largest reference that is surely as it was computed.
NEAR = float(1 << 22)
#: Independent chains in a row's sum or maximum.
CHAINS = 4

_ALL_LANES = 0xFFFFFFFF


@T.meta_class
class Softmax(FetchedTensors, OnlineSoftmax):
    """The shared softmax on one m-tile of wgmma's accumulator.

    ``step_sum`` is a step's share of ``row_sum``, in this lane; ``rows`` tells which query a row is.
    """

    all_exist = False
    #: Registers with what is added to scaled products, in powers of two, where it is computed before they are there.
    added: Any = None

    def __init__(self, pattern: Pattern, at: Site, rows: Rows, columns: int):
        self.rows = rows
        self.rows_follow = rows.are_positions
        OnlineSoftmax.__init__(self, pattern, at, M16N8, 1, columns)
        self.step_sum = T.alloc_local([2], "float32")

    def add_to_products(self, added) -> None:
        """Let what is added to products be computed beforehand, in registers ``added``: where the score is but the
        scaled product, −inf where the mask hides it."""
        self.added = added
        self.near = T.alloc_local([2], "float32")  # references, if those of the warp are near; else 0
        self.far = T.local_scalar("int32")

    def position(self, row0, column0, t, g, r, e):
        """Query and key of a register, from row and key of this lane's first one."""
        row, column = OnlineSoftmax.position(self, row0, column0, t, g, r, e)
        return self.rows.position(row), column

    def sees(self, at, t, r, e):
        """Whether the mask shows a score; of keys that all exist, if it is known."""
        if self.all_exist and self.terms is None and not self.pattern.is_unmasked:
            return self.pattern.mask_inside(self.here, *at)
        return OnlineSoftmax.sees(self, at, t, r, e)

    @T.inline
    def add_beforehand(self, row0, column0, relative):
        """Compute what is added to the products of a step; ``relative`` to references, if these are near.

        Where that is what a mask hides, all keys exist, and scores that are made without it are masked in their turn.
        """
        if static(self.added is not None and (relative or not self.folded)):
            for g in T.unroll(self.groups):
                for r in T.unroll(2):
                    for e in T.unroll(2):
                        self.look_at(0, g, r, e)
                        at = T.meta_var(self.position(row0, column0, 0, g, r, e))
                        i = T.meta_var(g * 4 + r * 2 + e)
                        if static(self.folded):
                            seen = T.meta_var(self.pattern.mask_inside(self.here, *at))
                            self.added[i] = T.Select(seen, T.float32(0) - self.near[r], T.float32(NEGATIVE_INFINITY))
                        else:
                            self.added[i] = accurate(self.pattern.added(self.here, *at)) * T.float32(LOG2_E)
                            if static(relative):
                                self.added[i] = self.added[i] - self.near[r]

    def modified(self, s, i, j, chosen=None):
        if self.added is None:
            return OnlineSoftmax.modified(self, s, i, j, chosen)
        g, r, e = self.register
        return self.to_powers(s) + self.added[g * 4 + r * 2 + e]

    def to_powers(self, s):
        """The scaled product in powers of two."""
        return s * (self.at.softmax_scale * T.float32(LOG2_E))

    @T.inline
    def find_near(self):
        """Find out whether the warp's references are so near 0 that what is added may be relative to them.

        That saves a subtraction where everything waits for the scores.  But the references of rows that are far from 0
        are multiples of up to 64, and what is added has these digits still: all powers of two would be off by as much.
        There scores are rounded first.  The reference of a row that has seen nothing counts as near: what exceeds it
        overflows.
        """
        if static(self.added is not None):
            self.far = T.cuda.any_sync(T.uint32(_ALL_LANES), T.Cast("int32", T.Or(self._is_far(0), self._is_far(1))))
            for r in T.unroll(2):
                self.near[r] = T.Select(self.far == 0, self.row_max[r], T.float32(0))

    def _is_far(self, r):
        x = self.row_max[r]
        return T.And(T.abs(x) > T.float32(NEAR), x != T.float32(LOWEST))

    @T.inline
    def probabilities_of_products(self, S, W):
        """``W = exp2(score - reference)`` of products ``S`` as they are, and what is added to them in ``W``."""
        if self.far == 0:
            for i in T.unroll(self.stride):
                W[i] = T.exp2(self.to_powers(S[i]) + W[i])
        else:
            for g in T.unroll(self.groups):
                for r in T.unroll(2):
                    for e in T.unroll(2):
                        i = T.meta_var(g * 4 + r * 2 + e)
                        W[i] = T.exp2(self.to_powers(S[i]) + W[i] - self.row_max[r])

    def of_first_rows(self, compute) -> None:
        """``compute()``, in whose text each lane looks at the first of its two rows alone."""
        self.lane_rows = 1
        compute()
        self.lane_rows = 2

    def scores_of_existing(self, S, row0, column0, masked) -> None:
        """As ``scores``, of a tile whose keys all exist."""
        self.all_exist = True
        self.scores(S, row0, column0, masked)
        self.all_exist = False

    @T.inline
    def scores(self, S, row0, column0, masked):
        """Raw products to scores, −inf where hidden; no negative scale, which would turn them round, gets here."""
        self.modify(S, row0, column0, masked)

    @T.inline
    def track(self, S, slack):
        """Raise references that scores exceed by more than ``slack``; sets ``grown``, ``correction``, ``row_sum``."""
        self.local_max(S, self.peak)
        self.follow_peak(slack)

    @T.inline
    def follow_peak(self, slack):
        """The same, with the largest scores of this lane in ``peak``."""
        self.grown = T.cuda.any_sync(
            T.uint32(_ALL_LANES),
            T.Cast("int32", functools.reduce(T.Or, [self._exceeds(r, slack) for r in range(self.lane_rows)])),
        )
        if self.grown != 0:
            self.reduce_rows(self.peak, T.max)
            for r in T.unroll(self.lane_rows):
                self.peak[r] = T.max(T.ceil(self.peak[r] * self.scale), self.row_max[r])
                self.correction[r] = T.exp2(self.row_max[r] - self.peak[r])
                self.row_max[r] = self.peak[r]
                self.row_sum[r] = self.row_sum[r] * self.correction[r]

    def _exceeds(self, r, slack):
        """Whether this lane's largest score of row ``r`` exceeds the reference by more than ``slack``."""
        return self.peak[r] * self.scale > self.row_max[r] + slack

    def find_peak(self, S) -> None:
        """The largest scores of this lane in each of its rows."""
        self._in_chains(S, self.peak, T.max)

    @T.inline
    def probabilities(self, S, scale, W):
        """``W = exp2(S * scale - reference)``; ``W`` may be ``S``."""
        for g in T.unroll(self.groups):
            for r in T.unroll(self.lane_rows):
                for e in T.unroll(2):
                    W[g * 4 + r * 2 + e] = T.exp2(S[g * 4 + r * 2 + e] * scale - self.row_max[r])

    @T.inline
    def visible_probabilities(self, S, scale, row0, column0):
        """``S = exp2(S * scale - reference)`` of keys that all exist, 0 where the mask hides them."""
        for n in T.unroll(4):
            for q in T.unroll(self.groups // 2):
                for r in T.unroll(2):
                    g = T.meta_var(q * 2 + n // 2)
                    e = T.meta_var(n % 2)
                    self.look_at(0, g, r, e)
                    i = T.meta_var(g * 4 + r * 2 + e)
                    seen = T.meta_var(self.pattern.mask_inside(self.here, *self.position(row0, column0, 0, g, r, e)))
                    added = T.meta_var(T.Select(seen, T.float32(0) - self.row_max[r], T.float32(NEGATIVE_INFINITY)))
                    S[i] = T.exp2(S[i] * scale + added)

    @T.inline
    def guess(self, S, W, begin, end):
        """``W = exp2(S * scale - reference)`` of groups ``begin .. end`` (exclusive), by instructions that the compiler
        can't move from where they are."""
        exponent = T.alloc_local([1], "float32")
        for g in T.unroll(begin, end):
            for r in T.unroll(2):
                for e in T.unroll(2):
                    i = T.meta_var(g * 4 + r * 2 + e)
                    T.ptx["fma.rn.ftz.f32"](exponent[0], S[i], self.scale, T.float32(0) - self.row_max[r])
                    T.ptx["ex2.approx.ftz.f32"](W[i], exponent[0])

    @T.inline
    def pack(self, S, P):
        """Probabilities to 16 bits, and their sums to ``step_sum``."""
        self.pack_pairs(S, P)
        self.sum_up(S)

    @T.inline
    def pack_pairs(self, S, P):
        """Probabilities to 16 bits."""
        for g in T.unroll(self.groups):
            for r in T.unroll(self.lane_rows):
                i = T.meta_var(g * 2 + r)
                T.ptx[element_type(self.pattern.dtype).pack](P[i], S[2 * i + 1], S[2 * i])

    def sum_up(self, S) -> None:
        """The sums of a step's probabilities, in this lane."""
        self._in_chains(S, self.step_sum, operator.add)

    @T.inline
    def _in_chains(self, S, to, combine):
        """Combine what this lane has of each of its rows, in chains that don't wait for one another."""
        chain = T.alloc_local([CHAINS], "float32")
        for r in T.unroll(self.lane_rows):
            for c in T.unroll(CHAINS):
                chain[c] = S[c // 2 * 4 + r * 2 + c % 2]
            for x in T.unroll(CHAINS, self.groups * 2):
                chain[x % CHAINS] = combine(chain[x % CHAINS], S[x // 2 * 4 + r * 2 + x % 2])
            to[r] = combine(combine(chain[0], chain[1]), combine(chain[2], chain[3]))

    def overflowed(self):
        """Whether this step's sum of a row of the warp says that probabilities may not have been represented."""
        return (
            T.cuda.any_sync(
                T.uint32(_ALL_LANES),
                T.Cast("int32", T.max(self.step_sum[0], self.step_sum[1]) >= T.float32(SUM_LIMIT)),
            )
            != 0
        )

    @T.inline
    def add_sums(self):
        """Count a step in, once its probabilities are final."""
        for r in T.unroll(self.lane_rows):
            self.row_sum[r] = self.row_sum[r] + self.step_sum[r]


@T.meta_class
class Finished(OnlineSoftmax):
    """Row sums and references of a finished work tile, kept while the next one has begun."""

    reads = False

    def __init__(self, softmax: Softmax):
        self.rows = softmax.rows
        OnlineSoftmax.__init__(self, softmax.pattern, softmax.at, softmax.fragment, 1, softmax.fragment.group)

    @T.inline
    def keep(self, softmax):
        """Take over the state, and complete the row sums."""
        for r in T.unroll(2):
            self.row_max[r] = softmax.row_max[r]
            self.row_sum[r] = softmax.row_sum[r]
        self.finish()

    @T.inline
    def store_lse(self, block, tile, row, lane):
        """Write the log-sum-exp of this lane's rows of a work tile, from row ``row`` on, if anyone asked."""
        geometry = T.meta_var(block.geometry)
        if T.And(geometry.lse_wanted, self.fragment.column(lane) == 0):
            where = T.meta_var(block.scheduler.work_tile(block.at, tile))
            to = flat(geometry.lse)
            for r in T.unroll(2):
                at: T.int32 = block.scheduler.first_row(where[0], tile) + row + r * self.fragment.row_step
                position = T.meta_var(self.rows.position(at))
                if T.And(at < self.rows.count, position < geometry.seqlen_q):
                    place = T.meta_var(geometry.queries.of(where[2]).at(position))
                    to[geometry.lse_offset(where[2], where[1] + self.rows.head(at), place)] = self.lse(r)

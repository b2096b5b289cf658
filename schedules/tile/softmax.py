"""The online softmax on accumulator fragments of scores (:mod:`schedules.tile.score`): once for every GPU.

The online softmax is that of FlashAttention (Dao et al., 2022), with references in place of maxima.  Everything
exponential is in powers of two.  A row has a *reference*, an integer, and its probabilities are
``p = exp2(score - reference)``.  All that is accumulated is linear in ``2^-reference``: raising a reference multiplies
the row sum and the output with a power of two, which is exact.  The reference need not be the maximum, only so near it
that nothing overflows or vanishes, hence

* ``track`` raises it only where a score exceeds it by more than ``LAZY`` (the lazy rescale of FlashAttention-4);
* once a row has one, steps may go on without looking for maxima, if overflow is noticed afterwards.

An integer also makes ``S * scale - reference``, one multiply-add, exact up to one rounding, however large scores are.
"""

from __future__ import annotations

import operator

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern, Site
from schedules.tile.fragment import Fragment
from schedules.tile.score import LN_2, LOG2_E, ScoreTile

#: Powers of two by which a score may exceed its row's reference; 2^8 leaves P and the row sum far from overflow.
LAZY = 8.0

#: The reference of a row that has seen nothing: finite, so that a hidden score minus it is −inf and not NaN.
LOWEST = -3e38

#: Smallest |scale|: keeps 0 * −inf out of the exponent, and brings no finite product anywhere.
SMALLEST_SCALE = 1e-37

_ALL_LANES = 0xFFFFFFFF


def from_lane(value: Expr, mask: int) -> Expr:
    """``value`` of the lane whose number differs in the bits of ``mask``."""
    return T.cuda.__shfl_xor_sync(T.uint32(_ALL_LANES), value, mask, 32)


@T.meta_class
class OnlineSoftmax(ScoreTile):
    """The softmax state of the rows that one lane shares in: ``2 * m_tiles`` rows of ``columns`` columns a step.

    A step with maxima is ``scores``, ``track``, ``rescale`` of the output if ``grown`` isn't 0, and ``exponentials`` of
    all groups with ``scale``.  One without is ``modify`` and ``exponentials`` with ``signed_scale()``.  All can begin
    with m-tile ``first``, if those before it see nothing.  ``tile_step``: rows from one m-tile of a warp to the next.
    Where the definition has a sink, and the rows are not those of a part of the keys, ``add_sink`` follows ``finish``.
    """

    #: Whether keys are all that there are, so that a sink belongs to the rows.
    is_whole = True
    rows_follow = True

    def __init__(self, pattern: Pattern, at: Site, fragment: Fragment, m_tiles: int, columns: int, tile_step: int = 0):
        ScoreTile.__init__(self, pattern, at, fragment, m_tiles, columns, tile_step)
        self.has_sink = pattern.has_sink and self.is_whole
        rows = 2 * m_tiles
        self.row_max = T.alloc_local([rows], "float32")  # the reference
        self.row_sum = T.alloc_local([rows], "float32")  # of this lane's columns; complete after ``finish``
        self.correction = T.alloc_local([rows], "float32")  # factor for what was summed before, valid if ``grown``
        self.peak = T.alloc_local([rows], "float32")
        self.scale = T.local_scalar("float32")
        self.grown = T.local_scalar("int32")

    def reduce_rows(self, values, combine, first=0):
        """Combine each row's value over the lanes that share the row."""
        for t in range(first, self.m_tiles):
            for i in range(2 * t, 2 * t + self.lane_rows):
                for lanes in self.fragment.row_lanes:
                    other = from_lane(values[i], lanes)
                    T.buffer_store(values, combine(values[i], other), [i])

    @T.inline
    def reset(self):
        """Before the first tile of a row tile."""
        self.scale = T.max(T.abs(self.signed_scale()), T.float32(SMALLEST_SCALE))
        for i in T.unroll(2 * self.m_tiles):
            self.row_max[i] = T.float32(LOWEST)
            self.row_sum[i] = T.float32(0)

    @T.inline
    def local_max(self, S, peak, first=0):
        """The largest score of this lane in each of its rows."""
        for t in T.unroll(first, self.m_tiles):
            for r in T.unroll(self.lane_rows):
                i = T.meta_var(t * self.stride + r * 2)
                peak[t * 2 + r] = T.max(S[i], S[i + 1])
                for g in T.unroll(1, self.groups):
                    peak[t * 2 + r] = T.max(peak[t * 2 + r], S[i + g * 4])
                    peak[t * 2 + r] = T.max(peak[t * 2 + r], S[i + g * 4 + 1])

    @T.inline
    def track(self, S, slack=LAZY, first=0):
        """Raise references that scores exceed by more than ``slack``; sets ``grown``, ``correction``, ``row_sum``."""
        self.local_max(S, self.peak, first)
        self.grown = 0
        for i in T.unroll(2 * first, 2 * self.m_tiles):
            excess = T.meta_var(self.peak[i] * self.scale > self.row_max[i] + T.float32(slack))
            self.grown = T.bitwise_or(self.grown, T.Cast("int32", excess))
        self.grown = T.cuda.any_sync(T.uint32(_ALL_LANES), self.grown)
        if self.grown != 0:
            self.reduce_rows(self.peak, T.max, first)
            self.advance(first)

    @T.inline
    def advance(self, first=0):
        """New references from the rows' ``peak``; the sum follows here, the output by ``rescale``."""
        for i in T.unroll(2 * first, 2 * self.m_tiles):
            self.raise_reference(i)
            self.row_sum[i] = self.row_sum[i] * self.correction[i]

    @T.inline
    def raise_reference(self, i):
        """The reference of a row from its ``peak``."""
        self.peak[i] = T.max(T.ceil(self.peak[i] * self.scale), self.row_max[i])
        self.correction[i] = T.exp2(self.row_max[i] - self.peak[i])
        self.row_max[i] = self.peak[i]

    @T.inline
    def exponentials(self, S, group, count, scale, first=0):
        """Scores of ``count`` groups from ``group`` to probabilities relative to the references, and sum them."""
        for t in T.unroll(first, self.m_tiles):
            for g in T.unroll(count):
                for r in T.unroll(2):
                    for e in T.unroll(2):
                        i = T.meta_var(t * self.stride + (group + g) * 4 + r * 2 + e)
                        S[i] = T.exp2(S[i] * scale - self.row_max[t * 2 + r])
                        self.row_sum[t * 2 + r] = self.row_sum[t * 2 + r] + S[i]

    @T.inline
    def rescale(self, O, stride, first=0):
        """What was accumulated before, relative to the new references; ``stride`` registers an m-tile."""
        for t in T.unroll(first, self.m_tiles):
            for g in T.unroll(stride // 4):
                for r in T.unroll(self.lane_rows):
                    for e in T.unroll(2):
                        i = T.meta_var(t * stride + g * 4 + r * 2 + e)
                        O[i] = O[i] * self.correction[t * 2 + r]

    @T.inline
    def finish(self):
        """Complete the row sums; after the last tile."""
        self.reduce_rows(self.row_sum, operator.add)

    @T.inline
    def add_sink(self, sinks):
        """Count in each finished row a logit without a key: ``sinks(row)``, −inf for none."""
        for i in T.unroll(2 * self.m_tiles):
            sink: T.float32 = sinks(i) * T.float32(LOG2_E)
            self.peak[i] = T.max(self.row_max[i], sink)
            self.correction[i] = T.exp2(self.row_max[i] - self.peak[i])
            total: T.float32 = self.row_sum[i] * self.correction[i] + T.exp2(sink - self.peak[i])
            self.correction[i] = T.Select(self.row_sum[i] == T.float32(0), T.float32(0), self.correction[i] / total)
            self.row_sum[i] = total
            self.row_max[i] = self.peak[i]

    def lse(self, row) -> Expr:
        """Natural logarithm of the sum of exponentials of a finished row; −inf if it saw nothing."""
        return (self.row_max[row] + T.log2(self.row_sum[row])) * T.float32(LN_2)

    def inverse(self, row) -> Expr:
        """1 / row sum of a finished row; 0 if it saw nothing.  With a sink it is in the sum."""
        if self.has_sink:
            return self.correction[row]
        return T.Select(self.row_sum[row] == T.float32(0), T.float32(0), T.float32(1) / self.row_sum[row])

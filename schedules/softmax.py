"""Scores, masks and the online softmax on accumulator fragments: once for every GPU.

The online softmax is that of FlashAttention (Dao et al., 2022), with the lazy rescale of FlashAttention-4: a row keeps
an older maximum as its reference as long as no score exceeds it by more than ``LAZY`` powers of two.

Everything exponential is in powers of two.  Where the definition only scales the score, ``S`` keeps raw products and
the scale folds into the exponent's one multiply-add, ``exp2(S * scale - offset)``; otherwise ``S`` holds scores times
log2(e) and ``scale`` is 1.
"""

from __future__ import annotations

import math
import operator

import tvm_ffi
from tvm.ir import Call, Expr
from tvm.script import tirx as T

from schedules.fragment import Fragment
from schedules.geometry import constant
from schedules.pattern import Pattern, Site

LOG2_E = math.log2(math.e)
LN_2 = math.log(2)
NEGATIVE_INFINITY = -math.inf

#: Powers of two by which a score may exceed its row's reference; 2^8 leaves P and the row sum far from overflow.
LAZY = 8.0

#: |reference * scale| from which ``S * scale - offset`` would lose too much: offset is rounded to 2^-24 of itself, so
#: that 1024 bounds the error of P to 2^-14.  Beyond it the reference is subtracted before the scale is applied.
LARGE_OFFSET = 1024.0

#: The reference of a row that has seen nothing: finite, so that nothing becomes inf − inf.  Scores below it count as
#: hidden; 16-bit floats reach it only by products of numbers beyond 1e14.
LOWEST = -1e30

_ALL_LANES = 0xFFFFFFFF


def accurate_tanh(x: Expr) -> Expr:
    """tanh to about 1e-7 absolute; --use_fast_math would make it tanh.approx, which is good to 5e-4 only."""
    return T.float32(1) - T.float32(2) / (T.exp2(x * T.float32(2 * LOG2_E)) + T.float32(1))


def _with_accurate_tanh(expr: Expr) -> Expr:
    def replace(node):
        if isinstance(node, Call) and getattr(node.op, "name", "").endswith("tanh"):
            return accurate_tanh(node.args[0])
        return node

    return tvm_ffi.structural_map(expr, replace, order="post")


def from_lane(value: Expr, mask: int) -> Expr:
    """``value`` of the lane whose number differs in the bits of ``mask``."""
    return T.cuda.__shfl_xor_sync(T.uint32(_ALL_LANES), value, mask, 32)


@T.meta_class
class OnlineSoftmax:
    """The softmax state of the rows that one lane shares in: ``2 * m_tiles`` rows of ``columns`` columns a step.

    A step is ``modify``, ``track``, ``settle``, ``exponentials`` of all groups, and ``rescale`` of the output if
    ``grown`` isn't 0, at any time after ``track`` and before products of this step are added.
    """

    def __init__(self, pattern: Pattern, at: Site, fragment: Fragment, m_tiles: int, columns: int):
        self.pattern, self.at, self.fragment = pattern, at, fragment
        self.m_tiles, self.groups = m_tiles, columns // fragment.group
        self.stride = fragment.registers(columns)
        self.folded = pattern.is_scale_only
        rows = 2 * m_tiles
        self.row_max = T.alloc_local([rows], "float32")  # the reference: a maximum of this row's scores so far
        self.row_sum = T.alloc_local([rows], "float32")  # of this lane's columns; complete after ``finish``
        self.correction = T.alloc_local([rows], "float32")  # factor for what was summed before, valid if ``grown``
        self.peak = T.alloc_local([rows], "float32")
        self.scale = T.local_scalar("float32")
        self.grown = T.local_scalar("int32")
        self.large = T.local_scalar("int32")

    def position(self, row0: Expr, column0: Expr, t, g, r, e) -> tuple[Expr, Expr]:
        """Row and column of a register, from those of this lane's first one."""
        f = self.fragment
        return row0 + (t * f.tile_rows + r * f.row_step), column0 + (g * f.group + e)

    def modified(self, s: Expr, i: Expr, j: Expr) -> Expr:
        """The modified score in powers of two."""
        return _with_accurate_tanh(self.pattern.score(self.at, s, i, j)) * T.float32(LOG2_E)

    def offset(self, row) -> Expr:
        """What a row's scaled scores are lowered by; ``settle`` has subtracted a large reference already."""
        reference = self.row_max[row] * self.scale
        return T.Select(self.large != 0, T.float32(0), reference) if self.folded else reference

    def reduce_rows(self, values, combine):
        """Combine each row's value over the lanes that share the row."""
        for i in range(2 * self.m_tiles):
            for lanes in self.fragment.row_lanes:
                other = from_lane(values[i], lanes)
                T.buffer_store(values, combine(values[i], other), [i])

    @T.inline
    def reset(self):
        """Before the first tile of a row tile."""
        if self.folded:
            self.scale = self.at.softmax_scale * T.float32(LOG2_E)
        else:
            self.scale = T.float32(1)
        self.large = 0
        for i in T.unroll(2 * self.m_tiles):
            self.row_max[i] = T.float32(LOWEST)
            self.row_sum[i] = T.float32(0)

    @T.inline
    def modify(self, S, row0, column0, masked):
        """Raw products to scores, −inf where the mask hides them; ``row0``, ``column0`` are this lane's first ones."""
        if not self.folded:
            for t in T.unroll(self.m_tiles):
                for g in T.unroll(self.groups):
                    for r in T.unroll(2):
                        for e in T.unroll(2):
                            at = T.meta_var(self.position(row0, column0, t, g, r, e))
                            i = T.meta_var(t * self.stride + g * 4 + r * 2 + e)
                            S[i] = self.modified(S[i], at[0], at[1])
        if masked:
            if self.pattern.is_interval:
                self._mask_interval(S, row0, column0)
            else:
                self._mask_elements(S, row0, column0)

    @T.inline
    def _mask_interval(self, S, row0, column0):
        # the visible keys of a row are an interval: two comparisons of a constant with a register, or one
        for t in T.unroll(self.m_tiles):
            for r in T.unroll(2):
                row = T.meta_var(self.position(row0, column0, t, 0, r, 0)[0])
                keys = T.meta_var(self.pattern.visible_range(self.at, row, row))
                end: T.int32 = keys[1] - column0
                begin: T.int32 = keys[0] - column0
                for g in T.unroll(self.groups):
                    for e in T.unroll(2):
                        i = T.meta_var(t * self.stride + g * 4 + r * 2 + e)
                        column = T.meta_var(g * self.fragment.group + e)
                        if constant(keys[0]) == 0:
                            S[i] = T.Select(column < end, S[i], T.float32(NEGATIVE_INFINITY))
                        else:
                            S[i] = T.Select(T.And(column < end, column >= begin), S[i], T.float32(NEGATIVE_INFINITY))

    @T.inline
    def _mask_elements(self, S, row0, column0):
        for t in T.unroll(self.m_tiles):
            for g in T.unroll(self.groups):
                for r in T.unroll(2):
                    for e in T.unroll(2):
                        at = T.meta_var(self.position(row0, column0, t, g, r, e))
                        i = T.meta_var(t * self.stride + g * 4 + r * 2 + e)
                        S[i] = T.Select(self.pattern.mask(self.at, at[0], at[1]), S[i], T.float32(NEGATIVE_INFINITY))

    @T.inline
    def local_max(self, S, peak):
        """The largest score of this lane in each of its rows."""
        for t in T.unroll(self.m_tiles):
            for r in T.unroll(2):
                first = T.meta_var(t * self.stride + r * 2)
                peak[t * 2 + r] = T.max(S[first], S[first + 1])
                for g in T.unroll(1, self.groups):
                    peak[t * 2 + r] = T.max(peak[t * 2 + r], S[first + g * 4])
                    peak[t * 2 + r] = T.max(peak[t * 2 + r], S[first + g * 4 + 1])

    @T.inline
    def track(self, S):
        """Move the references if some row of the warp outgrew its own; sets ``grown`` and ``correction``."""
        self.local_max(S, self.peak)
        self.grown = 0
        for i in T.unroll(2 * self.m_tiles):
            excess = T.meta_var((self.peak[i] - self.row_max[i]) * self.scale)
            self.grown = T.bitwise_or(self.grown, T.Cast("int32", excess > T.float32(LAZY)))
        self.grown = T.cuda.any_sync(T.uint32(_ALL_LANES), self.grown)
        if self.grown != 0:
            self.advance(self.peak)

    @T.inline
    def advance(self, peak):
        """New references from the lanes' own maxima; the sum follows here, the output by ``rescale``."""
        self.reduce_rows(peak, T.max)
        for i in T.unroll(2 * self.m_tiles):
            peak[i] = T.max(peak[i], self.row_max[i])
            self.correction[i] = self.row_max[i]
            self.row_max[i] = peak[i]
            self.correction[i] = T.exp2((self.correction[i] - self.row_max[i]) * self.scale)
            self.row_sum[i] = self.row_sum[i] * self.correction[i]
        if self.folded:
            self.large = 0
            for i in T.unroll(2 * self.m_tiles):
                far = T.meta_var(T.abs(self.row_max[i] * self.scale) > T.float32(LARGE_OFFSET))
                seen = T.meta_var(self.row_max[i] != T.float32(LOWEST))
                self.large = T.bitwise_or(self.large, T.Cast("int32", T.And(far, seen)))
            self.large = T.cuda.any_sync(T.uint32(_ALL_LANES), self.large)

    @T.inline
    def settle(self, S):
        """Subtract large references from the scores themselves; after ``track``, before ``exponentials``."""
        if self.folded:
            self._subtract_large(S)

    @T.inline
    def _subtract_large(self, S):
        if self.large != 0:
            for t in T.unroll(self.m_tiles):
                for g in T.unroll(self.groups):
                    for r in T.unroll(2):
                        for e in T.unroll(2):
                            i = T.meta_var(t * self.stride + g * 4 + r * 2 + e)
                            S[i] = S[i] - self.row_max[t * 2 + r]

    @T.inline
    def exponentials(self, S, first, count):
        """Scores of ``count`` groups from ``first`` to probabilities relative to the references, and sum them."""
        for t in T.unroll(self.m_tiles):
            for g in T.unroll(count):
                for r in T.unroll(2):
                    for e in T.unroll(2):
                        i = T.meta_var(t * self.stride + (first + g) * 4 + r * 2 + e)
                        S[i] = T.exp2(S[i] * self.scale - self.offset(t * 2 + r))
                        self.row_sum[t * 2 + r] = self.row_sum[t * 2 + r] + S[i]

    @T.inline
    def rescale(self, O, stride):
        """What was accumulated before, relative to the new references; ``stride`` registers an m-tile."""
        for t in T.unroll(self.m_tiles):
            for g in T.unroll(stride // 4):
                for r in T.unroll(2):
                    for e in T.unroll(2):
                        i = T.meta_var(t * stride + g * 4 + r * 2 + e)
                        O[i] = O[i] * self.correction[t * 2 + r]

    @T.inline
    def finish(self):
        """Complete the row sums; after the last tile."""
        self.reduce_rows(self.row_sum, operator.add)

    def lse(self, row) -> Expr:
        """Natural logarithm of the sum of exponentials of a finished row; −inf if it saw nothing."""
        return self.row_max[row] * (self.scale * T.float32(LN_2)) + T.log(self.row_sum[row])

    def inverse(self, row) -> Expr:
        """1 / row sum of a finished row; 0 if it saw nothing."""
        return T.Select(self.row_sum[row] == T.float32(0), T.float32(0), T.float32(1) / self.row_sum[row])

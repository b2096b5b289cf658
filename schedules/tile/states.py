"""Partial results that are folded from left to right: by the block that computes them, or by another launch.

What the rows of a range of keys leave is a *state*: the output relative to the row's reference, which isn't divided by
the row sum, that sum, and the reference (:mod:`schedules.tile.softmax`).  :class:`Fold` puts the state of the keys that
follow to the one of those before.  Both who may do so, the block that has computed several ranges one after the other
and the launch that finds their states in memory, take the ranges in the order of the keys and compute the same
expressions, so that it makes no difference to a row's bits which of them it was.

References are whole numbers: what is multiplied here are powers of two, and rounded is one addition for each range.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.tile.score import LN_2

_FUSED = "__forceinline__ __device__ float fused(float x, float y, float z) { return fmaf(x, y, z); }\n"


def _fused(x: Expr, y: Expr, z: Expr) -> Expr:
    """``x * y + z``, rounded once: what of such an expression is contracted isn't left to the compiler."""
    return T.cuda.func_call("fused", x, y, z, source_code=_FUSED, return_type="float32")


@T.meta_class
class PartialStates:
    """States of the rows for each part of the keys: ``o (rows, parts, columns)``, and reference and sum in
    ``sums (rows, parts, 2)``, float32.

    ``rows`` are those of the whole output in the order (batch, heads, seqlen_q).  A sum of 0 says that a row sees
    nothing of a part, and then its ``o`` may be anything.  Made before ``T.device_entry()`` of the handles of the two.
    """

    def __init__(self, handles, columns: int):
        o, sums = handles
        self.rows, self.parts = tirx.Var("partial_rows", "int32"), tirx.Var("parts", "int32")
        self.columns = columns
        self.o = T.match_buffer(o, (self.rows, self.parts, columns), "float32", align=16)
        self.sums = T.match_buffer(sums, (self.rows, self.parts, 2), "float32", align=8)


@T.meta_class
class Fold:
    """How the states of ``rows`` rows are put to those before: factors, used for all columns of a row."""

    def __init__(self, rows: int):
        self.rows = rows
        self.before, self.after = (T.alloc_local([rows], "float32") for _ in range(2))  # factors
        self.had, self.has = (T.alloc_local([rows], "int32") for _ in range(2))  # whether there was, is anything seen

    @T.inline
    def begin(self, peak, total, following_peak, following_total):
        """Factors of rows with references ``peak`` and sums ``total``, which become those of both states together."""
        for i in T.unroll(self.rows):
            self.had[i] = T.Cast("int32", total[i] != T.float32(0))
            self.has[i] = T.Cast("int32", following_total[i] != T.float32(0))
            higher: T.float32 = T.max(peak[i], following_peak[i])
            self.before[i] = T.exp2(peak[i] - higher)
            self.after[i] = T.exp2(following_peak[i] - higher)
            peak[i] = higher
            total[i] = _fused(total[i], self.before[i], following_total[i] * self.after[i])

    def folded(self, i: int, value: Expr, following: Expr) -> Expr:
        """An output of both, from the two of row ``i``; where a row has seen nothing its output may be anything."""
        both = _fused(value, self.before[i], following * self.after[i])
        return T.Select(self.has[i] == 0, value, T.Select(self.had[i] == 0, following, both))


def log_sum_exp(peak: Expr, total: Expr) -> Expr:
    """Natural logarithm of the sum of exponentials of a row; −inf if it saw nothing."""
    return (peak + T.log2(total)) * T.float32(LN_2)


def inverse(total: Expr) -> Expr:
    """1 / sum of a row; 0 if it saw nothing."""
    return T.Select(total == T.float32(0), T.float32(0), T.float32(1) / total)

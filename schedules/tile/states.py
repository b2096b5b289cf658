"""Partial results that are folded from left to right: by the block that computes them, or by another launch.

What the rows of a range of keys leave is a *state*: the output relative to the row's reference, which isn't divided by
the row sum, that sum, and the reference (:mod:`schedules.tile.softmax`).  The state of the keys that follow is put to
the one of those before: both are multiplied by the powers of two that their references, which are whole numbers, differ
by from the higher one, and added.  Both who may do so, the block that has computed several ranges one after the other
and the launch that finds their states in memory, take the ranges in the order of the keys and compute the same
expressions, from :data:`NOTHING` on, so that it makes no difference to a row's bits which of them it was.

The factors of all states of a row follow from their references alone and are computed beside each other; what is left
to do one after the other is an addition for each range.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.tile.score import LN_2, LOG2_E
from schedules.tile.softmax import LOWEST

_FUSED = "__forceinline__ __device__ float fused(float x, float y, float z) { return fmaf(x, y, z); }\n"


def _fused(x: Expr, y: Expr, z: Expr) -> Expr:
    """``x * y + z``, rounded once: what of such an expression is contracted isn't left to the compiler."""
    return T.cuda.func_call("fused", x, y, z, source_code=_FUSED, return_type="float32")


@T.meta_class
class PartialStates:
    """States of the rows for each split of the keys: ``o (rows, splits, columns)``, and reference and sum in
    ``sums (rows, splits, 2)``, float32.

    ``rows`` are those of the whole output in the order (batch, heads, seqlen_q).  A sum of 0 says that a row sees
    nothing of a split, and then its ``o`` may be anything.  ``counters (rows)``, int32, are zeros at first: at that of
    its first row a row tile's blocks arrive (:mod:`schedules.tile.arrivals`).  Made before ``T.device_entry()`` of the
    three handles.
    """

    def __init__(self, handles, columns: int):
        o, sums, counters = handles
        self.rows, self.splits = tirx.Var("partial_rows", "int32"), tirx.Var("splits", "int32")
        self.columns = columns
        self.o = T.match_buffer(o, (self.rows, self.splits, columns), "float32", align=16)
        self.sums = T.match_buffer(sums, (self.rows, self.splits, 2), "float32", align=8)
        self.counters = T.match_buffer(counters, (self.rows,), "int32", align=4)


#: What outputs and sums are folded to: anything added to it stays as it is, a negative zero too.
NOTHING = -0.0

#: The factor of a state of keys of which nothing is seen.
UNSEEN = -1.0


def reference(peak: Expr, total: Expr) -> Expr:
    """The reference of a state, or the lowest of all if nothing is seen."""
    return T.Select(total == T.float32(0), T.float32(LOWEST), peak)


def factors(before: Expr, highest: Expr, peak: Expr, total: Expr) -> tuple[Expr, Expr]:
    """What the states up to one and this one are multiplied by when it is put to them.

    Parameters
    ----------
    before, highest: the highest reference of the states before it, and with it.
    peak, total: its own reference and sum.
    """
    own = T.Select(total == T.float32(0), T.float32(UNSEEN), T.exp2(peak - highest))
    return T.exp2(before - highest), own


def folded(value: Expr, before: Expr, own: Expr, following: Expr) -> Expr:
    """An output or a sum of the states before and of the one that follows, with their :func:`factors`.

    Of a state of which nothing is seen the output may be anything.
    """
    return _fused(value, before, T.Select(own < T.float32(0), T.float32(0), following * own))


def finish(peak: Expr, total: Expr, sink: Expr | None = None) -> tuple[Expr, Expr]:
    """The end of a row with a reference and a sum, perhaps with the logit of a sink beside its keys: what its output is
    multiplied by, 0 if nothing is seen, and its log-sum-exp, −inf if nothing is seen."""
    scale = T.float32(1)
    if sink is not None:
        logit = sink * T.float32(LOG2_E)
        top = T.max(peak, logit)
        scale = T.exp2(peak - top)
        peak, total = top, _fused(total, scale, T.exp2(logit - top))
    factor = T.Select(total == T.float32(0), T.float32(0), scale / total)
    return factor, (peak + T.log2(total)) * T.float32(LN_2)

"""The steps between the two products of a row group with a kv tile, as TIR macros: score, mask, online softmax.

Buffers of a work item (float32; ``M`` query rows, ``N`` keys of a tile, ``G`` queries of a group):

=========== ========== =====================================================
buffer      shape      holds
=========== ========== =====================================================
ST          (N, G)     raw product, then score, then probability of a group
OT          (E, M)     output before the division by ``row_sum``
row_max     (M,)       largest score so far, in units of ``scale``
row_sum     (M,)       sum of probabilities so far
correction  (G,)       what a tile scales a group's earlier results with
=========== ========== =====================================================
"""

from __future__ import annotations

from types import SimpleNamespace

from tvm.script import tirx as T

from schedules.families.cpu.config import Config
from schedules.families.cpu.vector_math import exp2
from schedules.tile.score import NEGATIVE_INFINITY


def f32(x):
    """``x`` as float32."""
    return T.cast(x, "float32")


def make_steps(config: Config, lanes: int) -> SimpleNamespace:
    """The macros for one configuration and vector width, by name."""
    V = config.row_vectors

    @T.inline
    def apply_to_elements(ST, score, site, first, key0, keys, chosen):
        for j in T.serial(keys):
            for n in T.unroll(V):
                for lane in T.vectorized(lanes):
                    ST[j, n * lanes + lane] = score(
                        site, ST[j, n * lanes + lane], first + n * lanes + lane, key0 + j, chosen
                    )

    @T.inline
    def apply_score(ST, pattern, score, site, first, key0, keys):
        """``ST[j, i] = score(site, ST[j, i], first + i, key0 + j)``."""
        if pattern.has_choice:
            if pattern.choice(site):  # asked once, not for every score
                apply_to_elements(ST, score, site, first, key0, keys, True)
            else:
                apply_to_elements(ST, score, site, first, key0, keys, False)
        else:
            apply_to_elements(ST, score, site, first, key0, keys, None)

    @T.inline
    def online_softmax(ST, row_max, row_sum, correction, highest, total, column, keys, scale):
        """Probabilities of the tile into ``ST``; ``row_max``, ``row_sum`` and ``correction`` follow.

        The exponent is ``(score - highest) * scale``, in that order: it is exactly 0 for the largest score and for a
        maximum that stays, and no rounding of ``highest * scale`` (5e-4 at a score of 1e4) comes in.  A row that has
        seen nothing has the maximum −inf and subtracts 0 instead, which gives it probabilities of exactly 0.
        """
        for n in T.unroll(V):
            for lane in T.vectorized(lanes):
                highest[n * lanes + lane] = row_max[column + n * lanes + lane]
                total[n * lanes + lane] = T.float32(0)
        for j in T.serial(keys):
            for n in T.unroll(V):
                for lane in T.vectorized(lanes):
                    highest[n * lanes + lane] = T.max(highest[n * lanes + lane], ST[j, n * lanes + lane])
        for n in T.unroll(V):
            for lane in T.vectorized(lanes):
                correction[n * lanes + lane] = row_max[column + n * lanes + lane]
                row_max[column + n * lanes + lane] = highest[n * lanes + lane]
                highest[n * lanes + lane] = finite_or_zero(highest[n * lanes + lane])
                correction[n * lanes + lane] = exp2((correction[n * lanes + lane] - highest[n * lanes + lane]) * scale)
        for j in T.serial(keys):
            for n in T.unroll(V):
                for lane in T.vectorized(lanes):
                    ST[j, n * lanes + lane] = exp2((ST[j, n * lanes + lane] - highest[n * lanes + lane]) * scale)
                    total[n * lanes + lane] += ST[j, n * lanes + lane]
        for n in T.unroll(V):
            for lane in T.vectorized(lanes):
                row_sum[column + n * lanes + lane] = (
                    row_sum[column + n * lanes + lane] * correction[n * lanes + lane] + total[n * lanes + lane]
                )

    return SimpleNamespace(apply_score=apply_score, online_softmax=online_softmax)


def finite_or_zero(x):
    """0 in place of −inf."""
    return T.Select(x == T.float32(NEGATIVE_INFINITY), T.float32(0), x)


def accumulate(acc, p, v):
    """One multiply-add of the second product."""
    return acc + p * v


def accumulate_visible(acc, p, v):
    """The same in a masked tile: a masked key leaves the row alone, even where its value is inf or NaN."""
    return T.Select(p == T.float32(0), acc, acc + p * v)

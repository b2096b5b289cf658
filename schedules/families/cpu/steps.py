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

from collections.abc import Callable
from types import SimpleNamespace

from tvm.script import tirx as T

from schedules.families.cpu.config import Config
from schedules.families.cpu.vector_math import exp2
from schedules.tile.score import NEGATIVE_INFINITY

#: So many maxima of a row are taken side by side, since each waits for the one before.
_CHAINS = 4


def f32(x):
    """``x`` as float32."""
    return T.cast(x, "float32")


def maxima_shape(config: Config, lanes: int) -> tuple[int]:
    """The shape of ``highest``, which :func:`make_steps`'s online softmax works in."""
    return (_CHAINS * config.row_vectors * lanes,)


def make_steps(config: Config, lanes: int, keep_awake: Callable, rows: int) -> SimpleNamespace:
    """The macros for one configuration and vector width, by name.

    ``keep_awake`` is a macro that is called before each ``rows`` rows of exponentials.
    """
    V = config.row_vectors
    G = V * lanes

    def at_element(staged, look, site, j, lane):
        """The call at an element, and what is known of the mask there."""
        return staged.site(site, lane, j), {} if look is None else look.seen(j * V * lanes + lane)

    @T.inline
    def apply_to_elements(ST, score, site, first, key0, keys, chosen, staged, look):
        for j in T.serial(keys):
            for n in T.unroll(V):
                for lane in T.vectorized(lanes):
                    known = T.meta_var(at_element(staged, look, site, j, n * lanes + lane))
                    ST[j, n * lanes + lane] = score(
                        known[0],
                        ST[j, n * lanes + lane],
                        first + n * lanes + lane,
                        key0 + j,
                        chosen,
                        **known[1],
                    )

    @T.inline
    def apply_score(ST, pattern, score, site, first, key0, keys, staged, look):
        """``ST[j, i] = score(site, ST[j, i], first + i, key0 + j)``, with the parameters that are ``staged``, and what
        a ``look`` at the mask has found, unless that is None."""
        if pattern.has_choice:
            if pattern.choice(site):  # asked once, not for every score
                apply_to_elements(ST, score, site, first, key0, keys, True, staged, look)
            else:
                apply_to_elements(ST, score, site, first, key0, keys, False, staged, look)
        else:
            apply_to_elements(ST, score, site, first, key0, keys, None, staged, look)

    @T.inline
    def online_softmax(ST, row_max, row_sum, correction, highest, total, column, keys, scale):
        """Probabilities of the tile into ``ST``; ``row_max``, ``row_sum`` and ``correction`` follow.

        The exponent is ``(score - highest) * scale``, in that order: it is exactly 0 for the largest score and for a
        maximum that stays, and no rounding of ``highest * scale`` (5e-4 at a score of 1e4) comes in.  A row that has
        seen nothing has the maximum −inf and subtracts 0 instead, which gives it probabilities of exactly 0.
        """
        for n in T.unroll(V):
            for lane in T.vectorized(lanes):
                total[n * lanes + lane] = T.float32(0)
                for chain in T.unroll(_CHAINS):
                    highest[chain * G + n * lanes + lane] = row_max[column + n * lanes + lane]
        for step in T.serial(keys // _CHAINS):
            for chain in T.unroll(_CHAINS):
                for n in T.unroll(V):
                    for lane in T.vectorized(lanes):
                        highest[chain * G + n * lanes + lane] = T.max(
                            highest[chain * G + n * lanes + lane], ST[step * _CHAINS + chain, n * lanes + lane]
                        )
        for j in T.serial(keys // _CHAINS * _CHAINS, keys):
            for n in T.unroll(V):
                for lane in T.vectorized(lanes):
                    highest[n * lanes + lane] = T.max(highest[n * lanes + lane], ST[j, n * lanes + lane])
        for chain in T.unroll(1, _CHAINS):
            for n in T.unroll(V):
                for lane in T.vectorized(lanes):
                    highest[n * lanes + lane] = T.max(highest[n * lanes + lane], highest[chain * G + n * lanes + lane])
        for n in T.unroll(V):
            for lane in T.vectorized(lanes):
                correction[n * lanes + lane] = row_max[column + n * lanes + lane]
                row_max[column + n * lanes + lane] = highest[n * lanes + lane]
                highest[n * lanes + lane] = finite_or_zero(highest[n * lanes + lane])
                correction[n * lanes + lane] = exp2(correction[n * lanes + lane] - highest[n * lanes + lane], scale)
        for part in T.serial((keys + (rows - 1)) // rows):
            keep_awake()
            for j in T.serial(part * rows, T.min(keys, (part + 1) * rows)):
                for n in T.unroll(V):
                    for lane in T.vectorized(lanes):
                        ST[j, n * lanes + lane] = exp2(ST[j, n * lanes + lane] - highest[n * lanes + lane], scale)
                        total[n * lanes + lane] += ST[j, n * lanes + lane]
        for n in T.unroll(V):
            for lane in T.vectorized(lanes):
                row_sum[column + n * lanes + lane] = (
                    row_sum[column + n * lanes + lane] * correction[n * lanes + lane] + total[n * lanes + lane]
                )

    def look_at(look, P, site, b, h, first, last, key0, keys):
        """See what a tile has to see."""
        look.staged.fill(P, b, h, first, last + 1 - first, key0, keys)
        look.begin()
        with T.serial(keys) as j:
            look.row(
                j * V * lanes,
                V,
                lambda x: P.pattern.mask(look.staged.site(site, x, j), first + x, key0 + j),
            )

    return SimpleNamespace(apply_score=apply_score, online_softmax=online_softmax, look_at=look_at)


def finite_or_zero(x):
    """0 in place of −inf."""
    return T.Select(x == T.float32(NEGATIVE_INFINITY), T.float32(0), x)


def accumulate(acc, p, v):
    """One multiply-add of the second product."""
    return acc + p * v


def accumulate_visible(acc, p, v):
    """The same in a masked tile: a masked key leaves the row alone, even where its value is inf or NaN."""
    return T.Select(p == T.float32(0), acc, acc + p * v)

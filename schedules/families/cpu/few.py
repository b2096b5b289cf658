"""Few queries (decoding) of one query head by itself: vector lanes over head_dim and keys, long sequences in parts.

This is for query heads with whom no other row reads keys, and for parameters that differ from key to key; the others
are computed together (``decode``).  With one query, lanes over queries would be empty.  Here a score is a dot product
along head_dim, the scores of a tile fill vectors, and the output is accumulated along head_dim_v.  A work item is one
part of the keys of one head, for all (at most ``FEW``) queries; it leaves its unnormalised output, maximum and sum in a
workspace, and the parts are put together afterwards.  Where parts begin depends on the keys alone: a sequence has the
same bits with any number of threads, and whatever else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from schedules.families.cpu.ahead import elements_of_line, fetch
from schedules.families.cpu.geometry import Geometry
from schedules.families.cpu.places import Staged
from schedules.families.cpu.steps import f32, finite_or_zero
from schedules.families.cpu.vector_math import exp2
from schedules.tile.score import NEGATIVE_INFINITY

#: The most queries for which this is the faster way.  On a Zen 4 core (8 heads, 2048 keys, head_dim 64) a query took
#: 0.15 ms here and any row group of 32 queries 1.5 ms; at head_dim 128 it was 0.37 ms and 3.4 to 4.5 ms.
FEW = 8
#: Elements along head_dim in a vector: what every head_dim is a multiple of.
_W = 8
#: Keys whose dot products are computed together.
_R = 8
#: Keys of a tile at least: with tiles of 32, a query of 32 heads with 4096 keys took 1.2 (causal) to 1.8 times as long.
_TILE = 64
#: The keys of a head are split into parts of at least so many keys.
PART_KEYS = 1024


class Split(Protocol):
    """How keys are split into parts."""

    def count(self, geometry: Geometry) -> Expr:
        """How many parts there are."""

    def tiles(self, size: int, first: Expr, tiles: Expr, p: Expr, count: Expr) -> tuple[Expr, Expr]:
        """Where a part's tiles of ``size`` keys begin and end, of the ``tiles`` from ``first`` on that are visible."""

    def weights(self, maxima: tirx.Buffer) -> tirx.Buffer:
        """Where the weights of a row's parts are put; ``maxima`` are no longer needed."""

    def weight(self, row: Expr, p: Expr) -> Expr:
        """The place of that of a part, ``row`` being the part's row among all."""


@dataclass(frozen=True)
class EqualParts:
    """The visible tiles in parts of the same size, of which there are at most so many."""

    most: int = 32

    def count(self, geometry: Geometry) -> Expr:
        return T.max(T.min(T.int64(self.most), geometry.seqlen_kv // PART_KEYS), T.int64(1))

    def tiles(self, size: int, first: Expr, tiles: Expr, p: Expr, count: Expr) -> tuple[Expr, Expr]:
        return first + tiles * p // count, first + tiles * (p + 1) // count

    def weights(self, maxima: tirx.Buffer) -> tirx.Buffer:
        weights = T.sblock_alloc_buffer((self.most,), "float32", scope="local")
        IRBuilder.name("weights", weights)
        return weights

    def weight(self, row: Expr, p: Expr) -> Expr:
        return p


@dataclass(frozen=True)
class FixedParts:
    """A part at each multiple of ``PART_KEYS`` keys.

    Keys that a query doesn't see change no bit of its result, so that it has the same bits however many follow: a token
    that is decoded alone, and among the few of a chunk.
    """

    def count(self, geometry: Geometry) -> Expr:
        return T.max((geometry.seqlen_kv + (PART_KEYS - 1)) // PART_KEYS, T.int64(1))

    def tiles(self, size: int, first: Expr, tiles: Expr, p: Expr, count: Expr) -> tuple[Expr, Expr]:
        begin = T.max(first, p * (PART_KEYS // size))
        return begin, T.max(T.min(first + tiles, (p + 1) * (PART_KEYS // size)), begin)

    def weights(self, maxima: tirx.Buffer) -> tirx.Buffer:
        return maxima

    def weight(self, row: Expr, p: Expr) -> Expr:
        return row


def few_queries_macros(block_n: int, lanes: int, dtype: str, head_dim: int, head_dim_v: int, split: Split):
    """Macros ``part(geometry, workspace, b, h, p, count)`` and ``join(geometry, workspace, b, h, count)``.

    ``workspace`` is ``(outputs, maxima, sums)``, flat buffers over (batch, heads, part, query[, head_dim_v]).
    """
    N = max(block_n, _TILE)
    chunks = N // lanes

    @T.inline
    def prefetch(row, width):
        """Ask for the cache lines of a row of a buffer."""
        size = T.meta_var(elements_of_line(row[0]))
        for line in T.serial((width + (size - 1)) // size):
            fetch(row[0], row[1] + line * size)

    @T.inline
    def dot_products(P: Geometry, QF, S, acc, row, i, k_base, v_base, key0, keys):
        """``S[j] = q_i · k_j`` for the keys of a tile, rounded up to ``_R``; their values are fetched meanwhile."""
        for block in T.serial((keys + (_R - 1)) // _R):
            for r in T.unroll(_R):
                row[r] = P.k.of_key(k_base, T.min(key0 + block * _R + r, P.seqlen_kv - 1))
                prefetch(P.v.in_memory(v_base, key0 + block * _R + r), P.head_dim_v)
                for lane in T.vectorized(_W):
                    acc[r * _W + lane] = T.float32(0)
            for d in T.serial(P.head_dim // _W):
                for r in T.unroll(_R):
                    for lane in T.vectorized(_W):
                        acc[r * _W + lane] += QF[i, d * _W + lane] * f32(P.k.flat[row[r] + d * _W + lane])
            for r in T.unroll(_R):
                for lane in T.vectorized(4):
                    acc[r * _W + lane] += acc[r * _W + 4 + lane]
                S[block * _R + r] = (acc[r * _W] + acc[r * _W + 2]) + (acc[r * _W + 1] + acc[r * _W + 3])

    @T.inline
    def apply_to_elements(S, score, site, i, key0, chosen, staged):
        for c in T.unroll(chunks):
            for lane in T.vectorized(lanes):
                S[c * lanes + lane] = score(
                    staged.site(site, c * lanes + lane), S[c * lanes + lane], i, key0 + c * lanes + lane, chosen
                )

    @T.inline
    def apply_score(S, pattern, score, site, i, key0, staged):
        if pattern.has_choice:
            if pattern.choice(site):  # asked once, not for every score
                apply_to_elements(S, score, site, i, key0, True, staged)
            else:
                apply_to_elements(S, score, site, i, key0, False, staged)
        else:
            apply_to_elements(S, score, site, i, key0, None, staged)

    @T.inline
    def softmax(S, lanewise, maxima, sums, factor, r, scale):
        """Probabilities of a tile into ``S``; the row's maximum and sum follow, and what its output is scaled with."""
        for lane in T.vectorized(lanes):
            lanewise[lane] = S[lane]
        for c in T.unroll(1, chunks):
            for lane in T.vectorized(lanes):
                lanewise[lane] = T.max(lanewise[lane], S[c * lanes + lane])
        highest: T.float32 = maxima[r]
        for lane in T.unroll(lanes):
            highest = T.max(highest, lanewise[lane])
        subtract: T.float32 = finite_or_zero(highest)
        correction: T.float32 = exp2((maxima[r] - subtract) * scale)
        maxima[r] = highest
        for lane in T.vectorized(lanes):
            lanewise[lane] = T.float32(0)
        for c in T.unroll(chunks):
            for lane in T.vectorized(lanes):
                S[c * lanes + lane] = exp2((S[c * lanes + lane] - subtract) * scale)
                lanewise[lane] += S[c * lanes + lane]
        total: T.float32 = lanewise[0]
        for lane in T.unroll(1, lanes):
            total += lanewise[lane]
        sums[r] = sums[r] * correction + total
        factor[0] = correction

    @T.inline
    def accumulate(P: Geometry, S, tile_output, factor, output, k_base, v_base, key0, keys):
        """Add the values of keys that have a probability: a masked one does nothing, whatever its value.

        A tile is summed by itself first: a chain of N additions and one of tiles, not one of all keys of the part.
        """
        for e in T.serial(P.head_dim_v // _W):
            for lane in T.vectorized(_W):
                tile_output[e * _W + lane] = T.float32(0)
        for j in T.serial(keys):
            prefetch(P.k.in_memory(k_base, key0 + N + j), P.head_dim)
            if S[j] != T.float32(0):
                v_row: T.int64 = P.v.of_key(v_base, key0 + j)
                for e in T.serial(P.head_dim_v // _W):
                    for lane in T.vectorized(_W):
                        tile_output[e * _W + lane] += S[j] * f32(P.v.flat[v_row + e * _W + lane])
        for e in T.serial(P.head_dim_v // _W):
            for lane in T.vectorized(_W):
                output[0][output[1] + e * _W + lane] = (
                    output[0][output[1] + e * _W + lane] * factor[0] + tile_output[e * _W + lane]
                )

    @T.inline
    def part(P: Geometry, workspace, b, h, p, count):
        outputs, maxima, sums = workspace
        QF = T.sblock_alloc_buffer((FEW, head_dim), "float32")
        S = T.sblock_alloc_buffer((N,), "float32", scope="local")
        acc = T.sblock_alloc_buffer((_R * _W,), "float32", scope="local")
        lanewise = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
        tile_output = T.sblock_alloc_buffer((head_dim_v,), "float32", scope="local")
        factor = T.sblock_alloc_buffer((1,), "float32", scope="local")
        row = T.sblock_alloc_buffer((_R,), "int64", scope="local")
        staged = T.meta_var(Staged(P.pattern.params, "j", lanes, N))
        k_base: T.int64 = P.key_rows(b, h).offset(T.int64(0), T.int64(0))
        v_base: T.int64 = P.value_rows(b, h).offset(T.int64(0), T.int64(0))
        r0: T.int64 = P.part_row(b, h, p, count)
        scale: T.float32 = P.exponent_scale()
        site = T.meta_var(P.site(b, h))

        # 1. Queries as float32, and empty results.
        for i in T.serial(P.seqlen_q):
            q_row: T.int64 = P.q.row(b, h, i)
            for d in T.serial(P.head_dim):
                QF[i, d] = f32(P.q.flat[q_row + d])
            maxima[r0 + i] = T.float32(NEGATIVE_INFINITY)
            sums[r0 + i] = T.float32(0)
            for e in T.serial(P.head_dim_v):
                outputs[(r0 + i) * P.head_dim_v + e] = T.float32(0)

        # 2. This part's share of the kv tiles in which some row may see something.
        visible = T.meta_var(P.pattern.keys_of(site, T.int64(0), P.seqlen_q - 1).visible)
        first_tile: T.int64 = visible[0] // N
        tiles: T.int64 = (visible[1] + (N - 1)) // N - first_tile
        mine = T.meta_var(split.tiles(N, first_tile, tiles, p, count))
        for tile in T.serial(mine[0], mine[1]):
            key0: T.int64 = tile * N
            keys: T.int64 = T.min(T.int64(N), P.seqlen_kv - key0)
            for i in T.serial(P.seqlen_q):
                live: T.bool = P.pattern.tile_live(site, i, i, key0, key0 + keys - 1)
                full: T.bool = P.pattern.tile_full(site, i, i, key0, key0 + (N - 1))
                if live:
                    staged.fill(P, b, h, key0, keys, i)
                    dot_products(P, QF, S, acc, row, i, k_base, v_base, key0, keys)
                    if full:
                        if not P.pattern.is_scale_only:
                            apply_score(S, P.pattern, P.stored_score, site, i, key0, staged)
                    else:
                        apply_score(S, P.pattern, P.masked_score, site, i, key0, staged)
                    softmax(S, lanewise, maxima, sums, factor, r0 + i, scale)
                    output = T.meta_var((outputs, (r0 + i) * P.head_dim_v))
                    accumulate(P, S, tile_output, factor, output, k_base, v_base, key0, keys)

    return part, join_macro(split)


def join_macro(split: Split):
    """A macro ``join(geometry, workspace, b, h, count)``: put the parts of one head together."""

    def first_total(P: Geometry, b, h, subtract, scale):
        """What the sum of a row begins with: the sink's share."""
        if not P.pattern.has_sink:
            return T.float32(0)
        return P.first_sum(b, h) * exp2((P.first_max(b, h) - subtract) * scale)

    @T.inline
    def join(P: Geometry, workspace, b, h, count):
        """Put the parts of one head together: output and log-sum-exp of its rows."""
        outputs, maxima, sums = workspace
        weights = T.meta_var(split.weights(maxima))
        scale: T.float32 = P.exponent_scale()
        for i in T.serial(P.seqlen_q):
            r0: T.int64 = P.part_row(b, h, 0, count) + i
            o_row: T.int64 = P.o.row(b, h, i)
            highest: T.float32 = P.first_max(b, h)
            for p in T.serial(count):
                highest = T.max(highest, maxima[r0 + p * P.seqlen_q])
            subtract: T.float32 = finite_or_zero(highest)
            total: T.float32 = first_total(P, b, h, subtract, scale)
            for p in T.serial(count):
                at = T.meta_var(split.weight(r0 + p * P.seqlen_q, p))
                weights[at] = exp2((maxima[r0 + p * P.seqlen_q] - subtract) * scale)
                total += sums[r0 + p * P.seqlen_q] * weights[at]
            divisor: T.float32 = T.Select(total == T.float32(0), T.float32(1), total)
            for e in T.serial(P.head_dim_v):
                element: T.float32 = T.float32(0)
                for p in T.serial(count):
                    at = T.meta_var(split.weight(r0 + p * P.seqlen_q, p))
                    element += outputs[(r0 + p * P.seqlen_q) * P.head_dim_v + e] * weights[at]
                P.o.flat[o_row + e] = T.cast(element / divisor, P.o.flat.dtype)
            if P.wants_lse():
                P.lse[P.lse_row(b, h) + i] = highest * P.scale() + T.log(total)

    return join

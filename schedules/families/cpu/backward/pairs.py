"""The five products of a tile on pairs of bfloat16, two of which one instruction adds to a float32 (``operands.py``).

=========== ============= =====================================================================
buffer      shape         holds
=========== ============= =====================================================================
PR, dSR     (M / 2, N)    pairs of rows of probabilities and of gradients of scaled products
acc         (R * G,)      the register tile
=========== ============= =====================================================================
"""

from __future__ import annotations

from types import SimpleNamespace

from tvm.script import tirx as T

from schedules.families.cpu.amx import BLOCK, whole
from schedules.families.cpu.backward.config import Config, padded
from schedules.families.cpu.backward.floats import by_column, by_row, nothing
from schedules.families.cpu.backward.geometry import Geometry
from schedules.families.cpu.backward.operands import pair_operands
from schedules.families.cpu.isa import Isa
from schedules.families.cpu.pairs import LANES, dot, rounded_pair


def pair_products(config: Config, isa: Isa, dtype: str, head_dim: int, head_dim_v: int) -> SimpleNamespace:
    """The same as :func:`schedules.families.cpu.backward.floats.float_products`, on pairs."""
    M, N, R, V = config.block_m, config.block_n, config.tile_rows, config.row_vectors
    G = V * LANES
    D, E = padded(head_dim, config, isa), padded(head_dim_v, config, isa)
    operands = pair_operands(config, isa, head_dim, head_dim_v)

    @T.inline
    def sum_products(acc, left, right, first, row, depth):
        """``acc[r, c] = sum_k left(row + r, k) · right[first + k, c]``, both pairs, the latter of a strip."""
        for x in T.unroll(R * V):
            acc[T.Ramp(x * LANES, 1, LANES)] = T.Broadcast(T.float32(0), LANES)
        for k in T.serial(depth):
            for r in T.unroll(R):
                for n in T.unroll(V):
                    acc[T.Ramp((r * V + n) * LANES, 1, LANES)] = dot(
                        acc[T.Ramp((r * V + n) * LANES, 1, LANES)],
                        right[T.Ramp((first + k) * G + n * LANES, 1, LANES)],
                        left(row + r, k),
                    )

    @T.inline
    def rows_by_columns(out, acc, left, right, words, rows, columns, depth):
        """``out[i, j] = sum_d left(i, d) · right[d, j]``; strips of ``words`` rows, and rows and columns of ``N``."""
        for c in T.serial((columns + (G - 1)) // G):
            for i in T.serial((rows + (R - 1)) // R):
                sum_products(acc, left, right, c * words, i * R, depth)
                for r in T.unroll(R):
                    for n in T.unroll(V):
                        out[T.Ramp((i * R + r) * N + c * G + n * LANES, 1, LANES)] = acc[
                            T.Ramp((r * V + n) * LANES, 1, LANES)
                        ]

    @T.inline
    def scores(P: Geometry, t, acc, rows, keys):
        rows_by_columns(t.S, acc, neighbours(t.QN, D), t.KT, D // 2, rows, keys, P.head_dim // 2)
        rows_by_columns(t.dP, acc, neighbours(t.ON, E), t.VT, E // 2, rows, keys, P.head_dim_v // 2)

    @T.inline
    def add_products(out, base, out_stride, acc, left, right, pairs, rows, width, depth, beyond):
        for c in T.serial((width + (G - 1)) // G):
            for i in T.serial((rows + (R - 1)) // R):
                sum_products(acc, left, right, c * pairs, i * R, depth)
                for r in T.unroll(R):
                    if beyond or i * R + r < rows:
                        for n in T.unroll(V):
                            for lane in T.vectorized(LANES):
                                out[base + (i * R + r) * out_stride + c * G + n * LANES + lane] += acc[
                                    (r * V + n) * LANES + lane
                                ]

    @T.inline
    def pair_up(t, rows, keys):
        """Probabilities and gradients of scaled products as pairs of rows, and the latter as pairs of keys."""
        for j in T.serial(T.Select(rows % 2 == 1, whole(keys), T.int64(0))):
            t.S[rows * N + j] = T.float32(0)
            t.dP[rows * N + j] = T.float32(0)
        for x in T.serial((rows + 1) // 2):
            for c in T.serial(whole(keys) // LANES):
                at: T.int64 = 2 * x * N + c * LANES
                for lane in T.vectorized(LANES):
                    t.PR[x * N + c * LANES + lane] = rounded_pair(t.S[at + lane], t.S[at + N + lane])
                for lane in T.vectorized(LANES):
                    t.dSR[x * N + c * LANES + lane] = rounded_pair(t.dP[at + lane], t.dP[at + N + lane])
        operands.pair_gradients(t, rows, keys)

    @T.inline
    def gradients(P: Geometry, t, acc, dq_at, dq_stride, rows, keys):
        pair_up(t, rows, keys)
        row_pairs: T.int64 = (rows + 1) // 2
        add_products(t.dV, 0, E, acc, by_column(t.PR, N), t.OR, M // 2, keys, P.head_dim_v, row_pairs, True)
        add_products(t.dK, 0, D, acc, by_column(t.dSR, N), t.QR, M // 2, keys, P.head_dim, row_pairs, True)
        add_products(
            P.dq_sum,
            dq_at,
            dq_stride,
            acc,
            by_row(t.dSK, N // 2),
            t.KR,
            N // 2,
            rows,
            P.head_dim,
            whole(keys) // 2,
            False,
        )

    return SimpleNamespace(
        bits="uint16",
        columns=BLOCK,
        buffers={
            **operands.buffers,
            "PR": ((M // 2 * N,), "uint32"),
            "dSR": ((M // 2 * N,), "uint32"),
        },
        load_keys=operands.load_keys,
        load_queries=operands.load_queries,
        scores=scores,
        gradients=gradients,
        begin=nothing,
        finish=nothing,
        keep_awake=nothing,
    )


def neighbours(matrix, stride):
    """``(row, k) ->`` elements 2k and 2k + 1 of a row, as a pair."""
    return lambda row, k: T.reinterpret("uint32", matrix[T.Ramp(row * stride + 2 * k, 1, 2)])

"""The five products of a tile on pairs of bfloat16, two of which one instruction adds to a float32.

A pair is one 32-bit word, as in ``pairs.py`` beside this folder.  Which two elements are a pair is free as long as both
factors agree: along head_dim neighbours, of rows 2i and 2i + 1, of keys those that are a vector apart, so that a row of
scores becomes pairs without a shuffle.

=========== ============= =====================================================================
buffer      shape         holds
=========== ============= =====================================================================
KT, VT      (D / 2, N)    pairs along head_dim of keys and values, 0 past the last key
KR          (N / 2, D')   pairs of keys, 0 past the last one
QN, ON      (M, D)        queries and gradients of outputs as they come
QR, OR      (M / 2, D')   pairs of rows of these, 0 past the last one
PR, dSR     (M / 2, N)    pairs of rows of probabilities and of gradients of scaled products
dSK         (M, N / 2)    pairs of keys of the latter
acc         (R * G,)      the register tile
=========== ============= =====================================================================
"""

from __future__ import annotations

from types import SimpleNamespace

from tvm.script import tirx as T

from schedules.families.cpu.backward.config import Config, padded
from schedules.families.cpu.backward.floats import by_column, by_row, nothing
from schedules.families.cpu.backward.geometry import Geometry
from schedules.families.cpu.isa import Isa
from schedules.families.cpu.pairs import LANES, bits, dot, magnitude, pair, rounded_pair

#: Keys whose pairs are those a vector apart.
_BLOCK = 2 * LANES


def pair_products(config: Config, isa: Isa, dtype: str, head_dim: int, head_dim_v: int) -> SimpleNamespace:
    """The same as :func:`schedules.families.cpu.backward.floats.float_products`, on pairs."""
    M, N, R, V = config.block_m, config.block_n, config.tile_rows, config.row_vectors
    G = V * LANES
    D, E = padded(head_dim, config, isa), padded(head_dim_v, config, isa)

    @T.inline
    def pair_rows(tile, x, stride, tensor, low_at, high_at, has_low, has_high, width):
        """Row ``x`` of pairs from two rows of a tensor, 0 in place of one that isn't there."""
        low_mask: T.uint16 = T.Select(has_low, T.uint16(0xFFFF), T.uint16(0))
        high_mask: T.uint16 = T.Select(has_high, T.uint16(0xFFFF), T.uint16(0))
        for d in T.serial(width // 8):
            for lane in T.vectorized(8):
                tile[x * stride + d * 8 + lane] = pair(
                    T.bitwise_and(bits(tensor.flat[low_at + d * 8 + lane]), low_mask),
                    T.bitwise_and(bits(tensor.flat[high_at + d * 8 + lane]), high_mask),
                )
        for d in T.serial(width // 8, (width + (G - 1)) // G * (G // 8)):
            for lane in T.vectorized(8):
                tile[x * stride + d * 8 + lane] = T.uint32(0)

    @T.inline
    def look(tensor, at, width, largest):
        """The largest magnitude of a row."""
        for d in T.serial(width // 8):
            for lane in T.vectorized(8):
                largest[lane] = T.max(largest[lane], magnitude(tensor.flat[at + d * 8 + lane]))

    @T.inline
    def transpose(tile, tensor, at, count, width):
        for j in T.serial(count):
            for d in T.serial(width // 2):
                tile[d * N + j] = T.reinterpret("uint32", tensor.flat[T.Ramp(at + j * tensor.strides[2] + 2 * d, 1, 2)])
        for d in T.serial(width // 2):
            for j in T.serial(count, (count + (G - 1)) // G * G):
                tile[d * N + j] = T.uint32(0)

    @T.inline
    def load_keys(P: Geometry, t, k_at, v_at, keys, largest):
        for j in T.serial(keys):
            look(P.k, k_at + j * P.k.strides[2], P.head_dim, largest)
        for x in T.serial((keys + (_BLOCK - 1)) // _BLOCK * LANES):
            low: T.int64 = x // LANES * _BLOCK + x % LANES
            low_at: T.int64 = k_at + T.min(low, keys - 1) * P.k.strides[2]
            high_at: T.int64 = k_at + T.min(low + LANES, keys - 1) * P.k.strides[2]
            pair_rows(t.KR, x, D, P.k, low_at, high_at, low < keys, low + LANES < keys, P.head_dim)
        transpose(t.KT, P.k, k_at, keys, P.head_dim)
        transpose(t.VT, P.v, v_at, keys, P.head_dim_v)

    @T.inline
    def load_rows(natural, pairs, stride, stride_pairs, tensor, at, rows, width, largest):
        for i in T.serial(rows):
            look(tensor, at + i * tensor.strides[2], width, largest)
            for d in T.serial(width // 8):
                for lane in T.vectorized(8):
                    natural[i * stride + d * 8 + lane] = bits(tensor.flat[at + i * tensor.strides[2] + d * 8 + lane])
        for x in T.serial((rows + 1) // 2):
            low_at: T.int64 = at + 2 * x * tensor.strides[2]
            high_at: T.int64 = at + T.min(2 * x + 1, rows - 1) * tensor.strides[2]
            pair_rows(pairs, x, stride_pairs, tensor, low_at, high_at, True, 2 * x + 1 < rows, width)

    @T.inline
    def load_queries(P: Geometry, t, q_at, do_at, rows, largest):
        load_rows(t.QN, t.QR, head_dim, D, P.q, q_at, rows, P.head_dim, largest)
        load_rows(t.ON, t.OR, head_dim_v, E, P.do, do_at, rows, P.head_dim_v, largest)

    @T.inline
    def sum_products(acc, left, right, stride, row, column, depth):
        """``acc[r, c] = sum_k left(row + r, k) · right[k, column + c]``, both pairs."""
        for x in T.unroll(R * V):
            acc[T.Ramp(x * LANES, 1, LANES)] = T.Broadcast(T.float32(0), LANES)
        for k in T.serial(depth):
            for r in T.unroll(R):
                for n in T.unroll(V):
                    acc[T.Ramp((r * V + n) * LANES, 1, LANES)] = dot(
                        acc[T.Ramp((r * V + n) * LANES, 1, LANES)],
                        right[T.Ramp(k * stride + column + n * LANES, 1, LANES)],
                        left(row + r, k),
                    )

    @T.inline
    def rows_by_columns(out, acc, left, right, rows, columns, depth):
        for c in T.serial((columns + (G - 1)) // G):
            for i in T.serial((rows + (R - 1)) // R):
                sum_products(acc, left, right, N, i * R, c * G, depth)
                for r in T.unroll(R):
                    for n in T.unroll(V):
                        out[T.Ramp((i * R + r) * N + c * G + n * LANES, 1, LANES)] = acc[
                            T.Ramp((r * V + n) * LANES, 1, LANES)
                        ]

    @T.inline
    def scores(P: Geometry, t, acc, rows, keys):
        rows_by_columns(t.S, acc, neighbours(t.QN, head_dim), t.KT, rows, keys, P.head_dim // 2)
        rows_by_columns(t.dP, acc, neighbours(t.ON, head_dim_v), t.VT, rows, keys, P.head_dim_v // 2)

    @T.inline
    def add_products(out, base, out_stride, acc, left, right, stride, rows, width, depth, beyond):
        for c in T.serial((width + (G - 1)) // G):
            for i in T.serial((rows + (R - 1)) // R):
                sum_products(acc, left, right, stride, i * R, c * G, depth)
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
        blocks: T.int64 = (keys + (_BLOCK - 1)) // _BLOCK
        for j in T.serial(T.Select(rows % 2 == 1, blocks * _BLOCK, T.int64(0))):
            t.S[rows * N + j] = T.float32(0)
            t.dP[rows * N + j] = T.float32(0)
        for x in T.serial((rows + 1) // 2):
            for c in T.serial(2 * blocks):
                at: T.int64 = 2 * x * N + c * LANES
                for lane in T.vectorized(LANES):
                    t.PR[x * N + c * LANES + lane] = rounded_pair(t.S[at + lane], t.S[at + N + lane])
                for lane in T.vectorized(LANES):
                    t.dSR[x * N + c * LANES + lane] = rounded_pair(t.dP[at + lane], t.dP[at + N + lane])
        for i in T.serial(rows):
            for c in T.serial(blocks):
                for lane in T.vectorized(LANES):
                    t.dSK[i * (N // 2) + c * LANES + lane] = rounded_pair(
                        t.dP[i * N + c * _BLOCK + lane], t.dP[i * N + c * _BLOCK + LANES + lane]
                    )

    @T.inline
    def gradients(P: Geometry, t, acc, dq_at, dq_stride, rows, keys):
        pair_up(t, rows, keys)
        row_pairs: T.int64 = (rows + 1) // 2
        key_pairs: T.int64 = (keys + (_BLOCK - 1)) // _BLOCK * LANES
        add_products(t.dV, 0, E, acc, by_column(t.PR, N), t.OR, E, keys, P.head_dim_v, row_pairs, True)
        add_products(t.dK, 0, D, acc, by_column(t.dSR, N), t.QR, D, keys, P.head_dim, row_pairs, True)
        add_products(
            P.dq_sum, dq_at, dq_stride, acc, by_row(t.dSK, N // 2), t.KR, D, rows, P.head_dim, key_pairs, False
        )

    return SimpleNamespace(
        bits="uint16",
        columns=_BLOCK,
        buffers={
            "KT": ((head_dim // 2 * N,), "uint32"),
            "VT": ((head_dim_v // 2 * N,), "uint32"),
            "KR": ((N // 2 * D,), "uint32"),
            "QN": ((M * head_dim,), "uint16"),
            "ON": ((M * head_dim_v,), "uint16"),
            "QR": ((M // 2 * D,), "uint32"),
            "OR": ((M // 2 * E,), "uint32"),
            "PR": ((M // 2 * N,), "uint32"),
            "dSR": ((M // 2 * N,), "uint32"),
            "dSK": ((M * (N // 2),), "uint32"),
        },
        load_keys=load_keys,
        load_queries=load_queries,
        scores=scores,
        gradients=gradients,
        begin=nothing,
        finish=nothing,
        keep_awake=nothing,
    )


def neighbours(matrix, stride):
    """``(row, k) ->`` elements 2k and 2k + 1 of a row, as a pair."""
    return lambda row, k: T.reinterpret("uint32", matrix[T.Ramp(row * stride + 2 * k, 1, 2)])

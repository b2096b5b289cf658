"""Operands of a tile's products as pairs of bfloat16.

A pair is one 32-bit word, as in ``pairs.py`` beside this folder.  Which two elements are a pair is free as long as both
factors agree: along head_dim neighbours, of rows 2i and 2i + 1, of keys those that are a vector apart, so that a row of
scores becomes pairs without a shuffle.  Queries, output gradients and keys are copied as they come, with zeros up to
whole blocks of 32, as tile registers take them, and all else is made from these copies without looking at edges.  Right
factors lie in strips of as many columns as a product has at a time, whose rows follow each other.

=========== ================= ===============================================================
buffer      shape             holds
=========== ================= ===============================================================
QN, ON      (M, D')           queries and gradients of outputs; D' is D rounded up
QR, OR      (D'/G, M/2, G)    pairs of rows of these
KN          (N, D')           values, then keys
KT, VT      (N/G, D'/2, G)    pairs along head_dim of keys and values
KR          (D'/G, N/2, G)    pairs of keys
dSK         (M, N/2)          pairs of keys of gradients of scaled products
=========== ================= ===============================================================
"""

from __future__ import annotations

from types import SimpleNamespace

from tvm.script import tirx as T

from schedules.families.cpu.amx import BLOCK, whole
from schedules.families.cpu.backward.config import Config, padded
from schedules.families.cpu.backward.floats import look
from schedules.families.cpu.backward.geometry import Geometry
from schedules.families.cpu.isa import Isa
from schedules.families.cpu.pairs import LANES, bits, magnitude, pair, rounded_pair
from schedules.families.cpu.transpose import place, transpose


def pair_operands(config: Config, isa: Isa, head_dim: int, head_dim_v: int) -> SimpleNamespace:
    """Macros ``load_keys``, ``load_queries`` and ``pair_gradients``, and the shapes and dtypes of their buffers."""
    M, N, V = config.block_m, config.block_n, config.row_vectors
    G = V * LANES
    D, E = padded(head_dim, config, isa), padded(head_dim_v, config, isa)

    def up(width):
        """A width rounded up to whole strips, which are whole blocks."""
        return (width + (G - 1)) // G * G

    @T.inline
    def copy(tile, stride, tensor, at, count, width):
        """Rows of a tensor, with zeros up to whole blocks of rows and strips."""
        for i in T.serial(count):
            row: T.int64 = at + i * tensor.strides[2]
            for d in T.serial(width // BLOCK):
                for lane in T.vectorized(BLOCK):
                    tile[i * stride + d * BLOCK + lane] = bits(tensor.flat[row + d * BLOCK + lane])
            for d in T.serial(width // BLOCK * (BLOCK // 8), width // 8):
                for lane in T.vectorized(8):
                    tile[i * stride + d * 8 + lane] = bits(tensor.flat[row + d * 8 + lane])
            for d in T.serial(width // 8, up(width) // 8):
                for lane in T.vectorized(8):
                    tile[i * stride + d * 8 + lane] = T.uint16(0)
        for i in T.serial(count, whole(count)):
            for d in T.serial(up(width) // BLOCK):
                for lane in T.vectorized(BLOCK):
                    tile[i * stride + d * BLOCK + lane] = T.uint16(0)

    @T.inline
    def pair_rows(pairs, rows, tile, stride, width, x, low, high):
        """Row ``x`` of pairs, of strips that have ``rows``, from two rows."""
        for d in T.serial(up(width) // G):
            for n in T.unroll(V):
                for lane in T.vectorized(LANES):
                    pairs[(d * rows + x) * G + n * LANES + lane] = pair(
                        tile[low * stride + d * G + n * LANES + lane], tile[high * stride + d * G + n * LANES + lane]
                    )

    @T.inline
    def transpose_pairs(to, words, tile, stride, count, width):
        """Pairs along rows as columns, in strips of ``words`` rows."""
        for j in T.serial(whole(count) // LANES):
            for d in T.serial(up(width) // BLOCK):
                T.evaluate(
                    transpose(
                        *(place(to, "w", (j // V * words + d * LANES) * G + j % V * LANES), 4 * G),
                        *(place(tile, "r", j * LANES * stride + d * BLOCK), 2 * stride),
                    )
                )

    @T.inline
    def load_keys(P: Geometry, t, k_at, v_at, keys, largest):
        copy(t.KN, E, P.v, v_at, keys, P.head_dim_v)
        transpose_pairs(t.VT, E // 2, t.KN, E, keys, P.head_dim_v)
        copy(t.KN, D, P.k, k_at, keys, P.head_dim)
        transpose_pairs(t.KT, D // 2, t.KN, D, keys, P.head_dim)
        look(t.KN, D, keys, up(P.head_dim), largest, magnitude)
        for block in T.serial(whole(keys) // BLOCK):
            for x in T.serial(LANES):
                low: T.int64 = block * BLOCK + x
                pair_rows(t.KR, N // 2, t.KN, D, P.head_dim, block * LANES + x, low, low + LANES)

    @T.inline
    def load_rows(natural, pairs, stride, tensor, at, rows, width, largest):
        copy(natural, stride, tensor, at, rows, width)
        look(natural, stride, rows, up(width), largest, magnitude)
        for x in T.serial(whole(rows) // 2):
            pair_rows(pairs, M // 2, natural, stride, width, x, 2 * x, 2 * x + 1)

    @T.inline
    def load_queries(P: Geometry, t, q_at, do_at, rows, largest):
        load_rows(t.QN, t.QR, D, P.q, q_at, rows, P.head_dim, largest)
        load_rows(t.ON, t.OR, E, P.do, do_at, rows, P.head_dim_v, largest)

    @T.inline
    def pair_gradients(t, rows, keys):
        for i in T.serial(rows):
            for c in T.serial(whole(keys) // BLOCK):
                for lane in T.vectorized(LANES):
                    t.dSK[i * (N // 2) + c * LANES + lane] = rounded_pair(
                        t.dP[i * N + c * BLOCK + lane], t.dP[i * N + c * BLOCK + LANES + lane]
                    )

    return SimpleNamespace(
        buffers={
            "QN": ((M * D,), "uint16"),
            "ON": ((M * E,), "uint16"),
            "QR": ((M // 2 * D,), "uint32"),
            "OR": ((M // 2 * E,), "uint32"),
            "KN": ((N * max(D, E),), "uint16"),
            "KT": ((D // 2 * N,), "uint32"),
            "VT": ((E // 2 * N,), "uint32"),
            "KR": ((N // 2 * D,), "uint32"),
            "dSK": ((M * (N // 2),), "uint32"),
        },
        load_keys=load_keys,
        load_queries=load_queries,
        pair_gradients=pair_gradients,
    )

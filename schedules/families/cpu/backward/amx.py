"""The five products of a tile on AMX's tile registers, blocks of 32 rows by 32 columns (``amx.py`` beside this folder).

The left factor of a product is rows of elements, the right one rows of pairs, 32-bit words of two elements that are
summed; which two make a pair is free as long as both factors agree.  Queries, output gradients and keys are copied as
they come, with zeros up to whole blocks, and all else is made from these copies without looking at edges.  Along
head_dim neighbours are a pair, of rows 2i and 2i + 1, of keys those that are a vector apart, so that a row of gradients
becomes pairs without a shuffle.  Probabilities and gradients are transposed in vector registers, as pairs of rows.
Right factors lie in strips of 32 columns, whose rows follow each other.

=========== ================= =====================================================================
buffer      shape             holds
=========== ================= =====================================================================
QN, ON      (M, D')           queries and gradients of outputs; D' is D rounded up to 32
QR, OR      (D'/32, M/2, 32)  pairs of rows of these
KN          (N, D')           keys, then values
KT, VT      (N/32, D'/2, 32)  pairs along head_dim of keys and values
KR          (D'/32, N/2, 32)  pairs of keys
PT, dST     (N, M/2)          pairs of rows of probabilities and of gradients of scaled products, transposed
dSK         (M, N/2)          pairs of keys of the latter
block       (16, 16)          what is transposed next
state       (64,)             the thread's tile configuration, as it was
=========== ================= =====================================================================
"""

from __future__ import annotations

from types import SimpleNamespace

import tvm
from tvm.script import tirx as T

from schedules.families.cpu.amx import BLOCK, keep_awake, tile_product, tiles_begin, tiles_end, whole
from schedules.families.cpu.backward.config import Config, padded
from schedules.families.cpu.backward.geometry import Geometry
from schedules.families.cpu.isa import Isa
from schedules.families.cpu.pairs import LANES, bits, magnitude, pair, rounded_pair
from schedules.families.cpu.transpose import place, transpose, transpose_function


def tile_products(config: Config, isa: Isa, dtype: str, head_dim: int, head_dim_v: int) -> SimpleNamespace:
    """The same as :func:`schedules.families.cpu.backward.floats.float_products`, on tile registers."""
    M, N = config.block_m, config.block_n
    D, E = padded(head_dim, config, isa), padded(head_dim_v, config, isa)

    def factors(left, stride, right, strip, i, c, depth):
        """What block ``(i, c)`` of a product reads: rows ``stride`` apart, and one of the strips of ``strip`` rows."""
        size = tvm.DataType(left.dtype).itemsize * stride
        rows = place(left, "r", i * BLOCK * stride), T.int64(size)
        return *rows, place(right, "r", c * strip * BLOCK), T.int64(4 * BLOCK), whole(depth) // BLOCK

    @T.inline
    def clear_row(tile, at, width):
        for d in T.serial(width // BLOCK):
            for lane in T.vectorized(BLOCK):
                tile[at + d * BLOCK + lane] = T.cast(0, tile.dtype)

    @T.inline
    def copy(tile, stride, tensor, at, count, width):
        """Rows of a tensor, with zeros up to whole blocks in both directions."""
        for i in T.serial(count):
            row: T.int64 = at + i * tensor.strides[2]
            for d in T.serial(width // BLOCK):
                for lane in T.vectorized(BLOCK):
                    tile[i * stride + d * BLOCK + lane] = bits(tensor.flat[row + d * BLOCK + lane])
            for d in T.serial(width // BLOCK * (BLOCK // 8), width // 8):
                for lane in T.vectorized(8):
                    tile[i * stride + d * 8 + lane] = bits(tensor.flat[row + d * 8 + lane])
            for d in T.serial(width // 8, whole(width) // 8):
                for lane in T.vectorized(8):
                    tile[i * stride + d * 8 + lane] = T.uint16(0)
        for i in T.serial(count, whole(count)):
            clear_row(tile, i * stride, whole(width))

    @T.inline
    def look(tile, stride, count, width, largest):
        """The largest magnitude of rows."""
        for i in T.serial(count):
            for d in T.serial(whole(width) // 8):
                for lane in T.vectorized(8):
                    largest[lane] = T.max(largest[lane], magnitude(tile[i * stride + d * 8 + lane]))

    @T.inline
    def pair_rows(pairs, tile, stride, count, width):
        """Rows 2i and 2i + 1 as pairs."""
        for x in T.serial(whole(count) // 2):
            for d in T.serial(whole(width) // BLOCK):
                for lane in T.vectorized(BLOCK):
                    pairs[(d * (M // 2) + x) * BLOCK + lane] = pair(
                        tile[2 * x * stride + d * BLOCK + lane], tile[(2 * x + 1) * stride + d * BLOCK + lane]
                    )

    @T.inline
    def pair_keys(pairs, tile, stride, count, width):
        """Rows that are a vector apart as pairs."""
        for block in T.serial(whole(count) // BLOCK):
            for x in T.serial(LANES):
                for d in T.serial(whole(width) // BLOCK):
                    for lane in T.vectorized(BLOCK):
                        pairs[(d * (N // 2) + block * LANES + x) * BLOCK + lane] = pair(
                            tile[(block * BLOCK + x) * stride + d * BLOCK + lane],
                            tile[(block * BLOCK + LANES + x) * stride + d * BLOCK + lane],
                        )

    @T.inline
    def transpose_pairs(to, depth, tile, stride, count, width):
        """Pairs along a row as columns."""
        for j in T.serial(whole(count) // LANES):
            for d in T.serial(whole(width) // BLOCK):
                T.evaluate(
                    transpose(
                        *(place(to, "w", (j // 2 * depth + d * LANES) * BLOCK + j % 2 * LANES), 4 * BLOCK),
                        *(place(tile, "r", j * LANES * stride + d * BLOCK), 2 * stride),
                    )
                )

    @T.inline
    def load_keys(P: Geometry, t, k_at, v_at, keys, largest):
        copy(t.KN, D, P.k, k_at, keys, P.head_dim)
        look(t.KN, D, keys, P.head_dim, largest)
        pair_keys(t.KR, t.KN, D, keys, P.head_dim)
        transpose_pairs(t.KT, D // 2, t.KN, D, keys, P.head_dim)
        copy(t.KN, E, P.v, v_at, keys, P.head_dim_v)
        transpose_pairs(t.VT, E // 2, t.KN, E, keys, P.head_dim_v)

    @T.inline
    def load_queries(P: Geometry, t, q_at, do_at, rows, largest):
        copy(t.QN, D, P.q, q_at, rows, P.head_dim)
        copy(t.ON, E, P.do, do_at, rows, P.head_dim_v)
        look(t.QN, D, rows, P.head_dim, largest)
        look(t.ON, E, rows, P.head_dim_v, largest)
        pair_rows(t.QR, t.QN, D, rows, P.head_dim)
        pair_rows(t.OR, t.ON, E, rows, P.head_dim_v)

    @T.inline
    def rows_by_columns(out, left, stride, right, rows, columns, depth):
        """``out[i, j] = sum_d left[i, d] right[d, j]``; rows and columns of ``N``."""
        for c in T.serial(whole(columns) // BLOCK):
            for i in T.serial(whole(rows) // BLOCK):
                T.evaluate(
                    tile_product(
                        *(place(out, "w", i * BLOCK * N + c * BLOCK), T.int64(4 * N)),
                        *factors(left, stride, right, stride // 2, i, c, depth),
                    )
                )

    @T.inline
    def scores(P: Geometry, t, acc, rows, keys):
        rows_by_columns(t.S, t.QN, D, t.KT, rows, keys, P.head_dim)
        rows_by_columns(t.dP, t.ON, E, t.VT, rows, keys, P.head_dim_v)

    @T.inline
    def transposed_pairs(to, tile, block, rows, keys):
        """Pairs of rows as columns, rounded."""
        for y in T.serial(whole(rows) // BLOCK):
            for c in T.serial(whole(keys) // LANES):
                for r in T.unroll(LANES):
                    for lane in T.vectorized(LANES):
                        block[r * LANES + lane] = rounded_pair(
                            tile[(y * BLOCK + 2 * r) * N + c * LANES + lane],
                            tile[(y * BLOCK + 2 * r + 1) * N + c * LANES + lane],
                        )
                T.evaluate(
                    transpose(
                        *(place(to, "w", c * LANES * (M // 2) + y * LANES), 2 * M),
                        *(place(block, "r", 0), 4 * LANES),
                    )
                )

    @T.inline
    def pair_up(t, rows, keys):
        """Probabilities and gradients of scaled products as pairs."""
        for i in T.serial(rows, whole(rows)):
            clear_row(t.S, i * N, whole(keys))
            clear_row(t.dP, i * N, whole(keys))
        transposed_pairs(t.PT, t.S, t.block, rows, keys)
        transposed_pairs(t.dST, t.dP, t.block, rows, keys)
        for i in T.serial(whole(rows)):
            for c in T.serial(whole(keys) // BLOCK):
                for lane in T.vectorized(LANES):
                    t.dSK[i * (N // 2) + c * LANES + lane] = rounded_pair(
                        t.dP[i * N + c * BLOCK + lane], t.dP[i * N + c * BLOCK + LANES + lane]
                    )

    @T.inline
    def add_products(out, out_stride, left, right, rows, width, depth):
        """``out[i, c] += sum_k left[i, k] right[k, c]`` of keys, in whole blocks; ``k`` are rows."""
        for i in T.serial(whole(rows) // BLOCK):
            for c in T.serial(whole(width) // BLOCK):
                T.evaluate(
                    tile_product(
                        *(place(out, "rw", i * BLOCK * out_stride + c * BLOCK), T.int64(4 * out_stride)),
                        *factors(left, M // 2, right, M // 2, i, c, depth),
                        adds=True,
                    )
                )

    @T.inline
    def add_rows(out, base, out_stride, acc, left, right, rows, width, depth):
        """The same of rows of the call, of which there are no more than ``rows``; ``k`` are keys."""
        for i in T.serial(whole(rows) // BLOCK):
            for c in T.serial(whole(width) // BLOCK):
                if (i + 1) * BLOCK <= rows:
                    T.evaluate(
                        tile_product(
                            *(T.address_of(out[base + i * BLOCK * out_stride + c * BLOCK]), 4 * out_stride),
                            *factors(left, N // 2, right, N // 2, i, c, depth),
                            adds=True,
                        )
                    )
                else:
                    T.evaluate(
                        tile_product(
                            *(place(acc, "w", 0), T.int64(4 * BLOCK)),
                            *factors(left, N // 2, right, N // 2, i, c, depth),
                        )
                    )
                    for r in T.serial(rows - i * BLOCK):
                        for lane in T.vectorized(BLOCK):
                            out[base + (i * BLOCK + r) * out_stride + c * BLOCK + lane] += acc[r * BLOCK + lane]

    @T.inline
    def gradients(P: Geometry, t, acc, dq_at, dq_stride, rows, keys):
        keep_awake()
        pair_up(t, rows, keys)
        add_products(t.dV, E, t.PT, t.OR, keys, P.head_dim_v, rows)
        add_products(t.dK, D, t.dST, t.QR, keys, P.head_dim, rows)
        add_rows(P.dq_sum, dq_at, dq_stride, acc, t.dSK, t.KR, rows, P.head_dim, keys)

    @T.inline
    def begin(t):
        T.attr(0, "pragma_import_llvm", transpose_function(LANES))
        T.evaluate(tiles_begin(t.state))

    @T.inline
    def finish(t):
        T.evaluate(tiles_end(t.state))

    return SimpleNamespace(
        bits="uint16",
        columns=BLOCK,
        buffers={
            "QN": ((M * D,), "uint16"),
            "ON": ((M * E,), "uint16"),
            "QR": ((M // 2 * D,), "uint32"),
            "OR": ((M // 2 * E,), "uint32"),
            "KN": ((N * max(D, E),), "uint16"),
            "KT": ((D // 2 * N,), "uint32"),
            "VT": ((E // 2 * N,), "uint32"),
            "KR": ((N // 2 * D,), "uint32"),
            "PT": ((N * (M // 2),), "uint32"),
            "dST": ((N * (M // 2),), "uint32"),
            "dSK": ((M * (N // 2),), "uint32"),
            "block": ((LANES * LANES,), "uint32"),
            "state": ((64,), "uint8"),
        },
        load_keys=load_keys,
        load_queries=load_queries,
        scores=scores,
        gradients=gradients,
        begin=begin,
        finish=finish,
        keep_awake=keep_awake,
    )

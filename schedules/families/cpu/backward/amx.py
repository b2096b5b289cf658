"""The five products of a tile on AMX's tile registers, blocks of 32 rows by 32 columns (``amx.py`` beside this folder).

The left factor of a product is rows of elements, the right one rows of pairs (``operands.py``).  Probabilities and
gradients become left factors by being transposed in vector registers, as pairs of rows.

=========== ============= =====================================================================
buffer      shape         holds
=========== ============= =====================================================================
PT, dST     (N, M / 2)    pairs of rows of probabilities and of gradients of scaled products, transposed
block       (16, 16)      what is transposed next
state       (64,)         the thread's tile configuration, as it was
=========== ============= =====================================================================
"""

from __future__ import annotations

from types import SimpleNamespace

import tvm
from tvm.script import tirx as T

from schedules.families.cpu.amx import BLOCK, keep_awake, tile_product, tiles_begin, tiles_end, whole
from schedules.families.cpu.backward.config import Config, padded
from schedules.families.cpu.backward.geometry import Geometry
from schedules.families.cpu.backward.operands import pair_operands
from schedules.families.cpu.isa import Isa
from schedules.families.cpu.pairs import LANES, rounded_pair
from schedules.families.cpu.transpose import place, transpose


def tile_products(config: Config, isa: Isa, dtype: str, head_dim: int, head_dim_v: int) -> SimpleNamespace:
    """The same as :func:`schedules.families.cpu.backward.floats.float_products`, on tile registers."""
    M, N = config.block_m, config.block_n
    D, E = padded(head_dim, config, isa), padded(head_dim_v, config, isa)
    operands = pair_operands(config, isa, head_dim, head_dim_v)

    def factors(left, stride, right, strip, i, c, depth):
        """What block ``(i, c)`` of a product reads: rows ``stride`` apart, and one of the strips of ``strip`` rows."""
        size = tvm.DataType(left.dtype).itemsize * stride
        rows = place(left, "r", i * BLOCK * stride), T.int64(size)
        return *rows, place(right, "r", c * strip * BLOCK), T.int64(4 * BLOCK), whole(depth) // BLOCK

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
            for j in T.serial(whole(keys) // LANES):
                for lane in T.vectorized(LANES):
                    t.S[i * N + j * LANES + lane] = T.float32(0)
                for lane in T.vectorized(LANES):
                    t.dP[i * N + j * LANES + lane] = T.float32(0)
        transposed_pairs(t.PT, t.S, t.block, rows, keys)
        transposed_pairs(t.dST, t.dP, t.block, rows, keys)
        operands.pair_gradients(t, whole(rows), keys)

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
        T.evaluate(tiles_begin(t.state))

    @T.inline
    def finish(t):
        T.evaluate(tiles_end(t.state))

    return SimpleNamespace(
        bits="uint16",
        columns=BLOCK,
        buffers={
            **operands.buffers,
            "PT": ((N * (M // 2),), "uint32"),
            "dST": ((N * (M // 2),), "uint32"),
            "block": ((LANES * LANES,), "uint32"),
            "state": ((64,), "uint8"),
        },
        load_keys=operands.load_keys,
        load_queries=operands.load_queries,
        scores=scores,
        gradients=gradients,
        begin=begin,
        finish=finish,
        keep_awake=keep_awake,
    )

"""The two products of a tile in float32: 16-bit K and V become float32, once for all rows of a work item.

=========== ========== =========================================
buffer      shape      holds
=========== ========== =========================================
QT          (M/G, D, G)  queries of each group
KT, VT      (N, D)     keys and values; of float32 only where rows are apart
acc         (R * G,)   the register tile
=========== ========== =========================================
"""

from __future__ import annotations

from types import SimpleNamespace

from tvm.script import tirx as T

from schedules.families.cpu.ahead import make_fetch_next
from schedules.families.cpu.config import Config
from schedules.families.cpu.geometry import Geometry
from schedules.families.cpu.steps import accumulate, accumulate_visible, f32
from schedules.families.cpu.transpose import make_transposed_load

#: So many products of a score are summed one after another; then the sums of such chains are added up.  At head_dim 256
#: the error of a result falls from 1.5 to 0.95 of that of torch's attention (root mean square; the largest from 4 to
#: 1.2) for less than 0.5% of the time.  Chains of 64 give 0.7 there and at 128, and cost up to 1%.
_CHAIN = 128


def float_products(config: Config, lanes: int, dtype: str, head_dim: int, head_dim_v: int) -> SimpleNamespace:
    """Macros ``load_queries``, ``load_tile``, ``scores``, ``output``, and the shapes and dtypes of their buffers."""
    M, N, R, V = config.block_m, config.block_n, config.tile_rows, config.row_vectors
    G = V * lanes
    converts = dtype != "float32"

    def is_packed(P: Geometry, rows):
        """Whether float32 rows are brought together: where they are apart, and two groups of queries read each.

        Rows of 16 heads of 64 are 4096 bytes apart and share a set of the first-level cache; whatever the number of
        heads, each is on a page of its own.  On one core of a Zen 5, lengths of 1024 and 2048, that gained 20% with 16
        and with 32 heads, 13% with 12 and 15; with 40 queries, 8 of them in the second group, it lost 5%.
        """
        return T.And(rows >= 2 * G, T.Or(P.k.is_apart(P.head_dim), P.v.is_apart(P.head_dim_v)))

    def words(flat, row, d, count):
        """``count`` elements of a row from ``d`` on, as float32."""
        return f32(flat[row + d]) if count == 1 else T.cast(flat[T.Ramp(row + d, 1, count)], f"float32x{count}")

    load_transposed = make_transposed_load(config.row_vectors, lanes, words)
    fetch_next = make_fetch_next(config, lanes)

    @T.inline
    def load_queries(P: Geometry, QT, state, block, b, h, row0, rows, count):
        """``QT[i // G, d, i % G] = q[row0 + i, d]``; queries past ``rows`` repeat the last one."""
        load_transposed(P, QT, block, b, h, row0, rows, count, P.head_dim)

    @T.inline
    def convert(tile, tensor, base, keys, width):
        """``tile[j, d] = float32(row j of the tile that begins at base [d])``; widths are multiples of 8."""
        for j in T.serial(keys):
            for d in T.serial(width // 8):
                for lane in T.vectorized(8):
                    tile[j, d * 8 + lane] = f32(tensor.flat[tensor.in_tile(base, j) + d * 8 + lane])

    @T.inline
    def load_tile(P: Geometry, KT, VT, largest, block, k_at, v_at, keys, rows):
        if converts or is_packed(P, rows):
            convert(KT, P.k, k_at, keys, P.head_dim)
            convert(VT, P.v, v_at, keys, P.head_dim_v)

    @T.inline
    def zero(acc):
        for x in T.unroll(R * V):
            for lane in T.vectorized(lanes):
                acc[x * lanes + lane] = T.float32(0)

    @T.inline
    def scores_with(P: Geometry, QT, KT, ST, acc, row, k_at, group, keys, in_tile):
        """``ST[j, i] = sum_d k[j, d] * QT[group, d, i]``, in chains of ``_CHAIN``.

        Register tiles may reach past the last key, and repeat it; those rows of ``ST`` are never read.
        """
        for tile in T.serial((keys + (R - 1)) // R):
            if not converts:
                fetch_next(P, P.k, k_at, group, tile, N // R, head_dim)
            for r in T.unroll(R):
                row[r] = P.k.in_tile(k_at, T.min(tile * R + r, keys - 1))
            for chain in T.serial((P.head_dim + (_CHAIN - 1)) // _CHAIN):
                zero(acc)
                for d in T.serial(chain * _CHAIN, T.min(P.head_dim, (chain + 1) * _CHAIN)):
                    for r in T.unroll(R):
                        element: T.let[T.float32] = KT[tile * R + r, d] if in_tile else P.k.flat[row[r] + d]
                        for n in T.unroll(V):
                            for lane in T.vectorized(lanes):
                                acc[(r * V + n) * lanes + lane] += element * QT[group, d, n * lanes + lane]
                if chain == 0:
                    for r in T.unroll(R):
                        for n in T.unroll(V):
                            for lane in T.vectorized(lanes):
                                ST[tile * R + r, n * lanes + lane] = acc[(r * V + n) * lanes + lane]
                else:
                    for r in T.unroll(R):
                        for n in T.unroll(V):
                            for lane in T.vectorized(lanes):
                                ST[tile * R + r, n * lanes + lane] += acc[(r * V + n) * lanes + lane]

    @T.inline
    def scores(P: Geometry, QT, KT, ST, acc, row, k_at, group, keys, rows):
        if converts or is_packed(P, rows):
            scores_with(P, QT, KT, ST, acc, row, k_at, group, keys, True)
        else:
            scores_with(P, QT, KT, ST, acc, row, k_at, group, keys, False)

    @T.inline
    def output_with(P: Geometry, ST, VT, OT, acc, correction, v_at, group, keys, update, in_tile):
        for tile in T.serial(P.head_dim_v // R):
            if not converts:
                fetch_next(P, P.v, v_at, group, tile, head_dim_v // R, head_dim_v)
            zero(acc)
            for j in T.serial(keys):
                for r in T.unroll(R):
                    element: T.let[T.float32] = (
                        VT[j, tile * R + r] if in_tile else P.v.flat[P.v.in_tile(v_at, j) + tile * R + r]
                    )
                    for n in T.unroll(V):
                        for lane in T.vectorized(lanes):
                            acc[(r * V + n) * lanes + lane] = update(
                                acc[(r * V + n) * lanes + lane], ST[j, n * lanes + lane], element
                            )
            for r in T.unroll(R):
                for n in T.unroll(V):
                    for lane in T.vectorized(lanes):
                        OT[group, tile * R + r, n * lanes + lane] = (
                            OT[group, tile * R + r, n * lanes + lane] * correction[n * lanes + lane]
                            + acc[(r * V + n) * lanes + lane]
                        )

    @T.inline
    def output(P: Geometry, ST, PT, VT, OT, acc, correction, largest, v_at, group, keys, full, rows):
        """``OT[group, e, i] = OT[group, e, i] * correction[i] + sum_j v[j, e] * ST[j, i]``.

        A tile is summed by itself first: a chain of N additions and one of tiles, not one of all keys, which was seven
        times less accurate at 2048 keys.
        """
        if full:
            if converts or is_packed(P, rows):
                output_with(P, ST, VT, OT, acc, correction, v_at, group, keys, accumulate, True)
            else:
                output_with(P, ST, VT, OT, acc, correction, v_at, group, keys, accumulate, False)
        else:
            output_with(P, ST, VT, OT, acc, correction, v_at, group, keys, accumulate_visible, converts)

    @T.inline
    def keep_awake():
        pass

    @T.inline
    def finish(state):
        pass

    return SimpleNamespace(
        queries=((M // G, head_dim, G), "float32"),
        keys=((N, head_dim), "float32"),
        values=((N, head_dim_v), "float32"),
        probabilities=((1, 1), "float32"),
        accumulators=(R * G,),
        state=((1,), "uint8"),
        load_queries=load_queries,
        load_tile=load_tile,
        scores=scores,
        output=output,
        finish=finish,
        keep_awake=keep_awake,
        rows_awake=N,
    )

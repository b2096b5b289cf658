"""Many queries: the recurrence over kv tiles, with vector lanes over queries.

A work item is ``block_m`` rows of one head.  Everything that it keeps is transposed, so that a vector holds the same
element of ``lanes`` queries: ``QT[d, i]``, ``ST[j, i]``, ``OT[e, i]``.  Then ``S^T = K Q^T`` and ``O^T += V^T P^T``
multiply a vector of queries with one broadcast element of K or V: no horizontal reductions, no packing, and any stride
of K and V will do.

For each kv tile: 16-bit K and V become float32, once for all rows; then for each row group (``row_vectors`` vectors)
the product, the score and mask, the online softmax, and the second product.
"""

from __future__ import annotations

import math

from tvm.script import tirx as T

from schedules.families.cpu.config import Config
from schedules.families.cpu.problem import Problem
from schedules.families.cpu.steps import accumulate, accumulate_visible, f32, make_steps

_MINUS_INF = -math.inf


def row_tile_macro(config: Config, lanes: int, dtype: str, head_dim: int, head_dim_v: int):
    """A macro ``(problem, b, h, row0)`` that computes up to ``block_m`` rows from ``row0`` on."""
    M, N, R = config.block_m, config.block_n, config.tile_rows
    converts = dtype != "float32"
    steps = make_steps(config, lanes)
    G = steps.group

    @T.inline
    def load_tile(tile, tensor, base, keys, width):
        """``tile[j, d] = float32(tensor[base + j * stride + d])``; widths are multiples of 8."""
        for j in T.serial(keys):
            for d in T.serial(width // 8):
                for lane in T.vectorized(8):
                    tile[j, d * 8 + lane] = f32(tensor.flat[base + j * tensor.strides[2] + d * 8 + lane])

    @T.inline
    def row_tile(P: Problem, b, h, row0):
        QT = T.sblock_alloc_buffer((head_dim, M), "float32")
        OT = T.sblock_alloc_buffer((head_dim_v, M), "float32")
        ST = T.sblock_alloc_buffer((N, G), "float32")
        KF = T.sblock_alloc_buffer((N if converts else 1, head_dim), "float32")
        VF = T.sblock_alloc_buffer((N if converts else 1, head_dim_v), "float32")
        row_max = T.sblock_alloc_buffer((M,), "float32")
        row_sum = T.sblock_alloc_buffer((M,), "float32")
        correction = T.sblock_alloc_buffer((G,), "float32", scope="local")
        highest = T.sblock_alloc_buffer((G,), "float32", scope="local")
        total = T.sblock_alloc_buffer((G,), "float32", scope="local")
        acc = T.sblock_alloc_buffer((R, G), "float32", scope="local")

        # Mutable scalars, not let-bindings: TVM's index analysis would follow those through everything below.
        rows: T.int64 = T.min(T.int64(M), P.seqlen_q - row0)
        groups: T.int64 = (rows + (G - 1)) // G
        k_base: T.int64 = P.k.row(b, P.kv_head(h), T.int64(0))
        v_base: T.int64 = P.v.row(b, P.kv_head(h), T.int64(0))
        scale: T.float32 = P.exponent_scale()
        site = T.meta_var(P.site(b, h))

        # A key or value element, from the converted tile or from where the caller has it.  Register tiles may reach
        # past the last key; those rows of ST are never read.
        key = T.meta_var(
            (lambda key0, j, d: KF[j, d])
            if converts
            else (lambda key0, j, d: P.k.flat[k_base + T.min(key0 + j, P.seqlen_kv - 1) * P.k.strides[2] + d])
        )
        value = T.meta_var(
            (lambda key0, j, e: VF[j, e])
            if converts
            else (lambda key0, j, e: P.v.flat[v_base + (key0 + j) * P.v.strides[2] + e])
        )

        # 1. Queries transposed; rows past the end repeat the last one and are never stored.
        for i in T.serial(groups * G):
            q_row: T.int64 = P.q.row(b, h, row0 + T.min(i, rows - 1))
            for d in T.serial(P.head_dim):
                QT[d, i] = f32(P.q.flat[q_row + d])
        for e in T.serial(P.head_dim_v):
            for i in T.serial(groups * G // lanes):
                for lane in T.vectorized(lanes):
                    OT[e, i * lanes + lane] = T.float32(0)
        for i in T.serial(M // lanes):
            for lane in T.vectorized(lanes):
                row_max[i * lanes + lane] = T.float32(_MINUS_INF)
                row_sum[i * lanes + lane] = T.float32(0)

        # 2. The kv tiles in which some row may see something, and in each the groups of rows that may.
        visible = T.meta_var(P.pattern.visible_range(site, row0, row0 + rows - 1))
        first_tile: T.int64 = visible[0] // N
        end_tile: T.int64 = (visible[1] + (N - 1)) // N
        for tile in T.serial(first_tile, end_tile):
            key0: T.int64 = tile * N
            keys: T.int64 = T.min(T.int64(N), P.seqlen_kv - key0)
            if converts:
                load_tile(KF, P.k, k_base + key0 * P.k.strides[2], keys, P.head_dim)
                load_tile(VF, P.v, v_base + key0 * P.v.strides[2], keys, P.head_dim_v)
            for group in T.serial(groups):
                column: T.int64 = group * G
                first: T.int64 = row0 + column
                last: T.int64 = T.min(first + G, P.seqlen_q) - 1
                live: T.bool = P.pattern.tile_live(site, first, last, key0, key0 + keys - 1)
                full: T.bool = P.pattern.tile_full(site, first, last, key0, key0 + keys - 1)
                if live:
                    steps.scores_product(QT, key, ST, acc, column, key0, keys, P.head_dim)
                    if full:
                        if not P.pattern.is_scale_only:
                            steps.apply_score(ST, P.stored_score, site, first, key0, keys)
                        steps.online_softmax(ST, row_max, row_sum, correction, highest, total, column, keys, scale)
                        steps.values_product(
                            ST, value, OT, acc, correction, column, key0, keys, P.head_dim_v, accumulate
                        )
                    else:
                        steps.apply_score(ST, P.masked_score, site, first, key0, keys)
                        steps.online_softmax(ST, row_max, row_sum, correction, highest, total, column, keys, scale)
                        steps.values_product(
                            ST, value, OT, acc, correction, column, key0, keys, P.head_dim_v, accumulate_visible
                        )

        # 3. The log-sum-exp, before row_sum becomes the divisor.
        if P.wants_lse():
            for i in T.serial(rows):
                P.lse[(b * P.heads + h) * P.seqlen_q + row0 + i] = row_max[i] * P.scale() + T.log(row_sum[i])

        # 4. Divide, transpose back, store.  A row that saw nothing has a row_sum of 0, and an output of 0.
        for i in T.serial(M // lanes):
            for lane in T.vectorized(lanes):
                row_sum[i * lanes + lane] = T.Select(
                    row_sum[i * lanes + lane] == T.float32(0), T.float32(1), row_sum[i * lanes + lane]
                )
        for e in T.serial(P.head_dim_v):
            for i in T.serial(groups * G // lanes):
                for lane in T.vectorized(lanes):
                    OT[e, i * lanes + lane] = OT[e, i * lanes + lane] / row_sum[i * lanes + lane]
        for i in T.serial(rows):
            o_row: T.int64 = P.o.row(b, h, row0 + i)
            for e in T.serial(P.head_dim_v):
                P.o.flat[o_row + e] = T.cast(OT[e, i], dtype)

    return row_tile

"""The tile program: attention's recurrence over kv tiles, with vector lanes over queries.

A work item is ``block_m`` rows of one head.  Everything that it keeps is transposed, so that a vector holds the same element
of ``lanes`` queries: ``QT[d, i]``, ``ST[j, i]``, ``OT[e, i]``.  Then ``S^T = K Q^T`` and ``O^T += V^T P^T`` multiply a vector
of queries with one broadcast element of K or V: no horizontal reduction, no packing, and any stride of K and V will do.

For each kv tile: 16-bit K and V become float32, once for all rows; then for each row group (``row_vectors`` vectors)
the product, the score and mask, the online softmax, and the second product.
"""

from __future__ import annotations

import math

from tvm.script import tirx as T

from schedules.attention import append_arguments
from schedules.families.cpu.config import Config
from schedules.families.cpu.isa import ISAS
from schedules.families.cpu.steps import accumulate, accumulate_visible, f32, make_steps
from schedules.families.cpu.vector_math import LOG2E
from schedules.pattern import Pattern, Site
from schedules.template import Program, Target, Traversal

_MINUS_INF = -math.inf


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The kernel of one pattern, in the order and layout of a template (see :mod:`schedules.template`)."""
    arguments, values = pattern.parameter_symbols()
    func = _kernel(pattern, config, ISAS[target.isa].lanes, traversal, values, name)
    itemsize = 4 if pattern.dtype == "float32" else 2
    return Program(append_arguments(func, arguments), "s_tir", alignment=itemsize, index_bits=64)


def _kernel(pattern: Pattern, config: Config, lanes: int, traversal: Traversal, values, name: str):
    M, N, R = config.block_m, config.block_n, config.tile_rows
    D, E = pattern.head_dim, pattern.head_dim_v
    dtype = pattern.dtype
    converts = dtype != "float32"
    steps = make_steps(config, lanes)
    G = steps.group
    one = T.int64(1)
    heads_outer = traversal.order == "heads_outer"
    seq_first = traversal.layout == "bshd"

    def physical(b, h, s, d):
        return (b, s, h, d) if seq_first else (b, h, s, d)

    def work_item(w, batch, heads, tiles):
        """Batch, head and row tile of a work item, in the template's order."""
        order = (batch, heads, tiles) if heads_outer else (batch, tiles, heads)
        last, middle, first = w % order[2], w // order[2] % order[1], w // (order[1] * order[2])
        tile, head = (last, middle) if heads_outer else (middle, last)
        # A mask leaves some row tiles more to do than others, and a thread gets a contiguous part of the work items: take
        # the tiles in the order first, last, second, second to last, ...
        if not pattern.is_unmasked:
            tile = T.Select(tile % 2 == 0, tile // 2, tiles - 1 - tile // 2)
        return first, head, tile

    def params_at(b, h):
        """The run-time parameters as they are for one batch and head."""
        return {p.name: values[p.name][b, h] if p.per_head else values[p.name] for p in pattern.params}

    # The scale of the scores in ST, so that exp(score) = exp2(ST * scale).
    def exponent_scale(softmax_scale):
        return softmax_scale * T.float32(LOG2E) if pattern.is_scale_only else T.float32(LOG2E)

    def score(site, row, key, s):
        return s if pattern.is_scale_only else pattern.score(site, s, row, key)

    def masked_score(site, row, key, s):
        return T.Select(pattern.mask(site, row, key), score(site, row, key, s), T.float32(_MINUS_INF))

    @T.prim_func(s_tir=True, check_well_formed=False)
    def attention(q: T.handle, k: T.handle, v: T.handle, o: T.handle, lse: T.handle, softmax_scale: T.float32):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        batch, heads, kv_heads, seqlen_q, seqlen_kv = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        head_dim, head_dim_v, lse_length = T.int64(), T.int64(), T.int64()
        q_b, q_h, q_s, k_b, k_h, k_s = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        v_b, v_h, v_s, o_b, o_h, o_s = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        Q = T.match_buffer(q, physical(batch, heads, seqlen_q, head_dim), dtype, strides=physical(q_b, q_h, q_s, one))
        K = T.match_buffer(
            k, physical(batch, kv_heads, seqlen_kv, head_dim), dtype, strides=physical(k_b, k_h, k_s, one)
        )
        VALUE = T.match_buffer(
            v, physical(batch, kv_heads, seqlen_kv, head_dim_v), dtype, strides=physical(v_b, v_h, v_s, one)
        )
        O = T.match_buffer(o, physical(batch, heads, seqlen_q, head_dim_v), dtype, strides=physical(o_b, o_h, o_s, one))
        LSE = T.match_buffer(lse, (lse_length,), "float32")
        for w in T.parallel(batch * heads * ((seqlen_q + (M - 1)) // M)):
            with T.sblock("work_item"):
                T.reads()
                T.writes()
                QT = T.sblock_alloc_buffer((D, M), "float32")
                OT = T.sblock_alloc_buffer((E, M), "float32")
                ST = T.sblock_alloc_buffer((N, G), "float32")
                KF = T.sblock_alloc_buffer((N if converts else 1, D), "float32")
                VF = T.sblock_alloc_buffer((N if converts else 1, E), "float32")
                row_max = T.sblock_alloc_buffer((M,), "float32")
                row_sum = T.sblock_alloc_buffer((M,), "float32")
                correction = T.sblock_alloc_buffer((G,), "float32", scope="local")
                highest = T.sblock_alloc_buffer((G,), "float32", scope="local")
                total = T.sblock_alloc_buffer((G,), "float32", scope="local")
                acc = T.sblock_alloc_buffer((R, G), "float32", scope="local")

                # 1. Where this work item is.
                tiles: T.int64 = (seqlen_q + (M - 1)) // M
                b: T.int64 = work_item(w, batch, heads, tiles)[0]
                h: T.int64 = work_item(w, batch, heads, tiles)[1]
                row0: T.int64 = work_item(w, batch, heads, tiles)[2] * M
                rows: T.int64 = T.min(T.int64(M), seqlen_q - row0)
                kv_head: T.int64 = h // (heads // kv_heads)
                scale: T.float32 = exponent_scale(softmax_scale)
                site = T.meta_var(
                    Site(b, h, batch, heads, kv_heads, seqlen_q, seqlen_kv, softmax_scale, params_at(b, h))
                )

                k_base: T.int64 = b * k_b + kv_head * k_h
                v_base: T.int64 = b * v_b + kv_head * v_h
                KEYS = T.decl_buffer((T.int64(1 << 60),), dtype, data=K.data)
                VALUES = T.decl_buffer((T.int64(1 << 60),), dtype, data=VALUE.data)

                # 2. Queries transposed; rows past the end repeat the last one and are never stored.
                for i in T.serial((rows + (G - 1)) // G * G):
                    for d in T.serial(head_dim):
                        QT[d, i] = f32(Q[physical(b, h, row0 + T.min(T.int64(i), rows - 1), d)])
                for e in T.serial(head_dim_v):
                    for i in T.vectorized(M):
                        OT[e, i] = T.float32(0)
                for i in T.vectorized(M):
                    row_max[i] = T.float32(_MINUS_INF)
                    row_sum[i] = T.float32(0)

                # 3. The kv tiles in which some row may see something.
                first_tile: T.int64 = pattern.visible_range(site, row0, row0 + rows - 1)[0] // N
                end_tile: T.int64 = (pattern.visible_range(site, row0, row0 + rows - 1)[1] + (N - 1)) // N
                for tile in T.serial(first_tile, end_tile):
                    key0: T.int64 = tile * N
                    keys: T.int64 = T.min(T.int64(N), seqlen_kv - key0)
                    if converts:
                        for j in T.serial(keys):
                            for d in T.serial(head_dim // 8):
                                for lane in T.vectorized(8):
                                    KF[j, d * 8 + lane] = f32(KEYS[k_base + (key0 + j) * k_s + d * 8 + lane])
                            for e in T.serial(head_dim_v // 8):
                                for lane in T.vectorized(8):
                                    VF[j, e * 8 + lane] = f32(VALUES[v_base + (key0 + j) * v_s + e * 8 + lane])
                    for group in T.serial((rows + (G - 1)) // G):
                        column: T.int64 = group * G
                        first: T.int64 = row0 + column
                        last: T.int64 = T.min(first + G, seqlen_q) - 1
                        live: T.bool = pattern.tile_live(site, first, last, key0, key0 + keys - 1)
                        full: T.bool = pattern.tile_full(site, first, last, key0, key0 + keys - 1)
                        if live:
                            key = T.meta_var(
                                (lambda j, d: KF[j, d])
                                if converts
                                else (lambda j, d: KEYS[k_base + T.min(key0 + j, seqlen_kv - 1) * k_s + d])
                            )
                            value = T.meta_var(
                                (lambda j, e: VF[j, e])
                                if converts
                                else (lambda j, e: VALUES[v_base + (key0 + j) * v_s + e])
                            )
                            steps.scores_product(QT, key, ST, acc, column, keys, head_dim)
                            if full:
                                if not pattern.is_scale_only:
                                    steps.apply_score(ST, keys, lambda s, i, j: score(site, first + i, key0 + j, s))
                                steps.online_softmax(
                                    ST, row_max, row_sum, correction, highest, total, column, keys, scale
                                )
                                steps.values_product(
                                    ST, value, OT, acc, correction, column, keys, head_dim_v, accumulate
                                )
                            else:
                                steps.apply_score(ST, keys, lambda s, i, j: masked_score(site, first + i, key0 + j, s))
                                steps.online_softmax(
                                    ST, row_max, row_sum, correction, highest, total, column, keys, scale
                                )
                                steps.values_product(
                                    ST, value, OT, acc, correction, column, keys, head_dim_v, accumulate_visible
                                )

                # 4. Divide, transpose back, store.  A row that saw nothing has a row_sum of 0 and an output of 0.
                for i in T.serial(rows):
                    divisor: T.float32 = T.Select(row_sum[i] == T.float32(0), T.float32(1), row_sum[i])
                    for e in T.serial(head_dim_v):
                        O[physical(b, h, row0 + i, e)] = T.cast(OT[e, i] / divisor, dtype)
                if lse_length >= batch * heads * seqlen_q:
                    for i in T.serial(rows):
                        LSE[(b * heads + h) * seqlen_q + row0 + i] = row_max[i] * (
                            scale * T.float32(1 / LOG2E)
                        ) + T.log(row_sum[i])

    return attention

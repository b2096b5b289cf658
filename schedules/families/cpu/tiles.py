"""Many queries: the recurrence over kv tiles, with vector lanes over queries.

A work item is ``block_m`` rows of one head.  Everything that it keeps is transposed, so that a vector holds the same
element of ``lanes`` queries: ``QT[d, i]``, ``ST[j, i]``, ``OT[e, i]``.  Then ``S^T = K Q^T`` and ``O^T += V^T P^T``
multiply a vector of queries with one broadcast element of K or V: no horizontal reductions, no packing, and any stride
of K and V will do.

For each kv tile: what the products want of K and V, once for all rows; then for each row group (``row_vectors``
vectors) the product, the score and mask, the online softmax, and the second product.  The products are those of
``floats.py``, ``pairs.py`` or ``amx.py``.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.cpu.amx import tile_products
from schedules.families.cpu.config import Config, multiplication
from schedules.families.cpu.floats import float_products
from schedules.families.cpu.geometry import Geometry
from schedules.families.cpu.isa import Isa
from schedules.families.cpu.pages import find_rows, widen_tile
from schedules.families.cpu.pairs import pair_products
from schedules.families.cpu.places import Look, Staged
from schedules.families.cpu.steps import make_steps, maxima_shape
from schedules.families.cpu.transpose import make_transposed_store, transpose_function

MULTIPLICATIONS = {"floats": float_products, "pairs": pair_products, "tiles": tile_products}


def row_tile_macro(config: Config, isa: Isa, dtype: str, head_dim: int, head_dim_v: int):
    """A macro ``(geometry, b, h, row0)`` that computes up to ``block_m`` rows from ``row0`` on."""
    M, N, R, lanes = config.block_m, config.block_n, config.tile_rows, isa.lanes
    V = config.row_vectors
    G = V * lanes
    products = MULTIPLICATIONS[multiplication(isa, dtype)](config, lanes, dtype, head_dim, head_dim_v)
    steps = make_steps(config, lanes, products.keep_awake, products.rows_awake)

    store_transposed = make_transposed_store(V, lanes)

    @T.inline
    def row_tile(call: Geometry, b, h, row0):
        T.attr(0, "pragma_import_llvm", transpose_function(lanes))
        P = T.meta_var(call.with_room(N, N))
        QT = T.sblock_alloc_buffer(*products.queries)
        KT = T.sblock_alloc_buffer(*products.keys)
        VT = T.sblock_alloc_buffer(*products.values)
        PT = T.sblock_alloc_buffer(*products.probabilities)
        state = T.sblock_alloc_buffer(*products.state)
        OT = T.sblock_alloc_buffer((M // G, head_dim_v, G), "float32")
        ST = T.sblock_alloc_buffer((N, G), "float32")
        row_max = T.sblock_alloc_buffer((M,), "float32")
        row_sum = T.sblock_alloc_buffer((M,), "float32")
        correction = T.sblock_alloc_buffer((G,), "float32", scope="local")
        highest = T.sblock_alloc_buffer(maxima_shape(config, lanes), "float32", scope="local")
        total = T.sblock_alloc_buffer((G,), "float32", scope="local")
        acc = T.sblock_alloc_buffer(products.accumulators, "float32", scope="local")
        block = T.sblock_alloc_buffer((lanes, lanes), products.queries[1], scope="local")
        result = T.sblock_alloc_buffer((lanes, lanes), "float32", scope="local")
        row = T.sblock_alloc_buffer((R,), "int64", scope="local")
        largest = T.sblock_alloc_buffer((8,), "uint16", scope="local")
        staged = T.meta_var(Staged(P.pattern.of_score, "i", lanes, G, N))
        look = T.meta_var(Look(P.pattern, "i", G, N, lanes))

        # Mutable scalars, not let-bindings: TVM's index analysis would follow those through everything below.
        rows: T.int64 = T.min(T.int64(M), P.seqlen_q - row0)
        groups: T.int64 = (rows + (G - 1)) // G
        key_rows = T.meta_var(P.key_rows(b, h))
        value_rows = T.meta_var(P.value_rows(b, h))
        k_base: T.int64 = key_rows.offset(T.int64(0), T.int64(0))
        v_base: T.int64 = value_rows.offset(T.int64(0), T.int64(0))
        kv_head: T.int64 = P.kv_head(h)
        scale: T.float32 = P.exponent_scale()
        site = T.meta_var(P.site(b, h))

        # 1. Queries transposed; rows past the end repeat the last one and are never stored.
        products.load_queries(P, QT, state, block, b, h, row0, rows, groups * G)
        for group in T.serial(groups):
            for e in T.serial(P.head_dim_v):
                for n in T.unroll(V):
                    for lane in T.vectorized(lanes):
                        OT[group, e, n * lanes + lane] = T.float32(0)
        for i in T.serial(M // lanes):
            for lane in T.vectorized(lanes):
                row_max[i * lanes + lane] = P.first_max(b, h)
                row_sum[i * lanes + lane] = P.first_sum(b, h)

        # 2. The kv tiles in which some row may see something, and in each the groups of rows that may.  Where no group
        # may after all, a tile is loaded when the first one needs it (a test that costs up to 2% elsewhere); an element
        # is written here, so that its memory is not given away.
        on_demand = T.meta_var(P.pattern.has_gaps or look.is_needed or P.bounds is not None)
        if on_demand:
            KT[0, 0] = T.cast(0, products.keys[1])
            VT[0, 0] = T.cast(0, products.values[1])
        visible = T.meta_var(P.pattern.keys_of(site, row0, row0 + rows - 1).visible)
        first_tile: T.int64 = visible[0] // N
        end_tile: T.int64 = (visible[1] + (N - 1)) // N
        for tile in T.serial(first_tile, end_tile):
            key0: T.int64 = tile * N
            keys: T.int64 = T.min(T.int64(N), P.seqlen_kv - key0)
            k_at: T.int64 = key_rows.moved(k_base, T.int64(0), key0)
            v_at: T.int64 = value_rows.moved(v_base, T.int64(0), key0)
            find_rows(P, (k_base, v_base), key0, N, T.int64(0))
            loaded: T.bool = T.bool(not on_demand)
            if not on_demand:
                widen_tile(P, keys, T.int64(0), (T.int64(0), T.int64(0), kv_head))
                products.load_tile(P, KT, VT, largest, block, k_at, v_at, keys, rows)
            for group in T.serial(groups):
                column: T.int64 = group * G
                first: T.int64 = row0 + column
                last: T.int64 = T.min(first + G, P.seqlen_q) - 1
                live: T.bool = P.tile_live(site, first, last, key0, key0 + keys - 1)
                full: T.bool = P.tile_full(site, first, last, key0, key0 + keys - 1)
                if look.is_needed:
                    if T.And(live, T.Not(full)):
                        steps.look_at(look, P, site, b, h, first, last, key0, keys)
                        live = look.any()
                        full = look.all()
                if live:
                    if on_demand:
                        if not loaded:
                            widen_tile(P, keys, T.int64(0), (T.int64(0), T.int64(0), kv_head))
                            products.load_tile(P, KT, VT, largest, block, k_at, v_at, keys, rows)
                            loaded = T.bool(True)
                    staged.fill(P, b, h, first, last + 1 - first, key0, keys)
                    products.scores(P, QT, KT, ST, acc, row, k_at, group, keys, rows)
                    if full:
                        if not P.pattern.is_scale_only:
                            steps.apply_score(ST, P.pattern, P.stored_score, site, first, key0, keys, staged, None)
                    else:
                        steps.apply_score(ST, P.pattern, P.masked_score, site, first, key0, keys, staged, look)
                    steps.online_softmax(ST, row_max, row_sum, correction, highest, total, column, keys, scale)
                    products.output(P, ST, PT, VT, OT, acc, correction, largest, v_at, group, keys, full, rows)

        products.finish(state)

        # 3. The log-sum-exp, before row_sum becomes what results are multiplied by.
        if P.wants_lse():
            for i in T.serial(rows):
                P.lse[P.lse_row(b, h) + row0 + i] = row_max[i] * P.scale() + T.log(row_sum[i])

        # 4. Transpose back, divide, store.  A row that saw nothing has a row_sum of 0, and an output of 0.
        for i in T.serial(M // lanes):
            for lane in T.vectorized(lanes):
                row_sum[i * lanes + lane] = T.Select(
                    row_sum[i * lanes + lane] == T.float32(0),
                    T.float32(1),
                    T.float32(1) / row_sum[i * lanes + lane],
                )
        store_transposed(P, OT, row_sum, result, b, h, row0, rows)

    return row_tile

"""A work item of the backward: a section of keys against a section of queries, tile by tile.

Vector lanes are over keys in the scores and over head_dim in the sums, so that a product in vector registers multiplies
one broadcast element with a vector, and no sum is ever transposed.  For each tile of keys: keys and values as the
products want them, once for all queries; then for each tile of queries that see some of them, of each query head of the
group, the scores, what they become, and the three sums.  ``dk`` and ``dv`` of the tile stay in the cache meanwhile;
``dq`` is added to in memory, by nobody else at that time (see ``kernel.py``).

=========== ========== ======================================================================
buffer      shape      holds
=========== ========== ======================================================================
S           (M, N)     raw products of queries and keys, then probabilities
dP          (M, N)     products of output gradients and values, then gradients of scaled products
dK, dV      (N, D')    sums of the tile
=========== ========== ======================================================================
"""

from __future__ import annotations

import math
from types import SimpleNamespace

from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from schedules.families.cpu.backward.amx import tile_products
from schedules.families.cpu.backward.config import Config, padded
from schedules.families.cpu.backward.floats import by_column, by_row, float_products
from schedules.families.cpu.backward.geometry import MOST_SECTIONS, SUMMED, Geometry
from schedules.families.cpu.backward.pairs import pair_products
from schedules.families.cpu.config import multiplication
from schedules.families.cpu.isa import Isa
from schedules.families.cpu.places import Look, Staged
from schedules.families.cpu.steps import f32
from schedules.families.cpu.transpose import transpose_function
from schedules.families.cpu.vector_math import exp2
from schedules.tile.score import LOG2_E, NEGATIVE_INFINITY

MULTIPLICATIONS = {"floats": float_products, "pairs": pair_products, "tiles": tile_products}
#: The bits of infinity.
INFINITY = {"uint32": 0x7F800000, "uint16": 0x7F80}


def section_macro(pattern, config: Config, isa: Isa):
    """A macro ``(geometry, b, g, first_key, end_key, first_row, end_row, slot, begins)``.

    Keys are of head ``g``, rows of every query head that reads it; ``slot`` is the number of the section of keys, and
    ``begins`` says that nothing has been summed for these keys yet.
    """
    dtype, head_dim, head_dim_v = pattern.dtype, pattern.head_dim, pattern.head_dim_v
    M, N, lanes = config.block_m, config.block_n, isa.lanes
    D, E = padded(head_dim, config, isa), padded(head_dim_v, config, isa)
    products = MULTIPLICATIONS[multiplication(isa, dtype)](config, isa, dtype, head_dim, head_dim_v)
    tables = [p for p in pattern.learnt if p.rank]
    asked = [p.name for p in pattern.learnt if p.of_gradient in SUMMED and not p.rank]
    spread = [p for p in pattern.learnt if p.of_gradient not in SUMMED]
    learns = bool(asked)
    learnt = -(-max(1, len(asked)) * lanes // 8) * 8  # numbers are cleared by eights
    bits, step = products.bits, products.columns
    buffers = {
        **products.buffers,
        "S": ((M * N,), "float32"),
        "dP": ((M * N,), "float32"),
        "dK": ((N * D,), "float32"),
        "dV": ((N * E,), "float32"),
        **{f"d_{p.name}": ((N,), "float32") for p in spread},
        **{f"d_{p.name}{n}": ((N,), "float32") for p in tables for n in range(pattern.elements_read(p.name))},
    }
    registers = {
        "acc": ((config.tile_rows * config.row_vectors * lanes,), "float32"),
        **dict.fromkeys(("product", "prob", "dscore"), ((lanes,), "float32")),
        "parameters": ((learnt,), "float32"),
        "of_keys": ((8,), bits),
        "of_queries": ((8,), bits),
    }

    def score(P: Geometry, site, look, product, i, row, key, lane, c, begin, end, full, chosen):
        """The score of row ``i`` and key ``key + lane``, −inf where it isn't seen."""
        value = P.score(site, product, i, key + lane, chosen)
        if full:
            return value
        if look.is_needed:
            visible = look.seen(row * N + c * lanes + lane)["seen"]
        elif pattern.is_interval:
            column = T.cast(c * lanes, "int32") + lane
            visible = T.And(column >= begin, column < end)
        else:
            visible = pattern.mask(site, i, key + lane)
        return T.Select(visible, value, T.float32(NEGATIVE_INFINITY))

    def add_to_parameters(P: Geometry, local, site, i, key, chosen):
        """A vector's share in the gradients of parameters."""
        for n, param in enumerate(asked):
            with T.vectorized(lanes) as lane:
                slope = P.parameter_gradient(param, site(lane), local.product[lane], i, key + lane, chosen)
                share = if_weight(local.prob[lane], local.dscore[lane] * slope)
                T.buffer_store(local.parameters, local.parameters[n * lanes + lane] + share, [n * lanes + lane])

    def shares_of_places(P: Geometry, t, local, site, i, key, column, chosen):
        """A vector's shares in the gradients of parameters over queries or keys, and of tables."""
        for param in spread:
            with T.vectorized(lanes) as lane:
                slope = P.parameter_gradient(param.name, site(lane), local.product[lane], i, key + lane, chosen)
                share = if_weight(local.prob[lane], local.dscore[lane] * slope)
                T.buffer_store(vars(t)[f"d_{param.name}"], share, [column + lane])
        for param in tables:
            for n in range(pattern.elements_read(param.name, chosen)):
                with T.vectorized(lanes) as lane:
                    read = P.table_gradients(param.name, site(lane), local.product[lane], i, key + lane, chosen)
                    _, slope = read[n]
                    share = if_weight(local.prob[lane], local.dscore[lane] * slope)
                    T.buffer_store(vars(t)[f"d_{param.name}{n}"], share, [column + lane])

    def add_to_places(P: Geometry, t, site, i, key0, columns, chosen):
        """Add a row's shares to those gradients: to a query's, or to each key's; or to elements of tables."""
        for param in spread:
            shares, out = vars(t)[f"d_{param.name}"], P.gradients[param.name]
            with T.serial(T.Select(P.wants(param), columns, T.int64(0))) as j:
                at = {"b": site.b, "h": site.h, "i": i, "j": key0 + j}
                place = [at[a] for a in param.of_gradient]
                T.buffer_store(out, out[tuple(place)] + shares[j], place)
        for param in tables:
            with T.serial(T.Select(P.wants(param), columns, T.int64(0))) as j:
                read = P.table_gradients(param.name, site, T.float32(0), i, key0 + j, chosen)
                for n, (index, _) in enumerate(read):
                    P.tables.add(param, index, vars(t)[f"d_{param.name}{n}"][j])

    def at_vector(staged, site, c):
        """The call at a lane of a vector."""
        return lambda lane: staged.site(site, c * lanes + lane)

    def look_at(look, P, site, row0, rows, key0, columns):
        """See what a tile has to see."""
        look.begin()
        with T.serial(rows) as i:
            look.staged.fill(P, site.b, site.h, key0, columns, row0 + i)
            with T.serial((columns + (step - 1)) // step * (step // lanes)) as c:  # all that ``turn`` reads
                first = c * lanes
                look.row(
                    i * N + first,
                    1,
                    lambda x: pattern.mask(look.staged.site(site, first + x), row0 + i, key0 + first + x),
                )

    @T.inline
    def turn(P: Geometry, t, local, at_head, full, lse_at, row0, key0, rows, columns, chosen):
        """Probabilities into ``S``, gradients of scaled products into ``dP``: 0 of a key without weight."""
        for i in T.serial(rows):
            products.keep_awake()
            at_head.staged.fill(P, at_head.site.b, at_head.site.h, key0, columns, row0 + i)
            # A row that saw nothing subtracts +inf in place of −inf: its probabilities are 0.
            lse: T.float32 = P.lse[lse_at + i]
            subtract: T.float32 = T.Select(lse == T.float32(NEGATIVE_INFINITY), T.float32(math.inf), lse)
            difference: T.float32 = P.delta[lse_at + i]
            # Where a row sees one interval of keys, two comparisons of 32-bit numbers say which.
            seen = T.meta_var(pattern.keys_of(at_head.site, row0 + i, row0 + i).visible)
            begin: T.int32 = T.cast(T.min(T.max(seen[0] - key0, 0), N), "int32")
            end: T.int32 = T.cast(T.min(T.max(seen[1] - key0, 0), N), "int32")
            for c in T.serial((columns + (step - 1)) // step * (step // lanes)):
                at: T.int64 = i * N + c * lanes
                key: T.int64 = key0 + c * lanes
                for lane in T.vectorized(lanes):
                    local.product[lane] = t.S[at + lane]
                here = T.meta_var(at_vector(at_head.staged, at_head.site, c))
                for lane in T.vectorized(lanes):
                    local.prob[lane] = exp2(
                        (
                            score(
                                *(
                                    P,
                                    here(lane),
                                    at_head.look,
                                    local.product[lane],
                                    row0 + i,
                                    i,
                                    key,
                                    lane,
                                    c,
                                    begin,
                                    end,
                                ),
                                *(full, chosen),
                            )
                            - subtract
                        )
                        * T.float32(LOG2_E)
                    )
                for lane in T.vectorized(lanes):
                    t.S[at + lane] = local.prob[lane]
                for lane in T.vectorized(lanes):
                    local.dscore[lane] = if_weight(local.prob[lane], local.prob[lane] * (t.dP[at + lane] - difference))
                for lane in T.vectorized(lanes):
                    t.dP[at + lane] = if_weight(
                        local.prob[lane],
                        local.dscore[lane]
                        * P.score_gradient(here(lane), local.product[lane], row0 + i, key + lane, chosen),
                    )
                add_to_parameters(P, local, here, row0 + i, key, chosen)
                shares_of_places(P, t, local, here, row0 + i, key, c * lanes, chosen)
            add_to_places(P, t, at_head.site, row0 + i, key0, columns, chosen)

    @T.inline
    def turn_chosen(P: Geometry, t, local, at_head, full, lse_at, row0, key0, rows, columns):
        if pattern.has_choice:
            if pattern.choice(at_head.site):  # asked once, not for every score
                turn(P, t, local, at_head, full, lse_at, row0, key0, rows, columns, True)
            else:
                turn(P, t, local, at_head, full, lse_at, row0, key0, rows, columns, False)
        else:
            turn(P, t, local, at_head, full, lse_at, row0, key0, rows, columns, None)

    @T.inline
    def add_where_seen(out, base, stride, left, tensor, at, rows, width, depth):
        """``out[i, d] += sum_k left(i, k) * tensor[k, d]`` of those with weight, beside which anything may stand."""
        for i in T.serial(rows):
            for k in T.serial(depth):
                for d in T.serial(width // 8):
                    for lane in T.vectorized(8):
                        out[base + i * stride + d * 8 + lane] += if_weight(
                            left(i, k), left(i, k) * f32(tensor.flat[at + k * tensor.strides[2] + d * 8 + lane])
                        )

    @T.inline
    def tile_gradients(P: Geometry, t, local, full, q_at, do_at, k_at, dq_at, rows, keys):
        if full or (is_finite(local.of_keys) and is_finite(local.of_queries)):
            products.gradients(P, t, local.acc, dq_at, P.width, rows, keys)
        else:
            add_where_seen(t.dV, 0, E, by_column(t.S, N), P.do, do_at, keys, P.head_dim_v, rows)
            add_where_seen(t.dK, 0, D, by_column(t.dP, N), P.q, q_at, keys, P.head_dim, rows)
            add_where_seen(P.dq_sum, dq_at, P.width, by_row(t.dP, N), P.k, k_at, rows, P.head_dim, keys)

    @T.inline
    def clear(buffer, count, bits):
        for x in T.serial(count // 8):
            for lane in T.vectorized(8):
                buffer[x * 8 + lane] = T.cast(0, bits)

    @T.inline
    def store_sum(out, at, width, tile, stride, keys, begins, seen):
        """Add a tile's sums, if anything was ``seen``, to those of earlier sections of queries."""
        if begins:
            for j in T.serial(keys):
                for d in T.serial(width // 8):
                    for lane in T.vectorized(8):
                        out[at + j * width + d * 8 + lane] = T.Select(
                            seen, tile[j * stride + d * 8 + lane], T.float32(0)
                        )
        else:
            if seen:
                for j in T.serial(keys):
                    for d in T.serial(width // 8):
                        for lane in T.vectorized(8):
                            out[at + j * width + d * 8 + lane] += tile[j * stride + d * 8 + lane]

    def store_parameters(P: Geometry, local, b, h, slot):
        """Add the sums over lanes to a head's."""
        at = (b * P.heads + h) * MOST_SECTIONS + slot
        for n, param in enumerate(asked):
            total = local.parameters[n * lanes]
            for lane in range(1, lanes):
                total = total + local.parameters[n * lanes + lane]
            T.buffer_store(P.sums[param], P.sums[param][at] + total, [at])

    @T.inline
    def section(P: Geometry, b, g, first_key, end_key, first_row, end_row, slot, begins):
        T.attr(0, "pragma_import_llvm", transpose_function(lanes))
        t = T.meta_var(allocate(buffers))
        local = T.meta_var(allocate(registers, "local"))
        staged = T.meta_var(Staged(pattern.of_score, "j", lanes, N))
        look = T.meta_var(Look(pattern, "j", N, M, lanes))
        products.begin(t)
        key_rows = T.meta_var(P.key_rows(b, g * P.group))
        value_rows = T.meta_var(P.value_rows(b, g * P.group))
        for key_tile in T.serial((T.max(end_key - first_key, T.int64(0)) + (N - 1)) // N):
            key0: T.int64 = first_key + key_tile * N
            keys: T.int64 = T.min(T.int64(N), end_key - key0)
            k_at: T.int64 = key_rows.offset(key0, T.int64(0))
            v_at: T.int64 = value_rows.offset(key0, T.int64(0))
            seen: T.bool = T.bool(False)
            for r in T.serial(P.group):
                h: T.int64 = g * P.group + r
                site = T.meta_var(P.site(b, h))
                visible = T.meta_var(pattern.rows_of(site, key0, key0 + keys - 1).visible)
                first: T.int64 = T.max(visible[0], first_row) - first_row
                end: T.int64 = T.min(visible[1], end_row) - first_row
                if learns:
                    clear(local.parameters, learnt, "float32")
                for row_tile in T.serial(first // M, T.max(first // M, (end + (M - 1)) // M)):
                    row0: T.int64 = first_row + row_tile * M
                    rows: T.int64 = T.min(T.int64(M), end_row - row0)
                    live: T.bool = P.tile_live(site, row0, row0 + rows - 1, key0, key0 + keys - 1)
                    full: T.bool = P.tile_full(site, row0, row0 + rows - 1, key0, key0 + (N - 1))
                    if look.is_needed:
                        if T.And(live, T.Not(full)):
                            look_at(look, P, site, row0, rows, key0, keys)
                            live = look.any()
                            full = T.And(look.all(), keys == N)
                    if live:
                        # 1. Keys, once; queries and the gradients of their outputs.
                        if not seen:
                            clear(local.of_keys, 8, bits)
                            products.load_keys(P, t, k_at, v_at, keys, local.of_keys)
                            clear(t.dK, N * D, "float32")
                            clear(t.dV, N * E, "float32")
                            seen = T.bool(True)
                        q_at: T.int64 = P.q.row(b, h, row0)
                        do_at: T.int64 = P.do.row(b, h, row0)
                        lse_at: T.int64 = P.lse_row(b, h) + row0
                        clear(local.of_queries, 8, bits)
                        products.load_queries(P, t, q_at, do_at, rows, local.of_queries)
                        # 2. Scores, and what they become, up to the last key that a row may see.
                        at_head = T.meta_var(SimpleNamespace(site=site, staged=staged, look=look))
                        ends = T.meta_var(pattern.keys_of(site, row0, row0 + rows - 1).visible[1])
                        near: T.int64 = T.min(keys, T.max(ends - key0, T.int64(1)))
                        products.scores(P, t, local.acc, rows, near)
                        if full:
                            turn_chosen(P, t, local, at_head, True, lse_at, row0, key0, rows, near)
                        else:
                            turn_chosen(P, t, local, at_head, False, lse_at, row0, key0, rows, near)
                        # 3. The three sums.
                        tile_gradients(P, t, local, full, q_at, do_at, k_at, lse_at * P.width, rows, near)
                if learns:
                    store_parameters(P, local, b, h, slot)
            dk_at: T.int64 = (P.key_row(b, g) + key0) * P.width
            dv_at: T.int64 = (P.key_row(b, g) + key0) * P.width_v
            store_sum(P.dk_sum, dk_at, P.width, t.dK, D, keys, begins, seen)
            store_sum(P.dv_sum, dv_at, P.width_v, t.dV, E, keys, begins, seen)
        products.finish(t)

    return section


def allocate(shapes, scope: str = "global") -> SimpleNamespace:
    """Buffers of a work item by name, from their shapes and dtypes."""
    buffers = {}
    for name, (shape, dtype) in shapes.items():
        buffers[name] = T.sblock_alloc_buffer(shape, dtype, scope=scope)
        IRBuilder.name(name, buffers[name])
    return SimpleNamespace(**buffers)


def if_weight(prob, value):
    """``value``, or 0 where a key has no weight, whatever stands beside it."""
    return T.Select(prob == T.float32(0), T.float32(0), value)


def is_finite(largest):
    """Whether eight largest magnitudes, as bits, are those of finite numbers."""
    bound = largest[0]
    for lane in range(1, 8):
        bound = T.max(bound, largest[lane])
    return bound < T.cast(INFINITY[str(largest.dtype)], str(largest.dtype))

"""A work item of few queries: one part of the keys of some heads, for all query heads that read them.

Vector lanes are over head_dim in both products, and over keys between them.  A row is a query of a query head; it gets
the same bits in whatever block of rows it is, and with whatever other rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder

from schedules.families.cpu.ahead import elements_of_line, fetch
from schedules.families.cpu.decode.products import ROWS, products
from schedules.families.cpu.decode.vectors import largest, total
from schedules.families.cpu.few import FEW, Split
from schedules.families.cpu.geometry import Geometry, Tensor
from schedules.families.cpu.isa import Isa
from schedules.families.cpu.pages import find_rows, widen_tile
from schedules.families.cpu.steps import finite_or_zero
from schedules.families.cpu.vector_math import exp2
from schedules.tile.score import NEGATIVE_INFINITY


@dataclass(frozen=True)
class Ahead:
    """What is fetched while head number ``g`` of ``kv_count`` is computed: its share of the tile that begins at
    ``key0``, whose rows were looked up; nothing if these aren't the first rows of the head."""

    P: Geometry
    k_first: Expr
    v_first: Expr
    key0: Expr
    g: Expr
    kv_count: Expr
    is_first: Expr


def _sums(row: int, count: int) -> tirx.Buffer:
    """The sums of a row, to be kept in registers: of a buffer of 1 KB and more TVM would make memory."""
    buffer = T.sblock_alloc_buffer((count,), "float32", scope="local")
    IRBuilder.name(f"sums{row}", buffer)
    return buffer


def group_macro(isa: Isa, dtype: str, head_dim: int, head_dim_v: int, split: Split):
    """A macro ``part(geometry, workspace, b, kv_head, p, count)``; ``workspace`` as in ``few.py``."""
    do = products(isa, dtype, head_dim, head_dim_v)
    W, N = do.lanes, do.tile
    chunks = N // W

    @T.inline
    def apply_to_elements(S, s0, score, site, r, i, key0, chosen):
        for c in T.unroll(chunks):
            for lane in T.vectorized(W):
                S[s0 + r * N + c * W + lane] = score(site, S[s0 + r * N + c * W + lane], i, key0 + c * W + lane, chosen)

    @T.inline
    def apply_score(S, s0, pattern, score, site, r, i, key0):
        if pattern.has_choice:
            if pattern.choice(site):  # asked once, not for every score
                apply_to_elements(S, s0, score, site, r, i, key0, True)
            else:
                apply_to_elements(S, s0, score, site, r, i, key0, False)
        else:
            apply_to_elements(S, s0, score, site, r, i, key0, None)

    @T.inline
    def softmax(S, s0, lanewise, maxima, sums, factor, r, row, scale):
        """Probabilities of a tile into row ``r`` of ``S``; maximum and sum of its ``row`` follow, and ``factor``."""
        for lane in T.vectorized(W):
            lanewise[lane] = S[s0 + r * N + lane]
        for c in T.unroll(1, chunks):
            for lane in T.vectorized(W):
                lanewise[lane] = T.max(lanewise[lane], S[s0 + r * N + c * W + lane])
        highest: T.float32 = T.max(maxima[row], largest(lanewise[T.Ramp(0, 1, W)]))
        subtract: T.float32 = finite_or_zero(highest)
        correction: T.float32 = exp2((maxima[row] - subtract) * scale)
        maxima[row] = highest
        for lane in T.vectorized(W):
            lanewise[lane] = T.float32(0)
        for c in T.unroll(chunks):
            for lane in T.vectorized(W):
                S[s0 + r * N + c * W + lane] = exp2((S[s0 + r * N + c * W + lane] - subtract) * scale)
                lanewise[lane] += S[s0 + r * N + c * W + lane]
        sums[row] = sums[row] * correction + total(lanewise[T.Ramp(0, 1, W)])
        factor[r] = correction

    @T.inline
    def fetch_rows(tensor: Tensor, base, key, begin, end, width, heads):
        """Ask for the cache lines of the rows ``begin`` to ``end`` from ``key`` on, those of so many heads."""
        size = T.meta_var(elements_of_line(tensor.in_memory(base, key)[0]))
        beside: T.bool = tensor.strides[1] == width
        runs: T.int64 = T.Select(beside, T.int64(1), heads)
        lines: T.int64 = (width * T.Select(beside, heads, T.int64(1)) + (size - 1)) // size
        for j in T.serial(begin, end):
            for run in T.serial(runs):
                for line in T.serial(lines):
                    memory = T.meta_var(tensor.in_memory(base + run * tensor.strides[1], key, j))
                    fetch(memory[0], memory[1] + line * size)

    def share_of(ahead, begin, number):
        """Which keys of the next tile are fetched while a head is computed with ``number`` keys from ``begin`` on."""
        step = ahead.g * N + begin
        return step // ahead.kv_count, (step + number) // ahead.kv_count

    def fetch_share(ahead, of: str):
        """A macro that fetches the share of keys (``"k"``) or values of some of this tile's keys, and whether to."""
        P = ahead.P
        tensor, first = (P.k, ahead.k_first) if of == "k" else (P.v, ahead.v_first)
        width = P.head_dim if of == "k" else P.head_dim_v
        in_keys = of == "v" and P.v.flat.data.same_as(P.k.flat.data)  # they come with the keys

        @T.inline
        def macro(begin, number):
            bounds = T.meta_var(share_of(ahead, begin, number))
            fetch_rows(tensor, tensor.base(first, 0), ahead.key0, *bounds, width, ahead.kv_count)

        return SimpleNamespace(macro=macro, wanted=T.bool(False) if in_keys else ahead.is_first)

    @T.inline
    def block(P: Geometry, workspace, scratch, places, b, row0, number, rows_of_head, ahead, bases, key0, keys, scale):
        """What block ``number`` of a head, of the rows from ``row0`` on, does with a tile."""
        outputs, maxima, sums = workspace
        QW, KW, VW, S, PW, acc, key_at, added, lanewise, factor, live, at = scratch
        queries, heads, rows_of_parts = places
        k_base, v_base = bases
        rows: T.int64 = T.min(T.int64(ROWS), rows_of_head - number * ROWS)
        s0: T.int64 = number % do.blocks * (ROWS * N)
        count = T.meta_var((rows_of_head + (ROWS - 1)) // ROWS)
        do.scores(P, QW, KW, S, acc, key_at, row0 // ROWS, number, count, k_base, key0, keys, fetch_share(ahead, "k"))
        all_full: T.bool = T.bool(True)
        for r in T.serial(rows):
            i: T.int64 = queries[row0 + r]
            h: T.int64 = heads[row0 + r]
            site = T.meta_var(P.site(b, h))
            at[r] = rows_of_parts[row0 + r]
            sees: T.bool = P.pattern.tile_live(site, i, i, key0, key0 + keys - 1)
            full: T.bool = P.pattern.tile_full(site, i, i, key0, key0 + keys - 1)
            all_full = T.And(all_full, full)
            live[r] = T.cast(sees, "int32")
            if sees:
                if full:
                    if not P.pattern.is_scale_only:
                        apply_score(S, s0, P.pattern, P.stored_score, site, r, i, key0)
                else:
                    apply_score(S, s0, P.pattern, P.masked_score, site, r, i, key0)
                for j in T.serial(keys, N):
                    S[s0 + r * N + j] = T.float32(NEGATIVE_INFINITY)
                softmax(S, s0, lanewise, maxima, sums, factor, r, at[r], scale)
            else:
                for j in T.serial(N):
                    S[s0 + r * N + j] = T.float32(0)
        do.round_probabilities(S, s0, PW, rows)
        of_block = T.meta_var((S, s0, PW, acc, added, at, factor, live))
        do.output(
            *(P, of_block, outputs, VW, rows, rows_of_head, all_full, ahead.is_first, v_base, key0, keys),
            fetch_share(ahead, "v"),
        )

    @T.inline
    def part(call: Geometry, workspace, b, kv_first, kv_count, p, count):
        outputs, maxima, sums = workspace
        P = T.meta_var(call.with_room(2 * N, N))
        group = T.meta_var(P.heads // P.kv_heads)
        most = T.meta_var(FEW * P.heads + (ROWS - 1) * P.kv_heads)  # blocks of each head of keys are its own
        QW = T.sblock_alloc_buffer((most // ROWS * do.queries,), do.word)
        KW = T.sblock_alloc_buffer((do.keys[0],), do.keys[1])
        VW = T.sblock_alloc_buffer((do.values[0],), do.values[1])
        # Not with the scratch of tiles: TVM would put them where functions outside TIR find other dtypes.
        S = T.sblock_alloc_buffer((do.scores_size,), "float32", scope="local")
        PW = T.sblock_alloc_buffer((do.probabilities[0],), do.probabilities[1], scope="local")
        queries = T.sblock_alloc_buffer((most,), "int64")
        heads = T.sblock_alloc_buffer((most,), "int64")
        rows_of_parts = T.sblock_alloc_buffer((most,), "int64")
        acc = T.meta_var([_sums(r, do.sums) for r in range(ROWS)])
        key_at = T.sblock_alloc_buffer((ROWS,), "int64", scope="local")
        added = T.sblock_alloc_buffer((ROWS * do.sums,), "float32", scope="local")
        lanewise = T.sblock_alloc_buffer((W,), "float32", scope="local")
        factor = T.sblock_alloc_buffer((ROWS,), "float32", scope="local")
        live = T.sblock_alloc_buffer((ROWS,), "int32", scope="local")
        at = T.sblock_alloc_buffer((ROWS,), "int64", scope="local")
        scratch = T.meta_var((QW, KW, VW, S, PW, acc, key_at, added, lanewise, factor, live, at))
        places = T.meta_var((queries, heads, rows_of_parts))
        h0: T.int64 = kv_first * group
        rows: T.int64 = P.seqlen_q * group
        places_of_head: T.int64 = (rows + (ROWS - 1)) // ROWS * ROWS
        k_first: T.int64 = P.key_rows(b, h0).offset(T.int64(0), T.int64(0))
        v_first: T.int64 = P.value_rows(b, h0).offset(T.int64(0), T.int64(0))
        scale: T.float32 = P.exponent_scale()
        first: T.int64 = P.seqlen_kv
        end: T.int64 = T.int64(0)

        # 1. Queries as they are multiplied, empty results, and which keys some row may see.
        for g in T.serial(kv_count * group):
            visible = T.meta_var(P.pattern.keys_of(P.site(b, h0 + g), T.int64(0), P.seqlen_q - 1).visible)
            first = T.min(first, visible[0])
            end = T.max(end, visible[1])
            for i in T.serial(P.seqlen_q):
                r: T.int64 = g // group * places_of_head + i * group + g % group
                place: T.int64 = P.part_row(b, h0 + g, p, count) + i
                queries[r] = i
                heads[r] = h0 + g
                rows_of_parts[r] = place
                do.load_query(P, QW, r, P.q.row(b, h0 + g, i))
                maxima[place] = T.float32(NEGATIVE_INFINITY)
                sums[place] = T.float32(0)
                for e in T.serial(P.head_dim_v):
                    outputs[place * P.head_dim_v + e] = T.float32(0)
        for g in T.serial(kv_count):
            for r in T.serial(rows, places_of_head):
                do.clear_query(P, QW, g * places_of_head + r)
        do.clear_tile(P, VW)

        # 2. This part's share of the tiles of keys: of each all heads, and of these all rows.  The next tile's rows are
        # looked up and fetched meanwhile, those of all heads for a key, as they may lie beside each other.
        first_tile: T.int64 = first // N
        tiles: T.int64 = (end + (N - 1)) // N - first_tile
        mine = T.meta_var(split.tiles(N, first_tile, tiles, p, count))
        if P.is_paged:
            find_rows(P, (k_first, v_first), mine[0] * N, N, T.bitwise_and(mine[0] * N, T.int64(2 * N - 1)))
        for tile in T.serial(mine[0], mine[1]):
            key0: T.int64 = tile * N
            keys: T.int64 = T.min(T.int64(N), P.seqlen_kv - key0)
            find_rows(P, (k_first, v_first), key0 + N, N, T.bitwise_and(key0 + N, T.int64(2 * N - 1)))
            for g in T.serial(kv_count):
                k_base: T.int64 = P.k.base(k_first, g)
                v_base: T.int64 = P.v.base(v_first, g)
                widen_tile(P, keys, T.bitwise_and(key0, T.int64(2 * N - 1)), (k_base, v_base, kv_first + g))
                do.load_keys(P, KW, k_base, key0, keys)

                for quad in T.serial(places_of_head // ROWS):
                    row0 = T.meta_var(g * places_of_head + quad * ROWS)
                    ahead = T.meta_var(Ahead(P, k_first, v_first, key0 + N, g, kv_count, quad == 0))
                    block(
                        *(P, workspace, scratch, places, b, row0, quad, rows, ahead),
                        *((k_base, v_base), key0, keys, scale),
                    )

    return part

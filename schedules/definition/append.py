"""The operators before attention over a cache: new queries and keys are turned, new keys and values put into it."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition import blocks
from schedules.definition.attention import scratch
from schedules.definition.blocks import Formula, Rotation, Sizes
from schedules.definition.cache import STORED
from schedules.definition.operator import Symbols


def append(formula: Formula, symbols: Symbols) -> PrimFunc:
    """Turned queries, and a cache of their dtype."""
    index_dtype, dtype = formula.index_dtype, formula.dtype
    D, E = (tirx.IntImm(index_dtype, x) for x in (formula.head_dim, formula.head_dim_v))

    @T.prim_func(s_tir=True, check_well_formed=False)
    def append(
        q: T.handle,
        o: T.handle,
        k_new: T.handle,
        v_new: T.handle,
        k: T.handle,
        v: T.handle,
        cu_seqlens_q: T.handle,
        cu_seqlens_k: T.handle,
        cache_seqlens: T.handle,
        rotary_seqlens: T.handle,
        page_table: T.handle,
        rotary_cos: T.handle,
        rotary_sin: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "append"})
        batch, starts = T.Var("batch", index_dtype), T.Var("starts", index_dtype)
        heads, kv_heads = T.Var("heads", index_dtype), T.Var("kv_heads", index_dtype)
        total_q, total_new = T.Var("total_q", index_dtype), T.Var("total_new", index_dtype)
        pages, page_size = T.Var("pages", index_dtype), T.Var("page_size", index_dtype)
        pages_per_sequence = T.Var("pages_per_sequence", index_dtype)
        positions, half = T.Var("positions", index_dtype), T.Var("half", index_dtype)
        Q = T.match_buffer(q, (total_q, heads, D), dtype)
        O = T.match_buffer(o, (total_q, heads, D), dtype)
        K_new = T.match_buffer(k_new, (total_new, kv_heads, D), dtype)
        V_new = T.match_buffer(v_new, (total_new, kv_heads, E), dtype)
        K = T.match_buffer(k, (pages, page_size, kv_heads, D), dtype)
        V = T.match_buffer(v, (pages, page_size, kv_heads, E), dtype)
        q_starts = T.match_buffer(cu_seqlens_q, (starts,), "int32")
        k_starts = T.match_buffer(cu_seqlens_k, (starts,), "int32")
        before = T.match_buffer(cache_seqlens, (batch,), "int32")
        first = T.match_buffer(rotary_seqlens, (batch,), "int32")
        table = T.match_buffer(page_table, (batch, pages_per_sequence), "int32")
        cos = T.match_buffer(rotary_cos, (positions, half), dtype)
        sin = T.match_buffer(rotary_sin, (positions, half), dtype)
        n = T.meta_var(Sizes(batch, heads, total_q, E, kv_heads, total_new, D))
        rotation = T.meta_var(Rotation(cos, sin, symbols.scalars["turns"], dtype))
        _turn_and_append((Q, K_new, V_new), O, (K, V), (q_starts, k_starts), before, first, table, rotation, n, symbols)

    return append


def append_scaled(formula: Formula, symbols: Symbols) -> PrimFunc:
    """The same with a cache of 8 bits (:mod:`schedules.definition.cache`), and scales by page and head."""
    index_dtype, dtype, stored = formula.index_dtype, formula.dtype, STORED[symbols.cache]
    D, E = (tirx.IntImm(index_dtype, x) for x in (formula.head_dim, formula.head_dim_v))

    @T.prim_func(s_tir=True, check_well_formed=False)
    def append_scaled(
        q: T.handle,
        o: T.handle,
        k_new: T.handle,
        v_new: T.handle,
        k: T.handle,
        v: T.handle,
        cu_seqlens_q: T.handle,
        cu_seqlens_k: T.handle,
        cache_seqlens: T.handle,
        rotary_seqlens: T.handle,
        page_table: T.handle,
        rotary_cos: T.handle,
        rotary_sin: T.handle,
        k_scale: T.handle,
        v_scale: T.handle,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "append_scaled"})
        batch, starts = T.Var("batch", index_dtype), T.Var("starts", index_dtype)
        heads, kv_heads = T.Var("heads", index_dtype), T.Var("kv_heads", index_dtype)
        total_q, total_new = T.Var("total_q", index_dtype), T.Var("total_new", index_dtype)
        pages, page_size = T.Var("pages", index_dtype), T.Var("page_size", index_dtype)
        pages_per_sequence = T.Var("pages_per_sequence", index_dtype)
        positions, half = T.Var("positions", index_dtype), T.Var("half", index_dtype)
        Q = T.match_buffer(q, (total_q, heads, D), dtype)
        O = T.match_buffer(o, (total_q, heads, D), dtype)
        K_new = T.match_buffer(k_new, (total_new, kv_heads, D), dtype)
        V_new = T.match_buffer(v_new, (total_new, kv_heads, E), dtype)
        K = T.match_buffer(k, (pages, page_size, kv_heads, D), stored)
        V = T.match_buffer(v, (pages, page_size, kv_heads, E), stored)
        q_starts = T.match_buffer(cu_seqlens_q, (starts,), "int32")
        k_starts = T.match_buffer(cu_seqlens_k, (starts,), "int32")
        before = T.match_buffer(cache_seqlens, (batch,), "int32")
        first = T.match_buffer(rotary_seqlens, (batch,), "int32")
        table = T.match_buffer(page_table, (batch, pages_per_sequence), "int32")
        cos = T.match_buffer(rotary_cos, (positions, half), dtype)
        sin = T.match_buffer(rotary_sin, (positions, half), dtype)
        k_scales = T.match_buffer(k_scale, (pages, kv_heads), "float32")
        v_scales = T.match_buffer(v_scale, (pages, kv_heads), "float32")
        n = T.meta_var(Sizes(batch, heads, total_q, E, kv_heads, total_new, D))
        rotation = T.meta_var(Rotation(cos, sin, symbols.scalars["turns"], dtype))
        scales = T.meta_var((k_scales, v_scales))
        _turn_and_append(
            *((Q, K_new, V_new), O, (K, V), (q_starts, k_starts), before, first, table, rotation, n, symbols),
            *(scales, symbols.cache),
        )

    return append_scaled


def _turn_and_append(
    new, O, caches, starts, before, first, table, rotation: Rotation, n: Sizes, symbols: Symbols, scales=None, cache=""
) -> None:
    """The blocks of both: rows are turned, and every place of the cache gets the last row that comes to it."""
    Q, K_new, V_new = new
    K, V = caches
    index_dtype = str(n.batch.ty.dtype)
    of_q, of_k, places = (scratch(name, rows, index_dtype) for name, rows in (
        ("q_sequence", (n.seqlen_q,)), ("k_sequence", (n.seqlen_kv,)), ("place", (n.seqlen_kv,))
    ))  # fmt: skip
    turned = scratch("k_turned", tuple(K_new.shape), K_new.dtype)
    rows = scratch("row", tuple(K.shape[:2]), index_dtype)
    blocks.sequence_of("q_sequence", of_q, starts[0], n, "t")
    blocks.sequence_of("k_sequence", of_k, starts[1], n, "u")
    blocks.turned("o", O, Q, of_q, starts[0], first, symbols.scalars["along"], rotation, n, "thd")
    blocks.turned("k_turned", turned, K_new, of_k, starts[1], first, None, rotation, n, "ugd")
    blocks.place(places, of_k, starts[1], before, table, K.shape[0], K.shape[1], n)
    blocks.last_row(rows, places, n)
    how, scales = ("put", (None, None)) if scales is None else ("quantised", scales)
    blocks.put(f"k_{how}", K, turned, rows, n, "d", scales[0], cache)
    blocks.put(f"v_{how}", V, V_new, rows, n, "e", scales[1], cache)

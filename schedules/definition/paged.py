"""The operators over sequences of different lengths whose keys lie on pages of a cache, of q's dtype or of 8 bits."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition import attention, blocks
from schedules.definition.attention import scratch
from schedules.definition.blocks import Formula, Sizes
from schedules.definition.cache import STORED
from schedules.definition.operator import Symbols
from schedules.definition.ragged import Batch


def paged(formula: Formula, symbols: Symbols) -> PrimFunc:
    """Output and log-sum-exp of ragged queries over paged keys."""
    index_dtype, dtype = formula.index_dtype, formula.dtype
    D, E = (tirx.IntImm(index_dtype, x) for x in (formula.head_dim, formula.head_dim_v))

    @T.prim_func(s_tir=True, check_well_formed=False)
    def paged(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        o: T.handle,
        lse: T.handle,
        cu_seqlens_q: T.handle,
        seqlens_k: T.handle,
        page_table: T.handle,
        softmax_scale: T.float32,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "paged"})
        batch = T.Var("batch", index_dtype)
        heads = T.Var("heads", index_dtype)
        kv_heads = T.Var("kv_heads", index_dtype)
        total_q = T.Var("total_q", index_dtype)
        starts = T.Var("starts", index_dtype)
        pages = T.Var("pages", index_dtype)
        page_size = T.Var("page_size", index_dtype)
        pages_per_sequence = T.Var("pages_per_sequence", index_dtype)
        q_rows = T.match_buffer(q, (total_q, heads, D), dtype)
        k_pages = T.match_buffer(k, (pages, page_size, kv_heads, D), dtype)
        v_pages = T.match_buffer(v, (pages, page_size, kv_heads, E), dtype)
        o_rows = T.match_buffer(o, (total_q, heads, E), dtype)
        lse_rows = T.match_buffer(lse, (heads, total_q), "float32")
        q_starts = T.match_buffer(cu_seqlens_q, (starts,), "int32")
        k_lengths = T.match_buffer(seqlens_k, (batch,), "int32")
        table = T.match_buffer(page_table, (batch, pages_per_sequence), "int32")
        n = T.meta_var(
            _sizes(
                *(q_starts, k_lengths, heads, total_q, E, kv_heads, pages_per_sequence * page_size, D),
                *(softmax_scale, symbols.parameters),
            )
        )
        Q = T.meta_var(Batch(n, dtype).of_queries("q", q_rows, q_starts, D))
        K = T.meta_var(scratch("K", (n.batch, kv_heads, n.seqlen_kv, D), dtype))
        V = T.meta_var(scratch("V", (n.batch, kv_heads, n.seqlen_kv, E), dtype))
        O = T.meta_var(scratch("O", (n.batch, heads, total_q, E), dtype))
        LSE = T.meta_var(scratch("LSE", (n.batch, heads, total_q)))
        blocks.from_pages("k_from_pages", K, k_pages, table, n, "bgjd")
        blocks.from_pages("v_from_pages", V, v_pages, table, n, "bgje")
        attention.steps(Q, K, V, O, LSE, n, formula, dtype, blocks.own_keys, formula.has_sink)
        blocks.packed("o_rows", o_rows, O, q_starts, n, "the")
        blocks.packed_lse(lse_rows, LSE, q_starts, n)

    return paged


def paged_latent(formula: Formula, symbols: Symbols) -> PrimFunc:
    """The same where values are the first elements of keys, as in multi-head latent attention: there is no v."""
    index_dtype, dtype = formula.index_dtype, formula.dtype
    D, E = (tirx.IntImm(index_dtype, x) for x in (formula.head_dim, formula.head_dim_v))

    @T.prim_func(s_tir=True, check_well_formed=False)
    def paged_latent(
        q: T.handle,
        k: T.handle,
        o: T.handle,
        lse: T.handle,
        cu_seqlens_q: T.handle,
        seqlens_k: T.handle,
        page_table: T.handle,
        softmax_scale: T.float32,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "paged_latent"})
        batch = T.Var("batch", index_dtype)
        heads = T.Var("heads", index_dtype)
        kv_heads = T.Var("kv_heads", index_dtype)
        total_q = T.Var("total_q", index_dtype)
        starts = T.Var("starts", index_dtype)
        pages = T.Var("pages", index_dtype)
        page_size = T.Var("page_size", index_dtype)
        pages_per_sequence = T.Var("pages_per_sequence", index_dtype)
        q_rows = T.match_buffer(q, (total_q, heads, D), dtype)
        k_pages = T.match_buffer(k, (pages, page_size, kv_heads, D), dtype)
        o_rows = T.match_buffer(o, (total_q, heads, E), dtype)
        lse_rows = T.match_buffer(lse, (heads, total_q), "float32")
        q_starts = T.match_buffer(cu_seqlens_q, (starts,), "int32")
        k_lengths = T.match_buffer(seqlens_k, (batch,), "int32")
        table = T.match_buffer(page_table, (batch, pages_per_sequence), "int32")
        n = T.meta_var(
            _sizes(
                *(q_starts, k_lengths, heads, total_q, E, kv_heads, pages_per_sequence * page_size, D),
                *(softmax_scale, symbols.parameters),
            )
        )
        Q = T.meta_var(Batch(n, dtype).of_queries("q", q_rows, q_starts, D))
        K = T.meta_var(scratch("K", (n.batch, kv_heads, n.seqlen_kv, D), dtype))
        O = T.meta_var(scratch("O", (n.batch, heads, total_q, E), dtype))
        LSE = T.meta_var(scratch("LSE", (n.batch, heads, total_q)))
        blocks.from_pages("k_from_pages", K, k_pages, table, n, "bgjd")
        attention.steps(Q, K, K, O, LSE, n, formula, dtype, blocks.own_keys, formula.has_sink)
        blocks.packed("o_rows", o_rows, O, q_starts, n, "the")
        blocks.packed_lse(lse_rows, LSE, q_starts, n)

    return paged_latent


def paged_scaled(formula: Formula, symbols: Symbols) -> PrimFunc:
    """As :func:`paged` with keys and values in 8 bits (:mod:`schedules.definition.cache`), and scales of pages."""
    index_dtype, dtype, stored = formula.index_dtype, formula.dtype, STORED[symbols.cache]
    D, E = (tirx.IntImm(index_dtype, x) for x in (formula.head_dim, formula.head_dim_v))

    @T.prim_func(s_tir=True, check_well_formed=False)
    def paged_scaled(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        o: T.handle,
        lse: T.handle,
        cu_seqlens_q: T.handle,
        seqlens_k: T.handle,
        page_table: T.handle,
        k_scale: T.handle,
        v_scale: T.handle,
        softmax_scale: T.float32,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "paged_scaled"})
        batch = T.Var("batch", index_dtype)
        heads = T.Var("heads", index_dtype)
        kv_heads = T.Var("kv_heads", index_dtype)
        total_q = T.Var("total_q", index_dtype)
        starts = T.Var("starts", index_dtype)
        pages = T.Var("pages", index_dtype)
        page_size = T.Var("page_size", index_dtype)
        pages_per_sequence = T.Var("pages_per_sequence", index_dtype)
        q_rows = T.match_buffer(q, (total_q, heads, D), dtype)
        k_pages = T.match_buffer(k, (pages, page_size, kv_heads, D), stored)
        v_pages = T.match_buffer(v, (pages, page_size, kv_heads, E), stored)
        o_rows = T.match_buffer(o, (total_q, heads, E), dtype)
        lse_rows = T.match_buffer(lse, (heads, total_q), "float32")
        q_starts = T.match_buffer(cu_seqlens_q, (starts,), "int32")
        k_lengths = T.match_buffer(seqlens_k, (batch,), "int32")
        table = T.match_buffer(page_table, (batch, pages_per_sequence), "int32")
        k_scales = T.match_buffer(k_scale, (pages, kv_heads), "float32")
        v_scales = T.match_buffer(v_scale, (pages, kv_heads), "float32")
        n = T.meta_var(
            _sizes(
                *(q_starts, k_lengths, heads, total_q, E, kv_heads, pages_per_sequence * page_size, D),
                *(softmax_scale, symbols.parameters),
            )
        )
        Q = T.meta_var(Batch(n, dtype).of_queries("q", q_rows, q_starts, D))
        K = T.meta_var(scratch("K", (n.batch, kv_heads, n.seqlen_kv, D), dtype))
        V = T.meta_var(scratch("V", (n.batch, kv_heads, n.seqlen_kv, E), dtype))
        O = T.meta_var(scratch("O", (n.batch, heads, total_q, E), dtype))
        LSE = T.meta_var(scratch("LSE", (n.batch, heads, total_q)))
        blocks.from_pages("k_from_scaled_pages", K, k_pages, table, n, "bgjd", k_scales)
        blocks.from_pages("v_from_scaled_pages", V, v_pages, table, n, "bgje", v_scales)
        attention.steps(Q, K, V, O, LSE, n, formula, dtype, blocks.own_keys, formula.has_sink)
        blocks.packed("o_rows", o_rows, O, q_starts, n, "the")
        blocks.packed_lse(lse_rows, LSE, q_starts, n)

    return paged_scaled


def _sizes(
    q_starts, k_lengths, heads, total_q, head_dim_v, kv_heads, most_keys, head_dim, softmax_scale, params
) -> Sizes:
    """Sizes of a batch of sequences, with blocks ``q_lengths`` and ``k_lengths`` that find their lengths."""
    (batch,) = k_lengths.shape
    of_q, of_k = (scratch(f"{name}_lengths", (batch,), str(total_q.ty.dtype)) for name in "qk")
    n = Sizes(
        *(batch, heads, total_q, head_dim_v, kv_heads, most_keys, head_dim, None, softmax_scale, params, (of_q, of_k))
    )
    blocks.lengths("q_lengths", of_q, q_starts, n)
    blocks.given_lengths("k_lengths", of_k, k_lengths, n)
    return n

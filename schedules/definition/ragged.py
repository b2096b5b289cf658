"""Operators over sequences of different lengths that lie one after the other: forward and gradients."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition import attention, blocks
from schedules.definition.attention import scratch
from schedules.definition.blocks import Formula, Sizes
from schedules.definition.dense import gradients
from schedules.definition.operator import Symbols


def ragged(formula: Formula, symbols: Symbols) -> PrimFunc:
    """Output and log-sum-exp of sequences of different lengths."""
    index_dtype, dtype = formula.index_dtype, formula.dtype
    D, E = (tirx.IntImm(index_dtype, x) for x in (formula.head_dim, formula.head_dim_v))

    @T.prim_func(s_tir=True, check_well_formed=False)
    def ragged(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        o: T.handle,
        lse: T.handle,
        cu_seqlens_q: T.handle,
        cu_seqlens_k: T.handle,
        softmax_scale: T.float32,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "ragged"})
        total_q = T.Var("total_q", index_dtype)
        total_k = T.Var("total_k", index_dtype)
        heads = T.Var("heads", index_dtype)
        kv_heads = T.Var("kv_heads", index_dtype)
        starts = T.Var("starts", index_dtype)
        q_rows = T.match_buffer(q, (total_q, heads, D), dtype)
        k_rows = T.match_buffer(k, (total_k, kv_heads, D), dtype)
        v_rows = T.match_buffer(v, (total_k, kv_heads, E), dtype)
        o_rows = T.match_buffer(o, (total_q, heads, E), dtype)
        lse_rows = T.match_buffer(lse, (heads, total_q), "float32")
        q_starts = T.match_buffer(cu_seqlens_q, (starts,), "int32")
        k_starts = T.match_buffer(cu_seqlens_k, (starts,), "int32")
        n = T.meta_var(
            _sizes_of_sequences(
                q_starts, k_starts, heads, total_q, E, kv_heads, total_k, D, softmax_scale, symbols.parameters
            )
        )
        batch = T.meta_var(Batch(n, dtype))
        Q = T.meta_var(batch.of_queries("q", q_rows, q_starts, D))
        K = T.meta_var(batch.of_keys("k", k_rows, k_starts, D))
        V = T.meta_var(batch.of_keys("v", v_rows, k_starts, E))
        O = T.meta_var(scratch("O", (n.batch, heads, total_q, E), dtype))
        LSE = T.meta_var(scratch("LSE", (n.batch, heads, total_q)))
        attention.steps(Q, K, V, O, LSE, n, formula, dtype, blocks.own_keys, formula.has_sink)
        blocks.packed("o_rows", o_rows, O, q_starts, n, "the")
        blocks.packed_lse(lse_rows, LSE, q_starts, n)

    return ragged


def ragged_backward(formula: Formula, symbols: Symbols) -> PrimFunc:
    """Gradients of q, k, v and of the parameters that ask for one, of sequences of different lengths."""
    formula.differentiate()  # now: TVM's parser would make an error of its own of one that is raised inside
    index_dtype, dtype = formula.index_dtype, formula.dtype
    D, E = (tirx.IntImm(index_dtype, x) for x in (formula.head_dim, formula.head_dim_v))

    @T.prim_func(s_tir=True, check_well_formed=False)
    def ragged_backward(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        do: T.handle,
        lse: T.handle,
        delta: T.handle,
        dq: T.handle,
        dk: T.handle,
        dv: T.handle,
        cu_seqlens_q: T.handle,
        cu_seqlens_k: T.handle,
        softmax_scale: T.float32,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "ragged_backward"})
        total_q = T.Var("total_q", index_dtype)
        total_k = T.Var("total_k", index_dtype)
        heads = T.Var("heads", index_dtype)
        kv_heads = T.Var("kv_heads", index_dtype)
        starts = T.Var("starts", index_dtype)
        q_rows = T.match_buffer(q, (total_q, heads, D), dtype)
        k_rows = T.match_buffer(k, (total_k, kv_heads, D), dtype)
        v_rows = T.match_buffer(v, (total_k, kv_heads, E), dtype)
        do_rows = T.match_buffer(do, (total_q, heads, E), dtype)
        lse_rows = T.match_buffer(lse, (heads, total_q), "float32")
        delta_rows = T.match_buffer(delta, (heads, total_q), "float32")
        dq_rows = T.match_buffer(dq, (total_q, heads, D), dtype)
        dk_rows = T.match_buffer(dk, (total_k, kv_heads, D), dtype)
        dv_rows = T.match_buffer(dv, (total_k, kv_heads, E), dtype)
        q_starts = T.match_buffer(cu_seqlens_q, (starts,), "int32")
        k_starts = T.match_buffer(cu_seqlens_k, (starts,), "int32")
        n = T.meta_var(
            _sizes_of_sequences(
                q_starts, k_starts, heads, total_q, E, kv_heads, total_k, D, softmax_scale, symbols.parameters
            )
        )
        batch = T.meta_var(Batch(n, dtype))
        Q = T.meta_var(batch.of_queries("q", q_rows, q_starts, D))
        K = T.meta_var(batch.of_keys("k", k_rows, k_starts, D))
        V = T.meta_var(batch.of_keys("v", v_rows, k_starts, E))
        dO = T.meta_var(batch.of_queries("do", do_rows, q_starts, E))
        LSE = T.meta_var(batch.of_rows("lse", lse_rows, q_starts))
        Delta = T.meta_var(batch.of_rows("delta", delta_rows, q_starts))
        dQ = T.meta_var(scratch("dQ", (n.batch, heads, total_q, D), dtype))
        dK = T.meta_var(scratch("dK", (n.batch, kv_heads, total_k, D), dtype))
        dV = T.meta_var(scratch("dV", (n.batch, kv_heads, total_k, E), dtype))
        gradients(Q, K, V, dO, LSE, Delta, dQ, dK, dV, n, formula, symbols, blocks.own_keys)
        blocks.packed("dq_rows", dq_rows, dQ, q_starts, n, "thd")
        blocks.packed("dk_rows", dk_rows, dK, k_starts, n, "ugd")
        blocks.packed("dv_rows", dv_rows, dV, k_starts, n, "uge")

    return ragged_backward


def _sizes_of_sequences(
    q_starts, k_starts, heads, total_q, head_dim_v, kv_heads, total_k, head_dim, softmax_scale, params
) -> Sizes:
    """Sizes of a batch of sequences, with blocks ``q_lengths`` and ``k_lengths`` that find their lengths."""
    batch = q_starts.shape[0] - 1
    of_q, of_k = (scratch(f"{name}_lengths", (batch,), str(total_q.ty.dtype)) for name in "qk")
    n = Sizes(
        *(batch, heads, total_q, head_dim_v, kv_heads, total_k, head_dim, None, softmax_scale, params, (of_q, of_k))
    )
    blocks.lengths("q_lengths", of_q, q_starts, n)
    blocks.lengths("k_lengths", of_k, k_starts, n)
    return n


@dataclass(frozen=True)
class Batch:
    """Sequences laid out in a batch entry each."""

    n: Sizes
    dtype: str

    def of_queries(self, name, rows, starts, width):
        """``(batch, heads, total_q, width)`` by a block ``NAME_batch``."""
        X = scratch(name.upper(), (self.n.batch, self.n.heads, self.n.seqlen_q, width), self.dtype)
        axes = "bhid" if width.same_as(self.n.head_dim) else "bhie"
        blocks.unpacked(f"{name}_batch", X, rows, starts, self.n.lengths[0], self.n, axes)
        return X

    def of_keys(self, name, rows, starts, width):
        """``(batch, kv_heads, total_k, width)`` by a block ``NAME_batch``."""
        X = scratch(name.upper(), (self.n.batch, self.n.kv_heads, self.n.seqlen_kv, width), self.dtype)
        axes = "bgjd" if width.same_as(self.n.head_dim) else "bgje"
        blocks.unpacked(f"{name}_batch", X, rows, starts, self.n.lengths[1], self.n, axes)
        return X

    def of_rows(self, name, rows, starts):
        """``(batch, heads, total_q)`` by a block ``NAME_batch``."""
        X = scratch(name.upper(), (self.n.batch, self.n.heads, self.n.seqlen_q))
        blocks.unpacked_rows(f"{name}_batch", X, rows, starts, self.n.lengths[0], self.n)
        return X

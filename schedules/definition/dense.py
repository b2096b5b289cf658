"""Operators over a batch of sequences of one length: forward, a part of it, the merging of parts, and gradients."""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition import attention, blocks
from schedules.definition.attention import scratch
from schedules.definition.blocks import Formula, Sizes
from schedules.definition.operator import KEY_RANGE, Symbols

#: The blocks of a backward after its mask.
GRADIENT_BLOCKS = ("prob", "dp", "dscore", "ds", "dq_sum", "dq", "dk_sum", "dk", "dv_sum", "dv")


def forward(formula: Formula, symbols: Symbols) -> PrimFunc:
    """Output and log-sum-exp."""
    return attention.attend(formula, symbols.parameters)


def partial(formula: Formula, symbols: Symbols) -> PrimFunc:
    """The same over a range of keys, the output in float32."""
    return attention.attend(formula, symbols.parameters, tuple(symbols.scalars[name] for name in KEY_RANGE))


def combine(formula: Formula, symbols: Symbols) -> PrimFunc:
    """Output and log-sum-exp from those of parts."""
    index_dtype, dtype = formula.index_dtype, formula.dtype
    E = tirx.IntImm(index_dtype, formula.head_dim_v)

    @T.prim_func(s_tir=True, check_well_formed=False)
    def combine(o_parts: T.handle, lse_parts: T.handle, o: T.handle, lse: T.handle):
        T.func_attr({"tirx.noalias": True, "global_symbol": "combine"})
        parts = T.Var("parts", index_dtype)
        batch = T.Var("batch", index_dtype)
        heads = T.Var("heads", index_dtype)
        seqlen_q = T.Var("seqlen_q", index_dtype)
        OS = T.match_buffer(o_parts, (parts, batch, heads, seqlen_q, E), "float32")
        LSES = T.match_buffer(lse_parts, (parts, batch, heads, seqlen_q), "float32")
        O = T.match_buffer(o, (batch, heads, seqlen_q, E), dtype)
        LSE = T.match_buffer(lse, (batch, heads, seqlen_q), "float32")
        M = T.sblock_alloc_buffer((batch, heads, seqlen_q), "float32")
        W = T.sblock_alloc_buffer((parts, batch, heads, seqlen_q), "float32")
        L = T.sblock_alloc_buffer((batch, heads, seqlen_q), "float32")
        A = T.sblock_alloc_buffer((batch, heads, seqlen_q, E), "float32")
        n = T.meta_var(Sizes(batch, heads, seqlen_q, E, parts=parts))
        blocks.part_max(M, LSES, n)
        blocks.part_weight(W, LSES, M, n)
        blocks.part_sum(L, W, n)
        blocks.merge(A, W, OS, n)
        blocks.out(O, A, L, n, dtype)
        blocks.lse(LSE, M, L, n)

    return combine


def delta(formula: Formula, symbols: Symbols) -> PrimFunc:
    """What the backward needs to know of a row's output and its gradient."""
    index_dtype, dtype = formula.index_dtype, formula.dtype
    E = tirx.IntImm(index_dtype, formula.head_dim_v)

    @T.prim_func(s_tir=True, check_well_formed=False)
    def delta(o: T.handle, do: T.handle, dlse: T.handle, delta: T.handle):
        T.func_attr({"tirx.noalias": True, "global_symbol": "delta"})
        batch = T.Var("batch", index_dtype)
        heads = T.Var("heads", index_dtype)
        seqlen_q = T.Var("seqlen_q", index_dtype)
        O = T.match_buffer(o, (batch, heads, seqlen_q, E), dtype)
        dO = T.match_buffer(do, (batch, heads, seqlen_q, E), dtype)
        dLSE = T.match_buffer(dlse, (batch, heads, seqlen_q), "float32")
        Delta = T.match_buffer(delta, (batch, heads, seqlen_q), "float32")
        R = T.sblock_alloc_buffer((batch, heads, seqlen_q), "float32")
        n = T.meta_var(Sizes(batch, heads, seqlen_q, E))
        blocks.out_products(R, O, dO, n)
        blocks.delta(Delta, R, dLSE, n)

    return delta


def backward(formula: Formula, symbols: Symbols) -> PrimFunc:
    """Gradients of q, k, v and of the parameters that ask for one."""
    formula.differentiate()  # now: TVM's parser would make an error of its own of one that is raised inside
    index_dtype, dtype = formula.index_dtype, formula.dtype
    D, E = (tirx.IntImm(index_dtype, x) for x in (formula.head_dim, formula.head_dim_v))

    @T.prim_func(s_tir=True, check_well_formed=False)
    def backward(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        do: T.handle,
        lse: T.handle,
        delta: T.handle,
        dq: T.handle,
        dk: T.handle,
        dv: T.handle,
        softmax_scale: T.float32,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "backward"})
        batch = T.Var("batch", index_dtype)
        heads = T.Var("heads", index_dtype)
        kv_heads = T.Var("kv_heads", index_dtype)
        seqlen_q = T.Var("seqlen_q", index_dtype)
        seqlen_kv = T.Var("seqlen_kv", index_dtype)
        Q = T.match_buffer(q, (batch, heads, seqlen_q, D), dtype)
        K = T.match_buffer(k, (batch, kv_heads, seqlen_kv, D), dtype)
        V = T.match_buffer(v, (batch, kv_heads, seqlen_kv, E), dtype)
        dO = T.match_buffer(do, (batch, heads, seqlen_q, E), dtype)
        LSE = T.match_buffer(lse, (batch, heads, seqlen_q), "float32")
        Delta = T.match_buffer(delta, (batch, heads, seqlen_q), "float32")
        dQ = T.match_buffer(dq, (batch, heads, seqlen_q, D), dtype)
        dK = T.match_buffer(dk, (batch, kv_heads, seqlen_kv, D), dtype)
        dV = T.match_buffer(dv, (batch, kv_heads, seqlen_kv, E), dtype)
        n = T.meta_var(
            Sizes(batch, heads, seqlen_q, E, kv_heads, seqlen_kv, D, None, softmax_scale, symbols.parameters)
        )
        gradients(Q, K, V, dO, LSE, Delta, dQ, dK, dV, n, formula, symbols)

    return backward


def gradients(
    Q, K, V, dO, LSE, Delta, dQ, dK, dV, n: Sizes, formula: Formula, symbols: Symbols, narrow: Callable | None = None
) -> None:
    """The blocks from ``qk`` to the gradients; ``narrow(Y, X, n)`` may hide further keys after the mask."""
    scores = (n.batch, n.heads, n.seqlen_q, n.seqlen_kv)
    S, Z, X, P, dP, dX, dS = (scratch(name, scores) for name in ("S", "Z", "X", "P", "dP", "dX", "dS"))
    dQ_sum = scratch("dQ_sum", (n.batch, n.heads, n.seqlen_q, n.head_dim))
    dK_sum = scratch("dK_sum", (n.batch, n.kv_heads, n.seqlen_kv, n.head_dim))
    dV_sum = scratch("dV_sum", (n.batch, n.kv_heads, n.seqlen_kv, n.head_dim_v))
    blocks.row_products("qk", S, Q, K, n, "d")
    blocks.score(Z, S, n, formula)
    if narrow is None:
        blocks.mask(X, Z, n, formula)
    else:
        Y = scratch("Y", scores)
        blocks.mask(Y, Z, n, formula)
        narrow(X, Y, n)
    blocks.prob(P, X, LSE, n)
    blocks.row_products("dp", dP, dO, V, n, "e")
    blocks.dscore(dX, P, dP, Delta, n)
    blocks.ds(dS, dX, P, S, n, formula)
    blocks.sum_over_keys("dq_sum", dQ_sum, dS, K, n, "d")
    blocks.rounded("dq", dQ, dQ_sum, n, "bhid", n.softmax_scale, formula.dtype)
    blocks.sum_over_queries("dk_sum", dK_sum, dS, Q, n, "d")
    blocks.rounded("dk", dK, dK_sum, n, "bgjd", n.softmax_scale, formula.dtype)
    blocks.sum_over_queries("dv_sum", dV_sum, P, dO, n, "e")
    blocks.rounded("dv", dV, dV_sum, n, "bgje", T.float32(1), formula.dtype)
    if formula.has_sink:
        W = scratch("W", (n.batch, n.heads, n.seqlen_q))
        blocks.sink_prob(W, LSE, n, formula)
    for param in formula.params:
        if param.gradient:
            target = symbols.gradients[param.name]
            if param.rank:
                blocks.table_gradient(target, param, dX, P, S, n, formula)
            elif formula.is_of_sink(param):
                blocks.sink_gradient(target, param, W, Delta, n, formula)
            else:
                blocks.parameter_gradient(target, param, dX, P, S, n, formula)

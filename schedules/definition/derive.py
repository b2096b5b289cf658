"""From one definition every operator: ``derive(pattern, op)`` writes its TensorIR.

========  =============================================================================================
operator  computes
========  =============================================================================================
forward   o and lse: the blocks of :mod:`schedules.definition.attention` as they stand
partial   o (float32) and lse over the keys ``first_key`` up to but not ``last_key``
combine   o and lse of several parts over disjoint keys, ``o_parts (parts, batch, heads, seqlen_q, head_dim_v)``
          and ``lse_parts (parts, batch, heads, seqlen_q)``, both float32
delta     ``rowsum(do * o) - dlse``, float32 ``(batch, heads, seqlen_q)``
backward  dq, dk, dv, and ``d_NAME`` of each parameter that asks for a gradient
========  =============================================================================================

The output of a part is normalised: it is attention over the part's keys, so that whoever holds ``(o, lse)`` of disjoint
keys can merge them, a part alone is a result, and no weight in a merge exceeds 1.  (An output that isn't normalised
would need its row maximum as a third tensor.)

``combine`` is linear in ``exp(lse)``, and needs nothing of the definition but its softmax; a part that saw nothing has
the lse −inf and doesn't count, whatever its output holds.

``backward`` takes lse as ``forward`` left it, and delta.  With ``p = exp(score - lse)``, ``dp = do · v``:
``dscore = p * (dp - delta)``, ``ds = dscore * ∂score/∂s``, where ``s = softmax_scale * q · k``, and so
``dq = softmax_scale * sum_j ds k``, ``dk = softmax_scale * sum_i ds q``, ``dv = sum_i p do``; heads of keys and values
are summed over the query heads that read them.  A key without weight (hidden, or so far down that ``p`` is 0) has no
gradient, so that a row that sees nothing has none either.  The gradient of lse enters by delta alone, since
``∂lse/∂score = p``.

Each function compiled as it stands is the oracle of its operator.  A further operator is a function here with its row
in ``OPERATORS``, and blocks in :mod:`schedules.definition.blocks`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition import attention, blocks
from schedules.definition.blocks import Formula, Sizes
from schedules.definition.parameters import append_arguments, gradient_symbols, parameter_symbols

#: Further arguments of ``partial``: numbers of the keys where it begins, and before which it ends.
KEY_RANGE = ("first_key", "last_key")


@dataclass(frozen=True)
class Symbols:
    """What a function is written with besides its own arguments: parameters, gradients and scalars by name."""

    parameters: dict
    gradients: dict
    scalars: dict


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes
    ----------
    arguments: the roles of its tensors and of ``softmax_scale``, in order; then come ``scalars``, int32 numbers, then
        the run-time parameters, then their gradients.
    blocks: the names of its blocks, in order; one for each gradient of a parameter follows, ``d_`` and its name.
    write: makes the function with its ``arguments``, those that follow being given as symbols.
    has_scores: whether it computes scores, and so has run-time parameters.
    """

    arguments: tuple[str, ...]
    blocks: tuple[str, ...]
    write: Callable[[Formula, Symbols], PrimFunc]
    scalars: tuple[str, ...] = ()
    has_scores: bool = True
    has_gradients: bool = False


def derive(pattern: Formula, op: str) -> PrimFunc:
    """An operator of the attention that was matched.

    Parameters
    ----------
    pattern: what :func:`schedules.definition.pattern.match` found in a definition.
    op: one of ``OPERATORS``.

    Returns
    -------
    A PrimFunc with the arguments that the operator's entry in ``OPERATORS`` names, and its blocks.

    Raises
    ------
    DefinitionError: the operator needs a derivative that isn't known.
    """
    operator, index_dtype = OPERATORS[op], pattern.index_dtype
    scalars = {name: tirx.Var(name, "int32") for name in operator.scalars}
    parameters, values = parameter_symbols(pattern.params if operator.has_scores else (), index_dtype)
    gradients, targets = gradient_symbols(pattern.params if operator.has_gradients else (), index_dtype)
    func = operator.write(pattern, Symbols(values, targets, scalars))
    func = append_arguments(func, [*scalars.values(), *parameters, *gradients])
    asked = [p.name for p in pattern.params if p.gradient]
    return func.with_attr(attention.GRADIENTS, asked) if asked and operator.has_scores else func


# ---------------------------------------------------------------- operators


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
    one = T.float32(1)

    def parameter_gradients(dX, P, S, n):
        for param in formula.params:
            if param.gradient:
                blocks.parameter_gradient(symbols.gradients[param.name], param, dX, P, S, n, formula)

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
        S = T.sblock_alloc_buffer((batch, heads, seqlen_q, seqlen_kv), "float32")
        Z = T.sblock_alloc_buffer((batch, heads, seqlen_q, seqlen_kv), "float32")
        X = T.sblock_alloc_buffer((batch, heads, seqlen_q, seqlen_kv), "float32")
        P = T.sblock_alloc_buffer((batch, heads, seqlen_q, seqlen_kv), "float32")
        dP = T.sblock_alloc_buffer((batch, heads, seqlen_q, seqlen_kv), "float32")
        dX = T.sblock_alloc_buffer((batch, heads, seqlen_q, seqlen_kv), "float32")
        dS = T.sblock_alloc_buffer((batch, heads, seqlen_q, seqlen_kv), "float32")
        dQ_sum = T.sblock_alloc_buffer((batch, heads, seqlen_q, D), "float32")
        dK_sum = T.sblock_alloc_buffer((batch, kv_heads, seqlen_kv, D), "float32")
        dV_sum = T.sblock_alloc_buffer((batch, kv_heads, seqlen_kv, E), "float32")
        n = T.meta_var(
            Sizes(batch, heads, seqlen_q, E, kv_heads, seqlen_kv, D, None, softmax_scale, symbols.parameters)
        )
        blocks.row_products("qk", S, Q, K, n, "d")
        blocks.score(Z, S, n, formula)
        blocks.mask(X, Z, n, formula)
        blocks.prob(P, X, LSE, n)
        blocks.row_products("dp", dP, dO, V, n, "e")
        blocks.dscore(dX, P, dP, Delta, n)
        blocks.ds(dS, dX, P, S, n, formula)
        blocks.sum_over_keys("dq_sum", dQ_sum, dS, K, n, "d")
        blocks.rounded("dq", dQ, dQ_sum, n, "bhid", softmax_scale, dtype)
        blocks.sum_over_queries("dk_sum", dK_sum, dS, Q, n, "d")
        blocks.rounded("dk", dK, dK_sum, n, "bgjd", softmax_scale, dtype)
        blocks.sum_over_queries("dv_sum", dV_sum, P, dO, n, "e")
        blocks.rounded("dv", dV, dV_sum, n, "bgje", one, dtype)
        parameter_gradients(dX, P, S, n)

    return backward


#: The operators by name.
OPERATORS: dict[str, Operator] = {
    "forward": Operator(("q", "k", "v", "o", "lse", "softmax_scale"), attention.BLOCKS, forward),
    "partial": Operator(
        ("q", "k", "v", "o", "lse", "softmax_scale"),
        ("qk", "score", "mask", "key_range", "row_max", "prob", "row_sum", "pv", "out", "lse"),
        partial,
        scalars=KEY_RANGE,
    ),
    "combine": Operator(
        ("o_parts", "lse_parts", "o", "lse"),
        ("part_max", "part_weight", "part_sum", "merge", "out", "lse"),
        combine,
        has_scores=False,
    ),
    "delta": Operator(("o", "do", "dlse", "delta"), ("out_products", "delta"), delta, has_scores=False),
    "backward": Operator(
        ("q", "k", "v", "do", "lse", "delta", "dq", "dk", "dv", "softmax_scale"),
        ("qk", "score", "mask", "prob", "dp", "dscore", "ds", "dq_sum", "dq", "dk_sum", "dk", "dv_sum", "dv"),
        backward,
        has_gradients=True,
    ),
}

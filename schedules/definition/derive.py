"""From one definition every operator: ``derive(pattern, op)`` writes its TensorIR.

===============  ======================================================================================
operator         computes
===============  ======================================================================================
forward          o and lse: the blocks of :mod:`schedules.definition.attention` as they stand
partial          o (float32) and lse over the keys ``first_key`` up to but not ``last_key``
combine          o and lse of several parts over disjoint keys, ``o_parts (parts, batch, heads, seqlen_q,
                 head_dim_v)`` and ``lse_parts (parts, batch, heads, seqlen_q)``, both float32
delta            ``rowsum(do * o) - dlse``, float32 ``(batch, heads, seqlen_q)``
backward         dq, dk, dv, and ``d_NAME`` of each parameter that asks for a gradient
ragged           o and lse of sequences of different lengths, one after the other in ``(total, heads, head_dim)``
ragged_backward  their gradients
===============  ======================================================================================

The output of a part is normalised: it is attention over the part's keys, so that whoever holds ``(o, lse)`` of disjoint
keys can merge them, a part alone is a result, and no weight in a merge exceeds 1.  (An output that isn't normalised
would need its row maximum as a third tensor.)  A sink is in no part, since it would count several times: it is a part
of its own, with the output 0 and the lse ``sink``.

``combine`` is linear in ``exp(lse)``, and needs nothing of the definition but its softmax; a part that saw nothing has
the lse −inf and doesn't count, whatever its output holds.

``backward`` takes lse as ``forward`` left it, and delta.  With ``p = exp(score - lse)``, ``dp = do · v``:
``dscore = p * (dp - delta)``, ``ds = dscore * ∂score/∂s``, where ``s = softmax_scale * q · k``, and so
``dq = softmax_scale * sum_j ds k``, ``dk = softmax_scale * sum_i ds q``, ``dv = sum_i p do``; heads of keys and values
are summed over the query heads that read them.  A key without weight (hidden, or so far down that ``p`` is 0) has no
gradient, so that a row that sees nothing has none either.  The gradient of lse enters by delta alone, since
``∂lse/∂score = p``.  A sink is in lse already, so that nothing of this changes with it; its own gradient is
``-sum_i exp(sink - lse) * delta``.

``ragged`` and ``ragged_backward`` attend to each sequence as if it were alone.  Sequence ``b`` has the rows
``cu_seqlens_q[b]`` up to but not ``cu_seqlens_q[b + 1]`` of q (``(total_q, heads, head_dim)``), of o and of lse
(``(heads, total_q)``), and the keys ``cu_seqlens_k[b]`` up to ``cu_seqlens_k[b + 1]`` of k and v (``(total_k, kv_heads,
…)``).  Each is laid out in a batch of its own, in which the blocks of ``forward`` and ``backward`` follow, with the
sequence's lengths as the sizes that the score and the mask see; then everything is put back.  Rows and keys that are in
no sequence, those after the last, get zeros, and the lse −inf.

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
from schedules.definition.attention import scratch
from schedules.definition.blocks import Formula, Sizes
from schedules.definition.parameters import append_arguments, gradient_symbols, parameter_symbols

#: Further arguments of ``partial``: numbers of the keys where it begins, and before which it ends.
KEY_RANGE = ("first_key", "last_key")

#: Arguments of the operators over sequences of different lengths: where each begins among all queries, and among all
#: keys, int32 ``(batch + 1,)``; the last element is where the last sequence ends.
STARTS = ("cu_seqlens_q", "cu_seqlens_k")


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
    of_sink: further blocks where there is a sink.
    """

    arguments: tuple[str, ...]
    blocks: tuple[str, ...]
    write: Callable[[Formula, Symbols], PrimFunc]
    scalars: tuple[str, ...] = ()
    has_scores: bool = True
    has_gradients: bool = False
    of_sink: tuple[str, ...] = ()


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
        _gradients(Q, K, V, dO, LSE, Delta, dQ, dK, dV, n, formula, symbols)

    return backward


def _gradients(
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
            if formula.is_of_sink(param):
                blocks.sink_gradient(target, param, W, Delta, n, formula)
            else:
                blocks.parameter_gradient(target, param, dX, P, S, n, formula)


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
        batch = T.meta_var(_Batch(n, dtype))
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
        batch = T.meta_var(_Batch(n, dtype))
        Q = T.meta_var(batch.of_queries("q", q_rows, q_starts, D))
        K = T.meta_var(batch.of_keys("k", k_rows, k_starts, D))
        V = T.meta_var(batch.of_keys("v", v_rows, k_starts, E))
        dO = T.meta_var(batch.of_queries("do", do_rows, q_starts, E))
        LSE = T.meta_var(batch.of_rows("lse", lse_rows, q_starts))
        Delta = T.meta_var(batch.of_rows("delta", delta_rows, q_starts))
        dQ = T.meta_var(scratch("dQ", (n.batch, heads, total_q, D), dtype))
        dK = T.meta_var(scratch("dK", (n.batch, kv_heads, total_k, D), dtype))
        dV = T.meta_var(scratch("dV", (n.batch, kv_heads, total_k, E), dtype))
        _gradients(Q, K, V, dO, LSE, Delta, dQ, dK, dV, n, formula, symbols, blocks.own_keys)
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
class _Batch:
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


#: The blocks of a backward after its mask.
GRADIENT_BLOCKS = ("prob", "dp", "dscore", "ds", "dq_sum", "dq", "dk_sum", "dk", "dv_sum", "dv")

#: The operators by name.
OPERATORS: dict[str, Operator] = {
    "forward": Operator(
        ("q", "k", "v", "o", "lse", "softmax_scale"), attention.BLOCKS, forward, of_sink=attention.SINK_BLOCKS
    ),
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
        ("qk", "score", "mask", *GRADIENT_BLOCKS),
        backward,
        has_gradients=True,
        of_sink=("sink_prob",),
    ),
    "ragged": Operator(
        ("q", "k", "v", "o", "lse", *STARTS, "softmax_scale"),
        (
            *("q_lengths", "k_lengths", "q_batch", "k_batch", "v_batch", "qk", "score", "mask", "own_keys"),
            *("row_max", "prob", "row_sum", "pv", "out", "lse", "o_rows", "lse_rows"),
        ),
        ragged,
        of_sink=attention.SINK_BLOCKS,
    ),
    "ragged_backward": Operator(
        ("q", "k", "v", "do", "lse", "delta", "dq", "dk", "dv", *STARTS, "softmax_scale"),
        (
            *("q_lengths", "k_lengths", "q_batch", "k_batch", "v_batch", "do_batch", "lse_batch", "delta_batch"),
            *("qk", "score", "mask", "own_keys", *GRADIENT_BLOCKS, "dq_rows", "dk_rows", "dv_rows"),
        ),
        ragged_backward,
        has_gradients=True,
        of_sink=("sink_prob",),
    ),
}

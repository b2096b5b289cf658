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
paged            as ``ragged``, with the keys on pages of a cache
paged_latent     as ``paged``, with the first elements of keys as values
paged_scaled     as ``paged``, with keys and values in 8 bits
append           new queries and keys turned, and new keys and values in a cache
append_scaled    the same of a cache of 8 bits
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

``paged`` is ``ragged`` but for where keys are: sequence ``b`` has ``seqlens_k[b]`` of them, and key ``j`` is row ``j %
page_size`` of page ``page_table[b, j // page_size]`` of k and v, ``(pages, page_size, kv_heads, …)``.  Entries of the
table that no key needs are never read.  ``paged_latent`` is ``paged`` with ``v = k[..., :head_dim_v]``, which is no
argument then: multi-head latent attention, once the projections of keys and values are absorbed.  ``paged_scaled`` is
``paged`` on what elements of 8 bits stand for (:mod:`schedules.definition.cache`); each page and head has a scale,
float32 ``(pages, kv_heads)``.

``append`` turns each two elements of a row that belong together by an angle of its position, and puts new keys and
values, ``(total_new, kv_heads, …)``, into the pages of k and v, which it changes in place: those of sequence ``b`` to
the positions from ``cache_seqlens[b]`` on.  What has no place is left out, and of rows with one place the last one
counts.  It takes nothing of a definition but its sizes.  Roles are those of :mod:`tvm_flash.packs.manifest`, where a
kernel takes the cache as bytes and serves ``append_scaled`` too.

Each function compiled as it stands is the oracle of its operator.  They are written in
:mod:`schedules.definition.dense`, :mod:`~schedules.definition.ragged`, :mod:`~schedules.definition.paged` and
:mod:`~schedules.definition.append`; a further operator is a function there with its row in ``OPERATORS``, and blocks in
:mod:`schedules.definition.blocks`.
"""

from __future__ import annotations

from tvm import tirx
from tvm.tirx import PrimFunc

from schedules.definition import append, attention, dense, paged, ragged
from schedules.definition.blocks import Formula
from schedules.definition.dense import GRADIENT_BLOCKS
from schedules.definition.operator import APPENDED, KEY_RANGE, PAGES, SCALES, STARTS, TURNS, Operator, Symbols
from schedules.definition.parameters import append_arguments, gradient_symbols, parameter_symbols


def derive(pattern: Formula, op: str, cache: str = "") -> PrimFunc:
    """An operator of the attention that was matched.

    Parameters
    ----------
    pattern: what :func:`schedules.definition.pattern.match` found in a definition.
    op: one of ``OPERATORS``.
    cache: of ``paged_scaled`` the dtype of keys and values, if not that of the operator that was matched.

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
    func = operator.write(pattern, Symbols(values, targets, scalars, cache or pattern.cache))
    func = append_arguments(func, [*scalars.values(), *parameters, *gradients])
    return attention.with_parameters(func, pattern.params) if operator.has_scores else func


def _paged_blocks(kind: str) -> tuple[str, ...]:
    return (
        *("q_lengths", "k_lengths", "q_batch", f"k_from_{kind}", f"v_from_{kind}", "qk", "score", "mask", "own_keys"),
        *("row_max", "prob", "row_sum", "pv", "out", "lse", "o_rows", "lse_rows"),
    )


def _append_blocks(how: str) -> tuple[str, ...]:
    return "q_sequence", "k_sequence", "o", "k_turned", "place", "row", f"k_{how}", f"v_{how}"


#: The operators by name.
OPERATORS: dict[str, Operator] = {
    "forward": Operator(
        ("q", "k", "v", "o", "lse", "softmax_scale"), attention.BLOCKS, dense.forward, of_sink=attention.SINK_BLOCKS
    ),
    "partial": Operator(
        ("q", "k", "v", "o", "lse", "softmax_scale"),
        ("qk", "score", "mask", "key_range", "row_max", "prob", "row_sum", "pv", "out", "lse"),
        dense.partial,
        scalars=KEY_RANGE,
    ),
    "combine": Operator(
        ("o_parts", "lse_parts", "o", "lse"),
        ("part_max", "part_weight", "part_sum", "merge", "out", "lse"),
        dense.combine,
        has_scores=False,
    ),
    "delta": Operator(("o", "do", "dlse", "delta"), ("out_products", "delta"), dense.delta, has_scores=False),
    "backward": Operator(
        ("q", "k", "v", "do", "lse", "delta", "dq", "dk", "dv", "softmax_scale"),
        ("qk", "score", "mask", *GRADIENT_BLOCKS),
        dense.backward,
        has_gradients=True,
        of_sink=("sink_prob",),
    ),
    "ragged": Operator(
        ("q", "k", "v", "o", "lse", *STARTS, "softmax_scale"),
        (
            *("q_lengths", "k_lengths", "q_batch", "k_batch", "v_batch", "qk", "score", "mask", "own_keys"),
            *("row_max", "prob", "row_sum", "pv", "out", "lse", "o_rows", "lse_rows"),
        ),
        ragged.ragged,
        of_sink=attention.SINK_BLOCKS,
    ),
    "ragged_backward": Operator(
        ("q", "k", "v", "do", "lse", "delta", "dq", "dk", "dv", *STARTS, "softmax_scale"),
        (
            *("q_lengths", "k_lengths", "q_batch", "k_batch", "v_batch", "do_batch", "lse_batch", "delta_batch"),
            *("qk", "score", "mask", "own_keys", *GRADIENT_BLOCKS, "dq_rows", "dk_rows", "dv_rows"),
        ),
        ragged.ragged_backward,
        has_gradients=True,
        of_sink=("sink_prob",),
    ),
    "paged": Operator(
        ("q", "k", "v", "o", "lse", STARTS[0], *PAGES, "softmax_scale"),
        _paged_blocks("pages"),
        paged.paged,
        of_sink=attention.SINK_BLOCKS,
    ),
    "paged_latent": Operator(
        ("q", "k", "o", "lse", STARTS[0], *PAGES, "softmax_scale"),
        tuple(block for block in _paged_blocks("pages") if block != "v_from_pages"),
        paged.paged_latent,
        of_sink=attention.SINK_BLOCKS,
    ),
    "paged_scaled": Operator(
        ("q", "k", "v", "o", "lse", STARTS[0], *PAGES, *SCALES, "softmax_scale"),
        _paged_blocks("scaled_pages"),
        paged.paged_scaled,
        of_sink=attention.SINK_BLOCKS,
    ),
    "append": Operator(APPENDED, _append_blocks("put"), append.append, scalars=TURNS, has_scores=False),
    "append_scaled": Operator(
        (*APPENDED, *SCALES), _append_blocks("quantised"), append.append_scaled, scalars=TURNS, has_scores=False
    ),
}

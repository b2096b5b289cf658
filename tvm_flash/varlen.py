"""Attention over sequences of different lengths that lie one after the other."""

from __future__ import annotations

from typing import Any

from tvm_flash.call.checks import check_longest
from tvm_flash.call.dispatch import entrance
from tvm_flash.call.signature import signature
from tvm_flash.operators import RAGGED, RAGGED_LAYOUT

_attend = entrance(signature(RAGGED_LAYOUT, parameters=("alibi_slopes", "sinks"), op=RAGGED, layout_known=True))


def flash_attention_varlen(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    return_lse: bool = False,
    out: Any = None,
) -> Any:
    """Attention in which each of several sequences sees its own keys only, as if it were alone.

    Nothing is padded, and nothing is read on the host: a GPU isn't waited for, and a CUDA graph replays with other
    lengths.  A sequence's result is the same bits whatever else is in the batch.

    Parameters
    ----------
    q: ``(total_q, heads, head_dim)``, the rows of all sequences one after the other; frameworks, dtypes and strides as
        in :func:`tvm_flash.flash_attention`.
    k: ``(total_k, kv_heads, head_dim)``; query head h reads kv head ``h // (heads // kv_heads)``.
    v: ``(total_k, kv_heads, head_dim_v)``.
    cu_seqlens_q: int32 ``(batch + 1,)`` on the device of q, contiguous: sequence b has the rows ``cu_seqlens_q[b]`` up
        to but not ``cu_seqlens_q[b + 1]``.  The first is 0, none is less than the one before, and rows after the last
        belong to no sequence.  A sequence may be empty.
    cu_seqlens_k: the same of keys; as many as ``cu_seqlens_q``.
    max_seqlen_q, max_seqlen_k: lengths that no sequence exceeds, as flash_attn's function wants them; nothing here
        depends on them.
    causal: query i of a sequence sees its keys up to ``i + length_k - length_q``, aligned bottom-right.
    window_size, softcap: as in :func:`tvm_flash.flash_attention`.
    alibi_slopes, sinks: float32 ``(heads,)`` or ``(batch, heads)``, as in :func:`tvm_flash.flash_attention`.
    return_lse: also return the log-sum-exp of each row.
    out: where the result goes, of the result's shape and dtype; must not share memory with an input.

    Returns
    -------
    ``(total_q, heads, head_dim_v)`` in q's dtype and framework; zeros in a row that sees no key or belongs to no
    sequence.  With ``return_lse`` a pair of that and float32 ``(heads, total_q)``, natural logarithm, −inf there,
    or the sink of a row that sees no key.

    Raises
    ------
    InvalidArgumentError (ValueError), ArgumentTypeError (TypeError): an argument is wrong.  What is in ``cu_seqlens_q``
        and ``cu_seqlens_k`` is checked on the CPU; on a GPU nobody reads it, and starts that make no sense give rows
        that make none.
    NotSupportedError, KernelNotFoundError (NotImplementedError): nothing can compute it.
    PackError, KernelError (RuntimeError): no pack for the device, a damaged pack, a failed launch.
    """
    if max_seqlen_q is not None:
        check_longest("max_seqlen_q", max_seqlen_q)
    if max_seqlen_k is not None:
        check_longest("max_seqlen_k", max_seqlen_k)
    # fmt: off
    return _attend(q, k, v, cu_seqlens_q, cu_seqlens_k, alibi_slopes, sinks, out,
                   "auto", return_lse, softmax_scale, causal, window_size, softcap)
    # fmt: on

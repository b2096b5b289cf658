"""The functions that users call, and the memory of plans that makes a repeated call cheap."""

from __future__ import annotations

from typing import Any

from tvm_flash.call.dispatch import entrance
from tvm_flash.call.signature import signature

_attend_bhsd, _attend_bshd = entrance(signature("bhsd")), entrance(signature("bshd"))

#: The same with sinks.  A call without them has a tensor less to look at.
_WITH_SINKS = ("alibi_slopes", "sinks")
_attend_bhsd_sinks, _attend_bshd_sinks = (entrance(signature(x, parameters=_WITH_SINKS)) for x in ("bhsd", "bshd"))


def flash_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    return_lse: bool = False,
    out: Any = None,
    variant: str = "v1",
) -> Any:
    """Attention over tensors in V1's layout, ``(batch, heads, seq, head_dim)``.

    Parameters
    ----------
    q: ``(batch, heads, seqlen_q, head_dim)``, float32, float16 or bfloat16, of torch, NumPy, CuPy, JAX, or DLPack.
        Any strides with a contiguous last dimension; head_dim is a multiple of 8.
    k: ``(batch, kv_heads, seqlen_kv, head_dim)``; query head h reads kv head ``h // (heads // kv_heads)``.
    v: ``(batch, kv_heads, seqlen_kv, head_dim_v)``.
    causal: query i sees the keys up to ``i + seqlen_kv - seqlen_q``, aligned bottom-right.
    softmax_scale: factor of the scores; ``1/sqrt(head_dim)`` if not given.
    window_size: ``(left, right)``: a query sees so many keys before and after its own position; −1 is unbounded.
    softcap: replaces a score s by ``softcap * tanh(s / softcap)``; 0 doesn't.
    alibi_slopes: float32 ``(heads,)`` or ``(batch, heads)``: ``slope * |distance|`` is subtracted from a score.
    sinks: float32 ``(heads,)`` or ``(batch, heads)``: a logit that each row's softmax has beside those of its keys, and
        no value for; its gradient is there too.
    return_lse: also return the log-sum-exp of each row.
    out: where the result goes, of the result's shape and dtype; must not share memory with an input.
    variant: which kernel runs, ``"v1"``, ``"v2"`` or ``"auto"``; the layout stays that of this function.

    Returns
    -------
    ``(batch, heads, seqlen_q, head_dim_v)`` in q's dtype and framework; zeros in a row that sees no key.  With
    ``return_lse`` a pair of that and float32 ``(batch, heads, seqlen_q)``, natural logarithm, in such a row −inf, or
    its sink.

    Raises
    ------
    InvalidArgumentError, LayoutError (ValueError), ArgumentTypeError (TypeError): an argument is wrong.
    NotSupportedError, KernelNotFoundError (NotImplementedError): nothing can compute it.
    PackError, KernelError (RuntimeError): no pack for the device, a damaged pack, a failed launch.

    Notes
    -----
    The method is FlashAttention (Dao et al., 2022; Dao, 2023).  The kernel runs on the framework's current stream,
    never waits, and can be captured in a CUDA graph.
    """
    # fmt: off
    if sinks is not None:
        return _attend_bhsd_sinks(q, k, v, alibi_slopes, sinks, out,
                                  variant, return_lse, softmax_scale, causal, window_size, softcap)
    return _attend_bhsd(q, k, v, alibi_slopes, out,
                        variant, return_lse, softmax_scale, causal, window_size, softcap)
    # fmt: on


def flash_attention_v2(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    softmax_scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    return_lse: bool = False,
    out: Any = None,
    variant: str = "v2",
) -> Any:
    """Attention over tensors in V2's layout, ``(batch, seq, heads, head_dim)``.

    Parameters, results and errors are those of :func:`flash_attention`, with dimensions 1 and 2 of q, k, v and the
    result swapped; the log-sum-exp stays ``(batch, heads, seqlen_q)``.
    """
    # fmt: off
    if sinks is not None:
        return _attend_bshd_sinks(q, k, v, alibi_slopes, sinks, out,
                                  variant, return_lse, softmax_scale, causal, window_size, softcap)
    return _attend_bshd(q, k, v, alibi_slopes, out,
                        variant, return_lse, softmax_scale, causal, window_size, softcap)
    # fmt: on

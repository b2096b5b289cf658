"""The functions of the package ``flash_attn`` (FlashAttention 2), with its argument names, order and defaults."""

from __future__ import annotations

import torch

from tvm_flash.call.problem import HEAD_DIM_MULTIPLE
from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError, NotSupportedError
from tvm_flash.nn.attend import attend, fit, has_rows
from tvm_flash.nn.kvcache import attend_pages
from tvm_flash.nn.sequences import attend_sequences
from tvm_flash.nn.windows import sides


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
):
    """Attention over ``(batch, seqlen, heads, head_dim)``; k and v may have fewer heads.

    Tensors whose head_dim is no multiple of 8, or whose last dimension isn't contiguous, are copied, as flash_attn
    does, and on a GPU those whose rows don't begin at multiples of 16 bytes; of a padded head_dim the result is a view.
    A side of ``window_size`` that is negative or None is unbounded, as is a ``window_size`` of None.  Causal and window
    masks are aligned bottom-right, as in FlashAttention 2.1 and later.  ``deterministic`` changes nothing: results are
    the same bits on every run.

    Returns
    -------
    ``(batch, seqlen_q, heads, head_dim)``; with ``return_attn_probs`` also the log-sum-exp
    ``(batch, heads, seqlen_q)`` and None, where flash_attn gives the pattern of its dropout.

    Raises
    ------
    NotSupportedError: ``dropout_p`` isn't 0, or a gradient is required that no kernel computes; and what
        :func:`tvm_flash.flash_attention_v2` raises.
    """
    _refuse_dropout(dropout_p)
    result = attend(
        "bshd",
        *_fitting(q, k, v),
        softmax_scale=_scale(softmax_scale, q),
        causal=causal,
        window_size=sides(window_size),
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        return_lse=return_attn_probs,
    )
    if not return_attn_probs:
        return _columns(result, v)
    out, lse = result
    return _columns(out, v), lse, None


def flash_attn_qkvpacked_func(qkv: torch.Tensor, *args, **kwargs):
    """:func:`flash_attn_func` of ``(batch, seqlen, 3, heads, head_dim)``; nothing is copied."""
    return flash_attn_func(*_unpacked("qkv", qkv, 2, 3), *args, **kwargs)


def flash_attn_kvpacked_func(q: torch.Tensor, kv: torch.Tensor, *args, **kwargs):
    """:func:`flash_attn_func` of q and ``(batch, seqlen_kv, 2, kv_heads, head_dim)``; nothing is copied."""
    return flash_attn_func(q, *_unpacked("kv", kv, 2, 2), *args, **kwargs)


def flash_attn_varlen_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
):
    """Attention over sequences that lie one after another: q ``(total_q, heads, head_dim)``.

    ``cu_seqlens_q`` and ``cu_seqlens_k`` (``(batch + 1,)``) say where each sequence starts, from 0 on, and the last one
    ends.  Nothing here depends on ``max_seqlen_q`` and ``max_seqlen_k``.  It is one call of
    :func:`tvm_flash.flash_attention_varlen`; on a GPU whose pack has no kernels for that, the starts are read on the
    host, and each run of neighbours of one length is a call.  With a ``block_table`` (``(batch, pages_per_sequence)``),
    k and v are pages of a cache, ``(pages, page_size, kv_heads, head_dim)``, and ``cu_seqlens_k`` says how many keys
    each sequence has on its own; a head_dim that is no multiple of 8 is padded, which copies the whole cache.

    Returns
    -------
    ``(total_q, heads, head_dim_v)``; with ``return_attn_probs`` also the log-sum-exp ``(heads, total_q)`` and None.
    Rows after the last sequence are zeros, with a log-sum-exp of −inf.

    Raises
    ------
    NotSupportedError: ``dropout_p`` isn't 0, or no kernel computes the gradients, as with a ``block_table``; and what
        :func:`tvm_flash.flash_attention_varlen` and :func:`tvm_flash.flash_attention_paged` raise.
    """
    _refuse_dropout(dropout_p)
    options = {
        "softmax_scale": _scale(softmax_scale, q),
        "causal": causal,
        "window_size": sides(window_size),
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "return_lse": return_attn_probs,
    }
    starts = (cu_seqlens_q, cu_seqlens_k)
    if block_table is not None:
        result = attend_pages(*_fitting(q, k, v), *starts, block_table, max_seqlen_q, **options)
    else:
        result = attend_sequences(*_fitting(q, k, v), *starts, **options)
    if not return_attn_probs:
        return _columns(result, v)
    out, lse = result
    return _columns(out, v), lse, None


def flash_attn_varlen_qkvpacked_func(qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, *args, **kwargs):
    """:func:`flash_attn_varlen_func` of ``(total, 3, heads, head_dim)``; nothing is copied."""
    starts = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return flash_attn_varlen_func(*_unpacked("qkv", qkv, 1, 3), *starts, *args, **kwargs)


def flash_attn_varlen_kvpacked_func(q: torch.Tensor, kv: torch.Tensor, *args, **kwargs):
    """:func:`flash_attn_varlen_func` of q and ``(total_k, 2, kv_heads, head_dim)``; nothing is copied."""
    return flash_attn_varlen_func(q, *_unpacked("kv", kv, 1, 2), *args, **kwargs)


def _unpacked(name: str, x: torch.Tensor, dim: int, count: int) -> tuple[torch.Tensor, ...]:
    """The tensors that are packed along a dimension.

    Raises
    ------
    ArgumentTypeError, InvalidArgumentError: it is no tensor, or has others.
    """
    if not isinstance(x, torch.Tensor):
        raise ArgumentTypeError(f"{name}: is a {type(x).__qualname__}, expected a tensor of torch")
    if x.ndim != dim + 3 or x.shape[dim] != count:
        rows = "(batch, seqlen" if dim == 2 else "(total"
        raise InvalidArgumentError(
            f"{name}: has shape {tuple(x.shape)}, expected {rows}, {count}, heads, head_dim); stack "
            f"{', '.join(name)} along dimension {dim}"
        )
    return x.unbind(dim)


def _fitting(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """q, k and v as kernels take them; what aren't tensors with rows that fit is left for the checks to refuse."""
    if not all(map(has_rows, (q, k, v))) or q.shape[-1] != k.shape[-1]:
        return q, k, v
    return fit(q), fit(k), fit(v)


def _columns(out: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The result without the columns that :func:`fit` added to v."""
    return out if out.shape[-1] == v.shape[-1] else out[..., : v.shape[-1]]


def _scale(softmax_scale: float | None, q: torch.Tensor) -> float | None:
    """The scale of a head_dim before padding; None where the kernel's own is the same."""
    if softmax_scale is not None or not isinstance(q, torch.Tensor) or q.is_nested or not q.ndim:
        return softmax_scale
    return q.shape[-1] ** -0.5 if q.shape[-1] % HEAD_DIM_MULTIPLE else None


def _refuse_dropout(dropout_p: float) -> None:
    if isinstance(dropout_p, torch.Tensor) or dropout_p:
        raise NotSupportedError(
            f"dropout_p: is {dropout_p}, and these kernels have no dropout; give 0.0; models are trained without it"
        )

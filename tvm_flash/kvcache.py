"""Attention of new tokens to a cache of keys and values, to which theirs are appended first, in one call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm_flash.call.over_cache import OverCache
from tvm_flash.errors import ArgumentTypeError
from tvm_flash.frameworks import framework_of
from tvm_flash.paged import flash_attention_paged


def with_kvcache(
    tensors: Mapping[str, Any],
    cache_seqlens: Any,
    longest: int | None,
    interleaved: Any,
    num_splits: Any,
    how: OverCache,
) -> Any:
    """What :func:`flash_attention_with_kvcache` does, with its tensors by name.

    Raises
    ------
    ArgumentTypeError: they aren't of torch.
    """
    q = tensors["q"]
    if framework_of(q, "q").name != "torch":
        raise ArgumentTypeError(
            f"q: is a {type(q).__module__}.{type(q).__qualname__}, and caches that are changed in place are tensors of "
            f"torch; use torch.from_numpy or torch.from_dlpack"
        )
    from tvm_flash.tracing import torch_cache

    return torch_cache.attend(tensors, cache_seqlens, longest, interleaved, num_splits, how)


def flash_attention_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    *,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    page_table: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k_new: Any = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    sinks: Any = None,
    k_scale: Any = None,
    v_scale: Any = None,
    rotary_interleaved: bool = True,
    num_splits: int = 0,
    return_lse: bool = False,
) -> Any:
    """Rotate the new queries and keys, put the new keys and values into the cache, and attend to all of it.

    Tensors are those of torch, and the caches are changed in place.  Nothing is read on the host for tensors on a GPU,
    and a CUDA graph replays with other lengths and pages.  Everything is checked before anything is written.

    Parameters
    ----------
    q: ``(batch, seqlen_q, heads, head_dim)``, or ``(total_q, heads, head_dim)`` with ``cu_seqlens_q``.
    k_cache, v_cache: ``(batch_cache, seqlen_cache, kv_heads, head_dim)``, or with a ``page_table`` ``(pages, page_size,
        kv_heads, head_dim)``; any strides with a contiguous last dimension.
    k, v: the new keys and values, ``(batch, seqlen_new, kv_heads, head_dim)``, or ``(total_new, kv_heads, head_dim)``
        with ``cu_seqlens_k_new``.  Those of sequence b come to the positions from ``cache_seqlens[b]`` on.
    rotary_cos, rotary_sin: ``(seqlen_ro, rotary_dim / 2)`` in q's dtype, with k and v only: the first ``rotary_dim``
        elements of a row are turned, of a key by its position, of a query by that of its token, or where neither
        ``causal`` nor a window is asked for, by ``cache_seqlens``.  A position past the end counts as the last on a
        GPU, and is an error on the CPU.
    cache_seqlens: how many keys each sequence has in the cache before: int32 ``(batch,)``, or a number for all.  Left
        out, it is all that the cache has room for, and nothing can be appended.
    cache_batch_idx: int32 ``(batch,)``, which entry of the cache each sequence has; the first ones if not given.  None
        may occur twice if k is given, but of sequences with a new key and none before: rows that pad a batch may have
        one entry, or one page, where the key of the last stands.  Not with a page table.
    cache_leftpad: int32 ``(batch,)``, keys at the beginning of each sequence that are hidden.
    page_table: int32 ``(batch, pages_per_sequence)``, as in :func:`tvm_flash.flash_attention_paged`.
    cu_seqlens_q, cu_seqlens_k_new: int32 ``(batch + 1,)``: where each sequence begins in q, and in k and v; for a call
        whose sequences have different numbers of tokens.
    max_seqlen_q: with ``cu_seqlens_q`` a number of queries that no sequence exceeds.
    rotary_seqlens: int32 ``(batch,)``, positions of the first new tokens for the rotation, if not ``cache_seqlens``.
    causal: query i of a sequence sees keys up to ``i + length - seqlen_q``, ``length`` being what is in the cache
        afterwards.
    softmax_scale, window_size, softcap, alibi_slopes, sinks: as in :func:`tvm_flash.flash_attention_paged`.
    k_scale, v_scale: of caches in 8 bits, float8_e4m3fn or int8, as in :func:`tvm_flash.flash_attention_paged` (of a
        cache without a page table, its entries are the pages).  New keys, turned first, and values are divided by the
        scale of their place in float32 and rounded as :func:`tvm_flash.quantise_cache` does it.
    rotary_interleaved: whether elements 0 and 1, 2 and 3, … are turned together, or else 0 and ``rotary_dim / 2``, ….
    num_splits: taken as other packages take it; keys are always split at the same positions.
    return_lse: also return the log-sum-exp.

    Returns
    -------
    A tensor as q, with the head_dim of v_cache; with ``return_lse`` a pair of that and float32 ``(batch, heads,
    seqlen_q)``, or ``(heads, total_q)`` with ``cu_seqlens_q``.

    Raises
    ------
    InvalidArgumentError (ValueError), ArgumentTypeError (TypeError): an argument is wrong.  What is in int32 tensors is
        checked on the CPU; on a GPU nobody reads it: see :func:`tvm_flash.check_pages`.
    NotSupportedError, KernelNotFoundError (NotImplementedError): nothing can compute it, or a gradient is required.
    PackError, KernelError (RuntimeError): no pack for the device, a damaged pack, a failed launch.
    """
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    tensors |= {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "cache_batch_idx": cache_batch_idx}
    tensors |= {"cache_leftpad": cache_leftpad, "page_table": page_table, "cu_seqlens_q": cu_seqlens_q}
    tensors |= {"cu_seqlens_k_new": cu_seqlens_k_new, "rotary_seqlens": rotary_seqlens}
    tensors |= {"k_scale": k_scale, "v_scale": v_scale}
    options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size, "softcap": softcap}
    parameters = {"alibi_slopes": alibi_slopes, "sinks": sinks}
    how = OverCache(flash_attention_paged, parameters, options | {"return_lse": return_lse})
    return with_kvcache(tensors, cache_seqlens, max_seqlen_q, rotary_interleaved, num_splits, how)

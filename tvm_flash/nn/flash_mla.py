"""The function of the package ``flash_mla`` over a cache of latents, with its arguments."""

from __future__ import annotations

from typing import Any

import torch

from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError, NotSupportedError
from tvm_flash.latent import flash_attention_latent
from tvm_flash.nn.kvcache import as_int32
from tvm_flash.nn.naming import named_call
from tvm_flash.tracing.torch_cache import multiples


def get_mla_metadata(*_: Any, split_length: int | None = None, **__: Any) -> tuple[int | None, None]:
    """What ``flash_mla`` prepares for a batch.  Here nothing is prepared, as the device reads lengths itself; but where
    keys are split can be said (:func:`tvm_flash.flash_attention_latent`), which programs pass on with it.
    """
    return split_length, None


def flash_mla_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    cache_seqlens: torch.Tensor,
    head_dim_v: int = 512,
    tile_scheduler_metadata: int | None = None,
    num_splits: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: torch.Tensor | None = None,
    attn_sink: torch.Tensor | None = None,
    extra_k_cache: torch.Tensor | None = None,
    extra_indices_in_kvcache: torch.Tensor | None = None,
    topk_length: torch.Tensor | None = None,
    extra_topk_length: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multi-head latent attention of new tokens to a cache that has their keys; as in ``flash_mla``.

    It is one call of :func:`tvm_flash.flash_attention_latent`.  int32 tensors may have another integer dtype, and are
    converted then.  Pages may have any size.

    Parameters
    ----------
    q: ``(batch, seqlen_q, heads, head_dim)``.
    k_cache: ``(pages, page_size, kv_heads, head_dim)``, or ``(pages, page_size, head_dim)`` with one head.
    block_table: ``(batch, pages_per_sequence)``.
    cache_seqlens: ``(batch,)``, keys of each sequence, those of the new tokens included.
    tile_scheduler_metadata: what :func:`get_mla_metadata` gives, the ``split_length``; ``num_splits`` changes nothing.
    softmax_scale: ``head_dim ** -0.5`` if not given, as in ``flash_mla``.
    causal: aligned bottom-right.

    Returns
    -------
    ``(batch, seqlen_q, heads, head_dim_v)`` and the log-sum-exp, float32 ``(batch, heads, seqlen_q)``.

    Raises
    ------
    NotSupportedError: a cache in 8 bits, chosen keys, a sink or a second cache is asked for; and what
        :func:`tvm_flash.flash_attention_latent` raises.
    """
    others = {"indices": indices, "attn_sink": attn_sink, "extra_k_cache": extra_k_cache, "topk_length": topk_length}
    others |= {"extra_indices_in_kvcache": extra_indices_in_kvcache, "extra_topk_length": extra_topk_length}
    for name, x in others.items():
        if x is not None:
            raise NotSupportedError(f"{name}: is given, and there are no kernels for it; leave it out")
    if is_fp8_kvcache:
        raise NotSupportedError("is_fp8_kvcache: is True, and latents in 8 bits have no kernels; keep them in 16 bits")
    for name, x, ranks in (("q", q, (4,)), ("k_cache", k_cache, (3, 4))):
        if not isinstance(x, torch.Tensor):
            raise ArgumentTypeError(f"{name}: is a {type(x).__qualname__}, expected a tensor of torch")
        if x.ndim not in ranks:
            wanted = {"q": "(batch, seqlen_q, heads, head_dim)", "k_cache": "(pages, page_size, kv_heads, head_dim)"}
            raise InvalidArgumentError(f"{name}: has shape {tuple(x.shape)}, expected {wanted[name]}")
    batch, seqlen_q, heads, head_dim = q.shape
    names = {"kv_cache": "k_cache", "page_table": "block_table", "seqlens_k": "cache_seqlens"}
    out, lse = named_call(
        {**names, "split_length": "tile_scheduler_metadata", "max_seqlen_q": "q"},
        flash_attention_latent,
        q.flatten(0, 1),
        k_cache.unsqueeze(2) if k_cache.ndim == 3 else k_cache,
        multiples(q.device, batch, seqlen_q),
        as_int32(cache_seqlens),
        as_int32(block_table),
        seqlen_q,
        head_dim_v=head_dim_v,
        softmax_scale=head_dim**-0.5 if softmax_scale is None else softmax_scale,
        causal=causal,
        split_length=tile_scheduler_metadata,
        return_lse=True,
    )
    return out.view(batch, seqlen_q, heads, head_dim_v), lse.view(heads, batch, seqlen_q).transpose(0, 1)

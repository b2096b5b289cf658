"""Hugging Face transformers: ``register()``, then ``attn_implementation="tvm_flash"``.

A model makes its mask once in each forward pass, by the function that is registered for its attention, and hands it to
every layer's attention.  Ours, :func:`key_ranges`, makes no ``(seqlen_q, seqlen_kv)`` mask of causal, sliding and
padded attention, but says in one small tensor which keys there are; see :class:`KeyRanges`.  Masks of any other kind
are made as for ``"sdpa"``, and torch computes them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, modeling_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
    sliding_window_overlay,
)

from tvm_flash.errors import NotSupportedError
from tvm_flash.nn.attend import attend
from tvm_flash.nn.flash_attn import flash_attn_varlen_func
from tvm_flash.nn.masks import KeyMask, side_by_side
from tvm_flash.nn.sdpa import no_kernel, refusal, scaled_dot_product_attention, warn_of_fallback
from tvm_flash.padded import padded_attention

NAME = "tvm_flash"


def register(name: str = NAME) -> None:
    """Make ``attn_implementation=name`` known to transformers, for every model that takes one.

    transformers takes every name with "flash" in it for the package ``flash_attn`` or one like it, and imports that
    when a model is made: for this name there is nothing to import, which a function in that one's place has to say.
    """
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, key_ranges)
    if hasattr(modeling_utils, "lazy_import_flash_attention"):
        modeling_utils.lazy_import_flash_attention = _import_unless(name, modeling_utils.lazy_import_flash_attention)


def _import_unless(name: str, lazy_import: Callable) -> Callable:
    @functools.wraps(lazy_import)
    def import_flash_attention(implementation, *args, **kwargs):
        return None if implementation == name else lazy_import(implementation, *args, **kwargs)

    return import_flash_attention


@dataclass(frozen=True)
class KeyRanges:
    """A mask as one tensor, int32 ``(batch, kind, keys, 2)``, which a model hands on without looking into it.

    Its values, the same along dimensions 1 and 2, are where the keys of each batch entry start and end.  ``keys`` is
    the number of keys that take part: those after it, still empty places of a static cache, don't.  ``kind`` is 1 if
    every query sees all of these, 2 if the mask is causal (aligned to the last of the ``keys``), and 2 + w if it is
    causal with a sliding window of w keys.
    """

    ends: torch.Tensor
    keys: int
    causal: bool = False
    window: int = 0

    def pack(self) -> torch.Tensor:
        """The tensor; nothing is copied.  ``ends`` is int32 ``(batch, 2)``."""
        kind = 2 + self.window if self.causal else 1
        return self.ends[:, None, None].expand(-1, kind, self.keys, -1)

    @staticmethod
    def unpack(mask: torch.Tensor | None) -> KeyRanges | None:
        """What a mask holds if :meth:`pack` made it, else None."""
        if mask is None or mask.dtype != torch.int32:
            return None
        kind = mask.shape[1]
        return KeyRanges(mask[:, 0, 0], mask.shape[2], kind > 1, max(0, kind - 2))

    def visible(self, seqlen_q: int) -> torch.Tensor:
        """The same as a boolean mask ``(batch, 1, seqlen_q, keys)``."""
        i = torch.arange(seqlen_q, device=self.ends.device)[:, None] + self.keys - seqlen_q
        j = torch.arange(self.keys, device=self.ends.device)
        start, end = (x[:, None, None, None] for x in self.ends.unbind(1))
        seen = ((j >= start) & (j < end)).expand(-1, -1, seqlen_q, -1)
        seen = seen & (j <= i) if self.causal else seen
        return seen & (j > i - self.window) if self.window else seen


def key_ranges(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor | None:
    """The mask of a forward pass: None if there is nothing to hide but the future, else a :class:`KeyRanges`.

    Arguments are those of ``transformers.masking_utils.sdpa_mask``, whose result is returned for masks of another kind,
    and in a program that is being traced with a padding mask, whose values can't be read there.
    """
    known = None if others.get("use_vmap") else _recognise(mask_function)
    tracing = torch.compiler.is_compiling() or (attention_mask is not None and type(attention_mask) is not torch.Tensor)
    ranges = _Unknown
    if known is not None and not (tracing and attention_mask is not None):
        visible = None if attention_mask is None else _padding(attention_mask, kv_length, kv_offset)
        first = q_offset - kv_offset  # where the first query stands among the keys
        ranges = _ranges(*known, batch_size, q_length, kv_length, first, visible, others.get("device", "cpu"))
    if ranges is not _Unknown:
        return None if ranges is None else ranges.pack()
    return sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **{**others, "allow_is_causal_skip": False},
    )


class _Unknown:
    """Stands for a mask that isn't one of ranges."""


def _recognise(mask_function: Any) -> tuple[bool, int] | None:
    """Whether a mask function of transformers is causal, and its window (0 without one); None if it is another."""
    if mask_function is bidirectional_mask_function:
        return False, 0
    if mask_function is causal_mask_function:
        return True, 0
    cell = dict(zip(mask_function.__code__.co_freevars, mask_function.__closure__ or (), strict=True))
    if "mask_functions" not in cell:
        return None
    parts = cell["mask_functions"].cell_contents
    if len(parts) != 2 or parts[1] is not causal_mask_function or parts[0].__closure__ is None:
        return None
    if parts[0].__qualname__ != f"{sliding_window_overlay.__name__}.<locals>.inner_mask":
        return None
    return True, parts[0].__closure__[0].cell_contents


def _padding(attention_mask: torch.Tensor, kv_length: int, kv_offset: int) -> torch.Tensor:
    """The padding mask ``(batch, seen tokens)`` as boolean ``(batch, kv_length)``; what lies beyond it is hidden."""
    mask = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    return torch.nn.functional.pad(mask, (0, kv_length - mask.shape[1]))


def _ranges(causal, window, batch, q_length, kv_length, first, visible, device) -> KeyRanges | type[_Unknown] | None:
    """The key ranges of a mask: None if there is nothing to hide but the future, ``_Unknown`` if they have gaps."""
    if causal and q_length == 1:
        # A decoder's step: the keys up to its own, whatever room a static cache has behind them.
        keys, end = kv_length, first + 1
        start = 0 if not window else end - window
        seen = torch.arange(kv_length, device=device)
        seen = ((seen >= start) & (seen < end)).expand(batch, -1)
        visible, causal, window = seen if visible is None else seen & visible, False, 0
    else:
        keys = int(first) + q_length if causal else kv_length
        visible = visible if visible is None else visible[:, :keys]
    window = window if window < keys else 0
    tracing = torch.compiler.is_compiling()
    if visible is not None and not tracing:
        if not side_by_side(visible):
            return _Unknown
        visible = None if bool(visible.all()) else visible
    if visible is not None:
        return KeyRanges(KeyMask(visible, ordered=True).key_range(), keys, causal, window)
    if keys == kv_length and not window:
        return None
    ends = torch.tensor([[0, keys]], dtype=torch.int32, device=device).expand(batch, 2)
    return KeyRanges(ends, keys, causal, window)


# ---------------------------------------------------------------- attention


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """One layer's attention, with the arguments that transformers gives.

    Parameters
    ----------
    query: ``(batch, heads, seqlen_q, head_dim)``; key, value: ``(batch, kv_heads, seqlen_kv, head_dim)``.
    attention_mask: of :func:`key_ranges`, or any that transformers' ``"sdpa"`` takes.

    Returns
    -------
    ``(batch, seqlen_q, heads, head_dim)`` and None for the weights, which are never made.

    Raises
    ------
    NotSupportedError: the model has attention sinks (``s_aux``), or a soft cap where torch must compute.
    """
    if others.get("s_aux") is not None:
        raise NotSupportedError("s_aux: attention sinks aren't supported; use attn_implementation='eager'")
    ranges = KeyRanges.unpack(attention_mask)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and query.shape[2] > 1  # as for "sdpa": asked only without a mask
    reason = refusal(query, key, value, None, dropout, False, scaling, True)
    reason = reason or ("the layer has a position bias" if others.get("position_bias") is not None else None)
    reason = reason or ("the cache is paged" if others.get("cache") is not None else None)
    if others.get("cu_seq_lens_q") is not None and attention_mask is None:
        return _packed(query, key, value, causal, scaling, softcap or 0.0, others), None
    if reason is None and (ranges is not None or attention_mask is None):
        kind = "padded" if ranges is not None else "window" if softcap else "causal" if causal else "full"
        reason = no_kernel(kind, query, value, "softcap" if softcap else "identity")
        if reason is None:
            return _attend(query, key, value, ranges, causal, scaling, softcap or 0.0), None
    if softcap:
        raise NotSupportedError(
            f"softcap: there is no kernel that has it for this call ({reason or 'a mask of another kind'}); "
            f"use attn_implementation='eager'"
        )
    if ranges is not None:
        attention_mask = ranges.visible(query.shape[2])
        key, value = key[:, :, : ranges.keys], value[:, :, : ranges.keys]
    elif reason is None:
        group = {"enable_gqa": query.shape[1] != key.shape[1]}
        out = scaled_dot_product_attention(query, key, value, attention_mask, dropout, False, scaling, **group)
        return out.transpose(1, 2).contiguous(), None
    warn_of_fallback(reason)
    options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **others}
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _packed(query, key, value, causal: bool, scaling: float | None, softcap: float, others: dict[str, Any]):
    """Sequences one after another in a batch of one, as vision models and packed batches give them."""
    starts = others["cu_seq_lens_q"], others["cu_seq_lens_k"]
    packed = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    options = {"causal": causal, "softmax_scale": scaling, "softcap": softcap}
    return flash_attn_varlen_func(*packed, *starts, others["max_length_q"], others["max_length_k"], **options)[None]


def _attend(query, key, value, ranges: KeyRanges | None, causal: bool, scaling: float | None, softcap: float):
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))  # (batch, seq, heads, head_dim)
    if ranges is None:
        return attend("bshd", query, key, value, causal=causal, softmax_scale=scaling, softcap=softcap)
    key, value = key[:, : ranges.keys], value[:, : ranges.keys]
    window = (ranges.window - 1, 0) if ranges.window else (-1, -1)
    options = {"causal": ranges.causal, "window_size": window, "softmax_scale": scaling, "layout": "bshd"}
    return padded_attention(query, key, value, ranges.ends, **options)

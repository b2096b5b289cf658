"""Attention that our kernels don't compute, with everything that transformers' models ask for, by torch."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention

from tvm_flash.errors import NotSupportedError
from tvm_flash.frameworks.torch_watch import is_watched
from tvm_flash.integrations.transformers.masks import UNBOUNDED, band, within

#: The window that hides nothing.
ALL = (UNBOUNDED, UNBOUNDED)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    ends: torch.Tensor | None,
    window: tuple[int, int],
    mask: torch.Tensor | None,
    indices: torch.Tensor | None,
    sequences: Any,
    position_bias: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sink: torch.Tensor | None,
    dropout: float,
    weights: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``(batch, seqlen_q, heads, head_dim_v)``, and the weights ``(batch, heads, seqlen_q, seqlen_kv)`` or None.

    Tensors are ``(batch, heads, seq, head_dim)``; everything that hides keys hides them together.
    """
    (batch, heads, seqlen_q, _), keys, device = query.shape, key.shape[2], query.device
    if sequences is not None and batch > 1:  # one row of sequences
        query, key, value = (x.transpose(0, 1).flatten(1, 2)[None] for x in (query, key, value))
    plain = ends is None and mask is None and indices is None and sequences is None and position_bias is None
    if key.shape[1] != heads and not (plain and window == ALL):
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    square = window == (UNBOUNDED, 0) and seqlen_q == keys  # torch aligns at the top left
    if plain and (window == ALL or square) and not (softcap or weights or sink is not None):
        group = {"enable_gqa": True} if key.shape[1] != heads else {}
        out = scaled_dot_product_attention(query, key, value, None, dropout, square, scale=scaling, **group)
        return out.transpose(1, 2).contiguous(), None
    if key.shape[1] != heads:
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    visible = _visible(ends, window, indices, sequences, query.shape[2], key.shape[2], device)
    if mask is not None and mask.dtype == torch.bool:
        visible, mask = visible & mask, None
    bias = _sum(position_bias, mask)
    if softcap or weights or sink is not None:
        out, found = _written_out(query, key, value, visible, bias, scaling, softcap, sink, dropout)
    else:
        added = visible
        if bias is not None:
            lowest = torch.finfo(query.dtype).min
            added = torch.where(bias.isneginf(), bias, bias.clamp(min=lowest)).to(query.dtype)
            added = added.masked_fill(~visible, lowest)
        out, found = scaled_dot_product_attention(query, key, value, added, dropout, scale=scaling), None
    out = out.transpose(1, 2)  # (batch, seqlen_q, heads, head_dim_v)
    if sequences is not None and batch > 1:
        out = out[0].unflatten(0, (batch, seqlen_q))
    return out.contiguous(), found if weights else None


def _visible(ends, window, indices, sequences, seqlen_q, keys, device) -> torch.Tensor:
    """Boolean, to be broadcast over ``(batch, heads, seqlen_q, keys)``: what isn't hidden."""
    if sequences is not None:
        visible = _same_sequence(sequences, window, seqlen_q, keys, device)[None, None]
    else:
        visible = band(seqlen_q, keys, window, device)
    if ends is not None:
        visible = visible & within(ends, keys, device)
    if indices is not None:  # (batch, seqlen_q, count); one place more takes those that are out of range
        places = torch.where((indices >= 0) & (indices < keys), indices, keys).long()
        chosen = torch.zeros(*indices.shape[:2], keys + 1, dtype=torch.bool, device=device)
        visible = visible & chosen.scatter(-1, places, True)[..., :keys][:, None]
    return visible


def mask_within(mask: torch.Tensor, sequences: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """A mask, boolean or of numbers, that also hides sequences one after the other from each other.

    Raises
    ------
    NotSupportedError: all queries are of sequences, and not all keys that the mask shows, as where a layer makes keys
        of several sequences beside theirs; that is found out where the sequences' starts can be read at no cost.
    """
    (batch, _, seqlen_q, _), keys = query.shape, key.shape[2]
    starts = (sequences.starts_q, sequences.starts_k)
    if not torch.compiler.is_compiling() and all(x.device.type == "cpu" and not is_watched((x,)) for x in starts):
        end_q, end_k = (int(x[-1]) for x in starts)
        if end_q == batch * seqlen_q and end_k < batch * keys and _shown(mask, batch, keys)[end_k:].any():
            raise NotSupportedError(
                f"cu_seq_lens_k: ends at {end_k} of {batch * keys} keys, and attention_mask shows some beyond, of "
                f"no sequence; leave out cu_seq_lens_q and cu_seq_lens_k"
            )
    visible = _same_sequence(sequences, ALL, batch * seqlen_q, batch * keys, query.device)
    visible = visible.view(batch, seqlen_q, batch, keys).diagonal(dim1=0, dim2=2).movedim(-1, 0)[:, None]
    return mask & visible if mask.dtype == torch.bool else mask.masked_fill(~visible, torch.finfo(mask.dtype).min)


def _shown(mask: torch.Tensor, batch: int, keys: int) -> torch.Tensor:
    """``(batch * keys,)``: which keys a mask, boolean or of numbers, shows to any query."""
    shown = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return (shown & torch.ones(batch, 1, 1, keys, dtype=torch.bool, device=mask.device)).flatten(1, 2).any(1).flatten()


def _same_sequence(sequences, window, seqlen_q: int, keys: int, device) -> torch.Tensor:
    """``(seqlen_q, keys)``: true within a sequence, where the window, aligned to its end, lets a key through."""
    i, j = torch.arange(seqlen_q, device=device), torch.arange(keys, device=device)
    starts_q, starts_k = sequences.starts_q.to(device), sequences.starts_k.to(device)
    of_q = torch.searchsorted(starts_q, i.int(), right=True) - 1
    of_k = torch.searchsorted(starts_k, j.int(), right=True) - 1
    last = starts_q.shape[0] - 2  # rows after the last sequence belong to none
    ends_q, ends_k = (starts[(of_q + 1).clamp(max=last + 1)] for starts in (starts_q, starts_k))
    position = i - ends_q + ends_k  # of a query among the keys
    visible = (of_q[:, None] == of_k) & (of_q[:, None] <= last)
    left, right = window
    visible = visible if left == UNBOUNDED else visible & (j >= position[:, None] - left)
    return visible if right == UNBOUNDED else visible & (j <= position[:, None] + right)


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a.to(torch.promote_types(a.dtype, torch.float32)) + b  # in 16 bits a sum of low numbers is infinite


def _written_out(query, key, value, visible, bias, scaling, softcap, sink, dropout):
    """Attention step by step, with a soft cap, sinks, or for its weights."""
    wide = torch.promote_types(query.dtype, torch.float32)
    lowest = torch.finfo(wide).min  # nothing is less, so that a row without keys isn't NaN
    scores = (query @ key.transpose(2, 3) * scaling).to(wide)
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores if bias is None else scores + bias.to(wide)
    scores = scores.masked_fill(~visible, lowest).clamp(min=lowest)
    if sink is not None:
        sink = sink.reshape(1, -1, 1, 1) if sink.ndim == 1 else sink
        sink = sink.to(wide).expand(scores.shape[0], scores.shape[1], scores.shape[2], 1)
        scores = torch.cat((scores, sink), -1)
    weights = torch.softmax(scores, -1)
    weights = weights if sink is None else weights[..., :-1]
    weights = drop(weights.to(query.dtype), dropout) if dropout else weights.to(query.dtype)
    return weights @ value, weights

"""Causal masks as torch has them: which diagonal they follow, and torch's ``CausalBias``."""

from __future__ import annotations

from typing import Any

import torch


def top_left(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Keys, values and options of a call that is aligned bottom-right, for a causal mask that is aligned top-left.

    The tensors are ``(batch, heads, seq, head_dim)``.
    """
    seqlen_q, seqlen_kv = query.shape[2], key.shape[2]
    if seqlen_q > seqlen_kv:  # the last queries see all keys: a window of what lies beyond the bottom-right diagonal
        return key, value, {"window_size": (-1, seqlen_q - seqlen_kv)}
    if seqlen_kv > seqlen_q:  # keys after the last query are never seen
        key, value = key[:, :, :seqlen_q], value[:, :, :seqlen_q]
    return key, value, {"causal": True}


def bottom_right(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """What :func:`top_left` gives, for a causal mask that is aligned bottom-right."""
    return key, value, {"causal": True}


def is_causal_bias(x: Any) -> bool:
    """Whether something is a ``torch.nn.attention.bias.CausalBias``, whose module few programs import."""
    return type(x).__name__ == "CausalBias" and hasattr(x, "variant")


def is_of(bias: Any, query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether a mask is a ``CausalBias`` for these lengths; one that is aligned top-left is taken for any, as torch."""
    return is_causal_bias(bias) and (
        is_top_left(bias) or (bias.seq_len_q, bias.seq_len_kv) == (query.shape[-2], key.shape[-2])
    )


def is_top_left(bias: Any) -> bool:
    """Whether a ``CausalBias`` of torch's means what ``is_causal`` does."""
    return bias.seq_len_q == bias.seq_len_kv or bias.variant.name == "UPPER_LEFT"

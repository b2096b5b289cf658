"""Causal masks as torch has them: which diagonal they follow, and torch's ``CausalBias``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tvm_flash.frameworks.torch import CAN_ASK_SYMBOLS

_CAUSAL = {"causal": True}


def top_left(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Keys, values and options of a call that is aligned bottom-right, for a causal mask that is aligned top-left.

    The tensors are ``(batch, heads, seq, head_dim)``.  With a ``key_range`` among the options it is a call of
    ``padded_attention``.
    """
    seqlen_q, seqlen_kv = query.shape[2], key.shape[2]
    longer, shorter = may_exceed(seqlen_q, seqlen_kv), may_exceed(seqlen_kv, seqlen_q)
    if longer and shorter:  # a program for any lengths: query 0 stands on key 0, whatever they are
        first = torch.zeros(query.shape[0], dtype=torch.int32, device=query.device)
        return key, value, {"key_range": torch.stack((first, first + seqlen_kv), -1), "query_start": first} | _CAUSAL
    if longer:  # the last queries see all keys: a window of what lies beyond the bottom-right diagonal
        return key, value, {"window_size": (-1, seqlen_q - seqlen_kv)}
    if shorter:  # keys after the last query are never seen
        key, value = key[:, :, :seqlen_q], value[:, :, :seqlen_q]
    return key, value, _CAUSAL


def may_exceed(length: int, other: int) -> bool:
    """Whether a length is greater than another, or may be, in a program that is traced or exported for any lengths.

    A program that ``torch.compile`` makes is made anew where an answer changes, and has the better kernel then.
    """
    if torch.jit.is_tracing():  # which knows nothing of a length but that of its example
        return True
    if not (torch.compiler.is_compiling() and CAN_ASK_SYMBOLS and torch.compiler.is_exporting()):
        return length > other
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return not statically_known_true(length <= other)


def kind_of(aligned: Callable, seqlen_q: int, seqlen_kv: int) -> str:
    """The kind of mask that ``aligned`` (:func:`top_left`, :func:`bottom_right`) makes a call of."""
    if aligned is bottom_right or not may_exceed(seqlen_q, seqlen_kv):
        return "causal"
    return "padded" if may_exceed(seqlen_kv, seqlen_q) else "window"


def bottom_right(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """What :func:`top_left` gives, for a causal mask that is aligned bottom-right."""
    return key, value, _CAUSAL


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

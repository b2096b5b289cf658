"""Jagged nested tensors of PyTorch: their memory is that of sequences which lie one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tvm_flash.nn.attend import fit
from tvm_flash.varlen import flash_attention_varlen


@dataclass(frozen=True)
class Sequences:
    """q, k and v as ``(total, heads, head_dim)``, and where sequences of queries and of keys begin."""

    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    offsets: tuple[torch.Tensor, torch.Tensor]

    def attend(self, causal: bool, scale: float | None) -> torch.Tensor:
        """The result, jagged ``(batch, heads, lengths, head_dim_v)``."""
        q, _, v = self.rows
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        starts = (x.int() for x in self.offsets)
        out = flash_attention_varlen(*map(fit, self.rows), *starts, causal=causal, softmax_scale=scale)
        return torch.nested.nested_tensor_from_jagged(out[..., : v.shape[-1]], self.offsets[0]).transpose(1, 2)


def sequences_of(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> Sequences | str:
    """The sequences of jagged ``(batch, heads, lengths, head_dim)``, or why they aren't such."""
    tensors = (query, key, value)
    if any(getattr(x, "layout", None) != torch.jagged or x.dim() != 4 or x._ragged_idx != 2 for x in tensors):
        return "the tensors are nested, but not jagged along the sequences of each head"
    if torch.compiler.is_compiling():
        return "jagged tensors are compiled"
    if any(x.lengths() is not None for x in tensors):
        return "the jagged tensors have holes"
    if key.offsets() is not value.offsets() or (causal and query.offsets() is not key.offsets()):
        return "the jagged tensors have offsets of their own, which nobody reads"  # whether they are equal is unknown
    rows = tuple(x.transpose(1, 2).values() for x in tensors)
    return Sequences(rows, (query.offsets(), key.offsets()))

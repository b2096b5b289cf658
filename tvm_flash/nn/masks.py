"""Padding masks: the same keys are hidden from all queries and heads of a batch entry."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tvm_flash.frameworks.torch_watch import is_differentiated, is_watched

#: Keys from which on sorting them pays on a GPU.  H200, float16, torch's masked attention against ours with sorting:
#: 118 : 239 µs at 512 keys (batch 32, 12 heads, head_dim 64), 677 : 564 at 2048 (8, 16, 128), 5297 : 2607 at 8192.
MANY_KEYS = 1536


@dataclass(frozen=True)
class KeyMask:
    """Which keys each batch entry sees.

    ``visible`` is boolean ``(batch, seqlen_kv)``.  With ``ordered`` the visible keys of each entry are known to lie
    side by side; else the kernel gets them sorted to the front: attention without positions doesn't ask where a key
    stands.
    """

    visible: torch.Tensor
    ordered: bool

    def key_range(self) -> torch.Tensor:
        """int32 ``(batch, 2)``: where the visible keys of :meth:`arrange` start and end."""
        count = self.visible.sum(-1)
        ordered = self.ordered and self.visible.shape[-1]
        start = self.visible.int().argmax(-1) if ordered else torch.zeros_like(count)
        return torch.stack((start, start + count), -1).int()

    def arrange(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values ``(batch, kv_heads, seqlen_kv, dim)`` in the order that :meth:`key_range` is for."""
        if self.ordered:
            return x
        order = torch.sort(self.visible.to(torch.uint8), dim=-1, descending=True, stable=True).indices
        return x.gather(2, order[:, None, :, None].expand(x.shape))


def key_mask_of(
    attn_mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor, scale: float | None = None
) -> KeyMask | str:
    """A mask of torch's as one over keys, or why it isn't one; ``scale`` of the scores, if it isn't the usual one.

    Nothing is read from a GPU, which would wait for it: there, and in a compiled program, no order of the keys is taken
    for granted, and a mask of numbers, which may hold more than visible and hidden, isn't looked at.
    """
    if is_differentiated(attn_mask):
        return "a gradient of attn_mask is required"
    if attn_mask.ndim < 2 or attn_mask.ndim > 4:
        return f"attn_mask has {attn_mask.ndim} dimensions"
    mask = attn_mask if query.ndim == 4 or attn_mask.ndim < 3 else attn_mask[None]
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape)) if mask.ndim < 4 else mask
    for axis, what in ((1, "heads"), (2, "queries")):
        if not mask.shape[axis]:
            return f"attn_mask is of no {what}"
        if mask.shape[axis] != 1 and mask.stride(axis) != 0:
            return f"attn_mask differs between {what}, and these kernels take masks over keys"
    mask = mask[:, 0, 0]
    readable = mask.device.type == "cpu" and not torch.compiler.is_compiling() and not is_watched((mask,))
    if mask.dtype != torch.bool:
        if not readable:
            return "attn_mask holds numbers; give a boolean one"
        visible = _visible(mask, query, key, scale)
        if visible is None:
            return "attn_mask adds a bias to the scores"
        mask = visible
    if mask.device.type == "cuda" and key.shape[-2] < MANY_KEYS:
        return (
            f"attn_mask is on a GPU, where sorting fewer than {MANY_KEYS} keys by it takes longer than torch's "
            f"attention; tvm_flash.padded_attention takes where they start and end, and sorts nothing"
        )
    batch = query.shape[0] if query.ndim == 4 else 1
    mask = mask.expand(max(batch, key.shape[0] if key.ndim == 4 else 1), key.shape[-2])
    return KeyMask(mask, ordered=readable and side_by_side(mask))


#: exp of less than this, times any number of keys, is nothing beside 1 in float32.
_NOTHING = -120.0


def _visible(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor, scale: float | None) -> torch.Tensor | None:
    """A mask of numbers as a boolean one: 0 is visible, −inf or what weighs nothing beside it is hidden, else None."""
    visible, gone = mask == 0, mask == -torch.inf
    highest = mask.masked_fill(visible, -torch.inf).max().float().item() if mask.numel() else -torch.inf
    if not highest < _NOTHING:
        return None
    # (1 − mask) · −10000, −1e9, and float16's lowest number: nothing if no score can make up for it.
    if highest > torch.finfo(torch.bfloat16).min and query.numel() and key.numel():
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        both = (query.detach(), key.detach())

        def is_nothing(product: float) -> bool:
            return highest + 2 * scale * product < _NOTHING

        by_elements = query.shape[-1] * math.prod(map(_largest, both))
        if not is_nothing(by_elements) and not is_nothing(math.prod(float(x.norm(dim=-1).max()) for x in both)):
            return None
    # Where nothing is visible, −inf gives zeros, and other numbers give weights of their own.
    return visible if bool((visible.any(-1) | gone.all(-1)).all()) else None


def _largest(x: torch.Tensor) -> float:
    """The largest size of an element; of 4096 half keys of 8 heads in an eighth of the time of their lengths."""
    return max(abs(float(n)) for n in torch.aminmax(x))


def side_by_side(visible: torch.Tensor) -> bool:
    """Whether the visible keys of each row of ``(batch, seqlen_kv)`` lie in one piece; reads the mask."""
    edges = (visible[:, 1:] & ~visible[:, :-1]).sum(-1) + visible[:, 0] if visible.shape[1] else visible.sum(-1)
    return bool((edges <= 1).all())

"""Masks of transformers' models: made once in each forward pass, handed to every layer's attention.

A model makes its mask by the function that is registered for its attention.  Ours, :func:`make_mask`, returns a
:class:`Mask`: for whoever looks into it, it is the tensor that models with eager attention get, made only then; to our
own attention it says in a few numbers which keys are seen, wherever that can be said so (:class:`KeyRanges`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_map
from transformers import masking_utils

try:
    from transformers.masking_utils import (
        bidirectional_mask_function,
        causal_mask_function,
        eager_mask,
        packed_sequence_mask_function,
        sdpa_mask,
        sliding_window_bidirectional_mask_function,
        sliding_window_causal_mask_function,
    )
except ImportError as e:
    raise ImportError(
        "transformers: is older than what is known here (5.17 and newer); pip install -U transformers"
    ) from e

from tvm_flash.integrations.transformers.models import reads_masks
from tvm_flash.nn.masks import KeyMask, side_by_side

#: Of a window, on either side of a query's own position.
UNBOUNDED = -1

_FULL, _CAUSAL = _PLAIN = (UNBOUNDED, UNBOUNDED), (UNBOUNDED, 0)


@dataclass(frozen=True)
class KeyRanges:
    """Which keys the queries see, in a few numbers.

    ``keys``: how many keys take part; those after them, still empty places of a static cache, don't.  ``ends``: int32
    ``(batch, 2)``, where the keys of each batch entry start and end, or None if it sees all of them.  ``window``: how
    many keys before and after its own position a query sees, :data:`UNBOUNDED` for all, as FlashAttention's
    ``window_size``; the last query stands at the last of the ``keys``.
    """

    keys: int
    ends: torch.Tensor | None = None
    window: tuple[int, int] = _FULL

    def visible(self, seqlen_q: int, device: torch.device) -> torch.Tensor:
        """The same as a boolean mask ``(batch or 1, 1, seqlen_q, keys)``."""
        return band(seqlen_q, self.keys, self.window, device) & within(self.ends, self.keys, device)

    def pack(self) -> torch.Tensor:
        """The same as one tensor, uint32 ``(batch, kind, keys, 2)``, which a compiled program hands on.

        ``kind`` is 1 without a window, 2 for a causal mask, 2 + w for a causal one with a window of w keys.  No
        arithmetic mixes uint32 with floats, so that it fails in a layer that takes it for a mask of numbers.
        """
        left, right = self.window
        kind = 1 if right == UNBOUNDED else 2 if left == UNBOUNDED else 3 + left
        return self.ends.view(torch.uint32)[:, None, None].expand(-1, kind, self.keys, -1)

    @staticmethod
    def unpack(mask: torch.Tensor) -> KeyRanges:
        kind = mask.shape[1]
        window = _FULL if kind == 1 else (UNBOUNDED if kind == 2 else kind - 3, 0)
        return KeyRanges(mask.shape[2], mask[:, 0, 0].view(torch.int32), window)


def band(seqlen_q: int, keys: int, window: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Boolean ``(1, 1, seqlen_q, keys)``: what a window lets through, the last query at the last key."""
    i = torch.arange(seqlen_q, device=device)[:, None] + keys - seqlen_q
    j = torch.arange(keys, device=device)
    seen = torch.ones(seqlen_q, keys, dtype=torch.bool, device=device)
    left, right = window
    seen = seen if left == UNBOUNDED else seen & (j >= i - left)
    seen = seen if right == UNBOUNDED else seen & (j <= i + right)
    return seen[None, None]


def within(ends: torch.Tensor | None, keys: int, device: torch.device) -> torch.Tensor:
    """Boolean ``(batch or 1, 1, 1, keys)``: which keys lie between where those of each batch entry start and end."""
    if ends is None:
        return torch.ones(1, 1, 1, keys, dtype=torch.bool, device=device)
    j = torch.arange(keys, device=device)
    start, end = (x[:, None, None, None] for x in ends.unbind(1))
    return (j >= start) & (j < end)


class _Content:
    """What a :class:`Mask` and its views stand for."""

    def __init__(self, shape, dtype, device, ranges: KeyRanges | None, of_each, make: Callable[[], torch.Tensor]):
        self.shape, self.dtype, self.device, self.ranges, self.make = shape, dtype, device, ranges, make
        self.of_each_sequence: tuple[int, int] | None = of_each
        self.changed = False

    @functools.cached_property
    def visible(self) -> torch.Tensor:
        return self.make()

    @functools.cached_property
    def numbers(self) -> torch.Tensor:
        lowest, zero = torch.finfo(self.dtype).min, torch.zeros((), device=self.device, dtype=self.dtype)
        return torch.where(self.visible, zero, lowest).expand(self.shape)

    def release(self) -> None:
        """From now on the numbers alone count: somebody may write into them."""
        if not self.changed:
            self.numbers = self.numbers.contiguous()
            self.changed, self.ranges, self.of_each_sequence = True, None, None


class Mask(torch.Tensor):
    """A mask ``(batch, 1, seqlen_q, seqlen_kv)`` of 0 and the dtype's lowest number, made when somebody looks into it.

    Models with attention code of their own, and models that combine masks, get from every operation on it what they get
    with ``"eager"``; :func:`attention_forward` asks for :attr:`ranges` and :meth:`visible` instead.
    """

    @staticmethod
    def __new__(cls, content: _Content):
        mask = torch.Tensor._make_wrapper_subclass(cls, content.shape, dtype=content.dtype, device=content.device)
        mask._content = content
        return mask

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in _UNTOUCHED or (func is torch.ops.aten.slice.Tensor and _takes_all(*args)):
            return cls(args[0]._content)
        aliases = any(x.alias_info is not None for x in (*func._schema.arguments, *func._schema.returns))

        def tensor(x: Any) -> Any:
            if not isinstance(x, cls):
                return x
            if aliases:  # writes to it, or makes a view that may be written to
                x._content.release()
            return x._content.numbers

        args, kwargs = tree_map(tensor, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:
        return f"Mask(shape={tuple(self.shape)}, ranges={self.ranges})"

    @property
    def ranges(self) -> KeyRanges | None:
        """The keys in a few numbers, where that can be said so."""
        return self._content.ranges

    @property
    def of_each_sequence(self) -> tuple[int, int] | None:
        """The window that is left of it where the sequences of a batch are known; None if it hides more than that."""
        return self._content.of_each_sequence

    def numbers(self) -> torch.Tensor:
        """What is added to the scores."""
        return self._content.numbers

    def visible(self) -> torch.Tensor:
        """Boolean: true where a key is seen; the numbers, once something may have been written into them."""
        return self._content.numbers if self._content.changed else self._content.visible


_UNTOUCHED = {torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.lift_fresh.default}


def _takes_all(x: torch.Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> bool:
    return (start or 0) == 0 and (end is None or end >= x.shape[dim]) and step == 1


def make_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **others: Any,
) -> torch.Tensor | None:
    """The mask of a forward pass: a :class:`Mask`, or None where every query sees every key and the caller allows it.

    Arguments are those of ``transformers.masking_utils.sdpa_mask`` and ``eager_mask``.  A program that is being traced
    gets a tensor: the mask of sdpa, or :meth:`KeyRanges.pack` or None where that says all, or the one of eager
    attention for a model that reads its masks.
    """
    asked = {"batch_size": batch_size, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset}
    asked |= {"kv_offset": kv_offset, "mask_function": mask_function, "attention_mask": attention_mask}
    device = others.get("device", "cpu")
    window = None if others.get("use_vmap") else _recognise(mask_function)
    if _is_traced(attention_mask):
        return _traced(asked, others, window, device)
    ranges, of_each = None, _recognise(_of_packed(mask_function))
    if window is not None:
        visible = None if attention_mask is None else _padding(attention_mask[:batch_size], kv_length, kv_offset)
        ranges = _ranges(window, q_length, kv_length, q_offset - kv_offset, visible, device)
        everything = ranges is not None and (ranges.keys, ranges.ends, ranges.window) == (kv_length, None, _FULL)
        if everything and window[1] == UNBOUNDED and others.get("allow_is_bidirectional_skip"):
            return None
        of_each = window if ranges is not None and ranges.ends is None and ranges.keys == kv_length else None
    options = {**others, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    # By the time that somebody looks, a static cache has counted the new tokens in the same tensor.
    asked |= {name: x.clone() for name, x in asked.items() if isinstance(x, torch.Tensor)}
    shape, dtype = (batch_size, 1, q_length, kv_length), others.get("dtype", torch.float32)
    mask = Mask(_Content(shape, dtype, device, ranges, of_each, lambda: sdpa_mask(**asked, **options)))
    if ranges is None:  # mask functions are tensors' owners, which may have changed by then
        mask.visible()
    return mask


def _is_traced(attention_mask: torch.Tensor | None) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if attention_mask is not None and type(attention_mask) is not torch.Tensor:
        return True
    return _get_current_dispatch_mode() is not None


def _traced(asked: dict, others: dict, window: tuple[int, int] | None, device: Any) -> torch.Tensor | None:
    options = {**others, "allow_is_causal_skip": False}
    if reads_masks(others.get("config")):
        return eager_mask(**asked, **options)
    first = asked["q_offset"] - asked["kv_offset"]
    readable = asked["q_length"] == 1 or not isinstance(first, torch.Tensor)
    skipped = others.get("allow_is_causal_skip", True) or asked["q_length"] == 1
    if window is None or window[1] > 0 or asked["attention_mask"] is not None or not (readable and skipped):
        return sdpa_mask(**asked, **options)
    if window == _FULL and not others.get("allow_is_bidirectional_skip"):
        return sdpa_mask(**asked, **options)
    ranges = _ranges(window, asked["q_length"], asked["kv_length"], first, None, device)
    if ranges is not None and (ranges.keys, ranges.ends) == (asked["kv_length"], None) and ranges.window in _PLAIN:
        return None
    # A model may take some of the queries' rows, which a packed mask doesn't have; torch.jit has no view as uint32.
    if ranges is None or asked["q_length"] > 1 or torch.jit.is_tracing():
        return sdpa_mask(**asked, **options)
    ends = ranges.ends
    if ends is None:
        ends = torch.tensor([[0, ranges.keys]], dtype=torch.int32, device=device)
    return KeyRanges(ranges.keys, ends.expand(asked["batch_size"], 2), ranges.window).pack()


_CAUSAL_WINDOW = sliding_window_causal_mask_function(1)
_BIDIRECTIONAL_WINDOW = sliding_window_bidirectional_mask_function(1)
_PACKED = packed_sequence_mask_function(torch.zeros(1, 1))
_remap = getattr(masking_utils, "remap_positions_for_packed_sequence", lambda f, _: f)  # of later versions
_REMAPPED = _remap(causal_mask_function, torch.zeros(1, 1))


def _recognise(mask_function: Any) -> tuple[int, int] | None:
    """The window of a mask function of transformers; None if it is of another kind.

    What a function closes over can't be read while a program is compiled, so that windows aren't recognised there.
    """
    if mask_function is bidirectional_mask_function:
        return _FULL
    if mask_function is causal_mask_function:
        return _CAUSAL
    if torch.compiler.is_compiling():
        return None
    parts, causal = _parts(mask_function), _parts(_CAUSAL_WINDOW)
    both = _parts(_BIDIRECTIONAL_WINDOW)
    if parts is None or len(parts) != 2 or getattr(parts[0], "__closure__", None) is None:
        return None
    code = parts[0].__code__
    if parts[1] is causal_mask_function and code is causal[0].__code__:
        return parts[0].__closure__[0].cell_contents - 1, 0
    if parts[1] is bidirectional_mask_function and code is both[0].__code__:
        size = parts[0].__closure__[0].cell_contents
        return size, size
    return None


def _of_packed(mask_function: Any) -> Any:
    """The mask function of each sequence, of one that hides sequences from each other; None of any other function."""
    parts = None if torch.compiler.is_compiling() else _parts(mask_function)
    if parts is None or len(parts) != 2 or getattr(parts[1], "__code__", None) is not _PACKED.__code__:
        return None
    if parts[0] is causal_mask_function or getattr(parts[0], "__code__", None) is not _REMAPPED.__code__:
        return parts[0]
    at = parts[0].__code__.co_freevars.index("mask_function")
    return parts[0].__closure__[at].cell_contents


def _parts(mask_function: Any) -> tuple | None:
    """The mask functions of which a function of ``and_masks`` is the intersection; None of any other function."""
    if getattr(mask_function, "__code__", None) is not _CAUSAL_WINDOW.__code__:
        return None
    return mask_function.__closure__[0].cell_contents


def _padding(attention_mask: torch.Tensor, kv_length: int, kv_offset: int) -> torch.Tensor:
    """The padding mask ``(batch, seen tokens)`` as boolean ``(batch, kv_length)``; what lies beyond it is hidden."""
    mask = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    return torch.nn.functional.pad(mask, (0, kv_length - mask.shape[1]))


def _ranges(
    window: tuple[int, int],
    q_length: int,
    kv_length: int,
    first: int | torch.Tensor,
    visible: torch.Tensor | None,
    device: Any,
) -> KeyRanges | None:
    """A mask as key ranges, or None if they can't say it; ``first`` is where the first query stands.

    They can't where the padding has gaps, where queries stand beyond the keys, and where those of a window that looks
    both ways stand before the last key, as with room in a static cache.

    ``visible`` is boolean ``(batch, kv_length)``; without it nothing is read, so that this can be traced.
    """
    left, right = window
    if right == 0 and q_length == 1:
        # A decoder's step: the keys up to its own, whatever room a static cache has behind them.
        keys, window = kv_length, _FULL
        end = first + 1
        start = 0 if left == UNBOUNDED else end - (left + 1)
        if isinstance(end, torch.Tensor):
            start = torch.as_tensor(start, device=device)
            ends = torch.stack((start.clamp(min=0), end.to(device))).int().reshape(1, 2)
        else:
            start = max(0, start)
            whole = start == 0 and end == kv_length
            ends = None if whole else torch.tensor([[start, end]], dtype=torch.int32, device=device)
        if visible is not None:
            visible = visible & within(ends, keys, device)[:, 0, 0]
    else:
        keys, ends = kv_length, None
        if right != UNBOUNDED:
            keys = int(first) + q_length  # where a next query would stand
            if keys > kv_length or (right > 0 and keys < kv_length):
                return None
        visible = None if visible is None else visible[:, :keys]
        left = UNBOUNDED if left >= keys - 1 else left
        right = UNBOUNDED if right >= keys - 1 and right else right
        window = left, right
    if visible is not None:
        if not side_by_side(visible):
            return None
        ends = None if bool(visible.all()) else KeyMask(visible, ordered=True).key_range()
    return KeyRanges(keys, ends, window)

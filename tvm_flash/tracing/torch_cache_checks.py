"""What :func:`tvm_flash.flash_attention_with_kvcache` checks of its arguments, beside what its attention does.

What is in tensors is another file's: :mod:`.torch_cache_contents`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tvm_flash.call import checks, memory
from tvm_flash.call.paged import CACHE_DTYPES
from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError
from tvm_flash.frameworks.torch import check_dense, name_of
from tvm_flash.operators import SCALES
from tvm_flash.tracing.torch_checks import check_place

_INT32 = ("cache_batch_idx", "cache_leftpad", "page_table", "cu_seqlens_q", "cu_seqlens_k_new", "rotary_seqlens")
_CACHES = ("k_cache", "v_cache")
_FLOATS = ("k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin")


@dataclass(frozen=True)
class Sizes:
    """How many sequences there are, and how many keys each has room for."""

    batch: int
    capacity: int


def check(
    tensors: Mapping[str, Any],
    parameters: Mapping[str, Any],
    cache_seqlens: Any,
    longest: Any,
    interleaved: Any,
    num_splits: Any,
) -> Sizes:
    """Ranks, dtypes, devices and shapes of the tensors, and what goes with what; kinds of parameters of mask and score.

    Raises
    ------
    ArgumentTypeError, InvalidArgumentError
    """
    q, k_cache, v_cache = (tensors[name] for name in ("q", "k_cache", "v_cache"))
    given = {name: x for name, x in tensors.items() if x is not None}
    if isinstance(cache_seqlens, torch.Tensor):
        given["cache_seqlens"] = cache_seqlens
    for name in ("k_cache", "v_cache"):
        if tensors[name] is None:
            raise ArgumentTypeError(f"{name}: is None, expected a tensor")
    for name, x in given.items():
        if not isinstance(x, torch.Tensor):
            raise ArgumentTypeError(
                f"{name}: is a {type(x).__module__}.{type(x).__qualname__}, but q is a tensor of torch; use "
                f"torch.as_tensor({name})"
            )
        _check_kind(name, x)
        if x.device != q.device:
            raise ArgumentTypeError(f"{name}: is on {x.device}, but q is on {q.device}; move one to the other's device")
        if (name in _INT32 or name == "cache_seqlens") and x.dtype != torch.int32:
            raise ArgumentTypeError(f"{name}: has dtype {name_of(x.dtype)}, expected int32; convert it")
        if name in _CACHES and (given.keys() & SCALES or name_of(x.dtype) in CACHE_DTYPES):
            continue  # attention checks them, before anything is written
        if name in _FLOATS and x.dtype != q.dtype:
            raise ArgumentTypeError(
                f"{name}: has dtype {name_of(x.dtype)}, but q has {name_of(q.dtype)}; convert one to the other's"
            )
    for name, x in parameters.items():  # attention checks the rest of them, before anything is written
        if isinstance(x, torch.Tensor):
            _check_kind(name, x)
            check_place(name, x, q)
    checks.check_flag("rotary_interleaved", interleaved)
    if type(num_splits) is not int or num_splits < 0:
        raise ArgumentTypeError(
            f"num_splits: is {num_splits!r}, expected a whole number from 0 on; nothing depends on it"
        )
    for name, other in (SCALES, SCALES[::-1]):
        if tensors[name] is None and tensors[other] is not None:
            raise InvalidArgumentError(f"{name}: is None, and {other} is given; give both, or none")
    batch = _batch(tensors)
    page_table = tensors["page_table"]
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        _check_rank(name, x, "(pages, page_size, kv_heads, head_dim)" if page_table is not None else _CACHE)
    _check_table(tensors, batch)
    capacity = k_cache.shape[1] * (1 if page_table is None else page_table.shape[1])
    _check_lengths(tensors, cache_seqlens, batch, capacity)
    _check_new(tensors, batch, cache_seqlens)
    _check_rotation(tensors)
    return Sizes(batch, capacity)


def _check_kind(name: str, x: torch.Tensor) -> None:
    """That a tensor is of a kind that the operators know."""
    check_dense(x, name)
    if x.is_quantized:
        raise ArgumentTypeError(f"{name}: is quantized as {x.dtype}, expected a plain tensor; use {name}.dequantize()")


_CACHE = "(batch_cache, seqlen_cache, kv_heads, head_dim)"


def _check_rank(name: str, x: torch.Tensor, dimensions: str) -> None:
    rank = dimensions.count(",") + (not dimensions.endswith(",)"))
    if x.ndim != rank:
        raise InvalidArgumentError(
            f"{name}: has shape {tuple(x.shape)} of rank {x.ndim}, expected {rank} dimensions {dimensions}"
        )


def _check_shape(name: str, x: torch.Tensor | None, shape: tuple[int, ...], what: str) -> None:
    if x is not None and tuple(x.shape) != shape:
        raise InvalidArgumentError(f"{name}: has shape {tuple(x.shape)}, expected {shape}: {what}")


def _batch(tensors: Mapping[str, Any]) -> int:
    """How many sequences the queries are of."""
    q, starts = tensors["q"], tensors["cu_seqlens_q"]
    if starts is None:
        _check_rank("q", q, "(batch, seqlen_q, heads, head_dim)")
        return q.shape[0]
    _check_rank("q", q, "(total_q, heads, head_dim)")
    _check_rank("cu_seqlens_q", starts, "(batch + 1,)")
    if not starts.shape[0]:
        raise InvalidArgumentError("cu_seqlens_q: has shape (0,), expected (batch + 1,): where each sequence begins")
    return starts.shape[0] - 1


def _check_table(tensors: Mapping[str, Any], batch: int) -> None:
    table, entries = tensors["page_table"], tensors["cache_batch_idx"]
    if table is not None:
        if entries is not None:
            raise InvalidArgumentError(
                "cache_batch_idx: is given beside page_table, which says where each sequence is; give one of them"
            )
        _check_rank("page_table", table, "(batch, pages_per_sequence)")
        _check_shape("page_table", table, (batch, table.shape[1]), "a row for each sequence")
    elif entries is not None:
        _check_shape("cache_batch_idx", entries, (batch,), "an entry of the cache for each sequence")
    elif tensors["k_cache"].shape[0] < batch:
        raise InvalidArgumentError(
            f"k_cache: has {tensors['k_cache'].shape[0]} entries, but q is of {batch} sequences; expected one for each"
        )


def _check_lengths(tensors: Mapping[str, Any], cache_seqlens: Any, batch: int, capacity: int) -> None:
    if isinstance(cache_seqlens, torch.Tensor):
        _check_shape("cache_seqlens", cache_seqlens, (batch,), "how many keys each sequence has")
    elif cache_seqlens is not None:
        expected = f"a tensor int32 ({batch},) or a whole number for all sequences"
        cache_seqlens = checks.whole_number("cache_seqlens", cache_seqlens, expected)
        if not 0 <= cache_seqlens <= capacity:
            raise InvalidArgumentError(f"cache_seqlens: is {cache_seqlens}, expected 0 to {capacity}")
    for name in ("cache_leftpad", "rotary_seqlens"):
        _check_shape(name, tensors[name], (batch,), "a number for each sequence")


def _check_new(tensors: Mapping[str, Any], batch: int, cache_seqlens: Any) -> None:
    """Keys and values that are to be appended."""
    k, v, added = tensors["k"], tensors["v"], tensors["cu_seqlens_k_new"]
    if (k is None) != (v is None):
        raise InvalidArgumentError(f"{'k' if k is None else 'v'}: is None, and the other isn't; give both or none")
    if k is None:
        if added is not None:
            raise InvalidArgumentError(
                "cu_seqlens_k_new: is given without k and v, whose sequences it tells; leave it out"
            )
        return
    if cache_seqlens is None:
        raise InvalidArgumentError(
            "cache_seqlens: is None, and k and v are to be appended; say how many keys the cache has before"
        )
    for name, x in (("k", k), ("v", v)):
        cache = tensors[f"{name}_cache"]
        if added is None:
            _check_rank(name, x, "(batch, seqlen_new, kv_heads, head_dim)")
            shape = (batch, k.shape[1], *cache.shape[2:])
        else:
            _check_rank(name, x, "(total_new, kv_heads, head_dim)")
            shape = (k.shape[0], *cache.shape[2:])
        _check_shape(name, x, shape, f"as {name}_cache has them, and k and v as many")
    _check_shape("cu_seqlens_k_new", added, (batch + 1,), "where each sequence begins in k, and the last one ends")


def _check_rotation(tensors: Mapping[str, Any]) -> None:
    cos, sin = tensors["rotary_cos"], tensors["rotary_sin"]
    if (cos is None) != (sin is None):
        missing = "rotary_cos" if cos is None else "rotary_sin"
        raise InvalidArgumentError(f"{missing}: is None, and the other isn't; give both or none")
    if cos is None:
        return
    if tensors["k"] is None:
        raise InvalidArgumentError("rotary_cos: is given without k and v, which it turns; turn q before the call")
    width = tensors["q"].shape[-1]
    for name, x in (("rotary_cos", cos), ("rotary_sin", sin)):
        _check_rank(name, x, "(seqlen_ro, rotary_dim / 2)")
        if not x.shape[0] or not 0 < 2 * x.shape[1] <= width:
            raise InvalidArgumentError(
                f"{name}: has shape {tuple(x.shape)}, expected positions and half of a rotary_dim of at most {width}"
            )
    _check_shape("rotary_sin", sin, tuple(cos.shape), "that of rotary_cos")


def check_present(tensors: Mapping[str, Any]) -> None:
    """That all tensors of a call, by name, have memory.

    Raises
    ------
    InvalidArgumentError
    """
    for name, x in tensors.items():
        if isinstance(x, torch.Tensor) and not x.data_ptr() and x.numel():
            raise memory.without_memory(name)


def check_memory(tensors: Mapping[str, Any]) -> int:
    """That caches that are written have their elements for themselves; ``tensors`` are all of the call, by name.

    Pages of both caches may take turns in one buffer, so that page p of k_cache is page p − n of v_cache.  Which of
    them a sequence has is for :mod:`.torch_cache_contents` to see; the result is n, or 0 if they share nothing.

    Raises
    ------
    InvalidArgumentError
    """
    at = {name: x.data_ptr() for name, x in tensors.items() if isinstance(x, torch.Tensor)}
    shift = 0
    for cache in _CACHES:
        x = tensors[cache]
        own = x.shape, x.stride(), x.element_size()
        if x.is_inference() and not torch.is_inference_mode_enabled():
            raise InvalidArgumentError(
                f"{cache}: was made in torch.inference_mode, where alone it can be written; call there too, or clone it"
            )
        if not _is_injective(*own[:2]):
            raise InvalidArgumentError(
                f"{cache}: has strides {own[1]}, in which elements share memory, and keys are appended; use a tensor "
                f"that isn't expanded"
            )
        storage = x.untyped_storage()
        begin = storage.data_ptr()
        end = begin + storage.nbytes()
        for name, address in at.items():
            if not begin <= address < end or name == cache:
                continue
            y = tensors[name]
            distance = address - at[cache]
            if _share(*own, y.shape, y.stride(), y.element_size(), distance):
                if name in _CACHES and (shift := _pages_between(*own, y.stride(), abs(distance))):
                    shift = shift if at["v_cache"] > at["k_cache"] else -shift
                    continue
                raise InvalidArgumentError(
                    f"{name}: shares memory with {cache}, to which keys are appended; give it memory of its own, as "
                    f"with {name}.clone()"
                )

    return shift


def _pages_between(shape, strides, item_size, others, distance: int) -> int:
    """How many pages lie between two caches whose pages take turns; 0 if they don't."""
    page, size = (
        strides[0] * item_size,
        item_size + sum(item_size * s * (n - 1) for s, n in zip(strides[1:], shape[1:], strict=True)),
    )
    return distance // page if strides == others and page >= size and not distance % page else 0


_is_injective = functools.lru_cache(maxsize=64)(checks.is_injective)


@functools.lru_cache(maxsize=256)
def _share(shape, strides, item_size, other_shape, other_strides, other_item_size, distance: int) -> bool:
    """Whether two tensors of some shapes and strides, so many bytes from each other, share one."""
    one, other = (
        memory.footprint_of(*x) for x in ((shape, strides, item_size), (other_shape, other_strides, other_item_size))
    )
    base = 1 << 40  # the addresses don't matter, but none is negative
    return memory.overlap(one, base, other, base + distance)

"""What :func:`tvm_flash.flash_attention_with_kvcache` checks before it writes, beside what its attention does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tvm_flash.call import checks
from tvm_flash.call.ragged import fault_of
from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError
from tvm_flash.frameworks.torch import name_of
from tvm_flash.operators import SCALES

_INT32 = ("cache_batch_idx", "cache_leftpad", "page_table", "cu_seqlens_q", "cu_seqlens_k_new", "rotary_seqlens")
_CACHES = ("k_cache", "v_cache")
_FLOATS = ("k_cache", "v_cache", "k", "v", "rotary_cos", "rotary_sin")


@dataclass(frozen=True)
class Sizes:
    """How many sequences there are, and how many keys each has room for."""

    batch: int
    capacity: int


def check(tensors: Mapping[str, Any], cache_seqlens: Any, longest: Any, interleaved: Any, num_splits: Any) -> Sizes:
    """Ranks, dtypes, devices and shapes of the tensors, and what goes with what.

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
            raise ArgumentTypeError(f"{name}: is a {type(x).__qualname__}, but q is a tensor of torch")
        if x.device != q.device:
            raise ArgumentTypeError(f"{name}: is on {x.device}, but q is on {q.device}; move one to the other's device")
        if (name in _INT32 or name == "cache_seqlens") and x.dtype != torch.int32:
            raise ArgumentTypeError(f"{name}: has dtype {name_of(x.dtype)}, expected int32; convert it")
        if name in _CACHES and given.keys() & SCALES:
            continue  # attention checks them, before anything is written
        if name in _FLOATS and x.dtype != q.dtype:
            raise ArgumentTypeError(
                f"{name}: has dtype {name_of(x.dtype)}, but q has {name_of(q.dtype)}; convert one to the other's"
            )
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
        if isinstance(cache_seqlens, bool) or not hasattr(type(cache_seqlens), "__index__"):
            raise ArgumentTypeError(
                f"cache_seqlens: is {cache_seqlens!r}, expected int32 ({batch},) or a whole number for all sequences"
            )
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


def check_contents(
    tensors: Mapping[str, Any],
    before: torch.Tensor,
    after: torch.Tensor,
    table: torch.Tensor,
    sizes: Sizes,
    along: bool,
) -> None:
    """What is in int32 tensors of the CPU; ``along`` says that queries are turned by positions of their own.

    Raises
    ------
    InvalidArgumentError
    """
    for name, of in (("cu_seqlens_q", "q"), ("cu_seqlens_k_new", "k")):
        if tensors[name] is not None and (fault := fault_of(tensors[name].tolist(), of, tensors[of].shape[0])):
            raise InvalidArgumentError(f"{name}: {fault}")
    short, long = (x.tolist() for x in (before, after))
    for b, (first, last) in enumerate(zip(short, long, strict=True)):
        if first < 0 or last > sizes.capacity:
            new = f", and {last - first} more come to them" if last > first else ""
            raise InvalidArgumentError(
                f"cache_seqlens: is {first} of sequence {b}{new}, expected room for them among {sizes.capacity} keys"
            )
    page_size, pages = tensors["k_cache"].shape[1], tensors["k_cache"].shape[0]
    needed = (after + (page_size - 1)).div(max(page_size, 1), rounding_mode="floor")
    wrong = ((table < 0) | (table >= pages)) & (torch.arange(table.shape[1])[None] < needed[:, None])
    if wrong.any():
        b, i = wrong.nonzero()[0].tolist()
        name, place = (
            ("page_table", f"[{b}, {i}]") if tensors["page_table"] is not None else ("cache_batch_idx", f"[{b}]")
        )
        raise InvalidArgumentError(f"{name}: is {int(table[b, i])} at {place}, expected 0 to {pages - 1}")
    entries = tensors["cache_batch_idx"]
    if tensors["k"] is not None and entries is not None and len(set(entries.tolist())) < len(entries):
        raise InvalidArgumentError(
            "cache_batch_idx: names an entry twice, and keys are appended; expected different ones"
        )
    _check_positions(tensors, before, after, along)


def _check_positions(tensors: Mapping[str, Any], before: torch.Tensor, after: torch.Tensor, along: bool) -> None:
    """That the rotation has an angle for each position."""
    cos, first = tensors["rotary_cos"], tensors["rotary_seqlens"]
    if cos is None or not before.numel():
        return
    first = before if first is None else first
    last = first + torch.maximum(after - before, torch.ones_like(before)) - 1
    if along:
        starts, q = tensors["cu_seqlens_q"], tensors["q"]
        last = torch.maximum(last, first + (q.shape[1] if starts is None else starts.diff()) - 1)
    if int(first.min()) < 0 or int(last.max()) >= cos.shape[0]:
        raise InvalidArgumentError(
            f"rotary_cos: has {cos.shape[0]} positions, and {int(first.min())} to {int(last.max())} are needed"
        )

"""Keys on pages of a cache: what is checked of it before a call, and on the processor in one."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvm_flash.call import checks
from tvm_flash.call.ragged import fault_of
from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError
from tvm_flash.frameworks import TensorView
from tvm_flash.operators import SCALES
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import CACHE_OF_KIND

_DIMENSIONS = {
    "q": "(total_q, heads, head_dim)",
    "k_cache": "(pages, page_size, kv_heads, head_dim)",
    "v_cache": "(pages, page_size, kv_heads, head_dim_v)",
    "cu_seqlens_q": "(batch + 1,)",
    "seqlens_k": "(batch,)",
    "page_table": "(batch, pages_per_sequence)",
}

#: Dtypes of caches of 8 bits.
CACHE_DTYPES = tuple(dict.fromkeys(CACHE_OF_KIND.values()))


@dataclass(frozen=True)
class PagedSizes(checks.RaggedSizes):
    """Those of sequences whose keys lie on pages; ``seqlen_kv`` is how many keys the table has room for in each.

    ``longest`` is a number of queries that no sequence exceeds, None if none is known.
    """

    pages: int
    page_size: int
    pages_per_sequence: int
    longest: int | None = None

    @property
    def by_name(self) -> dict[str, int]:
        return sizes.of_pages(
            *(self.batch, self.heads, self.total_q, self.kv_heads, self.pages, self.page_size),
            *(self.pages_per_sequence, self.head_dim, self.head_dim_v, self.longest),
        )


def check_paged(given: Mapping[str, TensorView], longest: int | None) -> PagedSizes:
    """Ranks, dtypes, devices, shapes and strides of a call's tensors, alone and together.

    Raises
    ------
    ArgumentTypeError, InvalidArgumentError, NotSupportedError
    """
    for name, dimensions in _DIMENSIONS.items():
        x, rank = given[name], dimensions.count(",") + (not dimensions.endswith(",)"))
        if len(x.shape) != rank:
            raise InvalidArgumentError(
                f"{name}: has shape {x.shape} of rank {len(x.shape)}, expected {rank} dimensions {dimensions}"
            )
        if name in ("cu_seqlens_q", "seqlens_k", "page_table") and x.dtype != "int32":
            raise ArgumentTypeError(f"{name}: has dtype {x.dtype}, expected int32; convert it")
    q, k, v = (given[name] for name in ("q", "k_cache", "v_cache"))
    checks.check_element_type("q", q)
    _check_cache_dtypes(given)
    for name, x in (("k_cache", k), ("v_cache", v)):
        if x.device != q.device:
            raise ArgumentTypeError(f"{name}: is on {x.device}, but q is on {q.device}; move one to the other's device")
    _check_shapes(q.shape, k.shape, v.shape)
    for name, x in (("q", q), ("k_cache", k), ("v_cache", v)):
        checks.check_strides(name, x)
    for name in SCALES:
        if name in given:
            _check_scale(name, given[name], q, k.shape)
    batch, starts = given["seqlens_k"].shape[0], given["cu_seqlens_q"].shape[0]
    if starts != batch + 1:
        raise InvalidArgumentError(
            f"cu_seqlens_q: has shape ({starts},), but seqlens_k is of {batch} sequences; expected ({batch + 1},): "
            f"where each sequence begins, and the last one ends"
        )
    entries = given["page_table"].shape
    if entries[0] != batch:
        raise InvalidArgumentError(
            f"page_table: has shape {entries}, but seqlens_k is of {batch} sequences; expected a row for each"
        )
    if longest is not None:
        checks.check_longest("max_seqlen_q", longest)
        longest = int(longest)
    return PagedSizes(
        *(batch, q.shape[1], k.shape[2], q.shape[0], entries[1] * k.shape[1], q.shape[2], v.shape[3]),
        *(k.shape[0], k.shape[1], entries[1], longest),
    )


def _check_cache_dtypes(given: Mapping[str, TensorView]) -> None:
    """That keys and values are of q's dtype, or both of one of 8 bits beside their scales."""
    q, scaled = given["q"], SCALES[0] in given
    for name in ("k_cache", "v_cache"):
        dtype = given[name].dtype
        if scaled and dtype not in CACHE_DTYPES:
            raise ArgumentTypeError(
                f"{name}: has dtype {dtype}, and scales are given; expected {' or '.join(CACHE_DTYPES)}, or leave "
                f"k_scale and v_scale out"
            )
        if not scaled and dtype in CACHE_DTYPES:
            raise ArgumentTypeError(f"{name}: has dtype {dtype}, and no scales are given; give k_scale and v_scale")
        if not scaled and dtype != q.dtype:
            raise ArgumentTypeError(f"{name}: has dtype {dtype}, but q has {q.dtype}; convert one to the other's")
    k, v = (given[name].dtype for name in ("k_cache", "v_cache"))
    if k != v:
        raise ArgumentTypeError(f"v_cache: has dtype {v}, but k_cache has {k}; convert one to the other's")


def _check_scale(name: str, x: TensorView, q: TensorView, cache: tuple) -> None:
    """The dtype, shape and device of a scale beside a cache of a shape."""
    if x.dtype != "float32":
        raise ArgumentTypeError(f"{name}: has dtype {x.dtype}, expected float32; convert it")
    pages, heads = cache[0], cache[2]
    if x.shape not in ((heads,), (1, heads), (pages, heads)):
        raise InvalidArgumentError(
            f"{name}: has shape {x.shape}, expected ({heads},) or ({pages}, {heads}): one for each head, or a page "
            f"and head"
        )
    if x.device != q.device:
        raise ArgumentTypeError(f"{name}: is on {x.device}, expected {q.device}, where q is; move it")


def _check_shapes(q: tuple, k: tuple, v: tuple) -> None:
    if v[:3] != k[:3]:
        raise InvalidArgumentError(
            f"v_cache: has shape {v}, but k_cache {k}; expected as many pages, rows of a page and heads"
        )
    if k[3] != q[2]:
        raise InvalidArgumentError(f"k_cache: has head_dim {k[3]}, but q has {q[2]}; expected the same")
    for name, size in (("q", q[2]), ("v_cache", v[3])):
        if fault := checks.fault_of_head_dim(name, size):
            raise InvalidArgumentError(fault)
    if q[1] and (k[2] == 0 or q[1] % k[2]):
        raise InvalidArgumentError(f"k_cache: has {k[2]} heads, expected a divisor of q's {q[1]}")


def check_places(of: PagedSizes, table_stride: int, at: Mapping[str, int]) -> None:
    """That starts, lengths and pages in this process's memory make sense; ``at`` are their addresses by name.

    Raises
    ------
    InvalidArgumentError
    """
    starts = (ctypes.c_int32 * of.starts).from_address(at["cu_seqlens_q"]) if of.starts else []
    fault = fault_of(list(starts), "q", of.total_q)
    if fault is not None:
        raise InvalidArgumentError(f"cu_seqlens_q: {fault}")
    lengths = list((ctypes.c_int32 * of.batch).from_address(at["seqlens_k"])) if of.batch else []
    rows = [
        (ctypes.c_int32 * of.pages_per_sequence).from_address(at["page_table"] + 4 * b * table_stride)
        for b in range(of.batch)
    ]
    check_numbers(lengths, rows, of)


def check_numbers(lengths: Sequence[int], rows: Sequence[Sequence[int]], of: PagedSizes) -> None:
    """Raise for the first length that the table has no room for, and the first page that the cache hasn't.

    Raises
    ------
    InvalidArgumentError
    """
    for b, (length, row) in enumerate(zip(lengths, rows, strict=True)):
        if not 0 <= length <= of.seqlen_kv:
            raise InvalidArgumentError(
                f"seqlens_k: is {length} of sequence {b}, expected 0 to {of.seqlen_kv}: {of.pages_per_sequence} pages "
                f"of {of.page_size} keys"
            )
        needed = -(-length // of.page_size) if of.page_size else 0
        for i, page in enumerate(row[:needed]):
            if not 0 <= page < of.pages:
                raise InvalidArgumentError(
                    f"page_table: has page {page} at [{b}, {i}], which the {length} keys of sequence {b} need; "
                    f"expected 0 to {of.pages - 1}"
                )

"""Keys on pages of a cache: what is checked of it before a call, and on the processor in one."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tvm_flash.call import checks
from tvm_flash.call.problem import HEAD_DIM_MULTIPLE
from tvm_flash.call.ragged import fault_of
from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError
from tvm_flash.frameworks import TensorView
from tvm_flash.operators import SCALES
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import CACHE_OF_KIND, LEAST_SPLIT, MOST_SPLIT

_DIMENSIONS = {
    "q": "(total_q, heads, head_dim)",
    "k_cache": "(pages, page_size, kv_heads, head_dim)",
    "v_cache": "(pages, page_size, kv_heads, head_dim_v)",
    "kv_cache": "(pages, page_size, kv_heads, head_dim)",
    "cu_seqlens_q": "(batch + 1,)",
    "seqlens_k": "(batch,)",
    "page_table": "(batch, pages_per_sequence)",
}

#: Those of them with keys and values, and with keys that values are the first elements of.
_WITH_SCALES = ("k_cache", "v_cache")
_CACHES = (*_WITH_SCALES, "kv_cache")

#: Dtypes of caches of 8 bits.
CACHE_DTYPES = tuple(dict.fromkeys(CACHE_OF_KIND.values()))


@dataclass(frozen=True)
class PagedSizes(checks.RaggedSizes):
    """Those of sequences whose keys lie on pages; ``seqlen_kv`` is how many keys the table has room for in each.

    ``longest`` is a number of queries that no sequence exceeds, None if none is known; ``split_length`` how many keys a
    split has, 0 if a call doesn't say so.
    """

    pages: int
    page_size: int
    pages_per_sequence: int
    longest: int | None = None
    split_length: int = 0

    @property
    def by_name(self) -> dict[str, int]:
        return sizes.of_pages(
            *(self.batch, self.heads, self.total_q, self.kv_heads, self.pages, self.page_size),
            *(self.pages_per_sequence, self.head_dim, self.head_dim_v, self.longest, self.split_length),
        )


def check_paged(
    given: Mapping[str, TensorView],
    longest: int | None,
    head_dim_v: int | None = None,
    split_length: int | None = None,
) -> PagedSizes:
    """Ranks, dtypes, devices, shapes and strides of a call's tensors, alone and together.

    ``head_dim_v`` are the elements of values where these are the first ones of keys, in ``kv_cache``, and
    ``split_length`` the keys of a split then.

    Raises
    ------
    ArgumentTypeError, InvalidArgumentError, NotSupportedError
    """
    for name, dimensions in _DIMENSIONS.items():
        if name in given:
            _check_dimensions(name, given[name], dimensions)
    q, caches = given["q"], {name: given[name] for name in _CACHES if name in given}
    checks.check_element_type("q", q)
    _check_cache_dtypes(q, caches, scaled=SCALES[0] in given)
    for name, x in caches.items():
        if x.device != q.device:
            raise ArgumentTypeError(f"{name}: is on {x.device}, but q is on {q.device}; move one to the other's device")
    (key_name, k), *values = caches.items()
    _check_shapes(q.shape, key_name, k.shape)
    of_keys = not values
    head_dim_v = check_head_dim_v(head_dim_v, k.shape[3]) if of_keys else _check_values(*values[0], key_name, k.shape)
    for name, x in (("q", q), *caches.items()):
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
        # Rows behind the last sequence are written where none has any; sizes that kernels divide by begin with 1.
        longest = max(1, checks.whole_number("max_seqlen_q", longest, "a whole number, or None"))
    return PagedSizes(
        *(batch, q.shape[1], k.shape[2], q.shape[0], entries[1] * k.shape[1], q.shape[2], head_dim_v),
        *(k.shape[0], k.shape[1], entries[1], longest, check_split_length(split_length)),
    )


def _check_dimensions(name: str, x: TensorView, dimensions: str) -> None:
    """The rank of a tensor, and that what says where something is is int32."""
    rank = dimensions.count(",") + (not dimensions.endswith(",)"))
    if len(x.shape) != rank:
        raise InvalidArgumentError(
            f"{name}: has shape {x.shape} of rank {len(x.shape)}, expected {rank} dimensions {dimensions}"
        )
    if name in ("cu_seqlens_q", "seqlens_k", "page_table") and x.dtype != "int32":
        raise ArgumentTypeError(f"{name}: has dtype {x.dtype}, expected int32; convert it")


def check_head_dim_v(head_dim_v: object, head_dim: int) -> int:
    """How many elements of keys are their values.

    Raises
    ------
    ArgumentTypeError, InvalidArgumentError
    """
    size = checks.whole_number("head_dim_v", head_dim_v, "a whole number")
    if not 0 < size <= head_dim:
        raise InvalidArgumentError(
            f"head_dim_v: is {size}, expected 1 to {head_dim}: values are the first elements of the {head_dim} of a key"
        )
    if size % HEAD_DIM_MULTIPLE:
        raise InvalidArgumentError(f"head_dim_v: is {size}, expected a multiple of {HEAD_DIM_MULTIPLE}")
    return size


def check_split_length(split_length: object) -> int:
    """Keys of a split, 0 for None.

    Raises
    ------
    ArgumentTypeError, InvalidArgumentError
    """
    if split_length is None:
        return 0
    size = checks.whole_number("split_length", split_length, "a whole number or None")
    if not LEAST_SPLIT <= size <= MOST_SPLIT or size & (size - 1):
        raise InvalidArgumentError(
            f"split_length: is {size}, expected a power of two from {LEAST_SPLIT} to {MOST_SPLIT}, or None"
        )
    return size


def _check_cache_dtypes(q: TensorView, caches: Mapping[str, TensorView], scaled: bool) -> None:
    """That keys and values are of q's dtype, or both of one of 8 bits beside their scales."""
    for name, x in caches.items():
        if scaled and x.dtype not in CACHE_DTYPES:
            raise ArgumentTypeError(
                f"{name}: has dtype {x.dtype}, and scales are given; expected {' or '.join(CACHE_DTYPES)}, or leave "
                f"k_scale and v_scale out"
            )
        if not scaled and x.dtype in CACHE_DTYPES and name in _WITH_SCALES:
            raise ArgumentTypeError(f"{name}: has dtype {x.dtype}, and no scales are given; give k_scale and v_scale")
        if not scaled and x.dtype != q.dtype:
            raise ArgumentTypeError(f"{name}: has dtype {x.dtype}, but q has {q.dtype}; convert one to the other's")
    if len({x.dtype for x in caches.values()}) > 1:
        k, v = (x.dtype for x in caches.values())
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


def _check_values(name: str, v: TensorView, key_name: str, k: tuple) -> int:
    """The shape of values beside that of keys; how many elements they have."""
    if v.shape[:3] != k[:3]:
        raise InvalidArgumentError(
            f"{name}: has shape {v.shape}, but {key_name} {k}; expected as many pages, rows of a page and heads"
        )
    if fault := checks.fault_of_head_dim(name, v.shape[3]):
        raise InvalidArgumentError(fault)
    return v.shape[3]


def _check_shapes(q: tuple, name: str, k: tuple) -> None:
    if k[3] != q[2]:
        raise InvalidArgumentError(f"{name}: has head_dim {k[3]}, but q has {q[2]}; expected the same")
    if fault := checks.fault_of_head_dim("q", q[2]):
        raise InvalidArgumentError(fault)
    if q[1] and (k[2] == 0 or q[1] % k[2]):
        raise InvalidArgumentError(f"{name}: has {k[2]} heads, expected a divisor of q's {q[1]}")


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

"""Where tensors lie in memory: extents, overlap, alignment."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from tvm_flash.errors import InvalidArgumentError
from tvm_flash.frameworks import TensorView
from tvm_flash.packs.manifest import MOST_ALIGNMENT

ITEM_SIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "int8": 1, "int32": 4, "bool": 1}

#: Workspaces begin at multiples of so many bytes.
WORKSPACE_ALIGNMENT = 128

#: Steps of the search for a common element of two interleaved tensors before they count as overlapping.
_OVERLAP_WORK = 10_000


@dataclass(frozen=True)
class Footprint:
    """What bytes a tensor touches, relative to its pointer: all lie in ``[low, high)``; strides in bytes."""

    low: int
    high: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    item_size: int


#: Of a tensor without elements.
NOWHERE = Footprint(0, 0, (0,), (0,), 1)


def footprint(x: TensorView) -> Footprint:
    """The footprint of a tensor; empty (``low == high``) if it has no elements."""
    return footprint_of(x.shape, x.strides, ITEM_SIZE[x.dtype])


def footprint_of(shape: tuple[int, ...], strides: tuple[int, ...], item: int) -> Footprint:
    """That of a tensor whose elements have ``item`` bytes; strides are in elements."""
    if 0 in shape:
        return Footprint(0, 0, shape, strides, item)
    strides = tuple(s * item for s in strides)
    reach = [s * (n - 1) for s, n in zip(strides, shape, strict=True)]
    return Footprint(sum(r for r in reach if r < 0), sum(r for r in reach if r > 0) + item, shape, strides, item)


def overlap(a: Footprint, pointer_a: int, b: Footprint, pointer_b: int) -> bool:
    """Whether two tensors share a byte.  Tensors that interleave (slices of one buffer) usually don't."""
    if pointer_a + a.high <= pointer_b + b.low or pointer_b + b.high <= pointer_a + a.low:
        return False
    if a.low == a.high or b.low == b.high:
        return False
    import numpy as np

    arrays = [np.asarray(_Shadow(x, pointer)) for x, pointer in ((a, pointer_a), (b, pointer_b))]
    try:
        return np.shares_memory(*arrays, max_work=_OVERLAP_WORK)
    except np.exceptions.TooHardError:
        return True


def check_overlap(outputs: Collection[str], footprints: Mapping[str, Footprint], at: Mapping[str, int]) -> None:
    """That no output shares a byte with a tensor before it; footprints and pointers by name, in the order of a call.

    Raises
    ------
    InvalidArgumentError
    """
    for output in outputs:
        for name, x in footprints.items():
            if name == output:
                break
            if overlap(footprints[output], at[output], x, at[name]):
                what = "is written too" if name in outputs else f"is read while {output} is written"
                raise InvalidArgumentError(
                    f"{output}: shares memory with {name}, which {what}; give it memory of its own, or leave it out"
                )


def check_present(footprints: Mapping[str, Footprint], at: Mapping[str, int]) -> None:
    """That tensors with elements have memory; footprints and pointers by name.

    Raises
    ------
    InvalidArgumentError
    """
    for name, address in at.items():
        if not address and footprints[name].low < footprints[name].high:
            raise without_memory(name)


def without_memory(name: str) -> InvalidArgumentError:
    """What is said of a tensor with elements and no address."""
    return InvalidArgumentError(
        f"{name}: has no memory, which was given back or never allocated; give it some before the call, as what shards "
        f"parameters does in a module's forward"
    )


class _Shadow:
    """Describes memory, perhaps of a GPU, to NumPy, which computes with the addresses and reads nothing."""

    def __init__(self, x: Footprint, pointer: int):
        self.__array_interface__ = {
            "version": 3,
            "shape": x.shape,
            "strides": x.strides,
            "typestr": f"|V{x.item_size}",
            "data": (pointer, True),
        }


def workspace_start(at: int) -> int:
    """The first multiple of ``WORKSPACE_ALIGNMENT`` from a number of bytes on."""
    return -(-at // WORKSPACE_ALIGNMENT) * WORKSPACE_ALIGNMENT


def alignment_of(bits: int) -> int:
    """The largest power of two, up to ``MOST_ALIGNMENT``, that divides every number whose bits are in ``bits``."""
    bits |= MOST_ALIGNMENT
    return bits & -bits


def stride_bits(x: TensorView) -> int:
    """The byte strides of a tensor but the last, or-ed together; a dimension of size 1 is never stepped along."""
    bits, item = 0, ITEM_SIZE[x.dtype]
    for stride, size in zip(x.strides[:-1], x.shape[:-1], strict=True):
        if size > 1:
            bits |= stride * item
    return bits

"""NumPy arrays; bfloat16 is that of ml_dtypes, whose arrays are NumPy's."""

from __future__ import annotations

import math
import sys
from functools import partial

import numpy as np

from tvm_flash.errors import ArgumentTypeError
from tvm_flash.frameworks.base import Framework, TensorView

_ALIGNMENT = 64

#: Subclasses that are an ndarray and nothing more; others (masked arrays, matrices) have a meaning that would be lost.
_PLAIN = (np.ndarray, np.memmap)


class NumPy(Framework):
    name = "numpy"

    def key(self, tensor):
        return type(tensor), tensor.shape, tensor.strides, tensor.dtype, tensor.flags.writeable

    def pointer(self, tensor):
        return tensor.__array_interface__["data"][0]

    def view(self, tensor, name):
        if type(tensor) not in _PLAIN:
            raise ArgumentTypeError(
                f"{name}: is a {type(tensor).__qualname__}, expected a plain numpy.ndarray; use numpy.asarray(...)"
            )
        if not tensor.dtype.isnative:
            raise ArgumentTypeError(
                f"{name}: has the foreign byte order of {tensor.dtype.str!r}; use {name}.astype({tensor.dtype.name!r})"
            )
        return TensorView(
            shape=tensor.shape,
            strides=element_strides(tensor, name),
            dtype=tensor.dtype.name,
            device_kind="cpu",
            device_index=0,
            pointer=tensor.__array_interface__["data"][0],
            writable=tensor.flags.writeable,
        )

    def fast_reader(self, cls):
        if cls not in _PLAIN:
            return None
        return None, None, dtype_of("bfloat16") if "ml_dtypes" in sys.modules else None, None

    def allocator(self, shape, dtype, like):
        return partial(_empty, shape, dtype_of(dtype))

    def fill(self, tensor, value):
        tensor.fill(value)


def dtype_of(name: str) -> np.dtype:
    """The NumPy dtype; some exist where ml_dtypes is installed, which it is where an array of one came from."""
    if name in ("bfloat16", "float8_e4m3fn"):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An undefined array that starts at a multiple of 64 bytes, which ``numpy.empty`` doesn't promise."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.__array_interface__["data"][0] % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def element_strides(array, name: str) -> tuple[int, ...]:
    """Strides in elements of an array (NumPy's or CuPy's) that counts them in bytes."""
    size = array.dtype.itemsize
    if any(s % size for s in array.strides):
        raise ArgumentTypeError(
            f"{name}: has strides of {array.strides} bytes, which aren't multiples of its element size {size}; "
            f"use numpy.ascontiguousarray({name})"
        )
    return tuple(s // size for s in array.strides)


NUMPY = NumPy()

"""Arrays of any other framework that speaks DLPack."""

from __future__ import annotations

import sys

import numpy as np

from tvm_flash.errors import ArgumentTypeError, NotSupportedError
from tvm_flash.frameworks.base import Framework, TensorView
from tvm_flash.frameworks.numpy import NUMPY
from tvm_flash.machine import ffi

_KINDS = {code: kind for kind, code in ffi.DL_DEVICES.items()}


class DLPack(Framework):
    """Results are NumPy's memory, handed over through the ``from_dlpack`` of the caller's framework.

    On a GPU there is nothing here to allocate with: the caller gives ``out``.  The kernel runs on the default stream,
    for which ``__dlpack__()`` makes its producer ready the data.
    """

    name = "dlpack"
    adopts = True

    def adopt(self, tensor):
        if isinstance(tensor, ffi.tvm_ffi().Tensor) or not hasattr(tensor, "__dlpack__"):
            return tensor
        try:
            return ffi.tvm_ffi().from_dlpack(tensor)
        except (BufferError, TypeError, ValueError, RuntimeError) as e:
            raise ArgumentTypeError(f"q: {type(tensor).__qualname__}.__dlpack__ failed: {e}") from e

    def release(self, result, like):
        package = sys.modules[type(like).__module__.partition(".")[0]]
        from_dlpack = getattr(package, "from_dlpack", None)
        return from_dlpack(result) if from_dlpack else result

    def key(self, tensor):
        return tensor.shape, tensor.strides, str(tensor.dtype), tensor.__dlpack_device__()

    def pointer(self, tensor):
        return tensor.data_ptr()

    def view(self, tensor, name):
        kind, index = tensor.__dlpack_device__()
        return TensorView(
            shape=tensor.shape,
            strides=tensor.strides,
            dtype=str(tensor.dtype),
            device_kind=_KINDS.get(kind, f"DLPack device type {kind}"),
            device_index=index,
            pointer=tensor.data_ptr(),
        )

    def allocator(self, shape, dtype, like):
        if like.device_kind != "cpu" or dtype == "bfloat16":
            raise NotSupportedError(
                f"out: can't make a {dtype} result on {like.device} for this framework; pass out=, or use torch tensors"
            )
        allocate = NUMPY.allocator(shape, dtype, like)
        return lambda: ffi.tvm_ffi().from_dlpack(allocate())

    def allocates(self, device_kind):
        return device_kind == "cpu"

    def fill(self, tensor, value):
        if tensor.__dlpack_device__()[0] != ffi.DL_DEVICES["cpu"]:
            raise NotSupportedError("k: has no rows, and a result on a GPU can't be filled for this framework")
        np.from_dlpack(tensor).fill(value)


DLPACK = DLPack()

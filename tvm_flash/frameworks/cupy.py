"""CuPy arrays, on CuPy's current stream and from its memory pool."""

from __future__ import annotations

import sys

from tvm_flash.frameworks.base import Framework, TensorView
from tvm_flash.frameworks.numpy import dtype_of, element_strides

cupy = sys.modules["cupy"]


class CuPy(Framework):
    name = "cupy"

    def key(self, tensor):
        return type(tensor), tensor.shape, tensor.strides, tensor.dtype, tensor.device.id

    def pointer(self, tensor):
        return tensor.data.ptr

    def view(self, tensor, name):
        return TensorView(
            shape=tensor.shape,
            strides=element_strides(tensor, name),
            dtype=tensor.dtype.name,
            device_kind="cuda",
            device_index=tensor.device.id,
            pointer=tensor.data.ptr,
        )

    def allocator(self, shape, dtype, like):
        def allocate():
            with cupy.cuda.Device(like.device_index):
                return cupy.empty(shape, dtype_of(dtype))

        return allocate

    def fill(self, tensor, value):
        with cupy.cuda.Device(tensor.device.id):
            tensor.fill(value)

    def stream(self, device_index):
        with cupy.cuda.Device(device_index):
            return cupy.cuda.get_current_stream().ptr


CUPY = CuPy()

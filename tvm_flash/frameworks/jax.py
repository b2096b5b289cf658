"""JAX arrays; in ``jax.jit`` and the like, where there are none, :mod:`tvm_flash.call.dispatch` finds what takes over.

On the CPU an array's memory is read as a NumPy array, and the result becomes a JAX array.  On a GPU the kernel writes
to a new array of JAX's own; as JAX's streams can't be seen from here, the inputs are waited for before the call and the
result after it.
"""

from __future__ import annotations

import sys

import numpy as np

from tvm_flash.errors import ArgumentTypeError, NotSupportedError
from tvm_flash.frameworks.base import Framework, TensorView, Traced, contiguous_strides
from tvm_flash.frameworks.numpy import NUMPY, dtype_of
from tvm_flash.machine import cuda

jax = sys.modules["jax"]


class Jax(Framework):
    name = "jax"
    adopts = True
    mutable = False

    def adopt(self, tensor):
        if isinstance(tensor, jax.core.Tracer):
            raise Traced(JAX, "q: is a tracer of jax.jit, grad or vmap, which has no memory yet")
        if not isinstance(tensor, jax.Array):
            return tensor
        if len(tensor.devices()) != 1:
            raise ArgumentTypeError(
                f"q: is spread over {len(tensor.devices())} devices, expected one; call inside of jax.jit, or use "
                f"jax.device_put(q, device)"
            )
        tensor = tensor.block_until_ready()
        return np.asarray(tensor) if _device(tensor).platform == "cpu" else tensor

    def release(self, result, like):
        if isinstance(result, np.ndarray):
            return jax.device_put(result, _device(like))
        return result

    def key(self, tensor):
        if isinstance(tensor, np.ndarray):
            return NUMPY.key(tensor)
        return tensor.shape, tensor.dtype, _device(tensor)

    def pointer(self, tensor):
        return NUMPY.pointer(tensor) if isinstance(tensor, np.ndarray) else tensor.unsafe_buffer_pointer()

    def view(self, tensor, name):
        if isinstance(tensor, np.ndarray):
            return NUMPY.view(tensor, name)
        device = _device(tensor)
        return TensorView(
            shape=tuple(tensor.shape),
            strides=contiguous_strides(tensor.shape),
            dtype=tensor.dtype.name,
            device_kind="cuda" if device.platform == "gpu" else device.platform,
            device_index=device.local_hardware_id,
            pointer=tensor.unsafe_buffer_pointer(),
        )

    def allocator(self, shape, dtype, like):
        if like.device_kind == "cpu":
            return NUMPY.allocator(shape, dtype, like)
        return self._on_gpu(jax.numpy.empty, shape, dtype, like)

    def zeros_allocator(self, shape, dtype, like):
        if like.device_kind == "cpu":
            return super().zeros_allocator(shape, dtype, like)
        return self._on_gpu(jax.numpy.zeros, shape, dtype, like)

    def _on_gpu(self, make, shape, dtype, like):
        device = next(d for d in jax.local_devices() if d.local_hardware_id == like.device_index)

        def allocate():
            with jax.default_device(device):
                return make(shape, dtype_of(dtype)).block_until_ready()

        return allocate

    def fill(self, tensor, value):
        if not isinstance(tensor, np.ndarray):
            raise NotSupportedError("q: has a size of 0, which JAX arrays on a GPU may not; call with NumPy arrays")
        tensor.fill(value)

    def finish(self, device_index):
        cuda.synchronize(device_index)


def _device(array):
    return next(iter(array.devices()))


JAX = Jax()

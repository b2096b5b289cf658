"""PyTorch tensors on the CPU and on CUDA devices; any version, since nothing of torch's own ABI is used."""

from __future__ import annotations

import functools
import sys
from functools import partial

from tvm_flash.errors import ArgumentTypeError
from tvm_flash.frameworks import torch_watch
from tvm_flash.frameworks.base import Framework, TensorView, Traced, contiguous_strides
from tvm_flash.packs.manifest import MOST_ALIGNMENT

torch = sys.modules["torch"]

_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.int32: "int32"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}

_is_grad_enabled = torch.is_grad_enabled
_HAS_NESTED = hasattr(torch.Tensor, "is_nested")  # torch 1.11 has none

#: Whether a program that is being compiled can be asked what it knows of a symbol: 2.5 can't, 2.11 can.
CAN_ASK_SYMBOLS = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 11)


def name_of(dtype) -> str:
    """A dtype's name, as ``float32``."""
    return _NAMES.get(dtype) or str(dtype).removeprefix("torch.")


class Torch(Framework):
    name = "torch"

    pointer = staticmethod(torch.Tensor.data_ptr)

    def key(self, tensor):
        return tensor.shape, tensor.stride(), tensor.dtype, tensor.device

    def keys(self, tensors):
        return tuple([part for x in tensors for part in (x.shape, x.stride(), x.dtype, x.device)])

    def view(self, tensor, name):
        check_dense(tensor, name)
        if is_wrapper(tensor):
            raise Traced(TORCH, f"{name}: is a {type(tensor).__qualname__} without memory of its own")
        device = tensor.device
        return TensorView(
            shape=tuple(tensor.shape),
            strides=tensor.stride(),
            dtype=name_of(tensor.dtype),
            device_kind=device.type,
            device_index=device.index or 0,
            pointer=tensor.data_ptr(),
        )

    def allocator(self, shape, dtype, like):
        device = torch.device("cpu") if like.device_kind == "cpu" else torch.device("cuda", like.device_index)
        # On a GPU empty_like takes 1.6 µs, empty_strided 2.0, empty 2.4.
        if (prototype := _prototype(shape, _DTYPES[dtype], device)) is not None:
            return partial(torch.empty_like, prototype)
        return partial(torch.empty_strided, shape, _strides(shape), dtype=_DTYPES[dtype], device=device)

    def quick_allocator(self, shape, dtype, like):
        make = _empty_strided(like.device_kind)
        return make and partial(make, shape, _strides(shape), _DTYPES[dtype])

    def fill(self, tensor, value):
        tensor.fill_(value)

    def fast_reader(self, cls):
        api = getattr(cls, "__dlpack_c_exchange_api__", None)  # since torch 2.10
        # Subclasses may stand for something else.
        if not api or cls not in (torch.Tensor, torch.nn.Parameter) or (watch := torch_watch.fields()) is None:
            return None
        return api, _is_grad_enabled, None, watch

    def differentiated(self, *tensors):
        if _is_grad_enabled() and any(x.requires_grad for x in tensors):
            return True
        return any(map(torch_watch.has_tangent, tensors))

    def watched(self, tensors):
        return torch_watch.is_watched(tensors)

    def stream(self, device_index):
        return torch._C._cuda_getCurrentRawStream(device_index)


def is_aligned(tensor):
    """Whether rows begin at multiples of what kernels of GPUs ask for, as far as that is known: on the CPU nobody asks,
    and of what isn't plain memory, and in a program that is compiled, it isn't known.
    """
    if tensor.device.type == "cpu" or torch.compiler.is_compiling() or not torch_watch.are_plain((tensor,)):
        return True
    size = tensor.element_size()
    steps = [step * size for step, n in zip(tensor.stride()[:-1], tensor.shape, strict=False) if n > 1]
    return not any(n % MOST_ALIGNMENT for n in (tensor.data_ptr(), *steps))


def _strides(shape):
    """Those that torch gives a new tensor: an empty dimension counts as one element there."""
    return contiguous_strides(tuple(n or 1 for n in shape))


@functools.cache
def _empty_strided(device_kind):
    """What torch has for the programs that it compiles: ``(shape, strides, dtype)`` to a new tensor on the current
    device, without a dispatcher; None if it isn't there, or is another than it was."""
    guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
    make = getattr(guards, f"_empty_strided_{device_kind}", None)
    try:
        x = make((0, 8), (8, 1), torch.float16)
    except (TypeError, RuntimeError):
        return None
    same = (x.shape, x.stride(), x.dtype, x.device.type) == ((0, 8), (8, 1), torch.float16, device_kind)
    return make if same else None


_elements: dict = {}


@functools.cache
def _becomes_contiguous(ones):
    """Whether ``empty_like`` makes contiguous tensors of expanded ones; ``ones`` says which sizes are 1."""
    shape = tuple(1 if one else 2 for one in ones)
    return torch.empty_like(torch.empty(1).expand(shape)).stride() == contiguous_strides(shape)


def _prototype(shape, dtype, device):
    """A tensor with one element's memory, of which ``empty_like`` makes contiguous ones; None if there can't be one."""
    if 0 in shape or not _becomes_contiguous(tuple(n == 1 for n in shape)):
        return None
    if (dtype, device) not in _elements:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return None  # the element would live in the graph's memory
        _elements[dtype, device] = torch.empty(1, dtype=dtype, device=device)
    return _elements[dtype, device].expand(shape)


def check_dense(tensor, name):
    """That a tensor is one block of strided memory, or stands for one.

    Raises
    ------
    ArgumentTypeError: it is nested or sparse.
    """
    if _HAS_NESTED and tensor.is_nested:
        raise ArgumentTypeError(
            f"{name}: is nested, expected a dense tensor; use torch.nested.to_padded_tensor and padded_attention, or "
            f"call for each sequence"
        )
    if tensor.layout is not torch.strided:
        raise ArgumentTypeError(f"{name}: has the layout {tensor.layout}, expected a dense tensor; use .to_dense()")


class TracedTorch(Torch):
    """Tensors of subclasses that stand for others: fake, functional and distributed ones."""

    traces = adopts = True


def stands_for_others(cls: type) -> bool:
    """Whether tensors of a type have no memory to read, but answer operators in their own way."""
    own, usual = (getattr(c, "__torch_dispatch__", None) for c in (cls, torch.Tensor))  # torch 1.11 has no usual one
    return own is not usual


def is_wrapper(tensor) -> bool:
    """Whether a tensor only stands for others: also those of vmap and grad, and those on meta."""
    return stands_for_others(type(tensor)) or tensor.is_meta or is_functorch_wrapped(tensor)


def is_functorch_wrapped(tensor) -> bool:
    """Whether a tensor is one of a ``torch.func`` transform that is going on."""
    functorch = getattr(torch._C, "_functorch", None)
    return functorch is not None and functorch.is_functorch_wrapped_tensor(tensor)


TORCH = Torch()
TRACED_TORCH = TracedTorch()

"""The arguments of a kernel's launches, by role, and the memory of its workspaces."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tvm_flash.call import memory
from tvm_flash.call.request import Request
from tvm_flash.catalogue import DEFAULTS
from tvm_flash.frameworks import TensorView, contiguous_strides
from tvm_flash.machine.ffi import TensorSpec
from tvm_flash.operators import SCALES, gradient_of, role_of, tensor
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import DENSE, TAKEN_AS, KernelEntry, Param

#: Role of the memory that workspaces are in: those that hold anything at first, and those that hold zeros.
UNDEFINED, ZEROED = "workspaces", "zeroed workspaces"


@dataclass(frozen=True)
class Memory:
    """Workspaces of one call in one tensor.

    ``offsets`` (by name, in bytes) count from the first address in it that is a multiple of
    ``memory.WORKSPACE_ALIGNMENT``; ``elements`` float32 are room for all.
    """

    role: str
    offsets: Mapping[str, int]
    elements: int

    def pointers(self, at: int) -> dict[str, int]:
        """Addresses of the workspaces by name, of the tensor's address."""
        start = memory.workspace_start(at)
        return {name: start + offset for name, offset in self.offsets.items()}


def workspaces_of(entry: KernelEntry, extents: Mapping[str, int]) -> tuple[Memory, ...]:
    """Where the workspaces of a kernel are; ``extents`` are those of :meth:`KernelEntry.extents`."""
    found = []
    for role, zeroed in ((UNDEFINED, False), (ZEROED, True)):
        offsets, size = {}, 0
        for workspace in entry.workspaces:
            if workspace.zeroed == zeroed:
                offsets[workspace.name] = size
                items = math.prod(sizes.evaluate(n, extents) for n in workspace.shape)
                size += memory.workspace_start(items * memory.ITEM_SIZE[workspace.dtype])
        if offsets:
            found.append(Memory(role, offsets, (size + memory.WORKSPACE_ALIGNMENT) // 4))
    return tuple(found)


def maker(memory_: Memory, request: Request) -> Callable[[], Any]:
    """What makes the tensor of workspaces."""
    framework = request.framework
    allocator = framework.zeros_allocator if memory_.role == ZEROED else framework.allocator
    return allocator((memory_.elements,), "float32", request.q)


@dataclass(frozen=True)
class Made:
    """A tensor that a call makes if it isn't given: its name, shape and dtype; what is read has a ``value``."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    value: float | None = None

    def maker(self, request: Request) -> Callable[[], Any]:
        """What makes the tensor."""
        framework, value = request.framework, self.value
        allocate = framework.allocator(self.shape, self.dtype, request.q)
        if value is None:
            return allocate

        def filled():
            tensor = allocate()
            framework.fill(tensor, value)
            return tensor

        # On a GPU each call fills one of its own, in the order of its stream.
        return functools.partial(_same, filled()) if request.device.kind == "cpu" else filled


def _same(tensor: Any) -> Any:
    return tensor


def made_by(request: Request, entry: KernelEntry, extents: Mapping[str, int]) -> tuple[Made, ...]:
    """What a call makes: its results first, in order, then what its kernel takes although nobody asked for it.

    The latter are the gradients of parameters; parameters of a mask that stands in for a simpler one; and flat tensors
    of all in all one element: a kernel takes a shorter one than expected for none, and there is no shorter one.
    """
    operator = request.operator
    found = [Made(n, request.shape_of(n), request.dtype_of(n)) for n in request.results if n not in request.given]
    if operator.differentiates:
        for p in entry.params:
            if p.gradient and gradient_of(p.name) not in request.outputs:
                of_head = p.of_gradient in ("", "bh")  # others are large, and a kernel takes one element for none
                rank = p.rank or max(1, len(p.of_gradient))
                shape = request.sizes.of_axes(p.of_gradient) if of_head and p.axes else (1,) * rank
                found.append(Made(gradient_of(p.name), shape, "float32"))
    for name in (*operator.on_request, *operator.optional):
        shape = request.shape_of(name)
        if math.prod(shape) == 1 and name not in request.results and name not in request.given:
            found.append(Made(name, shape, request.dtype_of(name), 0.0 if name in operator.optional else None))
    for p in entry.params:
        if p.per_head and p.name not in request.given and p.name in DEFAULTS:
            found.append(Made(p.name, (1, 1), p.dtype, sizes.evaluate(DEFAULTS[p.name], extents)))
    return tuple(found)


def arguments_of(
    entry: KernelEntry, request: Request, made: tuple[Made, ...], extents: Mapping[str, int]
) -> dict[str, TensorSpec | int | float]:
    """Every argument of a kernel but for its pointers, by role, in the kernel's layout."""
    device, swap = request.device, entry.form == DENSE and entry.layout != request.layout
    found: dict[str, TensorSpec | int | float] = {"softmax_scale": request.softmax_scale, **request.scalars}
    for name, x in request.given.items():
        if name in request.parameters:
            found[name] = _parameter(request.declared[name], x, request)
        elif name in SCALES:
            found[name] = _scale(x, request)
        else:
            dtype = TAKEN_AS.get(x.dtype, x.dtype)
            found[role_of(name)] = _spec(name, x.shape, x.strides, dtype, request, swap)
    heads = (request.sizes.batch, request.sizes.heads)
    for x in made:
        if x.name in DEFAULTS:
            found[x.name] = TensorSpec(heads, (0, 0), x.dtype, device.kind, device.index)
            continue
        found[role_of(x.name)] = _spec(x.name, x.shape, contiguous_strides(x.shape), x.dtype, request, swap)
    for name in (*request.operator.on_request, *request.operator.optional):
        if role_of(name) not in found:  # one element is shorter than expected, and means that there is none
            found[role_of(name)] = TensorSpec((1,), (1,), tensor(name).dtype, device.kind, device.index)
    for param in entry.params:  # one that isn't given, and that the kernel doesn't use then
        if param.per_head and param.name not in found and request.scalars.get(f"has_{param.name}") == 0:
            found[param.name] = TensorSpec(heads, (0, 0), param.dtype, device.kind, device.index)
    for scalar in entry.scalars:
        found[scalar.name] = extents[scalar.name]
    for workspace in entry.workspaces:
        shape = tuple(sizes.evaluate(n, extents) for n in workspace.shape)
        strides = contiguous_strides(shape)
        found[workspace.name] = TensorSpec(shape, strides, workspace.dtype, device.kind, device.index)
    return found


def _parameter(param: Param, x: TensorView, request: Request) -> TensorSpec:
    """A parameter with the sizes of all its axes, strides of 0 where it has one value for all; a table as it is."""
    shape, strides = x.shape, x.strides
    if param.axes:
        missing = len(param.axes) - len(x.shape)
        strides = (0,) * missing + tuple(0 if n == 1 else s for n, s in zip(x.shape, x.strides, strict=True))
        shape = request.sizes.of_axes(param.axes)
    return TensorSpec(shape, strides, x.dtype, request.device.kind, request.device.index)


def _scale(x: TensorView, request: Request) -> TensorSpec:
    """A scale with a value for each page and head, with a stride of 0 where it has one for all pages."""
    of_pages = x.strides[0] if len(x.shape) > 1 and x.shape[0] > 1 else 0
    strides = (of_pages, x.strides[-1])
    return TensorSpec(request.shape_of("k_scale"), strides, x.dtype, request.device.kind, request.device.index)


def _spec(
    name: str, shape: tuple[int, ...], strides: tuple[int, ...], dtype: str, request: Request, swap: bool
) -> TensorSpec:
    """A tensor of the operator as kernels take it: a flat one as a vector, and one of rank 4 with dimensions 1 and 2
    swapped if the kernel's layout is the other one.

    The stride of a dimension of size 1 is arbitrary and never used: it gets the value of a contiguous tensor, as
    kernels may ask strides to be aligned.
    """
    if tensor(name).flat:
        shape, strides = (math.prod(shape),), (1,)
    plain = contiguous_strides(shape)
    strides = tuple(p if n == 1 else s for n, s, p in zip(shape, strides, plain, strict=True))
    if swap and len(tensor(name).axes) == 4:
        shape, strides = ((x[0], x[2], x[1], x[3]) for x in (shape, strides))
    return TensorSpec(shape, strides, dtype, request.device.kind, request.device.index)

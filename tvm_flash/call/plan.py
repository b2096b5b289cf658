"""A call that is prepared but for its pointers.

Everything that can be decided from shapes, strides, dtypes and options is decided once and kept in a :class:`Plan`; a
repeated call then sets pointers, checks those (alignment, overlap with ``out``), allocates the result and launches.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm_flash.call import fast, memory
from tvm_flash.call.checks import Sizes
from tvm_flash.call.choice import Choice, choose
from tvm_flash.call.problem import Problem
from tvm_flash.errors import InvalidArgumentError
from tvm_flash.frameworks import Framework, TensorView, contiguous_strides
from tvm_flash.machine.device import Device
from tvm_flash.machine.ffi import Frame, TensorSpec
from tvm_flash.packs.manifest import KernelEntry
from tvm_flash.packs.registry import registry


@dataclass(frozen=True)
class Request:
    """A call after all checks that don't need pointers.

    ``scalars`` are the run-time parameters that are numbers, by name; ``per_head`` those that are tensors, in the order
    in which the call gives them.  ``out`` is None if the result is to be allocated.
    ``suspicion`` is the text of a warning that heads and sequence may be swapped.
    """

    framework: Framework
    layout: str
    sizes: Sizes
    problem: Problem
    device: Device
    variant: str
    softmax_scale: float
    scalars: dict[str, float | int]
    q: TensorView
    k: TensorView
    v: TensorView
    per_head: dict[str, TensorView]
    out: TensorView | None
    return_lse: bool
    suspicion: str | None
    accept: Callable[[Choice], None]

    @property
    def out_shape(self) -> tuple[int, ...]:
        return self.sizes.out_shape(self.layout)


class EmptyPlan:
    """A problem with a size of 0: an empty result, or, where there are queries but no keys, zeros and −inf."""

    suspicion = None

    def __init__(self, request: Request):
        self._request = request

    def recipe(self, per_head: tuple[str, ...], q: Any, k: Any, v: Any, out: Any) -> None:
        """What the fast path needs: it leaves empty problems alone."""

    def run(self, q: Any, k: Any, v: Any, per_head: tuple[Any, ...], out: Any) -> tuple[Any, Any]:
        """The result and the log-sum-exp (None unless it was asked for)."""
        request, lse = self._request, None
        framework = request.framework
        if out is None:
            out = framework.allocator(request.out_shape, request.problem.dtype, request.q)()
        if 0 not in request.out_shape:
            framework.fill(out, 0.0)
        if request.return_lse:
            lse = framework.allocator(request.sizes.lse_shape, "float32", request.q)()
            if 0 not in request.sizes.lse_shape:
                framework.fill(lse, float("-inf"))
        return out, lse


class Plan:
    """A chosen kernel with its arguments laid out."""

    def __init__(self, request: Request, alignment: int = memory.MAX_ALIGNMENT):
        """Choose and load the kernel for pointers that are multiples of ``alignment`` bytes."""
        self._request = request
        self.suspicion = request.suspicion
        strides = 0
        for x in (request.q, request.k, request.v, *([request.out] if request.out else [])):
            strides |= memory.stride_bits(x)
        problem = _with_alignment(request.problem, min(alignment, memory.alignment_of(strides)))
        self.choice = choose(problem, request.device, request.variant)
        request.accept(self.choice)
        entry = self.choice.kernel.entry
        self._kernel = registry().load(self.choice.kernel)
        self._arguments, self._named = _arguments(request, entry)
        names = list(request.per_head)
        self._per_head = [None if name is None else names.index(name) for name in self._named]
        self._misaligned = entry.alignment - 1
        self._realigned: dict[int, Plan] = {}
        self._frames: list[Frame] = []  # append and pop are atomic: threads never share a frame
        self._inputs = tuple(memory.footprint(x) for x in (request.q, request.k, request.v, *request.per_head.values()))
        self._output = memory.footprint(request.out) if request.out else None
        self._gpu = request.device.index if request.device.kind == "cuda" else None
        self._lock = threading.Lock()
        self._framework, self._return_lse = request.framework, request.return_lse
        # A kernel that isn't asked for lse gets a tensor of one element, which must exist if that is all of lse.
        self._lse_needed = request.return_lse or math.prod(request.sizes.lse_shape) == 1
        if request.out is None:
            self._make_out = self._framework.allocator(request.out_shape, request.problem.dtype, request.q)
        if self._lse_needed:
            self._make_lse = self._framework.allocator(request.sizes.lse_shape, "float32", request.q)

    def run(self, q: Any, k: Any, v: Any, per_head: tuple[Any, ...], out: Any) -> tuple[Any, Any]:
        """The result and the log-sum-exp (None unless it was asked for).

        Raises
        ------
        InvalidArgumentError: ``out`` overlaps an input, or data is misaligned for every kernel.
        KernelError: the kernel failed to launch.
        """
        framework = self._framework
        pointer = framework.pointer
        try:
            at_q, at_k, at_v = pointer(q), pointer(k), pointer(v)
        except RuntimeError:
            for name, x in (("q", q), ("k", k), ("v", v)):
                framework.view(x, name)  # says which one has no memory, and what to do
            raise
        at_out = 0
        if out is not None:
            at_out = pointer(out)
            self._check_overlap((at_q, at_k, at_v, *map(pointer, per_head)), at_out)
        bits = at_q | at_k | at_v | at_out
        if bits & self._misaligned:
            return self._for_alignment(memory.alignment_of(bits)).run(q, k, v, per_head, out)
        if out is None:
            out = self._make_out()
            at_out = pointer(out)
        lse, at_lse = None, at_out
        if self._lse_needed:
            lse = self._make_lse()
            at_lse = pointer(lse)
        pointers = [at_q, at_k, at_v, at_out, at_lse]
        if self._per_head:
            pointers += [at_q if i is None else pointer(per_head[i]) for i in self._per_head]
        frame = self._frame()
        if self._gpu is None:
            frame.run(pointers)
        else:
            frame.run_on_stream(pointers, framework.stream(self._gpu))
            framework.finish(self._gpu)
        self._frames.append(frame)
        return out, (lse if self._return_lse else None)

    def _frame(self) -> Frame:
        """A frame that no other call uses."""
        try:
            return self._frames.pop()
        except IndexError:
            return Frame(self._kernel, self._arguments)

    def recipe(self, per_head: tuple[str, ...], q: Any, k: Any, v: Any, out: Any) -> tuple[Any, ...] | None:
        """What the fast path needs to do the same for tensors of this alignment; None if each call must warn.

        ``per_head`` are the parameters of each head that the call has room for, given or not.  The answer is that of
        :func:`tvm_flash.call.fast.recipe`, and the :func:`tvm_flash.call.fast.ways` of making the result and the
        log-sum-exp (None: nothing is to be made).
        """
        if self.suspicion is not None:
            return None
        bits = 0
        for x in (q, k, v) if out is None else (q, k, v, out):
            bits |= self._framework.pointer(x)
        if bits & self._misaligned:
            return self._for_alignment(memory.alignment_of(bits)).recipe(per_head, q, k, v, out)
        given = dict(zip(self._request.per_head, self._inputs[3:], strict=True))
        footprints = [*self._inputs[:3], *(given.get(name, memory.NOWHERE) for name in per_head)]
        footprints.append(self._output or memory.NOWHERE)
        used = [0 if name is None else 3 + per_head.index(name) for name in self._named]
        made = fast.recipe(self._frame(), used, self._return_lse, footprints)
        # On the processor the fast path has room of its own for an lse that nobody asked for.
        makes_lse = self._return_lse or (self._lse_needed and self._gpu is not None)
        request = self._request

        def ways(shape, dtype, make):
            return fast.ways(self._framework.quick_allocator(shape, dtype, request.q) or make, make)

        return (
            *made,
            ways(request.out_shape, request.problem.dtype, self._make_out) if out is None else None,
            ways(request.sizes.lse_shape, "float32", self._make_lse) if makes_lse else None,
        )

    def _check_overlap(self, pointers: tuple[int, ...], at_out: int) -> None:
        names = ("q", "k", "v", *self._request.per_head)
        for name, inputs, at in zip(names, self._inputs, pointers, strict=True):
            if memory.overlap(self._output, at_out, inputs, at):
                raise InvalidArgumentError(
                    f"out: shares memory with {name}, which is read while out is written; give it memory of its own, "
                    f"or leave it out"
                )

    def _for_alignment(self, alignment: int) -> Plan:
        with self._lock:
            plan = self._realigned.get(alignment)
            if plan is None:
                plan = self._realigned[alignment] = Plan(self._request, alignment)
        return plan


def _with_alignment(problem: Problem, alignment: int) -> Problem:
    return problem if problem.alignment == alignment else dataclasses.replace(problem, alignment=alignment)


def _arguments(request: Request, entry: KernelEntry) -> tuple[list, tuple[str | None, ...]]:
    """The kernel's arguments in its order and layout; and the names of the per-head tensors among them, in order.

    One that the call doesn't give, and the kernel doesn't use then, is None, and q's memory stands for it.
    """
    sizes, swap = request.sizes, entry.layout != request.layout
    out = request.out
    out_strides = out.strides if out else contiguous_strides(request.out_shape)
    lse_elements = math.prod(sizes.lse_shape)
    arguments = [
        *(_spec(x.shape, x.strides, request, swap) for x in (request.q, request.k, request.v)),
        _spec(request.out_shape, out_strides, request, swap),
        TensorSpec(
            (lse_elements if request.return_lse else 1,), (1,), "float32", request.device.kind, request.device.index
        ),
        request.softmax_scale,
    ]
    used: list[str | None] = []
    for param in entry.params:
        if not param.per_head:
            arguments.append(request.scalars[param.name])
            continue
        shape = (sizes.batch, sizes.heads)
        if param.name not in request.per_head and request.scalars.get(f"has_{param.name}") == 0:
            arguments.append(TensorSpec(shape, (0, 0), param.dtype, request.device.kind, request.device.index))
            used.append(None)
            continue
        x = request.per_head[param.name]
        strides = x.strides if len(x.shape) == 2 else (0, x.strides[0])
        strides = tuple(0 if n == 1 else s for n, s in zip((1, *x.shape)[-2:], strides, strict=True))
        arguments.append(TensorSpec(shape, strides, x.dtype, request.device.kind, request.device.index))
        used.append(param.name)
    return arguments, tuple(used)


def _spec(shape: tuple[int, ...], strides: tuple[int, ...], request: Request, swap: bool) -> TensorSpec:
    """A tensor argument in the kernel's layout.

    The stride of a dimension of size 1 is arbitrary and never used: it gets the value of a contiguous tensor, as
    kernels may ask strides to be aligned.
    """
    plain = contiguous_strides(shape)
    strides = tuple(p if n == 1 else s for n, s, p in zip(shape, strides, plain, strict=True))
    if swap:
        shape, strides = ((x[0], x[2], x[1], x[3]) for x in (shape, strides))
    return TensorSpec(shape, strides, request.problem.dtype, request.device.kind, request.device.index)

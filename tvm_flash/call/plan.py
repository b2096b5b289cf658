"""A call that is prepared but for its pointers.

Everything that can be decided from shapes, strides, dtypes and options is decided once and kept in a :class:`Plan`; a
repeated call then sets pointers, checks those (alignment, overlap with ``out``), allocates the result and launches.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Mapping
from typing import Any

from tvm_flash.call import fast, memory
from tvm_flash.call.choice import choose
from tvm_flash.call.launches import ZEROED, arguments_of, maker, workspaces_of
from tvm_flash.call.problem import Problem
from tvm_flash.call.request import Request
from tvm_flash.call.signature import Signature
from tvm_flash.machine.ffi import Frame
from tvm_flash.packs.manifest import KernelEntry, Launch
from tvm_flash.packs.registry import registry


class EmptyPlan:
    """A problem with a size of 0: an empty result, or, where there are queries but no keys, zeros and −inf."""

    suspicion = None

    def __init__(self, request: Request):
        self._request = request

    def recipe(self, signature: Signature, given: Mapping[str, Any]) -> None:
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
        entry = self.choice.kernel.entry
        extents = entry.extents(request.sizes.by_name)
        arguments = arguments_of(entry, request, extents)
        functions = registry().load(self.choice.kernel)
        self._launches = [
            (function, [arguments[x.role] for x in launch.arguments], _tensor_roles(launch, entry, request))
            for function, launch in zip(functions, entry.launches, strict=True)
        ]
        self._misaligned = entry.alignment - 1
        self._realigned: dict[int, Plan] = {}
        self._frames: list[tuple[Frame, ...]] = []  # append and pop are atomic: threads never share a frame
        self._inputs = {
            name: memory.footprint(x)
            for name, x in (("q", request.q), ("k", request.k), ("v", request.v), *request.per_head.items())
        }
        self._output = memory.footprint(request.out) if request.out else None
        self._gpu = request.device.index if request.device.kind == "cuda" else None
        self._lock = threading.Lock()
        self._framework, self._return_lse = request.framework, request.return_lse
        # A kernel that isn't asked for lse gets a tensor of one element, which must exist if that is all of lse.
        self._lse_needed = request.return_lse or math.prod(request.sizes.lse_shape) == 1
        if request.out is None:
            self._make_out = self._framework.allocator(request.out_shape, entry.dtype_of("o"), request.q)
        if self._lse_needed:
            self._make_lse = self._framework.allocator(request.sizes.lse_shape, "float32", request.q)
        self._workspaces = [(memory_, maker(memory_, request)) for memory_ in workspaces_of(entry, extents)]

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
            memory.check_overlap(self._output, at_out, self._inputs, (at_q, at_k, at_v, *map(pointer, per_head)))
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
        pointers = {"q": at_q, "k": at_k, "v": at_v, "o": at_out, "lse": at_lse}
        pointers |= {name: pointer(x) for name, x in zip(self._request.per_head, per_head, strict=True)}
        workspaces = [(memory_, make()) for memory_, make in self._workspaces]
        for memory_, tensor in workspaces:
            pointers |= memory_.pointers(pointer(tensor))
        frames = self._frames_of_one_call()
        for frame, (_, _, roles) in zip(frames, self._launches, strict=True):
            if self._gpu is None:
                frame.run([pointers[role] for role in roles])
            else:
                frame.run_on_stream([pointers[role] for role in roles], framework.stream(self._gpu))
        if self._gpu is not None:
            framework.finish(self._gpu)
        self._frames.append(frames)
        return out, (lse if self._return_lse else None)

    def _frames_of_one_call(self) -> tuple[Frame, ...]:
        """A frame for each launch that no other call uses."""
        try:
            return self._frames.pop()
        except IndexError:
            return tuple(Frame(function, arguments) for function, arguments, _ in self._launches)

    def recipe(self, signature: Signature, given: Mapping[str, Any]) -> tuple[int, Any, tuple] | None:
        """What the fast path needs to do the same for tensors of this alignment; None if each call must warn.

        ``given`` are the call's tensors by role, None for what isn't given; the answer is that of
        :func:`tvm_flash.call.fast.recipe`.
        """
        if self.suspicion is not None:
            return None
        bits = 0
        for role in ("q", "k", "v", "o"):
            bits |= 0 if given[role] is None else self._framework.pointer(given[role])
        if bits & self._misaligned:
            return self._for_alignment(memory.alignment_of(bits)).recipe(signature, given)
        request, framework = self._request, self._framework

        def ways(shape, dtype, make):
            return fast.ways(framework.quick_allocator(shape, dtype, request.q) or make, make)

        out = None
        if request.out is None:
            out = ways(request.out_shape, self.choice.kernel.entry.dtype_of("o"), self._make_out)
        # On the processor the fast path has room of its own for an lse that nobody asked for.
        makes_lse = self._return_lse or (self._lse_needed and self._gpu is not None)
        lse = ways(request.sizes.lse_shape, "float32", self._make_lse) if makes_lse else None
        made = [("o", out), ("lse", lse)]
        for memory_, make in self._workspaces:
            quick = (
                None if memory_.role == ZEROED else framework.quick_allocator((memory_.elements,), "float32", request.q)
            )
            made.append((memory_.role, fast.ways(quick or make, make)))
        call = fast.Call(
            launches=tuple(
                (frame, roles) for frame, (_, _, roles) in zip(self._frames_of_one_call(), self._launches, strict=True)
            ),
            made=tuple(made),
            returned=2 if self._return_lse else 1,
            workspaces={
                name: (memory_.role, offset)
                for memory_, _ in self._workspaces
                for name, offset in memory_.offsets.items()
            },
            footprints={**self._inputs, **({"o": self._output} if self._output else {})},
        )
        return fast.recipe(signature, call)

    def _for_alignment(self, alignment: int) -> Plan:
        with self._lock:
            plan = self._realigned.get(alignment)
            if plan is None:
                plan = self._realigned[alignment] = Plan(self._request, alignment)
        return plan


def _with_alignment(problem: Problem, alignment: int) -> Problem:
    return problem if problem.alignment == alignment else dataclasses.replace(problem, alignment=alignment)


def _tensor_roles(launch: Launch, entry: KernelEntry, request: Request) -> tuple[str, ...]:
    """The roles of a launch's tensors, in the order of its arguments; q's memory stands for what isn't given."""
    absent = {p.name for p in entry.params if p.per_head} - request.per_head.keys()
    return tuple("q" if x.role in absent else x.role for x in launch.arguments if x.rank)

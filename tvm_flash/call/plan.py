"""A call that is prepared but for its pointers.

Everything that can be decided from shapes, strides, dtypes and options is decided once and kept in a :class:`Plan`; a
repeated call then sets pointers, checks those (alignment, overlap with what is written), allocates results and
workspaces, and launches.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

from tvm_flash.call import fast, memory
from tvm_flash.call.choice import choose
from tvm_flash.call.launches import ZEROED, arguments_of, made_by, maker, workspaces_of
from tvm_flash.call.paged import PagedSizes, check_places
from tvm_flash.call.problem import Problem
from tvm_flash.call.ragged import check_starts
from tvm_flash.call.request import Request
from tvm_flash.call.signature import Signature
from tvm_flash.errors import KernelError, PackError
from tvm_flash.machine.ffi import Frame
from tvm_flash.operators import role_of, tensor
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, MOST_ALIGNMENT, Launch
from tvm_flash.packs.registry import Installed, build_command, registry


class EmptyPlan:
    """A problem with a size of 0: empty results, and where there are queries but no keys, or keys but no queries, zeros
    and a log-sum-exp of −inf."""

    suspicion = None

    def __init__(self, request: Request):
        self._request, self.results = request, request.results

    def recipe(self, signature: Signature, given: Mapping[str, Any]) -> None:
        """What the fast path needs: it leaves empty problems alone."""

    def run(self, tensors: Mapping[str, Any]) -> list[Any]:
        """The results, in order; ``tensors`` are those of the call by name.

        Raises
        ------
        InvalidArgumentError: a tensor has no memory, a result overlaps another one, or where sequences begin makes no
            sense (found on the processor only).
        """
        request = self._request
        framework, results = request.framework, []
        at = {name: framework.pointer(x) for name, x in tensors.items()}
        memory.check_present(request.footprints, at)
        memory.check_overlap(request.given_outputs, request.footprints, at)
        check_starts_of(request, at)
        for name in request.results:
            shape = request.shape_of(name)
            x = tensors.get(name)
            if x is None:
                x = framework.allocator(shape, request.dtype_of(name), request.q)()
            if 0 not in shape and not request.problem.accumulate:
                framework.fill(x, float("-inf") if name in request.operator.on_request else 0.0)
            results.append(x)
        return results


class Plan:
    """A chosen kernel with its arguments laid out."""

    def __init__(self, request: Request, alignment: int = MOST_ALIGNMENT):
        """Choose and load the kernel for pointers that are multiples of ``alignment`` bytes."""
        self._request, self.results = request, request.results
        self.suspicion = request.suspicion
        operator = request.operator
        self._aligned = [n for n in (*operator.inputs, *request.outputs) if n in request.given]
        strides = 0
        for name in self._aligned:
            strides |= 0 if tensor(name).flat else memory.stride_bits(request.given[name])
        problem = _with_alignment(request.problem, min(alignment, memory.alignment_of(strides)))
        self.choice = choose(problem, request.device, request.variant)
        entry = self.choice.kernel.entry
        _check_params(request, self.choice.kernel)
        extents = entry.extents(request.sizes.by_name, lambda x: request.shape_of(x) if x in request.outputs else ())
        self._made = made_by(request, entry, extents)
        arguments = arguments_of(entry, request, self._made, extents)
        functions = registry().load(self.choice.kernel)
        present = {*request.given, *(x.name for x in self._made), *operator.on_request}
        absent = {*(p.name for p in entry.params if p.is_tensor), *operator.optional} - present
        self._launches = [
            (function, [arguments[x.role] for x in launch.arguments], _tensor_roles(launch, absent))
            for function, launch in zip(functions, entry.launches, strict=True)
            if launch.is_needed(extents)
        ]
        self._misaligned = entry.alignment - 1
        self._realigned: dict[int, Plan] = {}
        self._frames: list[tuple[Frame, ...]] = []  # append and pop are atomic: threads never share a frame
        self._gpu = request.device.index if request.device.kind == "cuda" else None
        self._lock = threading.Lock()
        self._framework = request.framework
        self._makers = [(x.name, role_of(x.name), x.maker(request)) for x in self._made]
        self._unread = [role_of(n) for n in operator.on_request if n not in {x.name for x in self._made}]
        self._workspaces = [(memory_, maker(memory_, request)) for memory_ in workspaces_of(entry, extents)]

    def run(self, tensors: Mapping[str, Any]) -> list[Any]:
        """The results, in order; ``tensors`` are those of the call that are given, by name.

        Raises
        ------
        InvalidArgumentError: a tensor has no memory, a result overlaps another one, data is misaligned for every
            kernel, or where sequences begin makes no sense (found on the processor only).
        KernelError: the kernel failed to launch.
        """
        framework = self._framework
        pointer = framework.pointer
        try:
            at = {name: pointer(x) for name, x in tensors.items()}
        except RuntimeError:
            for name, x in tensors.items():
                framework.view(x, name)  # says which one has no memory, and what to do
            raise
        if 0 in at.values():
            memory.check_present(self._request.footprints, at)
        if self._request.given_outputs:
            memory.check_overlap(self._request.given_outputs, self._request.footprints, at)
        bits = 0
        for name in self._aligned:
            bits |= at[name]
        if bits & self._misaligned:
            return self._for_alignment(memory.alignment_of(bits)).run(tensors)
        pointers = {role_of(name): address for name, address in at.items()}
        found = dict(tensors)
        for name, role, make in self._makers:
            found[name] = x = make()
            pointers[role] = pointer(x)
        for role in self._unread:  # some address, to which nothing is written
            pointers[role] = pointers["q"]
        workspaces = [(memory_, make()) for memory_, make in self._workspaces]
        for memory_, x in workspaces:
            pointers |= memory_.pointers(pointer(x))
        frames = self._frames_of_one_call()
        for frame, (_, _, roles) in zip(frames, self._launches, strict=True):
            if self._gpu is None:
                try:
                    frame.run([pointers[role] for role in roles])
                except KernelError:
                    check_starts_of(self._request, at)  # says what the kernel has found
                    raise
            else:
                frame.run_on_stream([pointers[role] for role in roles], framework.stream(self._gpu))
        if self._gpu is not None:
            framework.finish(self._gpu)
        self._frames.append(frames)
        return [found[name] for name in self.results]

    def _frames_of_one_call(self) -> tuple[Frame, ...]:
        """A frame for each launch that no other call uses."""
        try:
            return self._frames.pop()
        except IndexError:
            return tuple(Frame(function, arguments) for function, arguments, _ in self._launches)

    def recipe(self, signature: Signature, given: Mapping[str, Any]) -> tuple[int, Any, tuple] | None:
        """What the fast path needs to do the same for tensors of this alignment; None if each call must warn.

        ``given`` are the call's tensors by name; the answer is that of :func:`tvm_flash.call.fast.recipe`.
        """
        if self.suspicion is not None:
            return None
        bits = 0
        for name in self._aligned:
            bits |= self._framework.pointer(given[name])
        if bits & self._misaligned:
            return self._for_alignment(memory.alignment_of(bits)).recipe(signature, given)
        request, framework = self._request, self._framework

        def ways(shape, dtype, any_value, make):
            quick = framework.quick_allocator(shape, dtype, request.q) if any_value else None
            return fast.ways(quick or make, make)

        made = zip(self._made, self._makers, strict=True)
        makers = {x.name: ways(x.shape, x.dtype, x.value is None, make) for x, (_, _, make) in made}
        if self._gpu is None:  # on the processor the fast path has room of its own for what nobody asked for
            makers = {n: x for n, x in makers.items() if n in request.results or n not in request.operator.on_request}
        names = dict.fromkeys((*request.results, *makers))
        made = [(role_of(name), makers.get(name)) for name in names]
        for memory_, make in self._workspaces:
            made.append((memory_.role, ways((memory_.elements,), "float32", memory_.role != ZEROED, make)))
        call = fast.Call(
            launches=tuple(
                (frame, roles) for frame, (_, _, roles) in zip(self._frames_of_one_call(), self._launches, strict=True)
            ),
            made=tuple(made),
            returned=len(request.results),
            workspaces={
                name: (memory_.role, offset)
                for memory_, _ in self._workspaces
                for name, offset in memory_.offsets.items()
            },
            footprints={role_of(name): x for name, x in request.footprints.items()},
        )
        return fast.recipe(signature, call)

    def _for_alignment(self, alignment: int) -> Plan:
        with self._lock:
            plan = self._realigned.get(alignment)
            if plan is None:
                plan = self._realigned[alignment] = Plan(self._request, alignment)
        return plan


def _check_params(request: Request, kernel: Installed) -> None:
    """That a kernel of a definition of the user's own takes the parameters that the call was checked for.

    Raises
    ------
    PackError: the packs have kernels of two definitions of one name.
    """
    if request.problem.definition != BUILTIN_DEFINITION and kernel.entry.params != tuple(request.declared.values()):
        command = build_command("native", "--definition", f"<file.py>:{request.problem.definition}")
        raise PackError(
            f"pack {kernel.pack.folder}: its kernel {kernel.entry.symbol} takes other parameters than another one of "
            f"the definition {request.problem.definition!r}, so that it was built of an earlier text; run `{command}`"
        )


def check_starts_of(request: Request, at: Mapping[str, int]) -> None:
    """That sequences begin where they can, and lie where keys are, if that is to be read; ``at`` are addresses by name.

    Raises
    ------
    InvalidArgumentError
    """
    if not request.operator.starts or request.device.kind != "cpu":
        return
    if isinstance(request.sizes, PagedSizes):
        check_places(request.sizes, request.given["page_table"].strides[0], at)
    else:
        check_starts(request.sizes, {name: at[name] for name in request.operator.starts})


def _with_alignment(problem: Problem, alignment: int) -> Problem:
    return problem if problem.alignment == alignment else dataclasses.replace(problem, alignment=alignment)


def _tensor_roles(launch: Launch, absent: set[str]) -> tuple[str, ...]:
    """The roles of a launch's tensors, in the order of its arguments; q's memory stands for what isn't there."""
    return tuple("q" if x.role in absent else x.role for x in launch.arguments if x.rank)

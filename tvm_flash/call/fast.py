"""The fast path of a repeated call: one C function that reads tensors, finds what the slow path left, and launches.

The library (``schedules/runtime_c/call.c``) is a support file of every pack, loaded with the first kernel.  Where a
pack has none, or ``TVM_FLASH_FAST_PATH=0`` is set, the slow path serves, with the same results, errors and warnings.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tvm_flash.call import memory
from tvm_flash.errors import InvalidArgumentError
from tvm_flash.frameworks import Framework
from tvm_flash.machine import cuda, ffi
from tvm_flash.packs.manifest import CALL_STEM
from tvm_flash.packs.registry import on_support_file

#: Set to 0 to do without the fast path.
VARIABLE = "TVM_FLASH_FAST_PATH"

_ABI = 5
_MAX_TENSORS, _MAX_ARGUMENTS, _MAX_MADE, _MAX_SLOTS = 16, 32, 12, 32


class _Launch(ctypes.Structure):
    """``Launch`` of ``call.c``."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("tensors", ctypes.c_void_p),
        ("slots", ctypes.POINTER(ctypes.c_int32)),
        ("argument_count", ctypes.c_int32),
        ("tensor_count", ctypes.c_int32),
    )


class _Workspace(ctypes.Structure):
    """``Workspace`` of ``call.c``."""

    _fields_ = (("slot", ctypes.c_int32), ("memory", ctypes.c_int32), ("offset", ctypes.c_int64))


class _Recipe(ctypes.Structure):
    """``Recipe`` of ``call.c``."""

    _fields_ = (
        ("launches", ctypes.POINTER(_Launch)),
        ("workspaces", ctypes.POINTER(_Workspace)),
        ("launch_count", ctypes.c_int32),
        ("workspace_count", ctypes.c_int32),
        ("slot_count", ctypes.c_int32),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("current_device", ctypes.c_void_p),
        ("made_count", ctypes.c_int32),
        ("returned_count", ctypes.c_int32),
        ("made", ctypes.c_int32 * _MAX_MADE),
        ("low", ctypes.c_int64 * _MAX_TENSORS),
        ("high", ctypes.c_int64 * _MAX_TENSORS),
    )


class Signature(Protocol):
    """What the library is told of a :class:`tvm_flash.call.signature.Signature`, and the functions that it gets."""

    tensors: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    roles: tuple[str, ...]
    below: bool
    call: Callable[..., Any]
    fast_call: Callable[..., Any] | None


_slow: Callable[..., Any]
_bind: Callable[..., Any] | None = None
_add: Callable[..., None]
_read: Callable[..., None]
_forget: Callable[[], int]
_lock = threading.Lock()

#: Every signature that there is.
_signatures: list[Signature] = []

#: The types whose tensors the library reads, and how.
_readers: dict[type, tuple] = {}
_frameworks: list[Framework] = []


def install(slow: Callable[..., Any]) -> None:
    """Make ``slow(signature, tensors …, options …)`` what computes a call, until the library is there, and whatever the
    library can't."""
    global _slow
    _slow = slow


def enter(signature: Signature) -> None:
    """Give a signature its ``call(tensors …, options …)``: the slow path's answer, sooner if the library is there."""
    with _lock:
        _signatures.append(signature)
        _connect(signature)


def _connect(signature: Signature) -> None:
    call = None
    if _bind is not None:
        call = _bind(signature, len(signature.tensors), len(signature.inputs), len(signature.outputs), signature.below)
    signature.call = signature.fast_call = call
    if call is None:
        signature.call = functools.partial(_slow, signature)


@contextlib.contextmanager
def switched_off() -> Iterator[None]:
    """Every call goes the slow way for a while: to compare."""
    before = [(signature, signature.call) for signature in _signatures]
    for signature, _ in before:
        signature.call = functools.partial(_slow, signature)
    try:
        yield
    finally:
        for signature, call in before:
            signature.call = call


def is_loaded() -> bool:
    """Whether the library is there."""
    return _bind is not None


def load(path: Path) -> None:
    """Load the library, once; ``path`` has been verified.  What can't be loaded here leaves the slow path alone.

    Raises
    ------
    InvalidArgumentError: the variable ``TVM_FLASH_FAST_PATH`` is neither 0 nor 1.
    """
    global _bind, _add, _read, _forget
    wanted = os.environ.get(VARIABLE) or "1"
    if wanted not in ("0", "1"):
        raise InvalidArgumentError(f"{VARIABLE}: is {wanted!r}, expected 0 or 1, or unset")
    if _bind is not None or wanted == "0" or not _supported():
        return
    with _lock:
        if _bind is not None:
            return
        try:
            functions = ctypes.PyDLL(str(path)).tvm_flash_call_functions
        except OSError:  # an interpreter that keeps its own functions to itself
            return
        functions.restype = ctypes.py_object
        functions.argtypes = (ctypes.c_int, ctypes.py_object, *[ctypes.c_void_p] * 3)
        try:
            _bind, _add, _read, _forget = functions(_ABI, _slow, *ffi.addresses())
        except TypeError:  # a pack of another version of this package
            return
        for signature in _signatures:
            _connect(signature)


on_support_file(CALL_STEM, load)


def _supported() -> bool:
    """Whether this is a CPython whose objects the library knows: not one without a global lock."""
    return sys.implementation.name == "cpython" and "t" not in sys.abiflags


def forget() -> None:
    """Drop everything that was remembered."""
    if _bind is not None:
        _forget()


def remember(signature: Signature, arguments: tuple, framework: Framework, plan: Any) -> None:
    """Keep what a plan has done for the next call with such arguments (those of ``signature.call``)."""
    if signature.fast_call is None or not _readable(type(arguments[0]), framework):
        return
    given = dict(zip(signature.tensors, arguments, strict=False))
    _add(signature.fast_call, arguments, functools.partial(plan.recipe, signature, given))


def _readable(cls: type, framework: Framework) -> bool:
    how = framework.fast_reader(cls)
    if how != _readers.get(cls):
        with _lock:
            if framework not in _frameworks:
                _frameworks.append(framework)
            _read(cls, _frameworks.index(framework), *how)
            _readers[cls] = how
    return how is not None


@dataclass(frozen=True)
class Call:
    """How a call is done, in terms of roles: what the library has to know.

    Attributes
    ----------
    launches: argument buffers, and the roles of the tensors among the arguments.
    made: role and makers (:func:`ways`) of each tensor that may have to be made, None for one that is given or not
        wanted: the results first, in the order in which they are returned.
    returned: how many of those are returned.
    workspaces: by role, the role of the memory that it is in, and the offset there in bytes.
    footprints: of the tensors that are given, by role.
    """

    launches: tuple[tuple[ffi.Frame, tuple[str, ...]], ...]
    made: tuple[tuple[str, Any], ...]
    returned: int
    workspaces: Mapping[str, tuple[str, int]]
    footprints: Mapping[str, memory.Footprint]


def recipe(signature: Signature, call: Call) -> tuple[int, Any, tuple] | None:
    """A recipe's address, what keeps it alive, and the makers; None if it is too large for the library."""
    roles = [*signature.roles, *(role for role, _ in call.made), *call.workspaces]
    roles += [role for _, launch_roles in call.launches for role in launch_roles]
    slots = {role: slot for slot, role in enumerate(dict.fromkeys(roles))}
    arguments = [frame.parts()[3] for frame, _ in call.launches]
    if len(slots) > _MAX_SLOTS or len(call.made) > _MAX_MADE or max(arguments) > _MAX_ARGUMENTS:
        return None
    keep: list[Any] = []
    launches = (_Launch * len(call.launches))()
    for launch, (frame, launch_roles) in zip(launches, call.launches, strict=True):
        numbers = (ctypes.c_int32 * len(launch_roles))(*(slots[role] for role in launch_roles))
        function, values, tensors, argument_count, tensor_count = frame.parts()
        launch.function, launch.arguments, launch.tensors, launch.slots = function, values, tensors, numbers
        launch.argument_count, launch.tensor_count = argument_count, tensor_count
        keep.append(numbers)
    workspaces = (_Workspace * len(call.workspaces))(
        *((slots[role], slots[at], offset) for role, (at, offset) in call.workspaces.items())
    )
    device = call.launches[0][0].device
    found = _Recipe(
        *(launches, workspaces, len(launches), len(workspaces), len(slots), *device),
        None if device[0] == ffi.DL_DEVICES["cpu"] else cuda.current_device_function(),
        *(len(call.made), call.returned),
    )
    found.made[: len(call.made)] = [slots[role] for role, _ in call.made]
    footprints = [call.footprints.get(role, memory.NOWHERE) for role in signature.roles]
    found.low[: len(footprints)] = [f.low for f in footprints]
    found.high[: len(footprints)] = [f.high for f in footprints]
    return ctypes.addressof(found), (found, call, launches, workspaces, keep), tuple(ways for _, ways in call.made)


def ways(quick: Callable[[], Any], sure: Callable[[], Any]) -> tuple[Any, ...]:
    """How the library makes a tensor: by the first, if the framework's current device is that of the call, or by the
    second."""
    calls = []
    for make in (quick, sure):
        plain = isinstance(make, functools.partial) and not make.keywords
        calls += (make.func, make.args) if plain else (make, ())  # the library calls through a partial at no cost
    return tuple(calls)

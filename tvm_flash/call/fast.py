"""The fast path of a repeated call: one C function that reads tensors, finds what the slow path left, and launches.

The library (``schedules/runtime_c/call.c``) is a support file of every pack, loaded with the first kernel.  Where a
pack has none, or ``TVM_FLASH_FAST_PATH=0`` is set, the slow path serves, with the same results, errors and warnings.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tvm_flash.call import memory
from tvm_flash.frameworks import Framework
from tvm_flash.machine import cuda, ffi

#: Set to 0 to do without the fast path.
VARIABLE = "TVM_FLASH_FAST_PATH"

#: How the library's file names begin.
STEM = "libtvm_flash_call"

_ABI = 2
_MAX_TENSORS = 12


class _Recipe(ctypes.Structure):
    """``Recipe`` of ``call.c``."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("tensors", ctypes.c_void_p),
        ("argument_count", ctypes.c_int32),
        ("tensor_count", ctypes.c_int32),
        ("device_type", ctypes.c_int32),
        ("device_index", ctypes.c_int32),
        ("returns_lse", ctypes.c_int32),
        ("current_device", ctypes.c_void_p),
        ("per_head", ctypes.c_int32 * _MAX_TENSORS),
        ("low", ctypes.c_int64 * _MAX_TENSORS),
        ("high", ctypes.c_int64 * _MAX_TENSORS),
    )


#: ``call(site, number of tensors, q, k, v, *per_head, out, *options)``: the slow path's answer, sooner.  A per-head
#: tensor or ``out`` that isn't given is None; a site is an object that stands for what its caller has decided.
call: Callable[..., Any]

_slow: Callable[..., Any]
_add: Callable[..., None] | None = None
_read: Callable[..., None]
_forget: Callable[[], int]
_lock = threading.Lock()

#: The types whose tensors the library reads, and how.
_readers: dict[type, tuple] = {}
_frameworks: list[Framework] = []


def install(slow: Callable[..., Any]) -> None:
    """Make ``slow`` what computes a call, until the library is there, and whatever the library can't."""
    global call, _slow
    call = _slow = slow


def load(path: Path) -> None:
    """Load the library, once; ``path`` has been verified.  What can't be loaded here leaves the slow path alone."""
    global call, _add, _read, _forget
    if _add is not None or os.environ.get(VARIABLE) == "0" or not _supported():
        return
    with _lock:
        if _add is not None:
            return
        try:
            functions = ctypes.PyDLL(str(path)).tvm_flash_call_functions
        except OSError:  # an interpreter that keeps its own functions to itself
            return
        functions.restype = ctypes.py_object
        functions.argtypes = (ctypes.c_int, ctypes.py_object, *[ctypes.c_void_p] * 3)
        try:
            fast_call, add, _read, _forget = functions(_ABI, _slow, *ffi.addresses())
        except TypeError:  # a pack of another version of this package
            return
        call, _add = fast_call, add


def _supported() -> bool:
    """Whether this is a CPython whose objects the library knows: not one without a global lock."""
    return sys.implementation.name == "cpython" and "t" not in sys.abiflags


def forget() -> None:
    """Drop everything that was remembered."""
    if _add is not None:
        _forget()


def remember(arguments: tuple, framework: Framework, plan: Any) -> None:
    """Keep what a plan has done for the next call with such arguments (those of :func:`call`)."""
    if _add is None or not _readable(type(arguments[2]), framework):
        return
    site, tensors = arguments[:2]
    _add(arguments, functools.partial(plan.recipe, site.per_head, *arguments[2:5], arguments[1 + tensors]))


def _readable(cls: type, framework: Framework) -> bool:
    how = framework.fast_reader(cls)
    if how != _readers.get(cls):
        with _lock:
            if framework not in _frameworks:
                _frameworks.append(framework)
            _read(cls, _frameworks.index(framework), *how)
            _readers[cls] = how
    return how is not None


def recipe(
    frame: ffi.Frame, per_head: list[int], returns_lse: bool, footprints: list[memory.Footprint]
) -> tuple[int, Any]:
    """A recipe's address and what keeps it alive.

    Parameters
    ----------
    frame: the arguments.
    per_head: which of the call's tensors the kernel's per-head parameters are, by position from q = 0 on.
    returns_lse: whether the caller gets the log-sum-exp too.
    footprints: of all tensors of the call, ``out`` last.
    """
    function, arguments, tensors, argument_count, tensor_count = frame.parts()
    current_device = None if frame.device[0] == ffi.DL_DEVICES["cpu"] else cuda.current_device_function()
    found = _Recipe(
        *(function, arguments, tensors, argument_count, tensor_count),
        *(*frame.device, returns_lse, current_device),
    )
    found.per_head[: len(per_head)] = per_head
    found.low[: len(footprints)] = [f.low for f in footprints]
    found.high[: len(footprints)] = [f.high for f in footprints]
    return ctypes.addressof(found), (found, frame)


def ways(quick: Callable[[], Any], sure: Callable[[], Any]) -> tuple[Any, ...]:
    """How the library makes a tensor: by the first, if the framework's current device is that of the call, or by the
    second."""
    calls = []
    for make in (quick, sure):
        plain = isinstance(make, functools.partial) and not make.keywords
        calls += (make.func, make.args) if plain else (make, ())  # the library calls through a partial at no cost
    return tuple(calls)

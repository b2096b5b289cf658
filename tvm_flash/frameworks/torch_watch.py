"""Whether PyTorch must see a call as an operator: who traces, records or transforms, which tensors aren't just memory.

PyTorch decides how an operator is answered by dispatch keys, of the tensors and of the thread.  A call over tensors
with no other keys than those of plain memory, in a thread with no other keys than the usual ones, may go to a kernel
directly.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from typing import Any

torch = sys.modules["torch"]

_C = torch._C
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter)

#: Keys of plain memory: its device's own, and those that every tensor has.
_PLAIN_KEYS = ("CPU", "CUDA", "Dense", "BackendSelect", "ADInplaceOrView")
_PLAIN_PREFIXES = ("Autograd", "Autocast")

_function_mode = getattr(_C, "_is_torch_function_mode_enabled", lambda: False)
_tensor_keys = getattr(_C, "_dispatch_keys", None)
_thread_keys = getattr(_C, "_dispatch_tls_local_include_set", None)


def is_watched(tensors: tuple[Any, ...]) -> bool:
    """Whether a call with such tensors, None among them, must be an operator."""
    if _thread_keys and not _plain(_thread_keys()):
        return True
    if (_function_mode() and not _only_devices()) or _observed():
        return True
    return any(_unusual(x) for x in tensors if x is not None)


def are_plain(tensors: tuple[Any, ...]) -> bool:
    """Whether tensors are just memory, whoever else watches the thread."""
    return not any(map(_unusual, tensors))


def has_tangent(tensor: Any) -> bool:
    """Whether a tensor carries a tangent of forward-mode differentiation."""
    forward_ad = torch.autograd.forward_ad
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None


def is_differentiated(tensor: Any) -> bool:
    """Whether a derivative by a tensor is asked for, in either mode, at any level of ``torch.func``."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and tensor.requires_grad
    return any((torch.is_grad_enabled() and x.requires_grad) or has_tangent(x) for x in _levels(tensor))


def has_tangent_below(tensor: Any) -> bool:
    """Whether a tensor carries a tangent, at any level of ``torch.func``."""
    return not torch.compiler.is_compiling() and any(map(has_tangent, _levels(tensor)))


def is_mapped(tensor: Any) -> bool:
    """Whether a tensor is mapped by ``torch.vmap``, at any level of ``torch.func``."""
    functorch = getattr(_C, "_functorch", None)
    return functorch is not None and any(map(functorch.is_batchedtensor, _levels(tensor)))


def _levels(tensor: Any) -> Iterator[Any]:
    """A tensor, and what it is at each level of ``torch.func`` below."""
    functorch = getattr(_C, "_functorch", None)
    yield tensor
    while functorch is not None and functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
        yield tensor


def _unusual(tensor: Any) -> bool:
    if type(tensor) not in _PLAIN_TYPES:
        return hasattr(type(tensor), "__torch_function__")
    return _tensor_keys is not None and not _plain(_tensor_keys(tensor))


#: What tells sets of keys apart: a number, but before torch 2.5 their text.
_bits = getattr(getattr(_C, "DispatchKeySet", None), "raw_repr", str)
_known: dict[int | str, bool] = {}


def _plain(keys: Any) -> bool:
    raw = _bits(keys)
    if raw not in _known:
        names = str(keys).partition("(")[2].rstrip(")").split(", ")
        _known[raw] = all(not n or n in _PLAIN_KEYS or n.startswith(_PLAIN_PREFIXES) for n in names)
    return _known[raw]


def _only_devices() -> bool:
    """Whether the modes that are on only say where new tensors are made."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._device import DeviceContext

    return all(isinstance(mode, DeviceContext) for mode in _get_current_function_mode_stack())


def _observed() -> bool:
    native = _native()
    return native["_ZN2at12hasCallbacksEv"]() if native else bool(torch.autograd._profiler_enabled())


# ---------------------------------------------------------------- the same for the fast path, without Python

_MODE = "_ZN3c104impl26raw_local_dispatch_key_setE"  # the thread's keys: two words, 0 if they are the usual ones
_QUESTIONS = ("_ZN2at12hasCallbacksEv", "_ZN2at4impl27torch_function_mode_enabledEv")


@functools.cache
def _native() -> dict[str, Any]:
    """Functions of PyTorch's library by name; empty if one isn't there."""
    try:
        library = ctypes.CDLL(_C.__file__)
        found = {name: getattr(library, name) for name in _QUESTIONS}
        ctypes.c_uint64.in_dll(library, _MODE)
    except (OSError, AttributeError, ValueError):
        return {}
    for function in found.values():
        function.restype, function.argtypes = ctypes.c_bool, ()
    return {"": library, **found}


@functools.cache
def fields() -> tuple | None:
    """``Watch`` of ``call_key.h``; None if something isn't where it is in the versions of PyTorch that are known.

    Nothing here is a stable interface, so that each place is found by trial, and tried.
    """
    native, level = _native(), getattr(torch.autograd.forward_ad, "_current_level", None)
    if not native or level is None or not (_tensor_keys and _thread_keys) or not hasattr(torch.Tensor, "_cdata"):
        return None
    keys = _offset_of_keys()
    if keys is None or not _modes_are_seen(native):
        return None
    address = {name: ctypes.cast(native[name], ctypes.c_void_p).value for name in _QUESTIONS}
    dlsym = ctypes.cast(ctypes.CDLL(None).dlsym, ctypes.c_void_p).value
    places = (_OBJECT_HEADER, keys, dlsym, native[""]._handle, *(address[name] for name in _QUESTIONS))
    return (*places, _MODE, vars(torch.autograd.forward_ad))


_OBJECT_HEADER = 16  # a tensor's object begins with those of every Python object, then the implementation's address
_WORDS = 24  # of a tensor's implementation that are looked through; it has no fewer


def _offset_of_keys() -> int | None:
    samples = [torch.zeros(2, device="cpu"), torch.zeros(2, dtype=torch.int32, device="cpu")]
    samples += [torch._neg_view(samples[0]), torch.nn.Parameter(samples[0])]
    if len({_bits(_tensor_keys(x)) for x in samples}) < 2 or _bits is str:
        return None
    for x in samples:
        if ctypes.c_uint64.from_address(id(x) + _OBJECT_HEADER).value != x._cdata:
            return None
    for offset in range(0, 8 * _WORDS, 8):
        if all(ctypes.c_uint64.from_address(x._cdata + offset).value == _tensor_keys(x).raw_repr() for x in samples):
            return offset
    return None


def _modes_are_seen(native: dict[str, Any]) -> bool:
    """Whether the thread's keys change with a mode, and the function that asks for modes says so."""
    from torch.overrides import BaseTorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    words = (ctypes.c_uint64 * 2).in_dll(native[""], _MODE)
    before, enabled = tuple(words), native[_QUESTIONS[1]]
    was_enabled = enabled()
    with TorchDispatchMode():
        seen = tuple(words) != before
    with BaseTorchFunctionMode():
        seen = seen and enabled()
    return seen and tuple(words) == before and enabled() == was_enabled

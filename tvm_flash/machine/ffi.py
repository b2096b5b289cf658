"""Calls through tvm-ffi's C interface.

Kernels take tensors as ``DLTensor``.  These are filled in here, from a pointer, a shape and strides, rather than by
each framework's DLPack export: then one path serves every framework, a transposed view is only another order of the
same numbers, read-only and bfloat16 arrays (which NumPy can't export) are tensors like all others, and a repeated call
writes nothing but the pointers.  Structures and functions: ``tvm/ffi/c_api.h`` and ``tvm/ffi/extra/c_env_api.h``.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tvm_flash.errors import KernelError, NotSupportedError

#: ``DLDataType`` codes and bits by dtype name.
_DL_DTYPES = {
    "float32": (2, 32),
    "float16": (2, 16),
    "bfloat16": (4, 16),
    "int32": (0, 32),
    "bool": (6, 8),
    "int8": (0, 8),
    "uint8": (1, 8),
}
#: ``DLDeviceType`` by device kind.
DL_DEVICES = {"cpu": 1, "cuda": 2}
# TVMFFITypeIndex
_INT, _FLOAT, _DLTENSOR_PTR = 1, 3, 7

_POINTER = ctypes.c_uint64


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", _POINTER),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", _POINTER),
        ("strides", _POINTER),
        ("byte_offset", ctypes.c_uint64),
    )


class _Value(ctypes.Union):
    _fields_ = (("v_int64", ctypes.c_int64), ("v_float64", ctypes.c_double), ("v_ptr", _POINTER))


class _Any(ctypes.Structure):
    _fields_ = (("type_index", ctypes.c_int32), ("padding", ctypes.c_uint32), ("value", _Value))


class _ByteArray(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Error(ctypes.Structure):
    """The head of ``TVMFFIObject`` and of the ``TVMFFIErrorCell`` that follows it."""

    _fields_ = (("object", ctypes.c_uint64 * 3), ("kind", _ByteArray), ("message", _ByteArray))


#: How many 8-byte words one ``DLTensor`` takes: the distance between the data pointers in a frame.
_WORDS = ctypes.sizeof(_DLTensor) // 8


@dataclass(frozen=True)
class TensorSpec:
    """A tensor argument but for its data pointer: shape and strides in elements, dtype, device kind and index."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device_kind: str
    device_index: int


class _NoTorch:
    """A finder that hides torch from one thread."""

    def __init__(self):
        self._thread = threading.get_ident()

    def find_spec(self, name, path=None, target=None):
        if name == "torch" and threading.get_ident() == self._thread:
            raise ModuleNotFoundError("not needed", name="torch")


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """Keep tvm_ffi's import from what it does for torch: import it (seconds), compile an extension for old versions."""
    variable, finder = "TVM_FFI_DISABLE_TORCH_C_DLPACK", _NoTorch()
    had = os.environ.get(variable)
    sys.meta_path.insert(0, finder)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        if had is None:
            del os.environ[variable]
        else:
            os.environ[variable] = had


@functools.cache
def tvm_ffi() -> ModuleType:
    """The tvm_ffi package, imported at the first use.

    Raises
    ------
    NotSupportedError: it can't live beside the installed torch.
    """
    try:
        with _without_torch():
            import tvm_ffi
    except AttributeError as e:
        if "torch" not in str(e):
            raise
        raise NotSupportedError(
            f"apache-tvm-ffi: doesn't know torch {sys.modules['torch'].__version__} ({e}); run "
            f"`pip install 'apache-tvm-ffi>=0.1.9'`, or take torch 2.3 or later"
        ) from e

    return tvm_ffi


@functools.cache
def _library() -> ctypes.CDLL:
    """libtvm_ffi with prototypes of our own, which other users of the library don't see; calls release the GIL."""
    library = ctypes.CDLL(tvm_ffi().LIB._name)
    library.TVMFFIErrorMoveFromRaised.argtypes = (ctypes.POINTER(ctypes.c_void_p),)
    library.TVMFFIErrorMoveFromRaised.restype = None
    library.TVMFFIObjectDecRef.argtypes = (ctypes.c_void_p,)
    return library


@functools.cache
def _stream_functions():
    """Get and set tvm-ffi's current stream of this thread; so short that they keep the GIL."""
    library = ctypes.PyDLL(tvm_ffi().LIB._name)
    get, set_ = library.TVMFFIEnvGetStream, library.TVMFFIEnvSetStream
    get.restype = ctypes.c_void_p
    set_.argtypes = (ctypes.c_int32, ctypes.c_int32, ctypes.c_void_p, ctypes.c_void_p)
    return get, set_


def addresses() -> tuple[int, ...]:
    """Where the functions are that call a kernel, and get and set tvm-ffi's current stream."""
    names = ("TVMFFIFunctionCall", "TVMFFIEnvGetStream", "TVMFFIEnvSetStream")
    return tuple(ctypes.cast(getattr(_library(), name), ctypes.c_void_p).value for name in names)


def _raised() -> str:
    """Kind and message of the error that the last call of this thread left behind."""
    handle = ctypes.c_void_p()
    _library().TVMFFIErrorMoveFromRaised(ctypes.byref(handle))
    if not handle:
        return "unknown error"
    error = _Error.from_address(handle.value)
    kind, message = (ctypes.string_at(x.data, x.size).decode(errors="replace") for x in (error.kind, error.message))
    _library().TVMFFIObjectDecRef(handle)
    return f"{kind}: {message}"


class Kernel:
    """A function of a loaded module."""

    def __init__(self, module, symbol: str):
        self.symbol = symbol
        self.function = module[symbol]
        self.handle = ctypes.c_void_p(self.function.__chandle__())


def load_module(path: Path):
    """Load a module of kernels.

    Raises
    ------
    OSError: the loader refuses the file.
    """
    try:
        return tvm_ffi().load_module(str(path.absolute()))
    except RuntimeError as e:
        raise OSError(str(e).strip()) from e


class Frame:
    """The arguments of one call, kept for the next one; not to be shared by two calls that run at the same time.

    ``set_pointer`` is indexed by tensor, in the order of the arguments.
    """

    __slots__ = ("_arguments", "_call", "_kernel", "_memory", "_pointers", "_result", "_tensors", "device")

    def __init__(self, kernel: Kernel, arguments: Sequence[TensorSpec | int | float]):
        """``arguments`` in the order of the kernel's parameters; data pointers are set before each call."""
        specs = [x for x in arguments if isinstance(x, TensorSpec)]
        self._kernel = kernel
        self._tensors = (_DLTensor * len(specs))()
        self._pointers = memoryview(self._tensors).cast("B").cast("Q")
        self._memory = [_describe(tensor, spec) for tensor, spec in zip(self._tensors, specs, strict=True)]
        values = (_Any * len(arguments))()
        position = 0
        for value, argument in zip(values, arguments, strict=True):
            if isinstance(argument, TensorSpec):
                value.type_index = _DLTENSOR_PTR
                value.value.v_ptr = ctypes.addressof(self._tensors[position])
                position += 1
            elif isinstance(argument, int):
                value.type_index, value.value.v_int64 = _INT, argument
            else:
                value.type_index, value.value.v_float64 = _FLOAT, argument
        result = _Any()
        self._memory += [values, result]
        self._arguments = (ctypes.c_void_p(ctypes.addressof(values)), ctypes.c_int32(len(arguments)))
        self._result = ctypes.c_void_p(ctypes.addressof(result))
        self._call = _library().TVMFFIFunctionCall
        self.device = (DL_DEVICES[specs[0].device_kind], specs[0].device_index)

    def parts(self) -> tuple[int, int, int, int, int]:
        """The function, then addresses of the arguments and of the tensors among them, then their numbers."""
        arguments, count = self._arguments
        tensors = ctypes.addressof(self._tensors)
        return self._kernel.handle.value, arguments.value, tensors, count.value, len(self._tensors)

    def run(self, pointers: Sequence[int]) -> None:
        """Call the kernel on the processor, or on a GPU's default stream.

        Raises
        ------
        KernelError: the kernel returned an error.
        """
        words, slot = 0, self._pointers
        for pointer in pointers:
            slot[words] = pointer
            words += _WORDS
        arguments, count = self._arguments
        if self._call(self._kernel.handle, arguments, count, self._result):
            raise KernelError(f"kernel {self._kernel.symbol} failed: {_raised()}")

    def run_on_stream(self, pointers: Sequence[int], stream: int) -> None:
        """Call the kernel with ``stream`` (a ``CUstream`` as an integer) as tvm-ffi's current one, for this call."""
        get, set_ = _stream_functions()
        kind, index = self.device
        before = get(kind, index) or 0
        if before == stream:
            self.run(pointers)
            return
        set_(kind, index, stream, None)
        try:
            self.run(pointers)
        finally:
            set_(kind, index, before, None)


def _describe(tensor: _DLTensor, spec: TensorSpec) -> ctypes.Array:
    """Fill a DLTensor; gives the memory that shape and strides live in."""
    ndim = len(spec.shape)
    memory = (ctypes.c_int64 * (2 * ndim))(*spec.shape, *spec.strides)
    tensor.device_type, tensor.device_id = DL_DEVICES[spec.device_kind], spec.device_index
    tensor.ndim = ndim
    tensor.code, tensor.bits = _DL_DTYPES[spec.dtype]
    tensor.lanes = 1
    tensor.shape = ctypes.addressof(memory)
    tensor.strides = ctypes.addressof(memory) + 8 * ndim
    return memory

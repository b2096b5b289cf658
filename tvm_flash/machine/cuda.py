"""What the CUDA driver says about the GPUs of this machine, asked through ``libcuda`` itself: no framework is needed.

Nothing here runs at import, and asking for properties makes no context on a device.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator
from dataclasses import dataclass

from tvm_flash.errors import KernelError, PackError

# CUdevice_attribute
_MULTIPROCESSORS, _MAJOR, _MINOR = 16, 75, 76


@dataclass(frozen=True)
class Gpu:
    """One CUDA device: its index as frameworks count, its name, its compute capability and its multiprocessors."""

    index: int
    name: str
    capability: tuple[int, int]
    multiprocessors: int


class _DriverError(Exception):
    """A call into the driver failed."""


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """libcuda, initialised; None without a driver or a device."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return library if library.cuInit(0) == 0 else None


def check(status: int) -> None:
    """Raise for a driver call's error; inside :func:`primary_context` only."""
    if status != 0:
        raise _DriverError(f"CUDA driver error {status}")


def device_count() -> int:
    """How many CUDA devices this process sees; 0 without a driver."""
    driver = _driver()
    count = ctypes.c_int(0)
    if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


@functools.cache
def gpu(index: int) -> Gpu:
    """Name, compute capability and multiprocessors of a device.

    Raises
    ------
    PackError: the driver doesn't know the device.
    """
    driver = _driver()
    try:
        if driver is None:
            raise _DriverError("there is no CUDA driver, or it sees no device")
        device, major, minor, multiprocessors = (ctypes.c_int() for _ in range(4))
        name = ctypes.create_string_buffer(256)
        check(driver.cuDeviceGet(ctypes.byref(device), index))
        check(driver.cuDeviceGetName(name, len(name), device))
        check(driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device))
        check(driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device))
        check(driver.cuDeviceGetAttribute(ctypes.byref(multiprocessors), _MULTIPROCESSORS, device))
    except _DriverError as e:
        raise PackError(f"device cuda:{index}: {e}; check the driver with nvidia-smi") from e
    return Gpu(index, name.value.decode(errors="replace"), (major.value, minor.value), multiprocessors.value)


@functools.cache
def current_device_function() -> int:
    """Address of the driver's ``cuCtxGetDevice``: the device that this thread uses now; fails if it has used none."""
    return ctypes.cast(_driver().cuCtxGetDevice, ctypes.c_void_p).value


def driver_version() -> str | None:
    """Newest CUDA version that the driver can run, as ``"13.0"``; None without a driver."""
    driver = _driver()
    version = ctypes.c_int(0)
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


@contextlib.contextmanager
def held(index: int) -> Iterator[ctypes.c_void_p]:
    """A device's primary context, which stays while this is on, whoever else is done with it: making one takes 0.2 s.

    Raises
    ------
    KernelError: a call into the driver fails.
    """
    driver, device, context = _driver(), ctypes.c_int(), ctypes.c_void_p()
    try:
        if driver is None:
            raise _DriverError("there is no CUDA driver")
        check(driver.cuDeviceGet(ctypes.byref(device), index))
        check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
    except _DriverError as e:
        raise KernelError(f"cuda:{index}: {e}") from e
    try:
        yield context
    finally:
        driver.cuDevicePrimaryCtxRelease_v2(device)


@contextlib.contextmanager
def primary_context(index: int) -> Iterator[ctypes.CDLL]:
    """The driver, with a device's primary context (which frameworks use too) current.

    Raises
    ------
    KernelError: a call into the driver fails; inside the block too, for those that :func:`check` looks at.
    """
    with held(index) as context:
        driver = _driver()
        try:
            check(driver.cuCtxPushCurrent_v2(context))
            try:
                yield driver
            finally:
                driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
        except _DriverError as e:
            raise KernelError(f"cuda:{index}: {e}") from e


def synchronize(index: int) -> None:
    """Wait for all work on a device.

    Raises
    ------
    KernelError: the driver reports an error, which may come from an earlier kernel.
    """
    with primary_context(index) as driver:
        check(driver.cuCtxSynchronize())


class Buffer:
    """Memory of a device with the contents of host memory; for use inside :func:`primary_context`."""

    def __init__(self, driver: ctypes.CDLL, address: int, size: int):
        self._driver, self._size = driver, size
        pointer = ctypes.c_uint64()
        check(driver.cuMemAlloc_v2(ctypes.byref(pointer), ctypes.c_size_t(size)))
        self.pointer = pointer.value
        check(driver.cuMemcpyHtoD_v2(pointer, ctypes.c_void_p(address), ctypes.c_size_t(size)))

    def download(self, address: int) -> None:
        """Copy the contents to host memory, after everything before it has run."""
        size = ctypes.c_size_t(self._size)
        check(self._driver.cuMemcpyDtoH_v2(ctypes.c_void_p(address), ctypes.c_uint64(self.pointer), size))

    def free(self) -> None:
        """Give the memory back."""
        self._driver.cuMemFree_v2(ctypes.c_uint64(self.pointer))

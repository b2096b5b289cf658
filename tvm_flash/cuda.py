"""What the CUDA driver says about the GPUs of this machine, asked through ``libcuda`` itself: no framework is needed.

Nothing here runs at import, and asking for properties makes no context on a device.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

from tvm_flash.errors import KernelError, PackError

# CUdevice_attribute
_MAJOR, _MINOR = 75, 76


@dataclass(frozen=True)
class Gpu:
    """One CUDA device: its index as frameworks count, its name and its compute capability."""

    index: int
    name: str
    capability: tuple[int, int]


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


def _check(status: int) -> None:
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
    """Name and compute capability of a device.

    Raises
    ------
    PackError: the driver doesn't know the device.
    """
    driver = _driver()
    try:
        if driver is None:
            raise _DriverError("there is no CUDA driver, or it sees no device")
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        name = ctypes.create_string_buffer(256)
        _check(driver.cuDeviceGet(ctypes.byref(device), index))
        _check(driver.cuDeviceGetName(name, len(name), device))
        _check(driver.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device))
        _check(driver.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device))
    except _DriverError as e:
        raise PackError(f"device cuda:{index}: {e}; check the driver with nvidia-smi") from e
    return Gpu(index, name.value.decode(errors="replace"), (major.value, minor.value))


def driver_version() -> str | None:
    """Newest CUDA version that the driver can run, as ``"13.0"``; None without a driver."""
    driver = _driver()
    version = ctypes.c_int(0)
    if driver is None or driver.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return None
    return f"{version.value // 1000}.{version.value % 1000 // 10}"


def synchronize(index: int) -> None:
    """Wait for all work on a device.

    Raises
    ------
    KernelError: the driver reports an error, which may come from an earlier kernel.
    """
    driver, device, context = _driver(), ctypes.c_int(), ctypes.c_void_p()
    try:
        _check(driver.cuDeviceGet(ctypes.byref(device), index))
        _check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device))
        _check(driver.cuCtxPushCurrent_v2(context))
        try:
            _check(driver.cuCtxSynchronize())
        finally:
            driver.cuCtxPopCurrent_v2(ctypes.byref(context))
            driver.cuDevicePrimaryCtxRelease_v2(device)
    except _DriverError as e:
        raise KernelError(f"waiting for cuda:{index}: {e}") from e

"""What this machine has: processor flags, and the arch of its GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

from tvm_flash.machine.cpu import features as cpu_features

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


def best_isa(isas: Mapping[str, object]) -> str:
    """The first of ``isas`` (best first; values have ``.features``) whose features this machine has.

    Raises
    ------
    ValueError: it has none of them.
    """
    for name, isa in isas.items():
        if cpu_features().issuperset(isa.features):
            return name
    raise ValueError(f"this processor has none of the instruction sets {', '.join(isas)}")


def gpu_capabilities() -> list[tuple[int, int]]:
    """Compute capability (major, minor) of each GPU that the driver shows; empty without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return []
    return [
        (_attribute(driver, index, _CAPABILITY_MAJOR), _attribute(driver, index, _CAPABILITY_MINOR))
        for index in range(count.value)
    ]


def _attribute(driver, device: int, attribute: int) -> int:
    value = ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return value.value

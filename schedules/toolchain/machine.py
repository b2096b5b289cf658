"""What this machine has: processor flags, and the arch of its GPU."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Mapping

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


def arch_of(capability: tuple[int, int], archs: Iterable[str]) -> str | None:
    """The arch whose code is best for a GPU: its own, else the nearest older one of its generation.

    Code for ``sm_90a`` runs on capability 9.0 and on nothing else; code for ``sm_80`` runs on every 8.x.
    """
    candidates = []
    for arch in archs:
        found = re.fullmatch(r"sm_(\d+)(\d)(a?)", arch)
        if not found:
            continue
        major, minor, exact = int(found[1]), int(found[2]), bool(found[3])
        if major == capability[0] and (minor == capability[1] or (minor < capability[1] and not exact)):
            candidates.append((minor, exact, arch))
    return max(candidates)[2] if candidates else None

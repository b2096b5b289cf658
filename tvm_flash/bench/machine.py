"""What a run ran on: device, driver and versions, as names and values."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import re
from pathlib import Path

from tvm_flash import __version__
from tvm_flash.machine import cuda
from tvm_flash.machine.device import Device
from tvm_flash.packs.registry import registry

_DRIVER = Path("/proc/driver/nvidia/version")


def describe(device: Device) -> dict[str, str]:
    """Names and values, the device first."""
    import torch

    about = {"device": device.name, "arch": device.native_arch}
    if device.kind == "cpu":
        best = registry().kernels("cpu")[:1]
        about["instructions"] = best[0].pack.manifest.isa if best else "no pack"
        about["threads"] = f"{torch.get_num_threads()}, torch's own"
    else:
        about["driver"] = f"{_kernel_module()} (CUDA {cuda.driver_version()})".removeprefix(" ")
        about["torch's CUDA"] = str(torch.version.cuda)
        about["cuDNN"] = _cudnn(torch.backends.cudnn.version())
    about["torch"] = torch.__version__
    about["tvm_flash"] = __version__
    about |= {package: importlib.metadata.version(package) for package in ("apache-tvm-ffi", "numpy")}
    usable = [p for p in registry().packs if p.arch in device.archs() and p.unusable is None]
    about |= {f"{p.arch} pack": _pack(p.manifest.versions) for p in usable}
    about["python"] = platform.python_version()
    return about


def now() -> str:
    """UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _kernel_module() -> str:
    """Version of NVIDIA's kernel module, empty where the system doesn't tell."""
    try:
        found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", _DRIVER.read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def _cudnn(version: int | None) -> str:
    """91900 → 9.19.0."""
    return "none" if version is None else f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _pack(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())

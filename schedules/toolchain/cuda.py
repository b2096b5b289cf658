"""CUDA C++ to modules; the source is what TVM exports for a ``cuda_host`` target: device and host code.

1. The device half becomes a device image: machine code, by nvcc, or for sm_70 by NVRTC of CUDA 12.
2. The host half becomes an object in which the image is embedded (:mod:`schedules.toolchain.host`).
3. The objects of a group are linked to one module, which needs tvm-ffi and the driver and nothing else.

Works on any machine with the compilers and the headers of tvm-ffi; no GPU, driver or TVM.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

from schedules.toolchain import inspection, nvcc, nvrtc, ptxas
from schedules.toolchain.elements import with_elements_apart
from schedules.toolchain.host import compile_host, embed, split, without_template
from schedules.toolchain.process import ToolchainError, host_compiler, run

#: What a module calls of the driver, which is found when the module is loaded.
_DRIVER_CALLS = (
    *("cuInit", "cuGetErrorString", "cuCtxGetDevice", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2"),
    *("cuDevicePrimaryCtxRetain", "cuThreadExchangeStreamCaptureMode", "cuLibraryLoadData", "cuLibraryGetKernel"),
    *("cuDeviceGetAttribute", "cuKernelSetAttribute", "cuLaunchKernel", "cuLaunchKernelEx", "cuTensorMapEncodeTiled"),
    "cuTensorMapReplaceAddress",
)


def device_compiler(arch: str) -> ModuleType:
    """The module that compiles device code for an arch: ``nvrtc`` for sm_70, else ``nvcc``."""
    return nvrtc if arch == "sm_70" else nvcc


def compiler_version(arch: str) -> str:
    """Version of an arch's device compiler, for hashes and manifests.

    Raises
    ------
    ToolchainError: there is no compiler.
    """
    return device_compiler(arch).compiler_version()


def compile_object(
    source: Path,
    target: Path,
    arch: str,
    *,
    run_on: str = "",
    recompile_for: str = "",
    images: Path | None = None,
    of_user: bool = False,
) -> ptxas.Report:
    """Compile one exported source to an object file.

    Parameters
    ----------
    source, target: path of the ``.cu`` file, and of the object to write.
    arch: what machine code is made for, e.g. ``"sm_90a"``.
    run_on: a newer arch on which the kernel shall also run, for verification: adds PTX.
    recompile_for: another arch whose machine code is made instead, for verification; its spills don't count.
    images: a folder in which device images are kept, so that kernels with the same device half are compiled once.
    of_user: whether the definition isn't the package's own.  Spills and serialised wgmma are accepted then, arrays
        are taken apart (``elements.py``), so that nvcc takes less time, and the host half is optimised less; kernels
        of the package's own stay what ran on hardware.

    Raises
    ------
    ToolchainError: there is no compiler, it fails, or ptxas reports spills or serialised wgmma.
    """
    device, host = without_template(*split(source.read_text(), source.name))
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        half = Path(scratch) / source.name
        half.write_text(with_elements_apart(device) if of_user else device)
        options = {"run_on": run_on, "recompile_for": recompile_for, "images": images, "of_user": of_user}
        image, report = compile_device(half, arch, **options)
        compile_host(embed(device, host, image), half.with_suffix(".cpp"), target, of_user=of_user)
    weaken_symbols(target)
    return report


def compile_device(
    half: Path,
    arch: str,
    *,
    run_on: str = "",
    recompile_for: str = "",
    images: Path | None = None,
    of_user: bool = False,
) -> tuple[Path, ptxas.Report]:
    """Compile the device half of a source, the file ``half``, to an image; its path, and the report.

    The image is beside it, or in ``images``.  Parameters and errors are those of :func:`compile_object`.
    """
    make = partial(device_compiler(arch).image, half, arch, run_on=run_on, recompile_for=recompile_for)
    key = source_hash("\0".join((half.read_text(), run_on, recompile_for)), arch)
    image, log = _kept(images / key, make) if images else make()
    report = ptxas.parse(log)
    if not report.kernels:
        raise ToolchainError(f"compiling {half.name} for {arch}: the compiler reported no kernel\n{log[-2000:]}")
    if not of_user:
        ptxas.check(report, arch)
    return image, report


def _kept(place: Path, make: Callable[[], tuple[Path, str]]) -> tuple[Path, str]:
    """An image and what its compiler said, from ``place`` (without suffix) or made and put there."""
    image, log = place.with_suffix(".image"), place.with_suffix(".log")
    if not log.exists():
        made, said = make()
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(made, image)
        draft = made.with_suffix(".log")
        draft.write_text(said)
        os.replace(draft, log)  # the last: who finds it finds the image too
    return image, log.read_text()


def weaken_symbols(target: Path) -> None:
    """Let several objects define what every exported source defines: the entry of a library, and helper functions."""
    listed = run(["nm", "--extern-only", "--defined-only", "--format=posix", target], f"inspecting {target.name}")
    names = [line.split()[0] for line in listed.splitlines()]
    run(["objcopy", *(f"--weaken-symbol={name}" for name in names), target], f"preparing {target.name}")


def link_module(objects: list[Path], target: Path) -> None:
    """Link objects to a module that needs tvm-ffi and the driver, and nothing else.

    Raises
    ------
    ToolchainError: the linker fails, or the module holds source or needs another library.
    """
    with tempfile.TemporaryDirectory() as scratch:
        stub = _driver_stub(Path(scratch))
        run(
            [
                host_compiler("c++"),
                *("-shared", "-o", target, *objects),
                *("-Wl,--as-needed", f"-L{stub}", "-lcuda"),
                *("-Wl,--exclude-libs,ALL", "-Wl,--strip-debug"),
            ],
            f"linking {target.name}",
        )
    inspection.check_module(target, may_need=("libcuda.so.1",))


def _driver_stub(folder: Path) -> Path:
    source = folder / "stub.c"
    source.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in _DRIVER_CALLS))
    run(
        [host_compiler(), "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", source, "-o", folder / "libcuda.so"],
        "making a stand-in for the driver",
    )
    return folder


def source_hash(source: str, arch: str) -> str:
    """sha256 of all that decides a kernel's machine code: source, arch, flags and compiler version."""
    parts = (source, arch, " ".join(nvcc.COMPILE_FLAGS), compiler_version(arch))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def dynamic_shared_memory(source: str) -> int:
    """Bytes of dynamic shared memory that the host half of an exported source asks for; the largest of its launches."""
    constants = dict(re.findall(r"^\s*auto (\w+) = (\d+);", source, re.M))
    launches = re.findall(r"\bdynamicSmemBytes = (\w+);", source)
    return max((int(constants.get(size, size)) for size in launches), default=0)

"""What a module must not contain: source text, and symbols that nothing will resolve."""

from __future__ import annotations

from pathlib import Path

from schedules.toolchain.process import ToolchainError, run

#: Byte strings of CUDA C++ that don't occur in machine code or in an error message of TVM.
_SOURCE_MARKS = (b"__global__ void", b"#include <cuda", b"threadIdx.x", b"tvm_cuda_host_launch(")

#: Libraries that every Linux machine with Python and, for CUDA, a driver has.
_ALLOWED_NEEDS = (
    "libc.so",
    "libm.so",
    "libdl.so",
    "librt.so",
    "libpthread.so",
    "libgcc_s.so",
    "libstdc++.so",
    "ld-linux",
)


def needed_libraries(path: Path) -> tuple[str, ...]:
    """The shared libraries that a module asks the loader for."""
    lines = run(["readelf", "-dW", path], f"inspecting {path.name}").splitlines()
    return tuple(line.split("[", 1)[1].rstrip("]") for line in lines if "(NEEDED)" in line)


def check_module(path: Path, *, may_need: tuple[str, ...] = ()) -> None:
    """Refuse a module that holds source or needs more than the system, tvm-ffi and ``may_need``.

    Raises
    ------
    ToolchainError: naming what was found.
    """
    data = path.read_bytes()
    found = [mark.decode() for mark in _SOURCE_MARKS if mark in data]
    if found:
        raise ToolchainError(f"{path.name}: holds CUDA source ({found[0]!r}); a pack may hold machine code only")
    extra = [lib for lib in needed_libraries(path) if not lib.startswith((*_ALLOWED_NEEDS, *may_need))]
    if extra:
        raise ToolchainError(f"{path.name}: needs {', '.join(extra)}, which the machine that loads it may not have")

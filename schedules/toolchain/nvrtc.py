"""sm_70: CUDA 13's nvcc has dropped it, NVRTC of CUDA 12 has not.  Device code to a device image."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import lru_cache
from pathlib import Path

from schedules.toolchain import nvcc
from schedules.toolchain.process import ToolchainError, run

_FLAGS = ("--std=c++17", "--use_fast_math", "-default-device")


@lru_cache(maxsize=1)
def find_toolkit() -> nvcc.Toolkit:
    """NVRTC and headers of CUDA 12, from their wheels.

    Raises
    ------
    ToolchainError: one of them is missing.
    """
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in spec.submodule_search_locations] if spec else []

    def find(path: str) -> Path:
        for root in roots:
            if (root / path).exists():
                return root / path
        raise ToolchainError(f'sm_70 needs {path} of CUDA 12; pip install "tvm-flash[volta]"')

    nvrtc = find("cuda_nvrtc/lib/libnvrtc.so.12")
    include = (
        find("cuda_runtime/include/cuda_runtime.h").parent,
        find("cuda_cccl/include/cuda/std/cstdint").parents[2],
    )
    major, minor = ctypes.c_int(), ctypes.c_int()
    ctypes.CDLL(str(nvrtc)).nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return nvcc.Toolkit(nvrtc, include, f"{major.value}.{minor.value} (NVRTC)")


def compiler_version() -> str:
    """Version of the compiler, for hashes and manifests."""
    return find_toolkit().version


def image(device: Path, arch: str, *, run_on: str = "", recompile_for: str = "") -> tuple[Path, str]:
    """As :func:`schedules.toolchain.nvcc.image`; code for another arch comes from the PTX."""
    text, target = device.read_text(), device.with_suffix(".image")
    if recompile_for:
        return target, _recompile(ptx(device, arch), target, recompile_for)
    cubin, log = _compile(text, device.name, arch, "CUBIN")
    target.write_bytes(cubin)
    if run_on:
        target = _both(target, ptx(device, arch).encode(), arch)
    return target, log


def ptx(device: Path, arch: str) -> str:
    """As :func:`schedules.toolchain.nvcc.ptx`."""
    text, _ = _compile(device.read_text(), device.name, nvcc.virtual(arch), "PTX")
    return text.rstrip(b"\0").decode()


def _compile(device: str, name: str, arch: str, kind: str) -> tuple[bytes, str]:
    """Compile device code; the image of ``kind`` (``"CUBIN"`` or ``"PTX"``) and the log."""
    kit = find_toolkit()
    lib = ctypes.CDLL(str(kit.compiler))
    program = ctypes.c_void_p()
    if lib.nvrtcCreateProgram(ctypes.byref(program), device.encode(), name.encode(), 0, None, None):
        raise ToolchainError(f"compiling {name} for {arch}: NVRTC can't start")
    options = [f"--gpu-architecture={arch}", *_FLAGS, *(f"-I{p}" for p in kit.include)]
    options += ["--ptxas-options=-v"] if kind == "CUBIN" else []
    array = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    failed = lib.nvrtcCompileProgram(program, len(options), array)
    log = _output(lib, program, "ProgramLog").rstrip(b"\0").decode()
    if failed:
        raise ToolchainError(f"compiling {name} for {arch}: NVRTC failed\n{log[:4000]}")
    code = _output(lib, program, kind)
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    return code, log


def _output(lib: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    if getattr(lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)):
        raise ToolchainError(f"NVRTC gives no {what}")
    buffer = ctypes.create_string_buffer(size.value)
    if getattr(lib, f"nvrtcGet{what}")(program, buffer):
        raise ToolchainError(f"NVRTC gives no {what}")
    return buffer.raw


def _recompile(ptx: str, image: Path, arch: str) -> str:
    """Machine code of a newer arch, by the assembler of CUDA 13, which still reads this PTX; what it reports."""
    text = image.with_suffix(".ptx")
    text.write_text(ptx)
    assembler = nvcc.find_toolkit().compiler.parent / "ptxas"
    return run([assembler, f"-arch={arch}", "-v", text, "-o", image], f"assembling {text.name} for {arch}")


def _both(cubin: Path, ptx: bytes, arch: str) -> Path:
    """One image with machine code and PTX."""
    text, joined = cubin.with_suffix(".ptx"), cubin.with_suffix(".fatbin")
    text.write_bytes(ptx)
    version = nvcc.generation(arch)
    images = (f"--image3=kind=elf,sm={version},file={cubin}", f"--image3=kind=ptx,sm={version},file={text}")
    run(
        [nvcc.find_toolkit().compiler.parent / "fatbinary", "-64", f"--create={joined}", *images],
        "joining device images",
    )
    return joined

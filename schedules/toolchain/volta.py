"""sm_70: CUDA 13's nvcc has dropped it, NVRTC of CUDA 12 has not.

The device half of an exported source goes through NVRTC to a device image; the host half is compiled by the C++
compiler with the image embedded, and launches the kernels that it loads from there.  The result is an object like any
other.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from schedules.toolchain import cuda, ptxas
from schedules.toolchain.process import ToolchainError, host_compiler, run

_HOST_HALF = "#include <tvm/ffi/c_api.h>"
_FLAGS = ("--std=c++17", "--use_fast_math", "-default-device")
_DECLARATION = re.compile(r'extern "C" __global__ void __launch_bounds__\([^)]*\) (\w+)\(([^;{]*)\);')
_LAUNCHER = re.compile(
    r"template <typename\.\.\. Params, typename\.\.\. Args>\nstatic cudaError_t tvm_cuda_host_launch.*?\n}\n", re.S
)

_PROLOGUE = """\
#include <cstdint>
#include <tuple>
#include <utility>
#include <cuda_fp16.h>
#include <cuda_bf16.h>
typedef unsigned int uint;
typedef unsigned char uchar;
typedef unsigned short ushort;
"""

_LIBRARY = """\
asm(".section .rodata\\n.balign 64\\nimage_begin:\\n.incbin \\"@IMAGE@\\"\\n.byte 0\\n.previous\\n");
extern "C" __attribute__((visibility("hidden"))) const char image_begin[];
static cudaLibrary_t image_library() {
  static cudaLibrary_t library = [] {
    cudaLibrary_t loaded = nullptr;
    cudaError_t error = cudaLibraryLoadData(&loaded, image_begin, nullptr, nullptr, 0, nullptr, nullptr, 0);
    if (error != cudaSuccess)
      TVM_FFI_THROW(CUDAError) << "cannot load the device image: " << cudaGetErrorString(error);
    return loaded;
  }();
  return library;
}
static cudaKernel_t image_kernel(const char* name) {
  cudaKernel_t kernel = nullptr;
  cudaError_t error = cudaLibraryGetKernel(&kernel, image_library(), name);
  if (error != cudaSuccess) TVM_FFI_THROW(CUDAError) << name << ": " << cudaGetErrorString(error);
  return kernel;
}
static cudaError_t image_set_attribute(cudaKernel_t kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute((const void*)kernel, attribute, value);
}
template <typename... Params, size_t... I>
static cudaError_t image_call(cudaKernel_t kernel, const cudaLaunchConfig_t* config, std::tuple<Params...>& values,
                              std::index_sequence<I...>) {
  void* pointers[] = {(void*)&std::get<I>(values)...};
  return cudaLaunchKernelExC(config, (const void*)kernel, pointers);
}
template <typename... Params, typename... Args>
static cudaError_t image_launch(void (*)(Params...), cudaKernel_t kernel, const cudaLaunchConfig_t* config,
                                Args... arguments) {
  std::tuple<Params...> values((Params)arguments...);
  return image_call(kernel, config, values, std::make_index_sequence<sizeof...(Params)>());
}
"""

_KERNEL = """\
typedef void (*signature_@NAME@)(@PARAMETERS@);
static cudaKernel_t image_@NAME@() {
  static cudaKernel_t kernel = image_kernel("@NAME@");
  return kernel;
}
"""


@dataclass(frozen=True)
class Toolkit:
    """NVRTC's library, the headers and the static runtime of CUDA 12, and NVRTC's version."""

    nvrtc: Path
    include: tuple[Path, ...]
    lib: Path
    version: str


@lru_cache(maxsize=1)
def find_toolkit() -> Toolkit:
    """The wheels of CUDA 12.

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
    version = f"{major.value}.{minor.value} (NVRTC)"
    return Toolkit(nvrtc, include, find("cuda_runtime/lib/libcudart_static.a").parent, version)


def compiler_version() -> str:
    """Version of the compiler, for hashes and manifests."""
    return find_toolkit().version


def compile_object(
    source: Path, target: Path, arch: str, *, run_on: str = "", spills_allowed: bool = False
) -> ptxas.Report:
    """Compile one exported source to an object file; as :func:`schedules.toolchain.cuda.compile_object`."""
    device, marker, host = source.read_text().partition(_HOST_HALF)
    if not marker:
        raise ToolchainError(f"{source.name}: has no host half that begins with {_HOST_HALF}")
    cubin, log = _nvrtc(device, source.name, arch, "CUBIN")
    report = ptxas.parse(log)
    if not report.kernels:
        raise ToolchainError(f"compiling {source.name} for {arch}: the compiler reported no kernel\n{log[-2000:]}")
    ptxas.check(report, spills_allowed=spills_allowed, arch=arch)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        image = Path(scratch) / "image"
        image.write_bytes(cubin)
        if run_on:
            ptx, _ = _nvrtc(device, source.name, arch.replace("sm_", "compute_"), "PTX")
            image = _both(image, ptx, arch)
        _compile_host(_embed(device, host, image), Path(scratch) / f"{source.stem}.cpp", target)
    cuda.weaken_symbols(target)
    return report


def link_module(objects: list[Path], target: Path) -> None:
    """As :func:`schedules.toolchain.cuda.link_module`, with the runtime of CUDA 12."""
    cuda.link_module(objects, target, cudart=find_toolkit().lib)


def _nvrtc(device: str, name: str, arch: str, kind: str) -> tuple[bytes, str]:
    """Compile device code; the image of ``kind`` (``"CUBIN"`` or ``"PTX"``) and the log."""
    kit = find_toolkit()
    lib = ctypes.CDLL(str(kit.nvrtc))
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
    image = _output(lib, program, kind)
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    return image, log


def _output(lib: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    if getattr(lib, f"nvrtcGet{what}Size")(program, ctypes.byref(size)):
        raise ToolchainError(f"NVRTC gives no {what}")
    buffer = ctypes.create_string_buffer(size.value)
    if getattr(lib, f"nvrtcGet{what}")(program, buffer):
        raise ToolchainError(f"NVRTC gives no {what}")
    return buffer.raw


def _both(cubin: Path, ptx: bytes, arch: str) -> Path:
    """One image with machine code and PTX."""
    text, image = cubin.with_name("image.ptx"), cubin.with_name("image.fatbin")
    text.write_bytes(ptx)
    version = arch.removeprefix("sm_")
    images = (f"--image3=kind=elf,sm={version},file={cubin}", f"--image3=kind=ptx,sm={version},file={text}")
    run([cuda.find_toolkit().nvcc.parent / "fatbinary", "-64", f"--create={image}", *images], "joining device images")
    return image


def _embed(device: str, host: str, image: Path) -> str:
    """The host half, launching kernels of an embedded image instead of its own."""
    kernels = dict(_DECLARATION.findall(device))
    glue = _LIBRARY.replace("@IMAGE@", str(image))
    for name, parameters in kernels.items():
        glue += _KERNEL.replace("@NAME@", name).replace("@PARAMETERS@", parameters)
        host = host.replace(f"cudaFuncSetAttribute(::{name},", f"image_set_attribute(image_{name}(),")
        launch = f"tvm_cuda_host_launch(::{name},"
        if launch not in host:
            raise ToolchainError(f"the host half doesn't launch {name} in the way that is known here")
        host = host.replace(launch, f"image_launch((signature_{name})nullptr, image_{name}(),")
    host, replaced = _LAUNCHER.subn(lambda _: glue, host)
    if not kernels or replaced != 1:
        raise ToolchainError("the exported source has another form than the one that is known here")
    return _PROLOGUE + _HOST_HALF + host


def _compile_host(text: str, source: Path, target: Path) -> None:
    source.write_text(text)
    include = (*find_toolkit().include, *cuda.tvm_ffi_include(), *cuda.find_toolkit().include)
    flags = ("-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-w")
    run(
        [host_compiler("c++"), *flags, *(f"-I{p}" for p in include), "-c", source, "-o", target],
        f"compiling {source.name}",
    )

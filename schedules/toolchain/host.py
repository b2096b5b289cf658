"""The host half of an exported source, made to launch kernels of an embedded device image through the driver."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

from schedules.runtime_c import SOURCES
from schedules.toolchain import nvcc
from schedules.toolchain.process import ToolchainError, host_compiler, run

#: The first line of the host half of what TVM exports.
HOST_HALF = "#include <tvm/ffi/c_api.h>"

#: What the host half needs of CUDA.
HOST_HEADER = SOURCES / "launch.h"

_FLAGS = ("-std=c++17", "-fPIC", "-fvisibility=hidden", "-w")
_DECLARATION = re.compile(r'extern "C" __global__ void __launch_bounds__\([^)]*\) (\w+)\(([^;{]*)\);')
_TEMPLATE = re.compile(r"^v\d_")
_LAUNCHER = re.compile(
    r"template <typename\.\.\. Params, typename\.\.\. Args>\nstatic cudaError_t tvm_cuda_host_launch.*?\n}\n", re.S
)
#: What ``launch.h`` stands in for; and ``math.h``, half of what there is to parse, of which nothing is called.
_HEADERS = re.compile(
    r"#include <(?:tvm/ffi/extra/cuda/device_guard\.h|tvm/ffi/function\.h|cuda_runtime\.h|math\.h)>\n"
)

_IMAGE = """\
asm(".section .rodata\\n.balign 64\\nimage_begin:\\n.incbin \\"@IMAGE@\\"\\n.byte 0\\n.previous\\n");
extern "C" __attribute__((visibility("hidden"))) const char image_begin[];
static CUlibrary image_library() {
  static CUlibrary library = device_image::load(image_begin);
  return library;
}
"""

#: A place in a host half that makes a tensor map, on the thread's own memory of the last one that it made.
_TENSOR_MAP = "[] { static thread_local device_image::TensorMap last; return &last; }()->encode("

_KERNEL = """\
typedef void (*signature_@NAME@)(@PARAMETERS@);
static device_image::Kernel& image_@NAME@() {
  static device_image::Kernel kernel(image_library(), "@NAME@", @EARLY@);
  return kernel;
}
"""


#: What a kernel calls to wait for the launch before, which has let it begin early.
_WAITS = re.compile(r"griddepcontrol_wait\w*\(\)")
_BODY = re.compile(r'extern "C" __global__ void __launch_bounds__\([^)]*\) (\w+)\([^;{]*\) \{(.*?)\n\}', re.S)


def split(text: str, name: str) -> tuple[str, str]:
    """The device half and the host half of an exported source; ``name`` is for the error.

    Raises
    ------
    ToolchainError: it has no host half.
    """
    device, marker, host = text.partition(HOST_HALF)
    if not marker:
        raise ToolchainError(f"{name}: has no host half that begins with {HOST_HALF}")
    return device, marker + host


def without_template(device: str, host: str) -> tuple[str, str]:
    """Both halves with device functions whose names don't say for which template they were made.

    What V1 and V2 run on a GPU often differs in nothing else.
    """
    names = re.compile(rf"\b(?:{'|'.join(dict(_DECLARATION.findall(device)))})\b")
    device, host = (names.sub(lambda name: _TEMPLATE.sub("", name[0]), half) for half in (device, host))
    return device, host


def embed(device: str, host: str, image: Path) -> str:
    """The host half, launching kernels of an embedded image in place of those that a compiler would have joined to it.

    Raises
    ------
    ToolchainError: the source isn't of the form that TVM exports.
    """
    kernels = dict(_DECLARATION.findall(device))
    begin_early = {name for name, body in _BODY.findall(device) if _WAITS.search(body)}
    glue = _IMAGE.replace("@IMAGE@", str(image))
    for name, parameters in kernels.items():
        early = "true" if name in begin_early else "false"
        glue += _KERNEL.replace("@NAME@", name).replace("@PARAMETERS@", parameters).replace("@EARLY@", early)
        host = host.replace(f"cudaFuncSetAttribute(::{name}, ", f"image_{name}().prepare(")
        launch = f"tvm_cuda_host_launch(::{name},"
        if launch not in host:
            raise ToolchainError(f"the host half doesn't launch {name} in the way that is known here")
        host = host.replace(launch, f"image_{name}().launch((signature_{name})nullptr,")
    host = host.replace("cuTensorMapEncodeTiled(", _TENSOR_MAP)
    host, replaced = _LAUNCHER.subn(lambda _: glue, host)
    if not kernels or replaced != 1:
        raise ToolchainError("the exported source has another form than the one that is known here")
    return f'#include "{HOST_HEADER.name}"\n' + _HEADERS.sub("", host)


def compile_host(text: str, source: Path, target: Path, *, of_user: bool = False) -> None:
    """Compile a host half to an object; ``source`` is where its text is put.

    That of a user's kernel is optimised less: it is one long sequence of checks, and takes half the time.
    """
    source.write_text(text)
    include = (HOST_HEADER.parent, *tvm_ffi_include(), *nvcc.find_toolkit().include[:1])
    flags = ("-O1" if of_user else "-O2", *_FLAGS, *(f"-I{p}" for p in include))
    run([host_compiler("c++"), *flags, "-c", source, "-o", target], f"compiling {source.name}")


def tvm_ffi_include() -> list[Path]:
    """Include folders of the installed apache-tvm-ffi."""
    root = importlib.metadata.distribution("apache-tvm-ffi").locate_file("tvm_ffi")
    return [Path(str(root)) / "include"]

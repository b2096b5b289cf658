"""CUDA kernels on the processor: an exported source to a module that takes CPU tensors (``simt.h`` is the machine)."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from schedules.toolchain.host import _LAUNCHER, split, tvm_ffi_include
from schedules.toolchain.process import host_compiler

_HEADER = Path(__file__).with_name("simt.h")

#: Where the device half's own functions begin.
_BEGIN = "#define ushort unsigned short\n#endif\n"

_LAUNCH = """
template <typename... Params, typename... Args>
static cudaError_t tvm_cuda_host_launch(void (*kernel)(Params...), const cudaLaunchConfig_t* config, Args... args) {
  simt::run(config->gridDim, config->blockDim, config->dynamicSmemBytes, [=] { kernel((Params)args...); });
  return cudaSuccess;
}
"""

_ASM = re.compile(r'asm volatile\(\s*((?:"[^"]*"\s*)+)(.*?)\);', re.S)
_OPERAND = re.compile(r'"[=+&]*[rlf]"\((\w+)\)')
_OFFSET = r"\[%\d+\+?(\d*)\]"

#: PTX by how it begins, and the call of the machine that it becomes: its operands by number, the constant in its
#: address, whether it is of bfloat16, and what the pattern names.  The first that matches counts.
_INSTRUCTIONS = {
    r"$": "",
    r"mov\.u32 %0, %%tid\.(?P<axis>\w);": "{0} = threadIdx.{axis};",
    r"mov\.u32 %0, %%ctaid\.(?P<axis>\w);": "{0} = blockIdx.{axis};",
    r"mov\.u32 %0, %%nctaid\.(?P<axis>\w);": "{0} = gridDim.{axis};",
    r"ld\.shared\.v4": "simt::load4({0}, {1}, {2}, {3}, {4} + {offset});",
    r"st\.shared\.b32": "simt::store1({0} + {offset}, {1});",
    r"st\.shared\.v4": "simt::store4(simt::at({0} + {offset}), {1}, {2}, {3}, {4});",
    r"ld\.global\.f32": "{0} = *(float*){1};",
    r"ld\.global\.v4\.b32": "simt::load_or_zero({0}, {1}, {2}, {3}, {4}, 1);",
    r"st\.global\.v2\.b32": "simt::store2((uint32_t*){0}, {1}, {2});",
    r"st\.global\.v4": "simt::store4((void*){0}, {1}, {2}, {3}, {4});",
    r"st\.global\.v2\.f32": "simt::store2((float*){0}, {1}, {2});",
    r"cp\.async\.cg": "simt::copy_later({0} + {offset}, {1}, {2});",
    r"cp\.async\.commit": "simt::commit();",
    r"cp\.async\.wait_group (?P<groups>\d+);": "simt::wait({groups});",
    r"ldmatrix\S*\.trans\b": "simt::ldmatrix({0}, {1}, {2}, {3}, {4} + {offset}, true);",
    r"ldmatrix": "simt::ldmatrix({0}, {1}, {2}, {3}, {4} + {offset}, false);",
    r"bar\.sync": "simt::barrier({0}, {1});",
    r"cvt\.rn": "{0} = simt::pack({1}, {2}, {brain});",
    r"\{\.reg \.pred p; setp\.ne\.s32 p, %5, 0;": "simt::load_or_zero({0}, {1}, {2}, {3}, {4}, {5});",
}

#: Matrix products by shape: the machine's function, and how many registers of d, a and b a thread holds.
_PRODUCTS = {
    "m16n8k16": ("mma_m16n8<16>", 4, 4, 2),
    "m16n8k8": ("mma_m16n8<8>", 4, 2, 1),
    "m8n8k4": ("mma_m8n8k4", 8, 2, 2),
}
_PRODUCT = re.compile(r"mma\.sync\.aligned\.(?P<shape>m\d+n8k\d+)\.row\.(?P<b_order>\w+)")


def _instruction(match: re.Match) -> str:
    """One PTX instruction as a call of the machine."""
    text = "".join(re.findall(r'"([^"]*)"', match.group(1)))
    operands = _OPERAND.findall(match.group(2))
    brain = "true" if "bf16" in text else "false"
    if found := _PRODUCT.match(text):
        return _product(found["shape"], found["b_order"], operands, brain)
    offset = int((re.search(_OFFSET, text) or [0, ""])[1] or 0)
    for pattern, call in _INSTRUCTIONS.items():
        if found := re.match(pattern, text):
            return call.format(*operands, offset=offset, brain=brain, **found.groupdict())
    raise ValueError(f"the machine has no instruction {text}")


def _product(shape: str, b_order: str, operands: list[str], brain: str) -> str:
    """A matrix product: registers in and out of the arrays that the machine's function takes."""
    function, d, a, b = _PRODUCTS[shape]
    flag = ("true" if b_order == "row" else "false") if shape == "m8n8k4" else brain
    # operands: d, a, b, c
    arrays = (
        f"float d[] = {{{', '.join(operands[d + a + b : d + a + b + d])}}};",
        f"uint32_t a[] = {{{', '.join(operands[d : d + a])}}};",
        f"uint32_t b[] = {{{', '.join(operands[d + a : d + a + b])}}};",
    )
    results = (f"{operands[i]} = d[{i}];" for i in range(d))
    return "{" + "".join(arrays) + f"simt::{function}(d, a, b, {flag});" + "".join(results) + "}"


def translate(text: str, name: str) -> str:
    """An exported source as C++ that runs on the processor."""
    device, host = split(text, name)
    device = device[device.index(_BEGIN) + len(_BEGIN) :]
    device = re.sub(r'extern "C" __global__ void __launch_bounds__\([^)]*\) \w+\([^;{]*\);\n', "", device)
    device = re.sub(r'extern "C" __global__ void __launch_bounds__\([^)]*\)', "static void", device)
    device = re.sub(r"extern __shared__ \S+ uchar (\w+)\[\];", r"uchar* \1 = simt::shared();", device)
    device = re.sub(r"__shared__ (alignas\(\d+\))", r"\1 static", device)  # blocks run one after the other
    device = re.sub(r"#pragma unroll.*\n", "", device)
    device = re.sub(r"__half2 pair = .*\n.*", "to = simt::pack(high, low, false);", device)
    device = _ASM.sub(_instruction, device)
    host = re.sub(r"#include <(tvm/ffi/extra/cuda/device_guard|cuda|cuda_runtime)\.h>\n", "", host)
    host = _LAUNCHER.sub(lambda _: _LAUNCH, host)
    host = host.replace("device.device_type) == 2", "device.device_type) == 1")
    host = re.sub(r"tvm::ffi::CUDADeviceGuard [^;]*;", "", host)
    return f'#include "{_HEADER}"\n{device}\n{host}'


def build(text: str, folder: Path, name: str = "kernel") -> Path:
    """Compile an exported source for the processor; the path of a module for ``tvm_ffi.load_module``."""
    source, module = folder / f"{name}.cpp", folder / f"{name}.so"
    source.write_text(translate(text, name))
    command = [host_compiler("c++"), "-std=c++17", "-O0", "-fPIC", "-shared", "-w"]
    subprocess.run([*command, *(f"-I{p}" for p in tvm_ffi_include()), source, "-o", module], check=True)
    return module

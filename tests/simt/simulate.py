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


def _instruction(match: re.Match) -> str:
    """One PTX instruction as a call of the machine."""
    text = "".join(re.findall(r'"([^"]*)"', match.group(1)))
    x = _OPERAND.findall(match.group(2))
    offset = int((re.search(_OFFSET, text) or [0, ""])[1] or 0)
    brain = "true" if "bf16" in text else "false"

    def array(kind: str, name: str, values: list[str]) -> str:
        return f"{kind} {name}[] = {{{', '.join(values)}}};"

    if not text:
        return ""
    if found := re.match(r"mov\.u32 %0, %%(\w+)\.(\w);", text):
        name = {"tid": "threadIdx", "ctaid": "blockIdx", "nctaid": "gridDim"}[found[1]]
        return f"{x[0]} = {name}.{found[2]};"
    if text.startswith("ld.shared.v4"):
        return f"simt::load4({', '.join(x[:4])}, {x[4]} + {offset});"
    if text.startswith("st.shared.b32"):
        return f"simt::store1({x[0]} + {offset}, {x[1]});"
    if text.startswith("st.shared.v4"):
        return f"simt::store4(simt::at({x[0]} + {offset}), {', '.join(x[1:5])});"
    if text.startswith("st.global.v4"):
        return f"simt::store4((void*){x[0]}, {', '.join(x[1:5])});"
    if text.startswith("cp.async.cg"):
        return f"simt::copy_later({x[0]} + {offset}, {x[1]}, {x[2]});"
    if text.startswith("cp.async.commit"):
        return "simt::commit();"
    if found := re.match(r"cp\.async\.wait_group (\d+);", text):
        return f"simt::wait({found[1]});"
    if text.startswith("ldmatrix"):
        return f"simt::ldmatrix({', '.join(x[:4])}, {x[4]} + {offset}, {'true' if '.trans' in text else 'false'});"
    if text.startswith("bar.sync"):
        return f"simt::barrier({x[0]}, {x[1]});"
    if text.startswith("cvt.rn"):
        return f"{x[0]} = simt::pack({x[1]}, {x[2]}, {brain});"
    if text.startswith("{.reg .pred p; setp.ne.s32 p, %5, 0;"):
        return f"simt::load_or_zero({', '.join(x)});"
    if found := re.match(r"mma\.sync\.aligned\.(m\d+n8k\d+)\.row\.(\w+)", text):
        m, a, b = {"m16n8k16": (4, 4, 2), "m16n8k8": (4, 2, 1), "m8n8k4": (8, 2, 2)}[found[1]]
        call = "mma_m8n8k4" if m == 8 else f"mma_m16n8<{a * 4}>"
        last = ("true" if found[2] == "row" else "false") if m == 8 else brain
        code = array("float", "d", x[m + a + b : 2 * m + a + b]) + array("uint32_t", "a", x[m : m + a])
        code += array("uint32_t", "b", x[m + a : m + a + b]) + f"simt::{call}(d, a, b, {last});"
        return "{" + code + "".join(f"{x[i]} = d[{i}];" for i in range(m)) + "}"
    raise ValueError(f"the machine has no instruction {text}")


def translate(text: str, name: str) -> str:
    """An exported source as C++ that runs on the processor."""
    device, host = split(text, name)
    device = device[device.index(_BEGIN) + len(_BEGIN) :]
    device = re.sub(r'extern "C" __global__ void __launch_bounds__\([^)]*\) \w+\([^;{]*\);\n', "", device)
    device = re.sub(r'extern "C" __global__ void __launch_bounds__\([^)]*\)', "static void", device)
    device = re.sub(r"extern __shared__ \S+ uchar (\w+)\[\];", r"uchar* \1 = simt::shared();", device)
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

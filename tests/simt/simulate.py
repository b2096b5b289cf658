"""CUDA kernels on the processor: an exported source to a module that takes CPU tensors (``machine.cpp`` runs it).

:func:`build` makes a module of one source, :class:`Simulated` runs all launches of a program, its tensors by role.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
import tvm_ffi

from schedules.families.interface import Program
from schedules.toolchain.host import _LAUNCHER, split, tvm_ffi_include
from schedules.toolchain.process import host_compiler
from tests import shared
from tests.simt import instructions
from tests.simt.guarded import Guarded
from tvm_flash.packs import sizes
from tvm_flash.packs.sizes import evaluate

_HERE = Path(__file__).parent

#: What every translated source begins with: what it sees of the machine, and what host halves include.
_PRELUDE = """
#include "simt.h"
#include <tvm/ffi/c_api.h>
#include <tvm/ffi/extra/c_env_api.h>
"""

#: Where the device half's own functions begin.
_BEGIN = "#define ushort unsigned short\n#endif\n"

_LAUNCH = """
template <typename... Params, typename... Args>
static cudaError_t tvm_cuda_host_launch(void (*kernel)(Params...), const cudaLaunchConfig_t* config, Args... args) {
  dim3 cluster = config->numAttrs ? config->attrs->val.clusterDim : dim3();
  simt::run(config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes, [=] { kernel((Params)args...); });
  return cudaSuccess;
}
"""

#: Modules that are loaded side by side must not share the machine's variables.
_FLAGS = ("-std=c++17", "-fPIC", "-w", "-fvisibility=hidden", "-fno-gnu-unique")
#: Sources are long and straight, and compile several times as fast like this.  The machine is what is hot.
_SOURCE_FLAGS, _MACHINE_FLAGS = (*_FLAGS, "-O0"), (*_FLAGS, "-O2")


def translate(text: str, name: str) -> str:
    """An exported source as C++ that runs on the processor."""
    device, host = split(text, name)
    device = device[device.index(_BEGIN) + len(_BEGIN) :]
    device = re.sub(r'extern "C" __global__ void __launch_bounds__\([^)]*\) \w+\([^;{]*\);\n', "", device)
    device = re.sub(r'extern "C" __global__ void __launch_bounds__\([^)]*\)', "static void", device)
    device = "".join(_with_shared_memory(part) for part in re.split(r"(?m)^(?=static void )", device))
    device = re.sub(r"#pragma unroll.*\n", "", device)
    device = re.sub(r"__half2 pair = .*\n.*", "to = simt::pack(high, low, false);", device)
    device = instructions.ASM.sub(instructions.translate, device)
    host = re.sub(r"#include <(tvm/ffi/function|tvm/ffi/extra/cuda/device_guard|cuda|cuda_runtime)\.h>\n", "", host)
    host = _LAUNCHER.sub(lambda _: _LAUNCH, host)
    host = host.replace("device.device_type) == 2", "device.device_type) == 1")
    host = re.sub(r"tvm::ffi::CUDADeviceGuard [^;]*;", "", host)
    return f'#include "prelude.h"\n{device}\n{host}'


#: Arrays in shared memory whose size is known, as sources declare them.
_BYTES = {"int": 4, "uint": 4, "float": 4}
_ARRAY = re.compile(r"__shared__ (alignas\((\d+)\)) (\w+) (\w+)\[(\d+)\];")


def _with_shared_memory(function: str) -> str:
    """A kernel's text with its arrays in shared memory: those of known size are statics, since blocks run one after the
    other, but what has its size from the launch begins behind them, and so at an address that they decide."""
    before = 0
    for _, alignment, element, _, length in _ARRAY.findall(function):
        before += -(-int(length) * _BYTES[element] // int(alignment)) * int(alignment)
    function = re.sub(r"extern __shared__ \S+ uchar (\w+)\[\];", rf"uchar* \1 = simt::shared() + {before};", function)
    return _ARRAY.sub(r"\1 static \3 \4[\5];", function)


def build(text: str, folder: Path, name: str = "kernel") -> Path:
    """Compile an exported source for the processor; the path of a module for ``tvm_ffi.load_module``.

    It is in a folder of its own inside ``folder``: a process that has loaded a path loads no other file from there.
    """
    folder = Path(tempfile.mkdtemp(dir=folder))
    source, module = folder / f"{name}.cpp", folder / f"{name}.so"
    source.write_text(translate(text, name))
    machine = shared.once("simt", _compile_machine)
    _compile(*_SOURCE_FLAGS, f"-I{machine}", source, machine / "machine.o", "-shared", "-o", module)
    return module


def _compile_machine(folder: Path) -> None:
    """What takes most of the time, once: the machine, and the precompiled prelude."""
    header = folder / "prelude.h"
    header.write_text(_PRELUDE)
    _compile(*_SOURCE_FLAGS, "-x", "c++-header", header, "-o", folder / "prelude.h.gch")
    _compile(*_MACHINE_FLAGS, "-c", _HERE / "machine.cpp", "-o", folder / "machine.o")


def _compile(*arguments: object) -> None:
    include = (_HERE, *tvm_ffi_include())
    command = [host_compiler("c++"), *(f"-I{p}" for p in include), *arguments]
    subprocess.run([str(word) for word in command], check=True)


def with_places(text: str, statements: str) -> tuple[str, list[str]]:
    """A source whose calls of some device functions are numbered, so that each can be left out (``configure``).

    Parameters
    ----------
    statements: a regular expression of the functions' names.

    Returns
    -------
    The source, and the name of the function at each place.
    """
    names: list[str] = []

    def numbered(match: re.Match) -> str:
        names.append(match[2])
        return f"{match[1]}if (simt::reach({len(names) - 1})) {match[2]}("

    return re.sub(rf"^( +)({statements})\(", numbered, text, flags=re.M), names


class Simulated:
    """All launches of a program, on CPU tensors.

    Parameters
    ----------
    program: what was scheduled.
    text: its exported source, ``Lowered.text``; a test may have changed it.
    folder: where to compile.
    name: of the source in errors, and of its files.
    """

    def __init__(self, program: Program, text: str, folder: Path, name: str = "kernel"):
        self.program = program
        self.module = tvm_ffi.load_module(str(build(text, folder, name)))
        self._launches: dict[str, Guarded] = {}

    def configure(
        self, order: int = 0, multiprocessors: int = 2, faulty_place: int = -1, other_parity: bool = False
    ) -> None:
        """How launches run from now on.

        Parameters
        ----------
        order: in which order threads get their turns: 0 by number, 1 backwards, others shuffle the warps.
        multiprocessors: how many the machine says it has; kernels that are persistent launch blocks for as many.
        faulty_place: which of the places of :func:`with_places` is left out, for all threads.
        other_parity: it isn't left out, but waits for the other parity.
        """
        self.module["simulate_with"](order, multiprocessors, faulty_place, int(other_parity))

    def launch(self, symbol: str) -> Guarded:
        """The function of a launch, whose tensors lie beside memory that nobody may touch."""
        if symbol not in self._launches:
            self._launches[symbol] = Guarded(self.module[symbol])
        return self._launches[symbol]

    def __call__(self, tensors: Mapping[str, object], layout: str = "bhsd") -> dict[str, torch.Tensor]:
        """Run the launches in order; the workspaces that they have left, by name.

        Parameters
        ----------
        tensors: tensors and numbers by role.  ``q``, ``k``, ``v`` give the sizes of the problem, from which numbers of
            the program follow that aren't given.
        layout: of q, k and v: ``"bhsd"`` as V1 has it, or ``"bshd"``.
        """
        problem = problem_of(*(tensors[role] for role in "qkv"), layout)
        for scalar in self.program.scalars:
            problem[scalar.name] = tensors.get(scalar.name, evaluate(scalar.value, problem))
        problem |= {sizes.elements_of(role): x.numel() for role, x in tensors.items() if role.startswith("d_")}
        workspaces = {}
        for workspace in self.program.workspaces:
            shape = [evaluate(size, problem) for size in workspace.shape]
            memory = torch.full(
                (max(1, _bytes(shape, workspace.dtype)),), 0 if workspace.zeroed else 0xFF, dtype=torch.uint8
            )
            workspaces[workspace.name] = memory.view(getattr(torch, workspace.dtype)).reshape(shape)
        given = {**problem, **workspaces, **tensors}
        for launch in self.program.launches:
            if not launch.when or given[launch.when]:
                self.launch(launch.symbol)(*(given[role] for role in launch.roles))
        return workspaces


def problem_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str) -> dict[str, int]:
    """The sizes of a problem by name (:mod:`tvm_flash.packs.sizes`)."""
    q, k, v = (x if layout == "bhsd" else x.transpose(1, 2) for x in (q, k, v))
    batch, heads, seqlen_q, head_dim = q.shape
    return sizes.of(batch, heads, seqlen_q, k.shape[1], k.shape[2], head_dim, v.shape[3])


def _bytes(shape: list[int], dtype: str) -> int:
    return torch.Size(shape).numel() * getattr(torch, dtype).itemsize

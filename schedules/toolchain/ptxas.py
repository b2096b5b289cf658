"""What ptxas says of a kernel (``-Xptxas -v``): registers, stack, spills, shared memory, warnings."""

from __future__ import annotations

import re
from dataclasses import dataclass

from schedules.toolchain.process import ToolchainError

#: ptxas gave up keeping wgmma asynchronous; such a kernel runs at a fraction of its speed.
SERIALISATION_WARNINGS = {
    "C7508": "setmaxnreg is ignored",
    "C7510": "wgmma is serialised",
    "C7512": "wgmma is serialised for want of registers",
    "C7519": "a wgmma fence was injected",
    "C7520": "wgmma is serialised because of divergent code",
}

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")
_CODE = re.compile(r"\((C\d{4})\)|\b(C75\d\d)\b")


@dataclass(frozen=True)
class KernelReport:
    """One ``__global__`` function: registers a thread; stack, spills, static shared memory in bytes."""

    name: str
    arch: str
    registers: int
    stack: int
    spills: int
    shared_memory: int


@dataclass(frozen=True)
class Report:
    """All that ptxas said: kernels in the order of compilation, and warnings of ``SERIALISATION_WARNINGS``."""

    kernels: tuple[KernelReport, ...]
    warnings: tuple[str, ...]

    def resources(self, dynamic_shared_memory: int) -> dict[str, int]:
        """Registers, spills and shared memory, as the manifest names them."""
        return {
            "registers": max(k.registers for k in self.kernels),
            "spills": max(k.spills for k in self.kernels),
            "shared_memory": max(k.shared_memory for k in self.kernels) + dynamic_shared_memory,
        }


def parse(text: str) -> Report:
    """Read the output of ``nvcc -Xptxas -v`` or of NVRTC with ``--ptxas-options=-v``."""
    kernels, warnings = [], []
    name, arch, stack, spills = "", "", 0, 0
    for line in text.splitlines():
        if found := _ENTRY.search(line):
            name, arch = found.groups()
            stack = spills = 0
        elif found := _SPILLS.search(line):
            stack, stores, loads = (int(x) for x in found.groups())
            spills = stores + loads
        elif name and (found := _USED.search(line)):
            shared = _SHARED.search(line)
            kernels.append(
                KernelReport(name, arch, int(found.group(1)), stack, spills, int(shared.group(1)) if shared else 0)
            )
            name = ""
        elif found := _CODE.search(line):
            code = found.group(1) or found.group(2)
            if code in SERIALISATION_WARNINGS:
                warnings.append(f"{code} ({SERIALISATION_WARNINGS[code]}): {line.strip()}")
    return Report(tuple(kernels), tuple(dict.fromkeys(warnings)))


def check(report: Report, arch: str) -> None:
    """Refuse kernels that would be slow for a reason that ptxas reports.

    Only code for ``arch`` counts: registers and spills of the same source for another arch say nothing of it.

    Raises
    ------
    ToolchainError: naming each kernel and what is wrong with it.
    """
    faults = list(report.warnings)
    faults += [
        f"{k.name} for {k.arch}: spills {k.spills} bytes at {k.registers} registers, stack {k.stack} bytes"
        for k in report.kernels
        if k.spills and k.arch == arch
    ]
    if faults:
        raise ToolchainError("ptxas reports code that must not ship: " + "; ".join(faults))

"""CUDA kernels compiled as they will be shipped, and the instructions that they are made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import tvm
from tvm.backend.cuda import export_cuda_host

from schedules.families.interface import Program
from schedules.toolchain import cuda
from schedules.toolchain.process import ToolchainError

#: Low 12 bits of an instruction word, Volta to Blackwell: the operation, and in the upper three the kinds of its
#: operands.
OPCODES = {
    "HMMA": (0x23C,),
    "LDSM": (0x83B,),
    "LDGSTS": (0xFAE,),
    "HGMMA": (0x9F0, 0xDF0),
    "UTMALDG": (0x5B4,),
    "UTMASTG": (0x3B5,),
    "LDL": (0x983,),
    "STL": (0x387,),
}


def needs_compiler(arch: str) -> None:
    """Skip the test where nothing compiles for an arch: the list of skips that are expected says where that may be."""
    try:
        cuda.compiler_version(arch)
    except ToolchainError as missing:
        pytest.skip(f"no CUDA compiler: {missing}")


def compiled(program: Program, arch: str, folder: Path):
    """The source, the report of ptxas, and how often each of ``OPCODES`` occurs.

    Raises
    ------
    ToolchainError: ptxas reports what must not ship, such as a spill (:func:`schedules.toolchain.ptxas.check`).
    """
    needs_compiler(arch)
    module = tvm.IRModule({"kernel": program.func})
    target = tvm.target.Target({"kind": "cuda", "arch": arch}, host={"kind": "cuda_host"})
    text = export_cuda_host(tvm.compile(module, target=target, tir_pipeline=program.pipeline).mod)
    source, target_file = folder / "kernel.cu", folder / "kernel.o"
    source.write_text(text)
    report = cuda.compile_object(source, target_file, arch)
    return text, report, count_opcodes(target_file.read_bytes())


def count_opcodes(data: bytes) -> dict[str, int]:
    """Instructions are 16 bytes long and aligned; the cubin lies somewhere in the object file."""
    start = data.index(b"\x7fELF", 4)  # the object file itself is the first
    words = [int.from_bytes(data[i : i + 2], "little") & 0xFFF for i in range(start, len(data) - 16, 16)]
    return {name: sum(words.count(code) for code in codes) for name, codes in OPCODES.items()}

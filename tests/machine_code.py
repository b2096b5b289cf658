"""CUDA kernels compiled as they will be shipped, and the instructions that they are made of."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from schedules.builder.compile import export_cuda
from schedules.families.interface import Program, Target
from schedules.toolchain import cuda
from schedules.toolchain.host import split
from schedules.toolchain.process import ToolchainError

#: Low 12 bits of an instruction word, Volta to Blackwell: the operation, and in the upper three the kinds of its
#: operands.
OPCODES = {
    "HMMA": (0x23C,),
    "HMMA.884": (0x236,),  # m8n8k4, of Volta
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

    The device half alone is compiled: the host half would take as long again, and says nothing of instructions.

    Raises
    ------
    ToolchainError: ptxas reports what must not ship, such as a spill (:func:`schedules.toolchain.ptxas.check`).
    """
    needs_compiler(arch)
    text = export_cuda(program, Target(arch))
    half = folder / "kernel.cu"
    half.write_text(split(text, half.name)[0])
    image, report = cuda.compile_device(half, arch)
    return text, report, count_opcodes(image.read_bytes())


def count_opcodes(cubin: bytes) -> dict[str, int]:
    """How often each of ``OPCODES`` occurs in the code of a device image."""
    code = _code(cubin)
    assert code
    # Instructions are 16 bytes long and aligned.
    words = [int.from_bytes(code[i : i + 2], "little") & 0xFFF for i in range(0, len(code), 16)]
    return {name: sum(words.count(code) for code in codes) for name, codes in OPCODES.items()}


def _code(elf: bytes) -> bytes:
    """The sections of an ELF file (64 bits, little-endian) whose names begin with ``.text``."""
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<3H", elf, 0x3A)
    sections = [struct.unpack_from("<2I4Q", elf, table + i * size) for i in range(count)]
    names_at = sections[names][4]
    return b"".join(
        elf[at : at + length] for name, _, _, _, at, length in sections if elf[names_at + name :].startswith(b".text")
    )

"""Kernels for tests of the CPU family: those of the pack, and others that are made here."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import tvm
import tvm_ffi

from schedules.families import cpu
from schedules.families.interface import Program
from schedules.templates import v1, v2
from schedules.toolchain import cpu as toolchain
from schedules.toolchain.process import host_compiler, run
from tvm_flash.machine.cpu import features
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, KernelEntry
from tvm_flash.packs.registry import registry

TEMPLATES = {"v1": v1, "v2": v2}


def runnable_isas() -> list[str]:
    """The instruction sets that this machine can run, the best first."""
    return [name for name, isa in cpu.ISAS.items() if set(isa.features) <= features()]


def others(dtype: str) -> list[str]:
    """Those but the best whose code for a dtype isn't a better one's.

    What is for bfloat16 alone changes nothing of other dtypes (``test_cpu_family.py`` compares their code).
    """
    best_of = {}
    for name in reversed(runnable_isas()):
        isa = cpu.ISAS[name]
        best_of[isa.lanes, isa.registers, isa.bfloat16 if dtype == "bfloat16" else ""] = name
    return [name for name in runnable_isas()[1:] if name in best_of.values()]


@functools.cache
def runtime() -> Path:
    """The threads and the scratch memory that kernels run on in a pack."""
    path = Path(tempfile.mkdtemp()) / toolchain.runtime_name()
    atexit.register(shutil.rmtree, path.parent)
    toolchain.build_runtime(path, path.name)
    return path


def compile_for(isa: str, program: Program):
    """TVM's executable of a program."""
    return tvm.compile(
        tvm.IRModule(program.functions), target=cpu.ISAS[isa].tvm_target(), tir_pipeline=program.pipeline
    )


def make(isa: str, program: Program, source: str = ""):
    """The module of a program, linked and loaded as that of a pack is; functions of a C ``source`` stand for those of
    the runtime."""
    compiled = compile_for(isa, program)
    with tempfile.TemporaryDirectory(dir=runtime().parent) as scratch:
        part, module = Path(scratch) / "kernel.o", runtime().parent / f"{Path(scratch).name}.so"
        compiled.mod.write_to_file(str(part), "o")
        parts = [part]
        if source:
            text = Path(scratch) / "source.c"
            text.write_text(source)
            parts.append(text.with_suffix(".o"))
            run([host_compiler(), "-c", "-fPIC", text, "-o", parts[1]], "compiling a test's C")
        toolchain.link_module(parts, module, runtime())
        return tvm_ffi.load_module(str(module))


def installed(**wanted) -> tuple[KernelEntry, tvm_ffi.Module] | None:
    """The pack's first kernel of a definition of the package whose entry has these values, and its module."""
    for found in registry().kernels("cpu"):
        e = found.entry
        if e.definition == BUILTIN_DEFINITION and all(getattr(e, name) == value for name, value in wanted.items()):
            return e, tvm_ffi.load_module(str(found.pack.folder / e.module))
    return None

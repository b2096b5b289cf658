"""Kernels for AMX on any processor: all their own text, but AMX's instructions are calls of ``instructions.c``."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from schedules.builder.compile import lower, make_cpu_object
from schedules.builder.suite import KernelSpec
from schedules.definition.pattern import Pattern
from schedules.families import cpu
from schedules.families.cpu.amx import TILE_PRODUCT
from schedules.families.cpu.kernel import LLVM_FUNCTIONS
from schedules.families.interface import Target
from schedules.toolchain.cpu import build_runtime, link_module, runtime_name
from schedules.toolchain.machine import best_isa
from schedules.toolchain.process import host_compiler, run
from tests import shared

TARGET = Target("cpu", "amx")
_INSTRUCTIONS = Path(__file__).with_name("instructions.c")
_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")


def build(spec: KernelSpec, pattern: Pattern, config: cpu.Config, folder: Path) -> Path:
    """A module in ``folder`` with one kernel, for the best instruction set that this machine has."""
    same_for_all = shared.once("amx", _compile_instructions)
    runtime, kernel = folder / runtime_name(), folder / "kernel.o"
    shutil.copy(same_for_all / runtime.name, runtime)
    isa, best = cpu.ISAS[TARGET.isa], cpu.ISAS[best_isa(cpu.ISAS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cpu.ISAS, TARGET.isa, replace(isa, mcpu=best.mcpu, mattr=best.mattr))
        patch.setitem(LLVM_FUNCTIONS, isa.bfloat16, TILE_PRODUCT.replace("@llvm.x86.", "@emulated_"))
        make_cpu_object(lower(spec, pattern, TARGET, config), TARGET, kernel)
    module = folder / f"{spec.symbol}.so"
    link_module([kernel, same_for_all / "instructions.o"], module, runtime)
    return module


def _compile_instructions(folder: Path) -> None:
    """What every module has beside its kernel: the instructions, and the runtime."""
    build_runtime(folder / runtime_name(), runtime_name())
    command = [host_compiler(), *_FLAGS, "-c", _INSTRUCTIONS, "-o", folder / "instructions.o"]
    run(command, f"compiling {_INSTRUCTIONS.name}")

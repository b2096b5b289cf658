"""Kernels for AMX on any processor: all their own text, but AMX's instructions are calls of ``instructions.c``."""

from __future__ import annotations

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

TARGET = Target("cpu", "amx")
_INSTRUCTIONS = Path(__file__).with_name("instructions.c")
_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")


def build(spec: KernelSpec, pattern: Pattern, config: cpu.Config, folder: Path) -> Path:
    """A module in ``folder`` with one kernel, for the best instruction set that this machine has."""
    runtime, instructions, kernel = (folder / name for name in (runtime_name(), "instructions.o", "kernel.o"))
    build_runtime(runtime, runtime.name)
    run([host_compiler(), *_FLAGS, "-c", _INSTRUCTIONS, "-o", instructions], f"compiling {_INSTRUCTIONS.name}")
    isa, best = cpu.ISAS[TARGET.isa], cpu.ISAS[best_isa(cpu.ISAS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cpu.ISAS, TARGET.isa, replace(isa, mcpu=best.mcpu, mattr=best.mattr))
        patch.setitem(LLVM_FUNCTIONS, isa.bfloat16, TILE_PRODUCT.replace("@llvm.x86.", "@emulated_"))
        make_cpu_object(lower(spec, pattern, TARGET, config), TARGET, kernel)
    module = folder / f"{spec.symbol}.so"
    link_module([kernel, instructions], module, runtime)
    return module

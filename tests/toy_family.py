"""Arch families for tests of the builder: kernels that compile in a tenth of a second, and compute next to nothing.

They stand for ``cpu`` and for the arch ``sm_90``.  As a program, ``python toy_family.py arguments…`` is
``build_kernels.py`` with these families.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import tvm
from tvm.script import tirx as T

from schedules import families
from schedules.families.interface import Program, Rejected, ScheduledLaunch


@dataclass(frozen=True)
class Config:
    """``block_m`` reaches the machine code, so that another configuration is another kernel."""

    block_m: int = 16


@dataclass(frozen=True)
class Isa:
    """As in the CPU family."""

    features: tuple[str, ...] = ()
    tried: bool = True

    def tvm_target(self) -> tvm.target.Target:
        return tvm.target.Target("llvm")


def _default_configs(template, pattern, target):
    return {0: Config(), 4096: Config(32)} if pattern.head_dim == 128 else {0: Config()}


def _feasible(pattern, config, target):
    return Rejected(f"head_dim {pattern.head_dim} is above 128") if pattern.head_dim > 128 else None


def _cpu_program(pattern, config, target, traversal, name):
    factor = config.block_m

    @T.prim_func(s_tir=True)
    def scale(q: T.handle, o: T.handle):
        n = T.int64()
        Q = T.match_buffer(q, (n,), "float32")
        O = T.match_buffer(o, (n,), "float32")
        for i in range(n):
            with T.sblock("scale"):
                at = T.axis.remap("S", [i])
                O[at] = Q[at] * T.float32(factor)

    func = scale.with_attr("global_symbol", name).with_attr("definition", pattern.func.script())
    return Program("forward", (ScheduledLaunch(func, ("q", "o")),), "s_tir", alignment=4, index_bits=64)


def _cuda_program(pattern, config, target, traversal, name):
    threads = config.block_m

    @T.prim_func(check_well_formed=False)
    def scale(q: T.handle, o: T.handle, factor: T.float32):
        rows = T.int32()
        columns = T.int32()
        Q = T.match_buffer(q, (rows, columns), "float32")
        O = T.match_buffer(o, (rows, columns), "float32")
        T.device_entry()
        row = T.cta_id([rows])
        column = T.thread_id([threads])
        if column < columns:
            O[row, column] = Q[row, column] * factor

    launch = ScheduledLaunch(scale.with_attr("global_symbol", name), ("q", "o", "softmax_scale"))
    return Program("forward", (launch,), "tirx", alignment=16, index_bits=32)


def _family(name: str, program, **more):
    module = types.ModuleType(f"schedules.families.{name}")
    module.DTYPES, module.TEMPLATES, module.Config = ("float32", "float16"), ("v1",), Config
    module.INDEX_DTYPE = "int64"
    module.default_configs, module.feasible, module.program = _default_configs, _feasible, program
    vars(module).update(more)
    return module


FAMILY = {"cpu": "toy_cpu", "sm_90": "toy_cuda"}


def families_by_name() -> dict[str, types.ModuleType]:
    """The modules that ``FAMILY`` names."""
    return {
        "toy_cpu": _family("toy_cpu", _cpu_program, ISAS={"toy": Isa()}),
        "toy_cuda": _family("toy_cuda", _cuda_program),
    }


if __name__ in ("__main__", "__mp_main__"):  # also in the worker processes of the command
    for module in families_by_name().values():
        sys.modules[module.__name__] = module
    families.FAMILY.update(FAMILY)

if __name__ == "__main__":
    from schedules.commands.build import main

    sys.exit(main())

"""Arch families for tests of the builder: kernels that compile in a tenth of a second, and compute next to nothing.

``install()`` makes them known as the families of ``cpu`` and of the arch ``sm_90``; as a program,
``python toy_family.py arguments…`` is ``build_kernels.py`` with these families.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tvm.script import tirx as T

from schedules import families
from schedules.template import Program, Rejected


@dataclass(frozen=True)
class Config:
    """``block_m`` reaches the kernel's text, so that another configuration is another kernel."""

    block_m: int = 16


@dataclass(frozen=True)
class Isa:
    """As in the CPU family."""

    mcpu: str = "x86-64"
    mattr: tuple[str, ...] = ()
    features: tuple[str, ...] = ()


def _default_configs(template, pattern, target):
    return {0: Config(), 4096: Config(32)} if pattern.head_dim == 128 else {0: Config()}


def _feasible(pattern, config, target):
    return Rejected(f"head_dim {pattern.head_dim} is above 128") if pattern.head_dim > 128 else None


def _cpu_program(pattern, config, target, traversal, name):
    func = pattern.func.with_attr("global_symbol", name).with_attr("block_m", config.block_m)
    return Program(func, "s_tir", alignment=4, index_bits=64)


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

    return Program(scale.with_attr("global_symbol", name), "tirx", alignment=16, index_bits=32)


def _family(name: str, program, **more):
    module = types.ModuleType(f"schedules.families.{name}")
    module.DTYPES, module.TEMPLATES, module.Config = ("float32", "float16"), ("v1",), Config
    module.INDEX_DTYPE = "int64"
    module.default_configs, module.feasible, module.program = _default_configs, _feasible, program
    vars(module).update(more)
    return module


def install() -> None:
    """Replace the families of ``cpu`` and ``sm_90`` in this process."""
    toys = {
        "toy_cpu": _family("toy_cpu", _cpu_program, ISAS={"toy": Isa()}),
        "toy_cuda": _family("toy_cuda", _cuda_program),
    }
    for module in toys.values():
        sys.modules[module.__name__] = module
    families.FAMILY.update(cpu="toy_cpu", sm_90="toy_cuda")


install()

if __name__ == "__main__":
    from schedules.build_command import main

    sys.exit(main())

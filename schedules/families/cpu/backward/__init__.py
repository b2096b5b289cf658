"""The backward of the CPU family, a kind of its kernels: dq, dk, dv and the gradients of parameters in one launch.

The interface of a kind is described in :mod:`schedules.families.interface`.
"""

from functools import partial
from types import SimpleNamespace

from schedules.families.cpu.backward import ragged
from schedules.families.cpu.backward.config import Config, default_configs, feasible, space
from schedules.families.cpu.backward.kernel import program

#: The kind that adds to results in float32; else the same.
accumulate = SimpleNamespace(
    Config=Config,
    default_configs=default_configs,
    feasible=feasible,
    program=partial(program, accumulates=True),
    space=space,
)

__all__ = ["Config", "accumulate", "default_configs", "feasible", "program", "ragged", "space"]

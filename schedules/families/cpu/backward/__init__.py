"""The backward of the CPU family, a kind of its kernels: dq, dk, dv and the gradients of parameters in one launch.

The interface of a kind is described in :mod:`schedules.families.interface`.
"""

from schedules.families.cpu.backward.config import Config, default_configs, feasible, space
from schedules.families.cpu.backward.kernel import program

__all__ = ["Config", "default_configs", "feasible", "program", "space"]

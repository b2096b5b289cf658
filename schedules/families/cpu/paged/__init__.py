"""Ragged sequences with their keys on pages, a kind of the CPU family's kernels: forward in one launch.

The interface of a kind is described in :mod:`schedules.families.interface`.
"""

from schedules.families.cpu.config import Config, default_configs, feasible
from schedules.families.cpu.paged.kernel import program
from schedules.families.cpu.space import space

__all__ = ["Config", "default_configs", "feasible", "program", "space"]

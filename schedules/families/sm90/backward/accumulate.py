"""The backward whose results are added to what is there, in float32: the same launches with another end."""

from __future__ import annotations

from schedules.definition.pattern import Pattern
from schedules.families.interface import Program, Target
from schedules.families.sm90.backward.config import Config, default_configs, feasible, space
from schedules.families.sm90.backward.program import program as launches
from schedules.tile.tile_scheduler import Traversal

__all__ = ["Config", "default_configs", "feasible", "program", "space"]


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The launches; ``config`` must be feasible."""
    return launches(pattern, config, target, traversal, name, adds=True)

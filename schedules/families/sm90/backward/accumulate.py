"""The backward whose results are added to what is there, in float32: the same launches with another end."""

from __future__ import annotations

from dataclasses import replace

from schedules.definition.pattern import Pattern
from schedules.families.interface import Program, Target
from schedules.families.sm90.backward import config as dense
from schedules.families.sm90.backward.config import SECTION, Config, feasible, space
from schedules.families.sm90.backward.program import program as launches
from schedules.tile.tile_scheduler import Traversal

__all__ = ["Config", "default_configs", "feasible", "program", "space"]


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """As those of the usual backward, in sections of a fixed number of heads."""
    found = dense.default_configs(template, pattern, target)
    return {bucket: replace(config, head_section=SECTION) for bucket, config in found.items()}


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The launches; ``config`` must be feasible."""
    return launches(pattern, config, target, traversal, name, adds=True)

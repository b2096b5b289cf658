"""The backward of ragged sequences: the same launches, whose blocks of queries and of keys are slots that they look up.

What is behind the end of a sequence TMA reads as zero and doesn't write
(:func:`schedules.families.sm90.tma.encode_ragged`), and the first launch leaves rows there that weigh nothing.
"""

from __future__ import annotations

from dataclasses import replace

from schedules.definition.pattern import Pattern
from schedules.families.interface import Program, Rejected, Target
from schedules.families.sm90.backward import config as dense
from schedules.families.sm90.backward.config import SECTION, Config, space
from schedules.families.sm90.backward.program import program as launches
from schedules.tile.tile_scheduler import Traversal

__all__ = ["Config", "default_configs", "feasible", "program", "space"]


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """As those of dense tensors, in sections of a fixed number of heads; but for sinks and ids, which the joint
    backward has of dense tensors only."""
    if pattern.has_sink or not dense.is_plain(pattern):
        return {0: dense.apart(pattern)}
    return {0: replace(dense.default_configs(template, pattern, target)[0], head_section=SECTION)}


def feasible(pattern: Pattern, config: Config, target: Target) -> Rejected | None:
    """Whether the configuration can be compiled for the pattern; None if so."""
    if config.heads_first:
        return Rejected("heads_first: slots of ragged sequences may be more than a grid's third axis has")
    if config.joint and (pattern.has_sink or pattern.atoms):
        what = "sinks" if pattern.has_sink else "masks that read ids"
        return Rejected(f"joint: of ragged sequences it has no {what}")
    return dense.feasible(pattern, config, target)


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The launches; ``config`` must be feasible."""
    return launches(pattern, config, target, traversal, name, ragged=True)

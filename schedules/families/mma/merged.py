"""Results that are put into those of other keys, on the mma.sync families: the forward kernel with another end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from schedules.definition.pattern import Pattern
from schedules.families.interface import Program, Rejected, Target
from schedules.families.mma import mma
from schedules.tile.geometry import MergedGeometry
from schedules.tile.tile_scheduler import Traversal


@dataclass(frozen=True)
class MergedForward:
    """A family's kernels of this kind, with what :mod:`schedules.families.interface` asks of one.

    Attributes
    ----------
    Config, default_configs, space, feasible: what the family has for its forward kernel.
    machine: the type of machine that a configuration asks for.
    """

    Config: type
    default_configs: Callable[[str, Pattern, Target], dict[int, object]]
    space: Callable[[str, Pattern, Target], Mapping[str, tuple]]
    feasible: Callable[[Pattern, object, Target], Rejected | None]
    machine: Callable[[object], type]

    def program(self, pattern: Pattern, config, target: Target, traversal: Traversal, name: str) -> Program:
        """The kernel."""
        return mma.program(pattern, config, traversal, name, self.machine(config), MergedGeometry)

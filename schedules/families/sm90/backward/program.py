"""The three launches of a backward, and the memory between them."""

from __future__ import annotations

from schedules.definition.pattern import Pattern
from schedules.families.interface import Program, ScheduledLaunch, Target
from schedules.families.sm90.backward import keys, parameters, queries
from schedules.families.sm90.backward.config import Config
from schedules.tile.delta import delta
from schedules.tile.gradients import ALIGNMENT
from schedules.tile.tile_scheduler import Traversal
from tvm_flash.packs.manifest import Workspace


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The launches; ``config`` must be feasible."""
    return Program(
        "backward",
        (
            ScheduledLaunch(delta(pattern, traversal, name, ALIGNMENT), ("o", "do", "dlse", "delta")),
            queries.build(pattern, config, traversal, f"{name}_dq"),
            keys.build(pattern, config, traversal, f"{name}_dkdv"),
        ),
        "tirx",
        alignment=ALIGNMENT,
        index_bits=32,
        workspaces=(
            Workspace("delta", "float32", (("*", "batch", "heads", "seqlen_q"),)),
            *parameters.workspaces(pattern),
        ),
    )

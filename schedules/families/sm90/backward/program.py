"""The three launches of a backward, and the memory between them."""

from __future__ import annotations

from schedules.definition.pattern import Pattern
from schedules.families.interface import Program, ScheduledLaunch, Target
from schedules.families.sm90 import config as forward
from schedules.families.sm90.backward import convert, joint, keys, parameters, queries
from schedules.families.sm90.backward.config import Config
from schedules.tile.delta import delta
from schedules.tile.gradients import ALIGNMENT
from schedules.tile.tile_scheduler import Traversal
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import Workspace


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The launches; ``config`` must be feasible."""
    first = ScheduledLaunch(delta(pattern, traversal, name, ALIGNMENT), ("o", "do", "dlse", "delta"))
    deltas = Workspace("delta", "float32", (("*", "batch", "heads", "seqlen_q"),))
    if config.joint:
        launches = (
            first,
            joint.build(pattern, config, traversal, f"{name}_joint"),
            convert.build(pattern, config, traversal, f"{name}_dq"),
        )
        workspaces, scalars = (deltas, *joint.workspaces(pattern, config)), joint.scalars()
    else:
        launches = (
            first,
            queries.build(pattern, config, traversal, f"{name}_dq"),
            keys.build(pattern, config, traversal, f"{name}_dkdv"),
        )
        workspaces, scalars = (deltas, *parameters.workspaces(pattern)), ()
    memory = {"workspaces": workspaces, "scalars": scalars, "narrow_axes": _narrow_axes(config)}
    return Program("backward", launches, "tirx", alignment=ALIGNMENT, index_bits=32, **memory)


def _narrow_axes(config: Config) -> tuple[sizes.Expression, ...]:
    """What the launches have along the second and the third axis of their grids."""
    blocks = ("ceildiv", "seqlen_kv", config.block_keys)
    if config.joint:  # the last launch's, and the one's before, where each head may be several pairs
        pairs = ("*", "batch", "heads")
        return "heads", "batch", blocks, ("ceildiv", pairs, config.head_section)
    of_keys = ("batch", blocks) if config.heads_first else ("kv_heads", "batch")
    return tuple(dict.fromkeys((*forward.narrow_axes(config.for_queries), *of_keys)))

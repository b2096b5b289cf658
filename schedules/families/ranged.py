"""Programs with the launches before them that find what tiles of a mask that reads ids see."""

from __future__ import annotations

from dataclasses import replace

from schedules.definition.pattern import Pattern
from schedules.families.interface import Program, ScheduledLaunch
from schedules.tile import mask_ranges
from schedules.tile.mask_ranges import Ranged
from schedules.tile.tile_scheduler import Traversal


def own_name(known: Pattern | Ranged, name: str) -> str:
    """What the launch of a kernel is called that is the first, or comes after the one that finds ranges for it."""
    return f"{name}_attend" if isinstance(known, Ranged) else name


def with_ranges(program: Program, traversal: Traversal, name: str, *kinds: Pattern | Ranged) -> Program:
    """The program with a launch for each of ``kinds``, the pattern as its launches see it, that has ranges.

    These come first, or right after a launch that is called ``name``; what is first has that name.
    """
    kinds = tuple(x for x in kinds if isinstance(x, Ranged))
    led = int(program.launches[0].symbol == name)
    names = [f"{name}_{x.role}" for x in kinds] if led else [name, *(f"{name}_{x.role}" for x in kinds[1:])]
    found = (
        ScheduledLaunch(mask_ranges.find(known, traversal, own), mask_ranges.roles(known))
        for known, own in zip(kinds, names, strict=False)
    )
    launches = (*program.launches[:led], *found, *program.launches[led:])
    return replace(program, launches=launches, workspaces=(*program.workspaces, *map(mask_ranges.workspace, kinds)))

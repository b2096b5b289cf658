"""Programs with the launches before them that find what tiles of a mask see, where positions don't tell it of a row's
keys, or of a key's rows, as one interval."""

from __future__ import annotations

from dataclasses import replace

from schedules.definition.pattern import Pattern
from schedules.families.interface import Program, ScheduledLaunch
from schedules.tile import mask_lists, mask_ranges, mask_walks
from schedules.tile.mask_lists import Listed
from schedules.tile.mask_ranges import Ranged
from schedules.tile.mask_walks import Walked
from schedules.tile.tile_scheduler import Traversal

#: Orders of lists with which kernels have run on hardware; those that walk in another one do without a list.
LISTED = (mask_lists.PARTS,)


def with_tiles(
    pattern: Pattern, axis: str, own: int, others: int, warpgroups: int = 1, order: str = mask_lists.PARTS
) -> Pattern | Ranged | Listed:
    """The pattern as kernels see it whose blocks have ``own`` queries (``axis`` is ``"i"``) or keys (``"j"``), and
    visit tiles of ``others``: with ranges where it reads ids, with a list of tiles where it has gaps, else the same.

    Each of ``warpgroups`` asks for ranges of its own; ``order`` is that of lists.
    """
    if pattern.atoms:
        return Ranged(pattern, axis, own // warpgroups, warpgroups)
    return Listed(pattern, axis, own, others, order) if pattern.has_gaps and order in LISTED else pattern


def is_found(known: Pattern | Ranged | Listed) -> bool:
    """Whether a launch finds what tiles see."""
    return isinstance(known, Ranged | Listed)


def own_name(known: Pattern | Ranged | Listed, name: str) -> str:
    """What the launch of a kernel is called that is the first, or comes after the one that finds tiles for it."""
    return f"{name}_attend" if is_found(known) else name


def with_ranges(program: Program, traversal: Traversal, name: str, *kinds: Pattern | Ranged | Listed) -> Program:
    """The program with a launch for each of ``kinds``, the pattern as its launches see it, that has ranges or lists.

    These come first, or right after a launch that is called ``name``; what is first has that name.
    """
    kinds = tuple(x for x in kinds if is_found(x))
    led = int(program.launches[0].symbol == name)
    names = [f"{name}_{x.role}" for x in kinds] if led else [name, *(f"{name}_{x.role}" for x in kinds[1:])]
    found = (
        ScheduledLaunch(_module(known).find(known, traversal, own), _module(known).roles(known))
        for known, own in zip(kinds, names, strict=False)
    )
    launches = (*program.launches[:led], *found, *program.launches[led:])
    workspaces = (*program.workspaces, *(_module(known).workspace(known) for known in kinds))
    return replace(program, launches=launches, workspaces=workspaces)


def _module(known: Ranged | Listed):
    if isinstance(known, Walked):
        return mask_walks
    return mask_lists if isinstance(known, Listed) else mask_ranges

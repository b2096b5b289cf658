"""Template V2, seq-outer: layout ``(batch, seq, heads, head_dim)``, tensor cores, from Ampere on (and the CPU).

A position's rows of all heads lie one after the other in memory, so an m-block of all heads is one stretch of it: the
same rows of every head of a section are taken before the next rows.  A section is as many heads as the second-level
cache has room for with their keys and values, which are read again for each m-block.  M-blocks go from the last to the
first: under a causal mask a launch starts with the longest of all heads and ends with the shortest, so that no
processor is left with a long one at the end.
"""

from __future__ import annotations

from schedules.definition.pattern import Pattern
from schedules.families import schedule
from schedules.families.interface import FORWARD, Program, Rejected, Target, Traversal
from schedules.tile.tile_scheduler import SeqOuter

TRAVERSAL = Traversal("v2", layout="bshd", order=lambda work, section: SeqOuter(work, section()))


def apply(pattern: Pattern, target: Target, name: str, config=None, kind: str = FORWARD) -> Program | Rejected:
    """Schedule a matched definition as a V2 kernel.

    Parameters
    ----------
    pattern: what the matcher found in the definition.
    target: the machine.
    name: global symbol of the kernel.
    config: the kind's ``Config``; its default for this pattern and target if not given.
    kind: of kernel, one of those that the target's family makes.
    """
    return schedule(pattern, target, name, TRAVERSAL, config, kind)

"""Template V1, heads-outer: layout ``(batch, heads, seq, head_dim)``, for every arch.

Work is ordered by head: all row tiles of one head before the next head, so that a head's K and V stay in the cache that
the tiles share.
"""

from __future__ import annotations

from schedules.definition.pattern import Pattern
from schedules.families import schedule
from schedules.families.interface import FORWARD, HEADS_OUTER, Program, Rejected, Target


def apply(pattern: Pattern, target: Target, name: str, config=None, kind: str = FORWARD) -> Program | Rejected:
    """Schedule a matched definition as a V1 kernel.

    Parameters
    ----------
    pattern: what the matcher found in the definition.
    target: the machine.
    name: global symbol of the kernel.
    config: the kind's ``Config``; its default for this pattern and target if not given.
    kind: of kernel, one of those that the target's family makes.
    """
    return schedule(pattern, target, name, HEADS_OUTER, config, kind)

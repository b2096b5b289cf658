"""Template V2, seq-outer: layout ``(batch, seq, heads, head_dim)``, tensor cores, from Ampere on (and the CPU).

Work is ordered by row strip: the same rows of all heads before the next rows, as a row of all heads is contiguous in
memory, and the longest strips of a causal mask start first.
"""

from __future__ import annotations

from schedules.definition.pattern import Pattern
from schedules.families import schedule
from schedules.families.interface import FORWARD, SEQ_OUTER, Program, Rejected, Target


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
    return schedule(pattern, target, name, SEQ_OUTER, config, kind)

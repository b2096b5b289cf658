"""Which configurations of the Hopper family are worth trying."""

from __future__ import annotations

from collections.abc import Mapping

from schedules.pattern import Pattern
from schedules.template import Target


def space(template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
    """Values of each field of ``Config``; what isn't feasible among their combinations is refused before compiling.

    V1 is the plain schedule: a head after the other, a row tile a block.
    """
    chained = template == "v2" and not pattern.has_gaps
    return {
        "num_consumer_warpgroups": (2, 3),
        "block_n": (48, 64, 80, 96, 112, 128, 144, 160, 176, 192),
        "num_stages": (2, 4),
        "pingpong": (True, False),
        "tiles_per_cta": (1, 2) if chained else (1,),
        "running_max": (False, True),
        "head_section": (1, 2, 4, 8) if template == "v2" else (1,),
    }

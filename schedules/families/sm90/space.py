"""Which configurations of the Hopper family are worth trying."""

from __future__ import annotations

from collections.abc import Mapping

from schedules.definition.pattern import Pattern
from schedules.families.interface import Target
from schedules.families.sm90.config import BY_LENGTH, boxed


def space(template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
    """Values of each field of ``Config``; what isn't feasible among their combinations is refused before compiling.

    ``pack_heads`` concerns only grouped heads, and is the default's.
    """
    several = not pattern.has_gaps
    of_scores = any({"i", "j"} <= set(p.axes) for p in pattern.params)
    return {
        "num_consumer_warpgroups": (1, 2, 3, 4),
        "block_n": (48, 64, 80, 96, 112, 128),
        "num_stages": (2, 4),
        "blocks_per_sm": (1, 2, 3),
        "pingpong": (True, False),
        "tiles_per_cta": (1, 2) if several else (1,),
        "waves": (0, 1, 2) if several else (0,),
        "overlap_tiles": (False, True) if several else (False,),
        "separate_output": (False, True) if several else (False,),
        "running_max": (False,) if pattern.is_scale_only else (False, True),
        "tensors_ahead": (False, True) if of_scores and several else (False,),
        "tensor_stages": (0, 1, 2) if boxed(pattern) is not None and several else (0,),
        "batches_beside": (False, True) if boxed(pattern) is not None else (False,),
        "head_section": (1, BY_LENGTH),
    }

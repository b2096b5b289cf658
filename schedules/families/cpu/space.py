"""Which configurations of the CPU family are worth trying."""

from __future__ import annotations

from collections.abc import Mapping

from schedules.definition.pattern import Pattern
from schedules.families.cpu.config import multiplication
from schedules.families.cpu.isa import ISAS
from schedules.families.interface import Target


def space(template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
    """Values of each field of ``Config``; what isn't feasible among their combinations is refused before compiling."""
    isa = ISAS[target.isa]
    if multiplication(isa, pattern.dtype) == "tiles":
        return {"block_m": (64, 128, 256, 512), "block_n": (32, 64, 128, 256)}
    # A block_m of 24 vectors gained up to 4% more on two Zen 4 cores, and leaves too few work items for many cores.
    return {
        "block_m": tuple(isa.lanes * vectors for vectors in (2, 3, 4, 6, 8, 12, 16)),
        "block_n": (32, 64, 128, 256),
        "row_vectors": (1, 2, 3, 4),
        "tile_rows": (2, 4, 8),
    }

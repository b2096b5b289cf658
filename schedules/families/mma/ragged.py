"""Ragged sequences on the mma.sync families: the forward kernel with blocks that look their work tile up.

The keys are ragged as the rows are, or lie on pages.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from schedules.definition.pattern import Pattern
from schedules.families.interface import Program, Rejected, Target, paged_program, ragged_program
from schedules.families.mma import mma
from schedules.tile.slots import BYTES
from schedules.tile.tile_scheduler import Traversal


@dataclass(frozen=True)
class RaggedForward:
    """A family's kernels of this kind, with what :mod:`schedules.families.interface` asks of one.

    Attributes
    ----------
    Config, default_configs, space: what the family has for its forward kernel.
    fits: the family's ``feasible``, which is told what more shared memory is needed.
    machine: the type of machine that a configuration asks for.
    """

    Config: type
    default_configs: Callable[[str, Pattern, Target], dict[int, object]]
    space: Callable[[str, Pattern, Target], Mapping[str, tuple]]
    fits: Callable[..., Rejected | None]
    machine: Callable[[object], type]

    def feasible(self, pattern: Pattern, config, target: Target) -> Rejected | None:
        """Whether the machine has room for a block."""
        return self.fits(pattern, config, target, found=BYTES)

    def program(self, pattern: Pattern, config, target: Target, traversal: Traversal, name: str) -> Program:
        """The kernel."""
        func = mma.ragged_kernel(pattern, config, traversal, name, self.machine(config))
        return ragged_program(func, pattern.params, "tirx", alignment=mma.ALIGNMENT, index_bits=mma.INDEX_BITS)


class PagedForward(RaggedForward):
    """The same with the keys on pages."""

    def program(self, pattern: Pattern, config, target: Target, traversal: Traversal, name: str) -> Program:
        """The kernel."""
        func = mma.paged_kernel(pattern, config, traversal, name, self.machine(config))
        return paged_program(func, pattern.params, "tirx", alignment=mma.ALIGNMENT, index_bits=mma.INDEX_BITS)

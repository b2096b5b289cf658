"""The backward of the mma.sync families, a kind of their kernels: three launches, no sums between blocks.

1. ``delta`` of each row (:mod:`schedules.tile.delta`).
2. ``dk`` and ``dv``: a block owns keys, and visits the queries that see them (``keys.py``, ``key_machine.py``).
3. ``dq``: a block owns queries, and visits the keys that they see (``queries.py``, ``query_machine.py``).

Scores and their gradients are computed twice, seven products in place of five.  In return nothing is summed outside of
a block's own registers, so that the same call has the same bits on every run, and needs no memory but delta.  Gradients
of parameters are summed by a fourth launch from what each block of the third has left.  A configuration may ask for one
launch in place of the second and the third (``joint.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from schedules.definition.pattern import Pattern
from schedules.families.interface import Program, Rejected, Target
from schedules.families.mma.backward import program as launches
from schedules.families.mma.backward.config import MACHINE, Config, Machine, feasible
from schedules.tile.tile_scheduler import Traversal


@dataclass(frozen=True)
class Backward:
    """A family's kernels of this kind, with what :mod:`schedules.families.interface` asks of one.

    Attributes
    ----------
    machines: the types of its machines for dk and dv, for dq, and of the joint launch if it has one.
    choose: its configuration for a template, a pattern and a target.
    machine: what the configurations must fit.
    longer: further configurations by how many keys they are for at least.
    """

    machines: tuple[type, ...]
    choose: Callable[[str, Pattern, Target], Config]
    machine: Machine = MACHINE
    longer: Callable[[Pattern, Target], Mapping[int, Config]] = lambda pattern, target: {}

    Config = Config

    def default_configs(self, template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
        """The configurations of a pattern, by the fewest keys that they are for."""
        return {0: self.choose(template, pattern, target), **self.longer(pattern, target)}

    def space(self, template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
        """Values of each field that are worth trying."""
        return {
            "block_n": (32, 64, 128),
            "block_m": (16, 32, 64),
            "num_warps": (4, 8),
            "num_stages": (2, 3),
            "min_blocks_per_sm": (1, 2),
            "block_m_dq": (64, 128, 256),
            "block_n_dq": (16, 32, 64),
            "num_warps_dq": (4, 8),
            "num_stages_dq": (2, 3),
            "min_blocks_per_sm_dq": (1, 2),
            "warps_per_tile": (1, 2),
            "paced": (False, True),
            "joint": (False, True) if len(self.machines) > 2 else (False,),
        }

    def feasible(self, pattern: Pattern, config: Config, target: Target) -> Rejected | None:
        """Whether the machine has room for the blocks, and the score has a derivative."""
        return feasible(pattern, config, target, self.machine)

    def program(self, pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
        """The launches."""
        return launches.program(pattern, config, traversal, name, self.machines)


class AccumulatingBackward(Backward):
    """The same whose results are added to what is there, in float32."""

    def feasible(self, pattern: Pattern, config: Config, target: Target) -> Rejected | None:
        """Whether the machine has room for the blocks, and the launches can add."""
        if config.joint:
            return Rejected("joint: it stores its results")
        return super().feasible(pattern, config, target)

    def program(self, pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
        """The launches."""
        return launches.program(pattern, config, traversal, name, self.machines, adds=True)


class RaggedBackward(Backward):
    """The same of ragged sequences, whose blocks are slots that they look up."""

    def feasible(self, pattern: Pattern, config: Config, target: Target) -> Rejected | None:
        """Whether the machine has room for the blocks, and the score has a derivative."""
        return feasible(pattern, config, target, replace(self.machine, looks_up=True))

    def program(self, pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
        """The launches."""
        return launches.program(pattern, config, traversal, name, self.machines, ragged=True)

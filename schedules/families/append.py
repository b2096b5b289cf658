"""What turns new queries and keys and puts new keys and values into a cache, as a kind of kernels of GPU families."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.interface import Program, Rejected, ScheduledLaunch, Target
from schedules.tile import append
from schedules.tile.dtypes import element_type
from schedules.tile.tile_scheduler import Traversal
from tvm_flash.packs.manifest import APPEND, APPEND_ROLES


@dataclass(frozen=True)
class Config:
    """There is nothing to choose: a row of all heads is a block's."""


def by_instruction(dtype: str) -> Callable:
    """How machines from sm_80 on round two float32."""
    instruction = element_type(dtype).pack

    @T.inline
    def pack(to, i, low, high):
        T.ptx[instruction](to[i], high, low)

    return pack


@dataclass(frozen=True)
class Appending:
    """A family's kernels of this kind (:mod:`schedules.families.interface`).

    Attributes
    ----------
    pack: ``pack(dtype)`` is how it rounds two float32 to a register, ``(to, i, low, high)``.
    """

    pack: Callable[[str], Callable]
    Config: type = Config

    def default_configs(self, template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
        """The only one."""
        return {0: Config()}

    def space(self, template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
        """Nothing to search."""
        return {}

    def feasible(self, pattern: Pattern, config: Config, target: Target) -> Rejected | None:
        """Whether a row has no more chunks than a block has threads for keys."""
        if max(pattern.head_dim, pattern.head_dim_v) > append.MOST_COLUMNS:
            return Rejected(f"takes head_dim up to {append.MOST_COLUMNS}, the columns of half of a block")
        return None

    def program(self, pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
        """The kernel."""
        func = append.append(pattern.dtype, name, self.pack(pattern.dtype))
        launches = (ScheduledLaunch(func, APPEND_ROLES),)
        return Program(APPEND, launches, "tirx", alignment=append.ALIGNMENT, index_bits=append.INDEX_BITS)

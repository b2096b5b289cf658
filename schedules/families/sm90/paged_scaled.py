"""Prompts over pages of a cache of 8 bits on Hopper: the kernel of :mod:`schedules.families.sm90.paged`, into whose
stages a warpgroup widens keys and values (:mod:`schedules.families.sm90.widening`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families.interface import PAGED_SCALED, Program, Rejected, Target, paged_program
from schedules.families.mma.scaled import ScaledForward, asynchronous_kinds
from schedules.families.mma.widen import ScaledGeometry
from schedules.families.sm90 import paged, ragged
from schedules.families.sm90.barriers import WARPS
from schedules.families.sm90.kernel import ALIGNMENT, attend
from schedules.families.sm90.ragged import RaggedRows, RaggedScheduler
from schedules.families.sm90.widening import WidenedBoxes, staged_bytes
from schedules.tile.geometry import parameterised
from schedules.tile.tile_scheduler import Traversal

#: Consumer warpgroups.
_CONSUMERS = 2
#: Registers of a thread of the producer's warpgroup, of the one that widens, and of a consumer's: all that 64 Ki allow.
#: With 24 in place of 40, finding work tiles spills.
_PRODUCER, _WIDENING, _CONSUMER = 40, 88, 192


@dataclass(frozen=True)
class Config(ragged.Config):
    """As for keys of 16 bits; ``staging`` are bytes of shared memory for tiles of 8 bits and their scales."""

    staging: int = 0

    @property
    def threads(self) -> int:
        """Threads of a block: another warpgroup widens."""
        return 128 * (self.num_consumer_warpgroups + 2)

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a producer's and of a consumer's thread."""
        return _PRODUCER, _CONSUMER

    @property
    def widening_registers(self) -> int:
        """Registers of a thread that widens."""
        return _WIDENING

    @property
    def reserved_memory(self) -> int:
        """Bytes of shared memory beside queries, keys and values."""
        return self.staging


def _kernel(pattern: Pattern, config: Config, name: str, cache: str) -> PrimFunc:
    def make(parameters):
        @T.prim_func(check_well_formed=False)
        def attention(
            q: T.handle,
            k: T.handle,
            v: T.handle,
            o: T.handle,
            lse: T.handle,
            cu_seqlens_q: T.handle,
            seqlens_k: T.handle,
            page_table: T.handle,
            k_scale: T.handle,
            v_scale: T.handle,
            softmax_scale: T.float32,
        ):
            handles = T.meta_var(((q, k, v, o, lse), (cu_seqlens_q, seqlens_k, page_table), (k_scale, v_scale)))
            geometry = ScaledGeometry(pattern, *handles, softmax_scale, parameters, ALIGNMENT, cache)
            rows = RaggedRows(geometry, T.bind(T.truncdiv(geometry.heads, geometry.kv_heads)))
            boxes = T.meta_var(WidenedBoxes(geometry, pattern, config, cache))
            scheduler = RaggedScheduler(pattern, geometry, config, WARPS + 1)
            attend(pattern, config, geometry, rows, scheduler, boxes)

        return attention

    return parameterised(pattern, make).with_attr("global_symbol", name)


@dataclass(frozen=True)
class WidenedForward:
    """The kernels over a cache of one dtype; where they don't fit, those of ``beside``."""

    cache: str
    beside: ScaledForward
    Config = Config

    def default_configs(self, template: str, pattern: Pattern, target: Target) -> dict[int, object]:
        """The configuration of a pattern."""
        config = self.widened(template, pattern, target)
        if self.feasible(pattern, config, target) is None:
            return {0: config}
        return self.beside.default_configs(template, pattern, target)

    @staticmethod
    def widened(template: str, pattern: Pattern, target: Target) -> Config:
        """The configuration of 16 bits with as many consumers as there are registers for: the bits are the same."""
        (of_16,) = paged.default_configs(template, pattern, target).values()
        fields = {**vars(of_16), "num_consumer_warpgroups": _CONSUMERS}
        return Config(**fields, staging=staged_bytes(of_16.block_n, pattern.head_dim + pattern.head_dim_v))

    def space(self, template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
        """Values of each field that are worth trying."""
        return {"pingpong": (False, True), "running_max": (False, True)}

    def feasible(self, pattern: Pattern, config, target: Target) -> Rejected | None:
        """Whether the configuration can be compiled for the pattern."""
        if not isinstance(config, Config):
            return self.beside.feasible(pattern, config, target)
        if config.num_consumer_warpgroups != _CONSUMERS or config.blocks_per_sm != 1:
            return Rejected(f"expected num_consumer_warpgroups {_CONSUMERS} and blocks_per_sm 1")
        if pattern.head_dim % 64 or pattern.head_dim_v % 64:
            return Rejected("head_dim and head_dim_v must be multiples of 64, of which a warp widens 16 a lane")
        if config.block_n % 16 or config.staging < staged_bytes(config.block_n, pattern.head_dim + pattern.head_dim_v):
            return Rejected(f"block_n {config.block_n}, staging {config.staging}: too little for tiles of 8 bits")
        return paged.feasible(pattern, config, target)

    def program(self, pattern: Pattern, config, target: Target, traversal: Traversal, name: str) -> Program:
        """The kernel; ``config`` must be feasible."""
        if not isinstance(config, Config):
            return self.beside.program(pattern, config, target, traversal, name)
        func = _kernel(pattern, config, name, self.cache)
        return paged_program(func, pattern.params, "tirx", alignment=ALIGNMENT, index_bits=32, scaled=True)


#: The kinds, by name.
KINDS = {kind: WidenedForward(cache, asynchronous_kinds()[kind]) for cache, kind in PAGED_SCALED.items()}

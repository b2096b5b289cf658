"""Decoding over pages of a cache of 8 bits: the launches of :mod:`schedules.families.mma.paged_decode` with scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families import split_keys
from schedules.families.interface import PAGED_DECODE_SCALED, Program, Rejected, Target
from schedules.families.mma.mma import ALIGNMENT
from schedules.families.mma.paged_decode import PagedDecoding, attend_splits
from schedules.families.mma.scaled_machines import ScaledDecodeMachine, over
from schedules.families.mma.widen import SCALE_BYTES, ScaledGeometry
from schedules.tile.dtypes import element_type, tensor_types
from schedules.tile.geometry import parameterised
from schedules.tile.partial import PartialResults
from schedules.tile.tile_scheduler import Traversal


def partial(pattern: Pattern, config, name: str, machine_type, packs: bool, early: bool) -> PrimFunc:
    """``(q, k, v, o_partial, lse_partial, cu_seqlens_q, seqlens_k, page_table, k_scale, v_scale, softmax_scale,
    *params)``; else as without scales.
    """

    def make(values):
        @T.prim_func(check_well_formed=False)
        def attention(
            q: T.handle,
            k: T.handle,
            v: T.handle,
            o_partial: T.handle,
            lse_partial: T.handle,
            cu_seqlens_q: T.handle,
            seqlens_k: T.handle,
            page_table: T.handle,
            k_scale: T.handle,
            v_scale: T.handle,
            softmax_scale: T.float32,
        ):
            handles = T.meta_var(((q, k, v), (cu_seqlens_q, seqlens_k, page_table), (k_scale, v_scale)))
            geometry = ScaledGeometry(pattern, *handles, softmax_scale, values, ALIGNMENT, machine_type.cache)
            results = PartialResults((o_partial, lse_partial), pattern.head_dim_v)
            attend_splits(pattern, config, machine_type, geometry, results, packs, early)

        return attention.with_attr("global_symbol", name)

    return parameterised(pattern, make)


@dataclass(frozen=True)
class ScaledDecoding(PagedDecoding):
    """A family's kernels over a cache of one dtype."""

    cache: str = ""

    def feasible(self, pattern: Pattern, config, target: Target) -> Rejected | None:
        """Whether the machine has room for a block, and tiles fill the splits."""
        return self.refusal(config) or self.fits(pattern, config, target, found=self._beside(pattern, config))

    @staticmethod
    def refusal(config) -> Rejected | None:
        """What :class:`PagedDecoding` asks of a configuration, and that one warp has a row for each lane at most."""
        if config.num_warps != 1 or config.block_n > 32:
            return Rejected(f"num_warps {config.num_warps}, block_n {config.block_n}: expected one, and up to 32 keys")
        return PagedDecoding.refusal(config)

    @staticmethod
    def _beside(pattern: Pattern, config) -> int:
        """Bytes of shared memory beyond stages of 16 bits: those of scales, less what 8 bits save."""
        types, stored = tensor_types(pattern), element_type("int8").bytes
        saved = (pattern.head_dim + pattern.head_dim_v) * (types.k.bytes - stored)
        return config.num_stages * config.block_n * (2 * SCALE_BYTES - saved)

    def program(self, pattern: Pattern, config, target: Target, traversal: Traversal, name: str) -> Program:
        """The two launches."""
        machine = over(self.machine, self.cache, target.arch)
        func = partial(pattern, config, name, machine, not pattern.depends_on_head, self.early)
        return split_keys.scaled_program(pattern, func, name, alignment=ALIGNMENT, waits=self.early)


#: By head_dim, the first that is large enough.
CONFIGS: Mapping[int, tuple[int, int, int, int, int]] = {
    64: (16, 32, 1, 3, 12),
    128: (16, 32, 1, 2, 8),
    256: (16, 16, 1, 2, 8),
}


def kinds(config_type, fits, early: bool = False) -> dict[str, ScaledDecoding]:
    """The kinds of a family, by name."""
    configs = {d: config_type(*x, q_in_registers=d <= 128) for d, x in CONFIGS.items()}
    return {
        kind: ScaledDecoding(config_type, ScaledDecodeMachine, configs, fits, early, cache)
        for cache, kind in PAGED_DECODE_SCALED.items()
    }

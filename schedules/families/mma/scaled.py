"""Prompts over pages of a cache of 8 bits: the kernel of :mod:`schedules.families.mma.ragged` with scales."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families import limits
from schedules.families.interface import PAGED_SCALED, Program, Rejected, Target, paged_program
from schedules.families.mma import asynchronous, mma
from schedules.families.mma.ragged import RaggedForward
from schedules.families.mma.scaled_machines import ScaledMachine, over
from schedules.families.mma.widen import SCALE_BYTES, ScaledGeometry
from schedules.tile.dtypes import element_type, tensor_types
from schedules.tile.geometry import parameterised
from schedules.tile.slots import BYTES
from schedules.tile.tile_scheduler import Traversal


def kernel(pattern: Pattern, config, traversal: Traversal, name: str, machine_type) -> PrimFunc:
    """``(q, k, v, o, lse, cu_seqlens_q, seqlens_k, page_table, k_scale, v_scale, softmax_scale, *params)``."""

    def make(values):
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
            geometry = ScaledGeometry(pattern, *handles, softmax_scale, values, mma.ALIGNMENT, machine_type.cache)
            mma.attend_sequences(pattern, config, traversal, geometry, machine_type)

        return attention.with_attr("global_symbol", name)

    return parameterised(pattern, make)


def beside_stages(pattern: Pattern, config) -> int:
    """Bytes of shared memory beyond stages of 16 bits: a tile of 16 bits and scales, less what 8 bits save."""
    types, stored = tensor_types(pattern), element_type("int8").bytes
    elements = config.block_n * (pattern.head_dim + pattern.head_dim_v)
    scales = 2 * config.num_stages * config.block_n * SCALE_BYTES
    return elements * types.k.bytes + scales - config.num_stages * elements * (types.k.bytes - stored)


@dataclass(frozen=True)
class ScaledForward(RaggedForward):
    """A family's kernels over a cache of one dtype.

    Attributes
    ----------
    cache: its dtype.
    beside: bytes of shared memory that a block of a configuration needs more than one of 16 bits.
    """

    cache: str = ""
    beside: Callable[[Pattern, object], int] = beside_stages

    def feasible(self, pattern: Pattern, config, target: Target) -> Rejected | None:
        """Whether the machine has room for a block."""
        if config.warps_per_tile > 1:
            return Rejected(f"warps_per_tile {config.warps_per_tile}: what is widened isn't shared by pairs of warps")
        if getattr(config, "num_stages", 2) < 2:
            return Rejected(f"num_stages {config.num_stages}: bytes are widened while the next ones come; expected 2")
        return self.fits(pattern, config, target, found=BYTES + self.beside(pattern, config))

    def program(self, pattern: Pattern, config, target: Target, traversal: Traversal, name: str) -> Program:
        """The kernel."""
        func = kernel(pattern, config, traversal, name, over(self.machine(config), self.cache, target.arch))
        options = {"alignment": mma.ALIGNMENT, "index_bits": mma.INDEX_BITS, "scaled": True}
        return paged_program(func, pattern.params, "tirx", **options)


def kinds(*family, **options) -> dict[str, ScaledForward]:
    """The kinds of a family, by name."""
    return {kind: ScaledForward(*family, cache=cache, **options) for cache, kind in PAGED_SCALED.items()}


#: Of archs with asynchronous copies, by head_dim, the first that is large enough, where shared memory is 99 KiB: those
#: of 16 bits with as many parameters, so that results have the same bits.  With 4 warps at 128 it spilled 24 bytes on
#: sm_90a.
_CONFIGS = {
    64: asynchronous.Config(128, 32, 4, 2, 2, q_in_registers=True),
    128: asynchronous.Config(128, 32, 8, 2, 1),
    256: asynchronous.Config(64, 32, 4, 2, 1),
}
#: The same where it is larger.
_LARGE = {**_CONFIGS, 256: asynchronous.Config(128, 32, 8, 2, 1)}


def _configs(template: str, pattern: Pattern, target: Target) -> dict[int, asynchronous.Config]:
    """The configuration of a pattern."""
    return {0: limits.by_head_dim(_LARGE if target.arch in ("sm_80", "sm_90a") else _CONFIGS, pattern)}


def _space(template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
    """Values of each field that are worth trying."""
    return {"block_n": (16, 32, 48, 64), "num_stages": (2, 3), "min_blocks_per_sm": (1, 2)}


def asynchronous_kinds() -> dict[str, ScaledForward]:
    """The kinds of the families with asynchronous copies: also of Hopper, which has none of its own."""
    return kinds(asynchronous.Config, _configs, _space, asynchronous.feasible, lambda config: ScaledMachine)

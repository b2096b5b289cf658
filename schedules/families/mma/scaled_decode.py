"""Decoding over pages of a cache of 8 bits: the launches of :mod:`schedules.families.mma.paged_decode` with scales."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families import limits, split_keys
from schedules.families.interface import PAGED_DECODE_SCALED, Program, Rejected, Target
from schedules.families.mma.asynchronous import Config
from schedules.families.mma.mma import ALIGNMENT
from schedules.families.mma.paged_decode import PagedDecoding, attend_splits
from schedules.families.mma.scaled_machines import ScaledDecodeMachine, over
from schedules.families.mma.widen import SCALE_BYTES, ScaledGeometry
from schedules.tile.dtypes import element_type, tensor_types
from schedules.tile.geometry import parameterised
from schedules.tile.partial import PartialResults
from schedules.tile.tile_scheduler import Traversal


def partial(pattern: Pattern, config, name: str, machine_type, packs: bool, early: bool, few=None) -> PrimFunc:
    """``(q, k, v, o_partial, lse_partial, cu_seqlens_q, seqlens_k, page_table, k_scale, v_scale, softmax_scale,
    *params)``; else as without scales."""

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
            attend_splits(pattern, config, machine_type, geometry, results, packs, early, few)

        return attention.with_attr("global_symbol", name)

    return parameterised(pattern, make)


@dataclass(frozen=True)
class ScaledDecoding(PagedDecoding):
    """A family's kernels over a cache of one dtype.

    Attributes
    ----------
    cache: its dtype.
    transposed: the type of machine of configurations that are ``transposed``.
    few_configs: by head_dim, the configurations of kernels with a text of its own for few rows.
    """

    cache: str = ""
    transposed: type | None = None
    few_configs: Mapping[int, TransposedConfig] = field(default_factory=dict)

    def default_configs(self, template: str, pattern: Pattern, target: Target) -> dict[int, object]:
        """The configuration of a pattern."""
        found = limits.by_head_dim(self.configs, pattern)
        if self.few_configs and self._few(pattern, found) is not None:
            found = limits.by_head_dim(self.few_configs, pattern)
        return {0: found}

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

    def space(self, template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
        """Values of each field that are worth trying."""
        found = PagedDecoding.space(self, template, pattern, target)
        if self.transposed is None:
            return found
        return {**found, "transposed": (False, True), "min_blocks_per_sm": (8, 12, 16)}

    def _transposes(self, config) -> bool:
        """Whether keys are on the left of products."""
        return self.transposed is not None and config.transposed

    def _few(self, pattern: Pattern, config) -> Config | None:
        """The configuration for few rows, where it has the same bits.

        Rows that don't exist have scores of 0, which raise no reference unless something is added to them.
        """
        if not (self._transposes(config) and pattern.is_scale_only):
            return None
        return replace(config, block_m=self.transposed.fragment_type.tile_rows)

    def program(self, pattern: Pattern, config, target: Target, traversal: Traversal, name: str) -> Program:
        """The two launches."""
        machine = over(self.transposed if self._transposes(config) else self.machine, self.cache, target.arch)
        packs = not pattern.depends_on_head
        func = partial(pattern, config, name, machine, packs, self.early, self._few(pattern, config))
        return split_keys.paged_program(pattern, func, name, alignment=ALIGNMENT, waits=self.early, scaled=True)


@dataclass(frozen=True)
class TransposedConfig(Config):
    """``transposed`` has keys and values on the left of products (:mod:`schedules.families.mma.transposed`)."""

    transposed: bool = False


#: By head_dim, the first that is large enough.
CONFIGS: Mapping[int, tuple[int, int, int, int, int]] = {
    64: (16, 32, 1, 3, 12),
    128: (16, 32, 1, 2, 8),
    256: (16, 16, 1, 2, 8),
}


def kinds(
    config_type,
    fits,
    early: bool = False,
    transposed: type | None = None,
    few_blocks: Mapping[int, int] | None = None,
) -> dict[str, ScaledDecoding]:
    """The kinds of a family, by name.

    ``few_blocks``: head_dims at which keys are on the left by default, and blocks of a multiprocessor of kernels with a
    text for few rows there.
    """
    configs = {d: config_type(*x, q_in_registers=d <= 128) for d, x in CONFIGS.items()}
    configs |= {d: replace(configs[d], transposed=True) for d in few_blocks or {}}
    few_configs = {d: replace(configs[d], min_blocks_per_sm=n) for d, n in (few_blocks or {}).items()}
    of_all = {"early": early, "transposed": transposed, "few_configs": few_configs}
    return {
        kind: ScaledDecoding(config_type, ScaledDecodeMachine, configs, fits, cache=cache, **of_all)
        for cache, kind in PAGED_DECODE_SCALED.items()
    }

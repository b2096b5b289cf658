"""Decoding over pages of a cache of 8 bits on Hopper: keys and values on the left of products, in tiles that come in
boxes of TMA (:mod:`schedules.families.sm90.tile_ring`).

A call with few rows a key has a kernel of its own with half as many rows a tile, and so half the registers: 16 warps
share a multiprocessor then.  Beyond head_dim 128 kernels are those of :mod:`schedules.families.mma.scaled_decode`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families import split_keys
from schedules.families.interface import PAGED_DECODE_SCALED, Program, Target
from schedules.families.mma import asynchronous, scaled_decode
from schedules.families.mma.mma import ALIGNMENT
from schedules.families.mma.paged_decode import attend_splits
from schedules.families.mma.scaled_decode import ScaledDecoding
from schedules.families.mma.scaled_machines import ScaledDecodeMachine, over
from schedules.families.mma.widen import SCALE_BYTES
from schedules.families.sm90.tile_ring import ByteBoxes, RingMachine, place_bytes
from schedules.tile.dtypes import tensor_types
from schedules.tile.tile_scheduler import Traversal


@T.inline
def attend_by_boxes(pattern, config, machine_type, geometry, results, packs, early):
    """The body of a kernel: descriptors of keys and values, and what is done with the splits."""
    boxes = T.meta_var(ByteBoxes(geometry, config.block_n))
    k_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
    T.evaluate(boxes.encode(k_map, geometry.k, pattern.head_dim))
    v_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
    T.evaluate(boxes.encode(v_map, geometry.v, pattern.head_dim_v))
    machine = T.meta_var(functools.partial(machine_type, boxes=boxes))
    attend_splits(pattern, config, machine, geometry, results, packs, early)


@dataclass(frozen=True)
class Config(asynchronous.Config):
    """``transposed`` has keys and values on the left of products, and ``num_stages`` places for tiles of K or V.

    ``few_blocks_per_sm``: as ``min_blocks_per_sm``, of the kernel for few rows.
    """

    transposed: bool = False
    few_blocks_per_sm: int = 16


@dataclass(frozen=True)
class RingDecoding(ScaledDecoding):
    """The kernels over a cache of one dtype."""

    def space(self, template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
        """Values of each field that are worth trying."""
        found = ScaledDecoding.space(self, template, pattern, target)
        return {
            **found,
            "transposed": (False, True),
            "num_stages": (2, 3, 4, 5, 6),
            "min_blocks_per_sm": (8, 12),
            "few_blocks_per_sm": (12, 16, 20),
        }

    @staticmethod
    def _beside(pattern: Pattern, config) -> int:
        if not config.transposed:
            return ScaledDecoding._beside(pattern, config)
        types, columns = tensor_types(pattern), (pattern.head_dim, pattern.head_dim_v)
        found = config.num_stages * (place_bytes(config.block_n, max(columns)) + config.block_n * SCALE_BYTES)
        return found - config.num_stages * config.block_n * sum(columns) * types.k.bytes

    def program(self, pattern: Pattern, config, target: Target, traversal: Traversal, name: str) -> Program:
        """The launches."""
        if not config.transposed:
            return ScaledDecoding.program(self, pattern, config, target, traversal, name)
        packs = not pattern.depends_on_head

        def make(config, name, when=""):
            machine = over(RingMachine, self.cache, target.arch)
            return scaled_decode.partial(pattern, config, name, machine, packs, self.early, attend_by_boxes, when)

        few = None
        # Rows that don't exist have scores of 0, which raise no reference unless something is added to them: else a
        # tile of fewer rows would have other bits.
        if pattern.is_scale_only:
            rows = RingMachine.fragment_type.tile_rows
            config_of_few = replace(config, block_m=rows, min_blocks_per_sm=config.few_blocks_per_sm)
            few = make(config_of_few, f"{name}_few", "few"), rows
        func = make(config, name, "more" if few else "")
        return split_keys.scaled_program(pattern, func, few, name, alignment=ALIGNMENT, waits=self.early)


#: By head_dim, the first that is large enough.
CONFIGS: Mapping[int, Config] = {
    64: Config(16, 32, 1, 4, 12, q_in_registers=True, transposed=True, few_blocks_per_sm=20),
    128: Config(16, 32, 1, 3, 8, q_in_registers=True, transposed=True),
    256: Config(*scaled_decode.CONFIGS[256]),
}

#: The kinds, by name.
KINDS = {
    kind: RingDecoding(Config, ScaledDecodeMachine, CONFIGS, asynchronous.feasible, early=True, cache=cache)
    for cache, kind in PAGED_DECODE_SCALED.items()
}

"""Decoding: few query rows for each head of keys, so that the keys are split among blocks.

Two launches.  The first (:mod:`schedules.families.sm90.split_kernel`) leaves a normalised output in float32 and its
log-sum-exp of each split of the keys.  The second combines the splits (:mod:`schedules.tile.combine`); it begins while
the first one ends.

Splits are at fixed positions, multiples of a length that follows from the number of keys alone, so that a sequence has
the same bits in any batch.  One kernel for a window with sides beyond the ends serves full and causal attention as
well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families import split_keys
from schedules.families.interface import Program, Rejected, Target
from schedules.families.sm90.barriers import WARPGROUP_THREADS
from schedules.families.sm90.boxes import DenseBoxes
from schedules.families.sm90.config import BARRIER_BYTES, OTHER_REGISTERS, PANEL, REGISTERS, WARPGROUP_ROWS, panels
from schedules.families.sm90.config import available_memory as _available_memory
from schedules.families.sm90.parts import PartScheduler
from schedules.families.sm90.split_kernel import compute_parts
from schedules.tile.geometry import Geometry, parameterised
from schedules.tile.partial import PartialResults
from schedules.tile.tile_scheduler import Traversal

ALIGNMENT = 16  # bytes; what TMA asks of addresses and strides

#: Keys of a split, by the fewest keys of the sequence: as few as fill the machine with one sequence, unless its blocks
#: would take longer to start and end than to read (the table in docs/hopper.md, "Decoding").
SPLIT_LENGTHS = ((0, 64), (1024, 128), (4096, 256), (8192, 512), (65536, 1024), (131072, 2048))


@dataclass(frozen=True)
class Config:
    """How a decoding kernel is scheduled.

    Attributes
    ----------
    block_n: keys of a tile, a multiple of 16 that divides every split.
    num_stages: stages of each of the two pipelines, of K and of V; a power of two.
    blocks_per_sm: blocks that share a multiprocessor.
    pack_heads: query heads of a group share a work tile (``packing.py``).
    """

    block_n: int = 64
    num_stages: int = 2
    blocks_per_sm: int = 2
    pack_heads: bool = True

    # What the main loop asks of a configuration.
    num_consumer_warpgroups = 1
    block_m = WARPGROUP_ROWS
    pingpong = overlap_tiles = several_tiles = persistent = False
    tiles_per_cta = 1

    @property
    def threads(self) -> int:
        """Threads of a block: the consumer warpgroup and that of those which fetch."""
        return 2 * WARPGROUP_THREADS

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread that fetches, and of a consumer's."""
        return REGISTERS[1, max(self.blocks_per_sm, 2)]


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """The configuration of a pattern."""
    packs = not pattern.depends_on_head
    if pattern.head_dim <= 64:
        return {0: Config(num_stages=4, pack_heads=packs)}
    if pattern.head_dim <= 128:
        return {0: Config(pack_heads=packs)}
    return {0: Config(num_stages=2, blocks_per_sm=1, pack_heads=packs)}


def space(template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
    """Values of each field of ``Config`` that are worth trying."""
    return {"block_n": (32, 64), "num_stages": (2, 4, 8), "blocks_per_sm": (1, 2, 3, 4)}


def feasible(pattern: Pattern, config: Config, target: Target) -> Rejected | None:
    """Whether the configuration can be compiled for the pattern."""
    for name, head_dim in (("head_dim", pattern.head_dim), ("head_dim_v", pattern.head_dim_v)):
        if head_dim % 16 or not 16 <= head_dim <= 256:
            return Rejected(f"{name} {head_dim} is not a multiple of 16 from 16 to 256")
    if config.block_n % 16:
        return Rejected(f"block_n {config.block_n} is not a multiple of 16")
    if refusal := split_keys.undivided(config.block_n, SPLIT_LENGTHS):
        return refusal
    if config.num_stages not in (2, 4, 8):
        return Rejected(f"num_stages {config.num_stages} is not 2, 4 or 8")
    if pattern.depends_on_head and config.pack_heads:
        return Rejected("a score or a mask that differs from head to head can't have heads packed")
    available = _available_memory(config)
    if (needed := _shared_memory(pattern, config)) > available:
        return Rejected(f"needs {needed} bytes of shared memory, a block of {target} has {available}")
    needed = config.block_n // 2 + config.block_n // 4 + pattern.head_dim_v // 2 + OTHER_REGISTERS
    if needed > config.registers[1]:
        return Rejected(f"needs about {needed} registers a thread, a consumer has {config.registers[1]}")
    return None


def _shared_memory(pattern: Pattern, config: Config) -> int:
    keys = config.num_stages * config.block_n * (panels(pattern.head_dim) + panels(pattern.head_dim_v))
    return (config.block_m * panels(pattern.head_dim) + keys) * 2 * PANEL + BARRIER_BYTES


def partial(pattern: Pattern, config: Config, traversal: Traversal, name: str) -> PrimFunc:
    """``(q, k, v, o_partial, lse_partial, softmax_scale, split_length, *params)``."""
    return parameterised(pattern, lambda parameters: _partial(pattern, config, traversal, parameters)).with_attr(
        "global_symbol", name
    )


def _partial(pattern: Pattern, config: Config, traversal: Traversal, parameters: dict) -> PrimFunc:
    @T.prim_func(check_well_formed=False)
    def attention(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        o_partial: T.handle,
        lse_partial: T.handle,
        softmax_scale: T.float32,
        split_length: T.int32,
    ):
        geometry = Geometry(pattern, traversal, (q, k, v), softmax_scale, parameters, ALIGNMENT)
        results = PartialResults((o_partial, lse_partial), pattern.head_dim_v)
        scheduler = PartScheduler(pattern, geometry, config, lambda keys: split_length, results.splits)
        compute_parts(pattern, geometry, scheduler, DenseBoxes(geometry, None), results)

    return attention


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The two launches; ``config`` must be feasible."""
    func = partial(pattern, config, traversal, name)
    return split_keys.program(pattern, func, traversal, name, SPLIT_LENGTHS, alignment=ALIGNMENT, waits=True)

"""Decoding over keys on pages on Hopper: few query rows for each head of keys, so that the keys are split among blocks.

The kernel of :mod:`schedules.families.sm90.split_kernel`, whose tiles of keys are several boxes of TMA
(:class:`schedules.families.sm90.boxes.FetchedPages`).  How long the splits of a sequence are follows from its own
number of keys, which the device reads; blocks are as many as the machine runs at a time.

The second launch knows by itself which splits a row has: what the first one doesn't write of the states is never
read.  Where sequences are few and short there is none: clusters of blocks fold the states.

Where that isn't faster (:func:`_by_boxes`), kernels are those of mma.sync (:mod:`schedules.families.mma.paged_decode`):
rows of wgmma are 64, which heads that can't share a tile don't fill.  For pages that aren't whole boxes there are such
kernels beside (:data:`ANY_PAGES`), of a kind of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families import split_keys
from schedules.families.interface import Program, Rejected, Target
from schedules.families.mma import asynchronous
from schedules.families.mma.paged_decode import PagedDecoding
from schedules.families.sm90 import decode
from schedules.families.sm90.barriers import WARPGROUP_THREADS
from schedules.families.sm90.boxes import FetchedPages
from schedules.families.sm90.config import (
    BARRIER_BYTES,
    OTHER_REGISTERS,
    PANEL,
    WARPGROUP_ROWS,
    available_memory,
    panels,
)
from schedules.families.sm90.kernel import ALIGNMENT
from schedules.families.sm90.parts import PartScheduler
from schedules.families.sm90.split_kernel import compute_parts
from schedules.families.sm90.states import bytes_of_states
from schedules.tile.geometry import PagedGeometry, parameterised
from schedules.tile.states import PartialStates
from schedules.tile.tile_scheduler import Traversal

__all__ = ["Config", "default_configs", "feasible", "program", "space"]

#: Keys of a split, by the sequence's own number of keys; powers of two.
SPLIT_LENGTHS = ((0, 64), (384, 128), (1537, 256), (8192, 512), (65536, 1024), (131072, 2048))

#: Registers of a thread that fetches, and of a consumer's, by blocks of a multiprocessor: what looks pages up spills
#: with 24, and what shares tiles at head_dim 64 with 40.
_REGISTERS = {1: (40, 248), 2: (48, 208), 3: (40, 120), 4: (40, 88)}

#: The kernels of mma.sync.
_WARPS = PagedDecoding(
    asynchronous.Config,
    asynchronous.DecodeMachine,
    {
        64: asynchronous.Config(16, 32, 1, 3, 8, q_in_registers=True),
        128: asynchronous.Config(16, 32, 1, 2, 6, q_in_registers=True),
        256: asynchronous.Config(16, 16, 1, 3, 3),
    },
    asynchronous.feasible,
    early=True,
)


@dataclass(frozen=True)
class AnyPages(PagedDecoding):
    """The same kernels where the usual ones go by boxes, for pages that aren't whole boxes."""

    def feasible(self, pattern: Pattern, config, target: Target) -> Rejected | None:
        """Whether the configuration can be compiled, and there is a use for it."""
        if not _by_boxes(pattern):
            return Rejected("kernels of the kind paged_decode are for pages of any size here")
        return PagedDecoding.feasible(self, pattern, config, target)


ANY_PAGES = AnyPages(asynchronous.Config, asynchronous.DecodeMachine, _WARPS.configs, asynchronous.feasible, early=True)

#: Rows that boxes must have for the run time to choose this kernel.  Prompts on pages of one key reach a fifth of what
#: they do on pages of 16 (docs/hopper.md, "Keys on pages"); decoding by boxes of few rows was never timed.
BOX_ROWS = 16


@dataclass(frozen=True)
class Config:
    """How the kernel is scheduled.

    Attributes
    ----------
    block_n: keys of a tile, a power of two from 16 to 128; no split is shorter.
    num_stages: stages of each of the two pipelines, of K and of V.
    blocks_per_sm: blocks that share a multiprocessor.
    pack_heads: query heads of a group share a row tile.
    """

    block_n: int = 64
    num_stages: int = 2
    blocks_per_sm: int = 2
    pack_heads: bool = True

    # What the main loop asks of a configuration.
    num_consumer_warpgroups = 1
    block_m = WARPGROUP_ROWS
    pingpong = overlap_tiles = persistent = False
    several_tiles = True
    tiles_per_cta = 1

    @property
    def threads(self) -> int:
        """Threads of a block: the consumer warpgroup and that of those which fetch."""
        return 2 * WARPGROUP_THREADS

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a thread that fetches, and of a consumer's."""
        return _REGISTERS[self.blocks_per_sm]


def split_lengths(config: Config) -> split_keys.SplitLengths:
    """Keys of a split with a configuration, by the sequence's own number of keys: whole tiles."""
    return tuple((fewest, max(length, config.block_n)) for fewest, length in SPLIT_LENGTHS)


def _by_boxes(pattern: Pattern) -> bool:
    """Whether TMA and wgmma are the faster ones for a pattern.

    On an H200, pages of 16, us by both: head_dim 64 1 x 4k keys of 32 heads on 8 10.4 and 18.8, 64 x 1k 47 and 77,
    16 x 4k 46.6 and 46.8; head_dim 256 with heads of 2048 columns in groups of four 44.4 and 43.8 (16 x 4k); with heads
    that aren't packed 213 and 149 at 128.
    """
    return not pattern.depends_on_head and pattern.head_dim <= 128


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, object]:
    """The configuration of a pattern."""
    if not _by_boxes(pattern):
        return _WARPS.default_configs(template, pattern, target)
    return {0: Config(num_stages=4 if pattern.head_dim <= 64 else 2)}


def space(template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
    """Values of each field of a pattern's configuration that are worth trying."""
    if not _by_boxes(pattern):
        return _WARPS.space(template, pattern, target)
    return {"block_n": (32, 64), "num_stages": (2, 3, 4, 6), "blocks_per_sm": (1, 2, 3)}


def feasible(pattern: Pattern, config: Config | asynchronous.Config, target: Target) -> Rejected | None:
    """Whether the configuration can be compiled for the pattern."""
    if not isinstance(config, Config):
        return _WARPS.feasible(pattern, config, target)
    for name, head_dim in (("head_dim", pattern.head_dim), ("head_dim_v", pattern.head_dim_v)):
        if head_dim % 16 or not 16 <= head_dim <= 256:
            return Rejected(f"{name} {head_dim} is not a multiple of 16 from 16 to 256")
    if config.block_n not in (16, 32, 64, 128):
        return Rejected(f"block_n {config.block_n} is no power of two from 16 to 128, of which splits are")
    if not 2 <= config.num_stages <= 8:
        return Rejected(f"num_stages {config.num_stages} is not from 2 to 8")
    if config.blocks_per_sm not in _REGISTERS:
        return Rejected(f"blocks_per_sm {config.blocks_per_sm} is not from 1 to 4")
    if pattern.depends_on_head and config.pack_heads:
        return Rejected("a score or a mask that differs from head to head can't have heads packed")
    keys = config.num_stages * config.block_n * (panels(pattern.head_dim) + panels(pattern.head_dim_v))
    needed = (config.block_m * panels(pattern.head_dim) + keys) * 2 * PANEL + bytes_of_states(pattern) + BARRIER_BYTES
    if needed > (available := available_memory(config)):
        return Rejected(f"needs {needed} bytes of shared memory, a block of {target} has {available}")
    needed = config.block_n // 2 + config.block_n // 4 + pattern.head_dim_v // 2 + OTHER_REGISTERS
    if needed > config.registers[1]:
        return Rejected(f"needs about {needed} registers a thread, a consumer has {config.registers[1]}")
    return None


def _shares(pattern: Pattern, config: Config, name: str) -> PrimFunc:
    """``(q, k, v, o_partial, sums_partial, cu_seqlens_q, seqlens_k, page_table, softmax_scale, longer, spread,
    *params)``: blocks that share all tiles, and leave states; ``spread`` says that they are needed."""

    def make(parameters):
        @T.prim_func(check_well_formed=False)
        def attention(
            q: T.handle,
            k: T.handle,
            v: T.handle,
            o_partial: T.handle,
            sums_partial: T.handle,
            cu_seqlens_q: T.handle,
            seqlens_k: T.handle,
            page_table: T.handle,
            softmax_scale: T.float32,
            longer: T.int32,
            spread: T.int32,
        ):
            handles = T.meta_var(((q, k, v), (cu_seqlens_q, seqlens_k, page_table)))
            geometry = PagedGeometry(pattern, *handles, softmax_scale, parameters, ALIGNMENT)
            states = PartialStates((o_partial, sums_partial), pattern.head_dim_v)
            scheduler = PartScheduler(pattern, geometry, config, _split_bits(config, longer), most_splits=states.parts)
            compute_parts(pattern, geometry, scheduler, FetchedPages(geometry, config.block_n), states)

        return attention

    return parameterised(pattern, make).with_attr("global_symbol", name)


def _clusters(pattern: Pattern, config: Config, name: str) -> PrimFunc:
    """``(q, k, v, o, lse, cu_seqlens_q, seqlens_k, page_table, softmax_scale, longer, runs, *params)``: clusters of
    ``runs`` blocks, which fold states."""

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
            softmax_scale: T.float32,
            longer: T.int32,
            runs: T.int32,
        ):
            handles = T.meta_var(((q, k, v, o, lse), (cu_seqlens_q, seqlens_k, page_table)))
            geometry = PagedGeometry(pattern, *handles, softmax_scale, parameters, ALIGNMENT)
            scheduler = PartScheduler(pattern, geometry, config, _split_bits(config, longer), runs=runs)
            compute_parts(pattern, geometry, scheduler, FetchedPages(geometry, config.block_n))

        return attention

    return parameterised(pattern, make).with_attr("global_symbol", name)


def _split_bits(config: Config, longer):
    """Of how many tiles the splits of a sequence are, as a power of two, by its keys."""
    return lambda keys: split_keys.paged_split_bits(keys, config.block_n, split_lengths(config), longer)


def program(
    pattern: Pattern, config: Config | asynchronous.Config, target: Target, traversal: Traversal, name: str
) -> Program:
    """The launches; ``config`` must be feasible."""
    if not isinstance(config, Config):
        return _WARPS.program(pattern, config, target, traversal, name)
    return split_keys.parts_program(
        pattern,
        _clusters(pattern, config, name),
        _shares(pattern, config, f"{name}_shares"),
        f"{name}_combine",
        split_lengths(config),
        resident=decode.MULTIPROCESSORS * config.blocks_per_sm,
        packs=config.pack_heads,
        most_rows=WARPGROUP_ROWS,
        page_step=BOX_ROWS,
        alignment=ALIGNMENT,
    )

"""Ragged sequences on Hopper: a block for each slot of each head, which looks its work tile up before it begins.

The hardware hands slots out as multiprocessors become free, the long tiles of a sequence before its short ones and
all heads of a slot one after the other, so that lengths, which no host knows, even out by themselves.  What is behind
the end of a sequence TMA reads as zero and doesn't write (:func:`schedules.families.sm90.tma.encode_ragged`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families.interface import Program, Rejected, Target, ragged_program
from schedules.families.sm90 import config as forward_config
from schedules.families.sm90 import defaults
from schedules.families.sm90.boxes import RaggedBoxes
from schedules.families.sm90.config import Config
from schedules.families.sm90.kernel import ALIGNMENT, attend
from schedules.tile.geometry import RaggedGeometry, parameterised
from schedules.tile.slots import WORDS, FoundTile, Own
from schedules.tile.tile_scheduler import InOneRow, Place, SeqOuter, Traversal

__all__ = ["Config", "default_configs", "feasible", "program", "space"]


@T.meta_class
class RaggedScheduler:
    """One work tile a block, looked up once; the blocks are in one row, the heads of a slot side by side.

    Made before ``T.device_entry()``.
    """

    def __init__(self, geometry: RaggedGeometry, config: Config):
        self.geometry, self.config = geometry, config
        work = geometry.work(config.block_m)
        self.order = InOneRow(SeqOuter(work, T.bind(geometry.heads)))

    def grid(self):
        """Blocks along each axis."""
        return [*self.order.grid()]

    def add_memory(self, pool):
        """Room for what is looked up."""
        self.found = FoundTile(pool.alloc((WORDS,), "int32"))
        self.geometry.queries, self.geometry.keys = Own(self.found.queries), Own(self.found.keys)

    @T.inline
    def find(self, block, lane):
        """A warp: look the block's work tile up."""
        item = T.meta_var(self.order.work_tile(Place(block, 0, 0, 0)))
        slot: T.int32 = item.m_block
        starts = T.meta_var(self.geometry.starts)
        self.found.look_up(*starts, self.config.block_m, item._replace(m_block=slot), lane)
        T.cuda.warp_sync()

    @T.inline
    def if_found(self, work):
        """Do the work of the work tile, if the slot has one."""
        if self.found.m_block >= 0:
            work()

    def work_tile(self, at, tile):
        """M-block, query head and sequence of the work tile."""
        return self.found.m_block, self.found.head, self.found.sequence

    def first_row(self, place, tile):
        """First row of an m-block."""
        return place * self.config.block_m

    def key_tiles(self, at):
        """A block has all tiles of keys."""
        return


@T.meta_class
class RaggedRows:
    """Rows are positions of the sequence; made before ``T.device_entry()``.

    The last work tile of a sequence often has warpgroups without rows, which let its tiles of keys pass.
    """

    may_be_absent = True

    def __init__(self, geometry: RaggedGeometry):
        self.geometry = geometry
        self.group = T.bind(T.truncdiv(geometry.heads, geometry.kv_heads))

    @property
    def count(self):
        """Rows of the sequence."""
        return self.geometry.queries.of(None).length

    def position(self, row):
        """The query of a row."""
        return row

    def head(self, row):
        """The query head of a row, counted from that of row 0."""
        return 0

    def span(self, row_first, rows: int):
        """First and last position (inclusive) of ``rows`` rows."""
        return row_first, T.min(row_first + rows, self.count) - 1


def _build(pattern: Pattern, config: Config, traversal: Traversal, name: str) -> PrimFunc:
    def make(parameters):
        @T.prim_func(check_well_formed=False)
        def attention(
            q: T.handle,
            k: T.handle,
            v: T.handle,
            o: T.handle,
            lse: T.handle,
            cu_seqlens_q: T.handle,
            cu_seqlens_k: T.handle,
            softmax_scale: T.float32,
        ):
            handles = T.meta_var(((q, k, v, o, lse), (cu_seqlens_q, cu_seqlens_k)))
            geometry = RaggedGeometry(pattern, traversal, *handles, softmax_scale, parameters, ALIGNMENT)
            scheduler = RaggedScheduler(geometry, config)
            attend(pattern, config, geometry, RaggedRows(geometry), scheduler, RaggedBoxes(geometry))

        return attention

    return parameterised(pattern, make).with_attr("global_symbol", name)


def _alone(config: Config) -> Config:
    return replace(
        config, tiles_per_cta=1, waves=0, overlap_tiles=False, separate_output=False, pack_heads=False, head_section=1
    )


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """One configuration: which kernel runs may not depend on lengths."""
    if pattern.head_dim <= 64 and pattern.is_scale_only:
        return {0: Config(num_consumer_warpgroups=1, block_n=64, num_stages=4, blocks_per_sm=3, pingpong=False)}
    if pattern.head_dim <= 128 and pattern.is_scale_only:
        return {0: Config(block_n=64, num_stages=4)}
    return {0: _alone(defaults.default_configs(template, pattern, target)[0])}


def space(template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
    """Values of each field that are worth trying."""
    return {
        "num_consumer_warpgroups": (1, 2, 3),
        "block_n": (48, 64, 80, 96, 128),
        "num_stages": (2, 4),
        "blocks_per_sm": (1, 2, 3),
        "pingpong": (False, True),
        "running_max": (False, True),
    }


def feasible(pattern: Pattern, config: Config, target: Target) -> Rejected | None:
    """Whether the configuration can be compiled for the pattern: a block has one work tile, of one head."""
    if config != _alone(config):
        return Rejected("blocks have one work tile, of one head: tiles_per_cta 1, waves 0, nothing that needs several")
    return forward_config.feasible(pattern, config, target)


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The kernel; ``config`` must be feasible."""
    func = _build(pattern, config, traversal, name)
    return ragged_program(func, pattern.params, "tirx", alignment=ALIGNMENT, index_bits=32)

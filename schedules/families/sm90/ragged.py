"""Ragged sequences on Hopper: a block computes the rows of a slot, which it looks up before it begins, for a few heads.

The hardware hands slots out as multiprocessors become free, the long tiles of a sequence before its short ones and
all heads of a slot one after the other, so that lengths, which no host knows, even out by themselves.  The work tiles
of a block are those of one slot: they are equally long, looked up once, and the queries and keys of the next come
while one is computed.  What is behind the end of a sequence TMA reads as zero and doesn't write
(:func:`schedules.families.sm90.tma.encode_ragged`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families.interface import Program, Rejected, Target, ragged_program
from schedules.families.sm90 import config as forward_config
from schedules.families.sm90 import defaults
from schedules.families.sm90.boxes import RaggedBoxes
from schedules.families.sm90.config import Config as ForwardConfig
from schedules.families.sm90.kernel import ALIGNMENT, attend
from schedules.tile.geometry import RaggedGeometry, parameterised
from schedules.tile.slots import WORDS, FoundTile, Own
from schedules.tile.tile_scheduler import InOneRow, Place, SeqOuter, Traversal

__all__ = ["Config", "default_configs", "feasible", "program", "space"]


@dataclass(frozen=True)
class Config(ForwardConfig):
    """As for dense sequences, but for what blocks go on to.

    Attributes
    ----------
    most_heads: heads of a slot that a block computes, a power of two; half of them, and so on, where heads don't
        divide into so many.
    """

    most_heads: int = 1

    @property
    def several_tiles(self) -> bool:
        """Whether blocks may compute more than one work tile."""
        return self.most_heads > 1


@T.meta_class
class RaggedScheduler:
    """The rows of one slot a block, looked up once; the blocks are in one row, those of a slot side by side.

    Made before ``T.device_entry()``.
    """

    def __init__(self, geometry: RaggedGeometry, config: Config):
        self.geometry, self.config = geometry, config
        heads = T.int32(1)
        for n in (1 << x for x in range(1, config.most_heads.bit_length())):
            heads = T.Select(T.truncmod(geometry.heads, n) == 0, T.int32(n), heads)
        self.heads = T.bind(heads) if config.several_tiles else 1
        shares = T.bind(T.truncdiv(geometry.heads, self.heads))
        self.order = InOneRow(SeqOuter(replace(geometry.work(config.block_m), heads=shares), shares))

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

    def tiles(self, at):
        """How many work tiles a block computes."""
        return self.heads

    def work_tile(self, at, tile):
        """M-block, query head and sequence of work tile number ``tile``."""
        return self.found.m_block, self.found.head * self.heads + tile, self.found.sequence

    def first_row(self, place, tile):
        """First row of an m-block."""
        return place * self.config.block_m

    def key_tiles(self, at):
        """A block has all tiles of keys of its rows."""
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


#: What a block of ragged sequences doesn't have: places of other rows, and packed heads.
_ALONE = {"tiles_per_cta": 1, "waves": 0, "pack_heads": False, "head_section": 1}


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """One configuration: which kernel runs may not depend on lengths.

    TFLOP/s on an H200, bfloat16, 32, 16 and 8 sequences of about 512, 2k and 4k, 32 heads on 8 of 128, causal: 128 keys
    357, 573, 631; 64 keys in 4 stages 384, 559, 585, with one head a block 314, 537, 608.  Heads of 64, full, 64
    sequences of about 256, 128 of 128, then 32, 8 and 1 of 512, 2k and 16k each: four warpgroups 218, 146, 446, 526,
    533; a block of one, three of which share a multiprocessor, 244, 162, 325, 404, 450.
    """
    alone = any(p.per_head for p in pattern.params) or pattern.has_gaps
    heads = {"most_heads": 1 if alone else 4}
    if pattern.head_dim <= 64 and pattern.is_scale_only:
        many = Config(num_consumer_warpgroups=4, block_n=64, num_stages=4, pingpong=False)
        return {0: replace(many, **heads)}
    if pattern.head_dim <= 128 and pattern.is_scale_only:
        return {0: Config(block_n=128, **heads)}
    dense = dataclasses.asdict(defaults.default_configs(template, pattern, target)[0])
    if alone:
        dense |= {"overlap_tiles": False, "separate_output": False}
    return {0: Config(**{**dense, **_ALONE, **heads})}


def space(template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
    """Values of each field that are worth trying."""
    return {
        "num_consumer_warpgroups": (1, 2, 3),
        "block_n": (48, 64, 80, 96, 128),
        "num_stages": (2, 4),
        "blocks_per_sm": (1, 2, 3),
        "pingpong": (False, True),
        "running_max": (False, True),
        "most_heads": (1, 2, 4, 8),
    }


def feasible(pattern: Pattern, config: Config, target: Target) -> Rejected | None:
    """Whether the configuration can be compiled for the pattern."""
    if config != replace(config, **_ALONE):
        return Rejected(f"blocks of ragged sequences have the rows of one slot: {_ALONE}")
    if config.most_heads not in (1, 2, 4, 8):
        return Rejected(f"most_heads {config.most_heads} is not 1, 2, 4 or 8")
    if config.several_tiles and any(p.per_head for p in pattern.params):
        return Rejected("parameters of each head need most_heads 1: a block reads them once")
    return forward_config.feasible(pattern, config, target)


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The kernel; ``config`` must be feasible."""
    func = _build(pattern, config, traversal, name)
    return ragged_program(func, pattern.params, "tirx", alignment=ALIGNMENT, index_bits=32)

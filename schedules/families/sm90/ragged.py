"""Ragged sequences on Hopper: persistent blocks, a warp of which finds their work tiles while others compute.

What is behind the end of a sequence TMA reads as zero and doesn't write
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
from schedules.families.sm90.barriers import consumer_arrivals, transaction_barriers
from schedules.families.sm90.boxes import RaggedBoxes
from schedules.families.sm90.config import Config as ForwardConfig
from schedules.families.sm90.kernel import ALIGNMENT, attend
from schedules.tile.geometry import RaggedGeometry, parameterised
from schedules.tile.levels import LevelWalk
from schedules.tile.slots import WORDS, FoundTile, Own
from schedules.tile.tile_scheduler import Traversal

__all__ = ["Config", "default_configs", "feasible", "program", "space"]


@dataclass(frozen=True)
class Config(ForwardConfig):
    """As for dense sequences, with persistent blocks."""

    waves: int = 1

    @property
    def keeps_parameters(self) -> bool:
        """Whether a block reads the parameters of a head once; here it reads them for each work tile."""
        return False


#: Work tiles that are known ahead, a power of two.
_AHEAD = 4
#: int32 of shared memory for where the walk over levels has come to, behind those of the tiles.
_WALK = 4


@T.meta_class
class RaggedScheduler:
    """Persistent blocks take shares of the work from the longest to the shortest, to and fro
    (:mod:`schedules.tile.levels`).

    A warp, the one that fetches queries, finds the block's own ahead of those who need them, and leaves their work
    tiles in shared memory.  Made before ``T.device_entry()``.
    """

    looks_up = True

    def __init__(self, pattern: Pattern, geometry: RaggedGeometry, config: Config, others: int = 3):
        self.geometry, self.config = geometry, config
        self.rises = not pattern.is_unmasked
        most = geometry.work(config.block_m).m_blocks * geometry.heads
        resident = T.call_extern("int32", "multiprocessors") * config.blocks_per_sm * config.waves
        self.blocks = T.bind(T.min(resident, most))
        #: who needs a tile, and says when no more: the warps of the consumers, and ``others``, the threads for K, V and
        #: outputs
        self.readers = consumer_arrivals(config.num_consumer_warpgroups) + others

    def grid(self):
        """Blocks along each axis."""
        return [self.blocks, 1, 1]

    def add_memory(self, pool):
        """Room for the tiles that are known, and barriers."""
        self.words = pool.alloc((_AHEAD * WORDS + _WALK,), "int32")
        self.known, self.done = (transaction_barriers(pool, _AHEAD) for _ in range(2))

    @T.inline
    def init(self):
        """One thread: initialise the barriers; the first tile has been found."""
        self.known.init(1)
        self.done.init(self.readers)
        self.known.arrive(0)

    def found(self, tile) -> FoundTile:
        """Work tile number ``tile`` of the block."""
        return FoundTile(self.words, T.bitwise_and(tile, _AHEAD - 1) * WORDS)

    def _turn(self, tile):
        return T.bitwise_and(T.shift_right(tile, _AHEAD.bit_length() - 1), 1)

    def _walk(self) -> LevelWalk:
        geometry = self.geometry
        return LevelWalk(geometry.queries, geometry.keys, geometry.heads, self.config.block_m, self.rises)

    def _number(self, block, visit):
        """Number of the share that a block takes after ``visit`` others."""
        fro = T.bitwise_and(visit, 1)
        return visit * self.blocks + T.Select(fro == 1, self.blocks - 1 - block, block)

    @T.inline
    def _write(self, tile, walk):
        """One lane: what a walk has found is work tile number ``tile``."""
        queries = T.meta_var(self.geometry.queries)
        length = T.meta_var(queries.of(walk.sequence).length)
        found = T.meta_var(self.found(tile))
        found.write(queries, self.geometry.keys, walk.sequence, walk.head, walk.m_block, length)
        found.follow(walk.other)

    @T.inline
    def find(self, block, lane):
        """A warp: find the block's first work tile, before the barriers are there."""
        walk = self._walk()
        walk.start()
        walk.find(block, lane)
        if lane == 0:
            self._write(0, walk)
            walk.save(self.words, _AHEAD * WORDS)
        T.cuda.warp_sync()

    @T.inline
    def if_found(self, work):
        """Do the work of the block's work tiles, if it has any."""
        if self.found(0).exists:
            work()

    @T.inline
    def feed(self, block, q, q_map, lane):
        """A warp: find the other work tiles, and fetch their queries."""
        walk = self._walk()
        walk.resume(self.words, _AHEAD * WORDS)
        visit: T.int32 = 0
        going: T.int32 = 1
        while going != 0:
            tile: T.int32 = block.tile + 1
            before = T.meta_var(self.found(block.tile))
            follows: T.int32 = T.Cast("int32", before.other >= 0)
            if follows == 0:
                visit = visit + 1
                walk.find(self._number(block.at[0], visit), lane)
            self.done.wait(T.bitwise_and(tile, _AHEAD - 1), T.bitwise_xor(self._turn(tile), 1))
            if lane == 0:
                if follows == 0:
                    self._write(tile, walk)
                else:
                    self.found(tile).take_other(before)
                self.known.arrive(T.bitwise_and(tile, _AHEAD - 1))
            block.advance()
            going = T.Cast("int32", self.found(tile).exists)
            if T.And(going != 0, lane == 0):
                q.producer_acquire(q.state(tile))
                q.load(q.state(tile), q_map, block.queries(0))

    def own(self, geometry, rows, tile):
        """Geometry and rows of the block's work tile number ``tile``."""
        found = self.found(tile)
        own = geometry.at(Own(found.queries), Own(found.keys))
        return own, RaggedRows(own, rows.group)

    def work_tiles(self, at):
        """How many work tiles a block computes: it will see."""
        return

    def work_tile(self, at, tile):
        """M-block, query head and sequence of work tile number ``tile``."""
        found = self.found(tile)
        return found.m_block, found.head, found.sequence

    def first_row(self, place, tile):
        """First row of an m-block."""
        return place * self.config.block_m

    def key_tiles(self, at):
        """A block has all tiles of keys of its rows."""
        return

    @T.inline
    def await_tile(self, tile):
        """Until it is known what work tile number ``tile`` is."""
        self.known.wait(T.bitwise_and(tile, _AHEAD - 1), self._turn(tile))

    @T.inline
    def read_parameters(self, block):
        """Read what belongs to the head of the work tile that a block has come to."""
        block.parameters.read(block.batch, block.head)

    @T.inline
    def each_tile(self, block, advances, lane, visit):
        """``visit(t)`` for all work tiles of a block, up to one that doesn't exist.

        ``lane`` is that of a whole warp, None of a single thread.
        """
        going: T.int32 = 1
        while going != 0:
            visit(block.tile)
            if lane is None:
                self.done.arrive(T.bitwise_and(block.tile, _AHEAD - 1))
            else:
                T.cuda.warp_sync()
                if lane == 0:
                    self.done.arrive(T.bitwise_and(block.tile, _AHEAD - 1))
            block.advance()
            going = T.Cast("int32", self.found(block.tile).exists)


@T.meta_class
class RaggedRows:
    """Rows are positions of the sequence.  The last work tile of a sequence often has warpgroups without rows, which
    let its tiles of keys pass.
    """

    may_be_absent = True
    are_positions = True

    def __init__(self, geometry: RaggedGeometry, group):
        self.geometry, self.group = geometry, group

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
            rows = RaggedRows(geometry, T.bind(T.truncdiv(geometry.heads, geometry.kv_heads)))
            scheduler = RaggedScheduler(pattern, geometry, config)
            attend(pattern, config, geometry, rows, scheduler, RaggedBoxes())

        return attention

    return parameterised(pattern, make).with_attr("global_symbol", name)


#: What a block of ragged sequences doesn't have: places of two row tiles, products of two work tiles side by side, and
#: heads that share a tile.
_WITHOUT = {"tiles_per_cta": 1, "overlap_tiles": False, "pack_heads": False, "head_section": 1, "waves": 1}


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """One configuration: which kernel runs may not depend on lengths.  Figures: docs/hopper.md, "Ragged sequences"."""
    if pattern.head_dim <= 64 and pattern.is_scale_only:
        return {0: Config(num_consumer_warpgroups=4, block_n=64, num_stages=4, pingpong=False)}
    if pattern.head_dim <= 128 and pattern.is_scale_only:
        return {0: Config(block_n=128)}
    dense = dataclasses.asdict(defaults.default_configs(template, pattern, target)[0])
    return {0: Config(**{**dense, **_WITHOUT})}


def space(template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
    """Values of each field that are worth trying."""
    return {
        "num_consumer_warpgroups": (1, 2, 3, 4),
        "block_n": (48, 64, 80, 96, 128),
        "num_stages": (2, 4),
        "blocks_per_sm": (1, 2, 3),
        "pingpong": (False, True),
        "running_max": (False, True),
        "separate_output": (False, True),
    }


def feasible(pattern: Pattern, config: Config, target: Target) -> Rejected | None:
    """Whether the configuration can be compiled for the pattern."""
    if config != replace(config, **_WITHOUT):
        return Rejected(f"blocks of ragged sequences are persistent, and compute a row tile at a time: {_WITHOUT}")
    return forward_config.feasible(pattern, config, target)


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The kernel; ``config`` must be feasible."""
    func = _build(pattern, config, traversal, name)
    return ragged_program(func, pattern.params, "tirx", alignment=ALIGNMENT, index_bits=32)

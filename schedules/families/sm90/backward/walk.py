"""Blocks of keys, and the tiles of queries that each of them visits: the forward's walk the other way round."""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern, Site
from schedules.families.mma.registers import anew
from schedules.families.sm90.backward.config import Config
from schedules.families.sm90.tma import encode_keys, encode_ragged, ragged_box
from schedules.tile.geometry import local, site
from schedules.tile.gradients import RaggedTensors, Tensors
from schedules.tile.parameters import Parameters
from schedules.tile.query_range import QueryTiles
from schedules.tile.slots import WORDS, FoundTile, Own
from schedules.tile.tile_scheduler import ceildiv


@T.meta_class
class DenseKeys:
    """Blocks of ``keys`` keys of tensors with a batch axis: each batch has ``blocks`` of its own.

    Made before ``T.device_entry()``.
    """

    looks_up = False

    def __init__(self, tensors: Tensors, keys: int):
        self.tensors = tensors
        self.blocks, self.batch = T.bind(ceildiv(tensors.seqlen_kv, keys)), tensors.batch

    def encode(self, descriptor, tensor, rows: int):
        """Make the descriptor of a tensor whose boxes have so many rows, on the host."""
        return encode_keys(descriptor, tensor, rows)

    def add_memory(self, pool):
        """Take what a block needs of shared memory to know what it is: nothing."""

    @T.inline
    def find(self, place, lane):
        """A warp: look up which keys the block at ``place`` has."""

    def exists(self) -> Expr | None:
        """Whether the block has keys; None if it always does."""
        return

    def own(self):
        """The tensors with the sequence of this block."""
        return self.tensors

    def of(self, place: Expr, batch: Expr):
        """Number of the block among those of its sequence, and the sequence."""
        return place, batch

    def begins(self, block) -> Expr:
        """Whether it is the first of its sequence, which may have no keys."""
        return block.number == 0

    def row(self, b: Expr, h: Expr, heads: Expr) -> Expr:
        """Number of one of ``heads`` heads among those of all batches."""
        return b * heads + h

    def box(self, position: Expr, head: Expr, batch: Expr, sequences):
        """Where rows from ``position`` on are, as a box of TMA; ``sequences`` are those of queries or of keys."""
        return position, head, batch


@T.meta_class
class RaggedKeys:
    """The same of ragged sequences: ``blocks`` slots for those of all, which a warp looks up."""

    looks_up = True

    def __init__(self, tensors: RaggedTensors, keys: int):
        self.tensors, self.keys = tensors, keys
        self.blocks, self.batch = T.bind(tensors.keys.tiles(keys)), T.int32(1)

    def encode(self, descriptor, tensor, rows: int):
        return encode_ragged(descriptor, tensor, rows)

    def add_memory(self, pool):
        self.found = FoundTile(pool.alloc((WORDS,), "int32"))

    @T.inline
    def find(self, place, lane):
        self.found.look_up_keys(self.tensors.queries, self.tensors.keys, self.keys, place, lane)

    def exists(self) -> Expr:
        return self.found.exists

    def own(self):
        return self.tensors.at(Own(self.found.queries), Own(self.found.keys))

    def of(self, place: Expr, batch: Expr):
        return self.found.m_block, self.found.sequence

    def begins(self, block) -> Expr:
        return self.found.begins

    def row(self, b: Expr, h: Expr, heads: Expr) -> Expr:
        return h

    def box(self, position: Expr, head: Expr, batch: Expr, sequences):
        return ragged_box(sequences.of(batch), position, head)


def key_blocks(tensors: Tensors | RaggedTensors, keys: int) -> DenseKeys | RaggedKeys:
    """The blocks of ``keys`` keys of a launch's tensors."""
    return (RaggedKeys if isinstance(tensors, RaggedTensors) else DenseKeys)(tensors, keys)


def exists_both(*conditions: Expr | None) -> Expr:
    """Whether all conditions hold; None always does."""
    return tirx.all(*(x for x in conditions if x is not None), T.bool(True))


@T.meta_class
class KeyScheduler:
    """A block for each place of ``blocks``, of each head of keys and batch; made before ``T.device_entry()``.

    Blocks of a head are started from its first keys on, which a causal mask shows to most queries: the longest first.
    """

    def __init__(self, tensors: Tensors | RaggedTensors, blocks: DenseKeys | RaggedKeys, config: Config):
        self.heads_first = config.heads_first
        self.blocks, self.kv_heads, self.batch = blocks.blocks, tensors.kv_heads, blocks.batch

    def grid(self):
        """Blocks along each axis."""
        if self.heads_first:
            return [self.kv_heads, self.batch, self.blocks]
        return [self.blocks, self.kv_heads, self.batch]

    def place(self, at):
        """Place among those of its head, head of keys and batch of the block at ``at``."""
        return (at[2], at[0], at[1]) if self.heads_first else (at[0], at[1], at[2])

    def exists(self, at) -> Expr | None:
        """Whether there is such a block; None if there always is."""
        return


@T.meta_class
class SectionScheduler:
    """As :class:`KeyScheduler`, of heads in sections: the same keys of all heads of a section, then the next keys.

    The query heads of a group are shared among ``parts`` blocks, ``heads_per_block`` each.  Blocks of a head are
    started in the order of their keys and of their parts, as those that wait for each other must be.
    """

    def __init__(
        self,
        tensors: Tensors | RaggedTensors,
        blocks: DenseKeys | RaggedKeys,
        heads_per_block: Expr,
        head_section: Expr | int,
    ):
        self.blocks = blocks.blocks
        self.heads_per_block = heads_per_block
        self.parts = T.bind(ceildiv(tensors.group, heads_per_block))
        self.kv_heads = tensors.kv_heads
        self.pairs = T.bind(tensors.kv_heads * blocks.batch * self.parts)
        self.section = T.bind(T.min(self.pairs, head_section))

    def grid(self):
        """Blocks along each axis."""
        return [self.section, self.blocks, ceildiv(self.pairs, self.section)]

    def place(self, at):
        """Place among those of its head, head of keys, batch and part of the block at ``at``."""
        pair = at[2] * self.section + at[0]
        head = T.truncdiv(pair, self.parts)
        return at[1], T.truncmod(head, self.kv_heads), T.truncdiv(head, self.kv_heads), T.truncmod(pair, self.parts)

    def exists(self, at) -> Expr:
        """Whether there is such a block; the last section may be smaller."""
        return at[2] * self.section + at[0] < self.pairs


@T.meta_class
class KeyBlock:
    """What one block computes: keys from ``key_first`` on, of head ``kv_head`` of batch ``batch``.

    It visits the queries of ``group`` query heads, one head after the other: all that read that head of keys, or part
    number ``part`` of them.  ``place`` is its own among the ``blocks`` of a head.
    """

    def __init__(
        self,
        pattern: Pattern,
        config: Config,
        blocks: DenseKeys | RaggedKeys,
        scheduler: KeyScheduler | SectionScheduler,
        at,
    ):
        self.pattern, self.config, self.blocks, self.tensors = pattern, config, blocks, blocks.own()
        self.place, kv_head, batch, *part = scheduler.place(at)
        number, batch = blocks.of(self.place, batch)
        self.kv_head = local(kv_head)
        if blocks.looks_up:  # read where they are needed: no register holds them throughout the steps
            self.number, self.key_first, self.batch = number, number * config.block_keys, batch
        else:
            self.number, self.key_first, self.batch = local(number), local(number * config.block_keys), local(batch)
            self.place = self.number
        self.group, self.first_head = self.tensors.group, T.int32(0)
        if part:
            self.part = local(part[0])
            # both are computed where they are asked for: the warpgroup for dq has no registers for them
            self.first_head = self.part * scheduler.heads_per_block
            self.group = T.min(scheduler.heads_per_block, self.tensors.group - self.first_head)

    def head(self, g: Expr) -> Expr:
        """Query head number ``g`` of those that the block visits."""
        return self.kv_head * self.tensors.group + self.first_head + g

    def site(self, g: Expr) -> Site:
        """What the definition's variables are in query head number ``g`` of the group, whose parameters are read."""
        head = self.head(g)
        return site(self.tensors, Parameters(self.tensors, self.batch, head), self.batch, head)

    def site_anew(self) -> Site:
        """The same of the first query head, where all are alike: made where it is asked for, so that no register holds
        any of it throughout the steps."""
        batch, head = local(anew(self.batch)).source[0], self.head(T.int32(0))
        return site(self.tensors, Parameters(self.tensors, batch, head), batch, head)

    def tiles(self, at: Site) -> QueryTiles:
        """The tiles of queries of one head that the block visits."""
        return QueryTiles(self.pattern, at, self.key_first, self.config.block_keys, self.config.block_m)

    def keys(self, row: Expr):
        """Where keys from ``row`` of the block on are."""
        return self.blocks.box(self.key_first + row, self.kv_head, self.batch, self.tensors.keys)

    def queries(self, query: Expr, head: Expr):
        """Where queries from ``query`` on of a query head are."""
        return self.blocks.box(query, head, self.batch, self.tensors.queries)

    def tile_place(self, head: Expr, tile: Expr, tiles: Expr) -> Expr:
        """Number of a tile of queries of a query head among those of all; each head has ``tiles`` places."""
        tensors, batch = self.tensors, anew(self.batch)
        return tensors.head_row(batch, head) * tiles + tensors.first_tile(batch, self.config.block_m) + tile

    def block_place(self, heads: Expr, head: Expr) -> Expr:
        """Number of this block among those of ``heads`` heads, if it is that of ``head``."""
        return self.blocks.row(anew(self.batch), head, heads) * self.blocks.blocks + self.place

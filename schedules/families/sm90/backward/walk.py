"""Blocks of keys, and the tiles of queries that each of them visits: the forward's walk the other way round."""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern, Site
from schedules.families.sm90.backward.config import Config
from schedules.tile.geometry import Parameters, local, site
from schedules.tile.gradients import Tensors
from schedules.tile.query_range import QueryTiles
from schedules.tile.tile_scheduler import ceildiv


@T.meta_class
class KeyScheduler:
    """A block for each ``block_keys`` keys of a head of keys and batch; made before ``T.device_entry()``.

    Blocks of a head are started from its first keys on, which a causal mask shows to most queries: the longest first.
    """

    def __init__(self, tensors: Tensors, config: Config):
        self.heads_first = config.heads_first
        self.blocks = T.bind(ceildiv(tensors.seqlen_kv, config.block_keys))
        self.kv_heads, self.batch = tensors.kv_heads, tensors.batch

    def grid(self):
        """Blocks along each axis."""
        if self.heads_first:
            return [self.kv_heads, self.batch, self.blocks]
        return [self.blocks, self.kv_heads, self.batch]

    def place(self, at):
        """Number among those of its head, head of keys and batch of the block at ``at``."""
        return (at[2], at[0], at[1]) if self.heads_first else (at[0], at[1], at[2])


@T.meta_class
class SectionScheduler:
    """As :class:`KeyScheduler`, of heads in sections: the same keys of all heads of a section, then the next keys.

    The query heads of a group are shared among ``parts`` blocks, ``heads_per_block`` each.  Blocks of a head are
    started in the order of their keys and of their parts, as those that wait for each other must be.
    """

    def __init__(self, tensors: Tensors, config: Config, heads_per_block: Expr):
        self.blocks = T.bind(ceildiv(tensors.seqlen_kv, config.block_keys))
        self.heads_per_block = heads_per_block
        self.parts = T.bind(ceildiv(tensors.group, heads_per_block))
        self.kv_heads = tensors.kv_heads
        self.pairs = T.bind(tensors.kv_heads * tensors.batch * self.parts)
        self.section = T.bind(T.min(self.pairs, config.head_section))

    def grid(self):
        """Blocks along each axis."""
        return [self.section, self.blocks, ceildiv(self.pairs, self.section)]

    def place(self, at):
        """Number among those of its head, head of keys, batch and part of the block at ``at``."""
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
    number ``part`` of them.
    """

    def __init__(self, pattern: Pattern, config: Config, tensors: Tensors, scheduler: KeyScheduler, at):
        self.pattern, self.config, self.tensors = pattern, config, tensors
        number, kv_head, batch, *part = scheduler.place(at)
        self.number = local(number)
        self.key_first = local(number * config.block_keys)
        self.kv_head, self.batch = local(kv_head), local(batch)
        self.group, self.first_head = tensors.group, T.int32(0)
        if part:
            self.part = local(part[0])
            self.first_head = local(self.part * scheduler.heads_per_block)
            self.group = local(T.min(scheduler.heads_per_block, tensors.group - self.first_head))

    def head(self, g: Expr) -> Expr:
        """Query head number ``g`` of those that the block visits."""
        return self.kv_head * self.tensors.group + self.first_head + g

    def site(self, g: Expr) -> Site:
        """What the definition's variables are in query head number ``g`` of the group, whose parameters are read."""
        head = self.head(g)
        return site(self.tensors, Parameters(self.tensors, self.batch, head), self.batch, head)

    def tiles(self, at: Site) -> QueryTiles:
        """The tiles of queries of one head that the block visits."""
        return QueryTiles(self.pattern, at, self.key_first, self.config.block_keys, self.config.block_m)

    def keys(self, row: Expr):
        """Where keys from ``row`` of the block on are."""
        return self.key_first + row, self.kv_head, self.batch

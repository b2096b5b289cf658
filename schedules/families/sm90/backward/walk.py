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
class KeyBlock:
    """What one block computes: keys from ``key_first`` on, of head ``kv_head`` of batch ``batch``.

    It visits the queries of ``group`` query heads, one head after the other.
    """

    def __init__(self, pattern: Pattern, config: Config, tensors: Tensors, scheduler: KeyScheduler, at):
        self.pattern, self.config, self.tensors = pattern, config, tensors
        number, kv_head, batch = scheduler.place(at)
        self.key_first = local(number * config.block_keys)
        self.kv_head, self.batch = local(kv_head), local(batch)
        self.group = tensors.group

    def head(self, g: Expr) -> Expr:
        """Query head number ``g`` of the group."""
        return self.kv_head * self.group + g

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

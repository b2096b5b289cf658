"""Blocks of keys, and which tiles of queries each of them visits: the forward's walk the other way round."""

from __future__ import annotations

import tvm_ffi
from tvm import sym
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern, Site
from schedules.families.sm90.backward.config import Config
from schedules.families.sm90.backward.tensors import Tensors
from schedules.tile.geometry import Parameters, constant, local, site
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

    def keys(self, row: Expr):
        """Where keys from ``row`` of the block on are."""
        return self.key_first + row, self.kv_head, self.batch


@T.meta_class
class QueryWalk:
    """The tiles of queries of one head that a block of keys visits: step ``i`` is tile ``begin + i``, ``steps`` in all.

    Steps ``left .. right`` (exclusive) are of tiles that see every key that exists, and need no mask; the others of
    partly visible ones.  Queries past the last one weigh nothing by themselves, and keys past the last one aren't
    stored, so that neither needs a mask.  ``has_full`` and ``has_masked`` say whether there can be such steps.
    """

    def __init__(self, block: KeyBlock, at: Site):
        pattern, block_m = block.pattern, block.config.block_m
        last = block.key_first + (block.config.block_keys - 1)
        rows = pattern.rows_of(at, block.key_first, T.min(last, at.seqlen_kv - 1))
        (lo, hi), (full_lo, full_hi) = rows.visible, rows.full
        self.has_masked = not pattern.is_unmasked
        self.has_full = pattern.is_unmasked or constant(full_hi) != 0
        self.begin = local(T.truncdiv(lo, block_m))
        self.steps = local(T.max(ceildiv(hi, block_m) - self.begin, 0))
        self.left, self.right = (self.steps if self.has_masked else T.int32(0)), self.steps
        self.has_right = False
        if self.has_masked and self.has_full:
            self.has_right = not tvm_ffi.structural_equal(full_hi, _all(at.seqlen_q))
            whole = T.Select(full_hi >= at.seqlen_q, self.steps, T.truncdiv(full_hi, block_m) - self.begin)
            self.left = local(T.min(T.max(ceildiv(full_lo, block_m) - self.begin, 0), self.steps))
            self.right = local(T.max(T.min(whole, self.steps), self.left)) if self.has_right else self.steps

    def tile(self, step: Expr) -> Expr:
        """The tile of a step."""
        return self.begin + step


def _all(count: Expr) -> Expr:
    """How the end of a range of rows is written that always is the last row's."""
    return sym.Analyzer().simplify(T.max(count, 0))

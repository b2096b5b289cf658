"""What one block computes: which rows of which head, and which tiles of keys they visit."""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.sm90.config import Config
from schedules.geometry import Geometry, KeyTiles, Parameters, local, site
from schedules.pattern import Pattern


def grid(geometry: Geometry, config: Config):
    """Blocks as ``(x, y, z)``; :class:`Block` reads them back.

    Row tiles are the fastest, so that a head's K and V stay in the cache; with head sections, the heads of one are.
    """
    groups = _ceildiv(geometry.seqlen_q, config.block_m * config.tiles_per_cta)
    if config.head_section == 1:
        return [groups, geometry.heads, geometry.batch]
    section = _section(geometry, config)
    return [section, groups, geometry.batch * T.truncdiv(geometry.heads, section)]


def _section(geometry, config):
    # Heads that don't divide into sections form one that is as wide as all of them.
    whole = T.truncmod(geometry.heads, config.head_section) == 0
    return T.Select(whole, T.int32(config.head_section), geometry.heads)


def _ceildiv(a, b):
    return T.truncdiv(a + (b - 1), b)


@T.meta_class
class Block:
    """The block at ``(x, y, z)`` of the grid: its head, batch and row tiles.

    Row tiles are taken from the last to the first, the order that starts with the longest where a mask is causal.  A
    block with two takes one from each end, which makes blocks of about equal length.
    """

    def __init__(self, pattern: Pattern, config: Config, geometry: Geometry, x, y, z):
        self.pattern, self.config, self.geometry = pattern, config, geometry
        if config.head_section == 1:
            self.group, self.head, self.batch = x, y, z
        else:
            section = _section(geometry, config)
            sections = T.truncdiv(geometry.heads, section)
            self.batch = local(T.truncdiv(z, sections))
            self.group, self.head = y, local(T.truncmod(z, sections) * section + x)
        self.kv_head = local(T.truncdiv(self.head, T.truncdiv(geometry.heads, geometry.kv_heads)))
        self.parameters = Parameters(geometry, self.batch, self.head)
        self.site = site(geometry, self.parameters, self.batch, self.head)

    def row_first(self, turn):
        """First row of the block's tile number ``turn``."""
        block_m, tiles = self.config.block_m, self.config.tiles_per_cta
        last = _ceildiv(self.geometry.seqlen_q, block_m * tiles) * tiles - 1 - self.group
        return T.Select(turn == 0, last, self.group) * block_m if tiles == 2 else last * block_m


@T.meta_class
class Walk:
    """The tiles of keys that a row tile visits, from right to left: step ``i`` is tile ``last - i``, ``steps`` in all.

    Steps from ``full_begin`` to ``full_end`` (exclusive) need no mask.  There always is a step 0, which masks if it
    must, even for rows that see nothing.  ``has_full`` and ``has_left`` say which of the three parts there can be.
    """

    def __init__(self, block: Block, row_first):
        config, geometry = block.config, block.geometry
        row_last = T.min(row_first + (config.block_m - 1), geometry.seqlen_q - 1)
        self.block = block
        self.keys = keys = KeyTiles(block.pattern, block.site, row_first, row_last, config.block_n)
        # A tile past the last row (the blocks have two, an odd number was needed) takes the one step.
        steps = T.max(keys.end - keys.begin, 1)
        self.steps = local(T.Select(row_first < geometry.seqlen_q, steps, 1) if config.tiles_per_cta == 2 else steps)
        self.last = local(T.max(keys.end - 1, keys.begin))
        self.has_full, self.has_left = keys.has_full, keys.has_left
        self.full_begin = local(self.last + 1 - keys.full_end) if keys.has_full else self.steps
        self.full_end = local(self.last + 1 - keys.full_begin) if keys.has_full else self.steps

    def key_first(self, step):
        """First key of a step's tile."""
        return (self.last - step) * self.block.config.block_n

    def blind(self, row_first, rows):
        """How many of the first steps show nothing to ``rows`` rows from ``row_first`` on; all but one at most."""
        block, block_n = self.block, self.block.config.block_n
        row_last = T.min(row_first + (rows - 1), block.geometry.seqlen_q - 1)
        end = block.pattern.visible_range(block.site, row_first, row_last)[1]
        return T.max(T.min(self.last + 1 - _ceildiv(end, block_n), self.steps - 1), 0)

    def live(self, row_first, step):
        """Whether a step has anything to see; asked only of masks with gaps, and not of step 0."""
        block, config = self.block, self.block.config
        key = self.key_first(step)
        return block.pattern.tile_live(
            block.site, row_first, row_first + (config.block_m - 1), key, key + (config.block_n - 1)
        )

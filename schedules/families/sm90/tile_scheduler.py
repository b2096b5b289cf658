"""The tile scheduler: which work tiles there are, and which block computes them in which order."""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.mma.registers import anew
from schedules.families.sm90.config import ALL, Config
from schedules.families.sm90.packing import Rows
from schedules.tile.geometry import Geometry, local
from schedules.tile.static import static
from schedules.tile.tile_scheduler import ceildiv


@T.meta_class
class TileScheduler:
    """Places ``(x, y, z)``, x the fastest, with one work tile each: ``block_m`` rows of a head; or with two of them.

    Rows are the fastest, so that a head's K and V stay in the cache; with head sections, the heads of one are.  If one
    section is all heads, rows are the slowest, from the longest of a causal mask to the shortest.

    Either each place has a block, or the kernel is persistent: ``blocks`` of them take the places in snake order, in
    which the first of a round takes the last place of the next.  So lengths that fall add up to nearly the same for
    every block.

    Made before ``T.device_entry()``, of host expressions.
    """

    #: Whether a warp looks work tiles up; else each follows from its number.
    looks_up = False

    def __init__(self, geometry: Geometry, rows: Rows, config: Config):
        self.config, self.rows = config, rows
        self.m_blocks = T.bind(ceildiv(rows.count, config.block_m * config.tiles_per_cta))
        if config.head_section == 1:
            self.x, self.y, self.z = self.m_blocks, rows.heads, geometry.batch
        elif config.head_section == ALL:
            self.x, self.y, self.z = rows.heads, geometry.batch, self.m_blocks
        else:
            # Heads that don't divide into sections form one that is as wide as all of them.
            whole = T.truncmod(rows.heads, config.head_section) == 0
            section = T.bind(T.Select(whole, T.int32(config.head_section), rows.heads))
            self.sections = T.bind(T.truncdiv(rows.heads, section))
            self.x, self.y, self.z = section, self.m_blocks, geometry.batch * self.sections
        if config.persistent:
            resident = T.call_extern("int32", "multiprocessors") * config.blocks_per_sm
            self.count = T.bind(self.x * self.y * self.z)
            self.blocks = T.bind(T.min(resident * config.waves, self.count))

    def add_memory(self, pool):
        """Take what a block needs of shared memory: nothing, as its work tiles follow from its place."""

    @T.inline
    def init(self):
        """One thread: initialise barriers."""

    @T.inline
    def find(self, block, lane):
        """A warp: before anything is done, look up what block number ``block`` has to do."""

    @T.inline
    def if_found(self, work):
        """Do the work of the block's work tiles, if it has any."""
        work()

    def grid(self):
        """Blocks along each axis."""
        return [self.blocks, 1, 1] if self.config.persistent else [self.x, self.y, self.z]

    def own(self, geometry, rows, tile):
        """Geometry and rows of the block's work tile number ``tile``: those of all."""
        return geometry, rows

    @T.inline
    def await_tile(self, tile):
        """Until it is known what work tile number ``tile`` is: it follows from its number."""

    @T.inline
    def read_parameters(self, block):
        """Read what belongs to the head of the work tile that a block has come to: once, for one head."""

    @T.inline
    def each_tile(self, block, advances, lane, visit):
        """``visit(t)`` for all work tiles of a block, which goes on to each if it ``advances``.

        ``lane`` is that of a whole warp, None of a single thread.
        """
        for t in T.serial(block.tiles):
            if advances:
                if static(self.config.several_tiles):
                    if t > 0:
                        block.advance()
            visit(t)

    def work_tiles(self, at):
        """How many work tiles the block at ``at`` computes."""
        tiles = self.config.tiles_per_cta
        return local(self.visits(at[0]) * tiles) if self.config.persistent else tiles

    def visits(self, block):
        """How many places block number ``block`` takes."""
        whole = T.truncdiv(self.count, self.blocks)
        return whole + T.Cast("int32", whole * self.blocks + self._position(block, whole) < self.count)

    def visit(self, block, i):
        """The place that block number ``block`` takes after ``i`` others."""
        n = i * self.blocks + self._position(block, i)
        rest = T.truncdiv(n, self.x)
        z = T.truncdiv(rest, self.y)
        return n - rest * self.x, rest - z * self.y, z

    def work_tile(self, at, tile):
        """Place among those of its head, first query head and batch of work tile ``tile`` of the block at ``at``."""
        config = self.config
        x, y, z = at
        if config.persistent:
            x, y, z = self.visit(x, T.shift_right(anew(tile), config.tiles_per_cta - 1))
        if config.head_section == 1:
            return x, y * self.rows.head_step, z
        if config.head_section == ALL:
            return z, x * self.rows.head_step, y
        batch = T.truncdiv(z, self.sections)
        return y, ((z - batch * self.sections) * self.x + x) * self.rows.head_step, batch

    def key_tiles(self, at):
        """First and end of the tiles of keys that are a block's share; None if it has all."""
        return

    def first_row(self, place, tile):
        """First row of work tile number ``tile``, which is in place ``place`` of its head.

        Work tiles are taken from the last to the first, the order that starts with the longest where a mask is causal.
        A place with two has one from each end, so that all are about equally long.
        """
        block_m, tiles = self.config.block_m, self.config.tiles_per_cta
        last = self.m_blocks * tiles - 1 - place
        return (T.Select(T.bitwise_and(tile, 1) == 0, last, place) if tiles == 2 else last) * block_m

    def _position(self, block, i):
        return T.Select(T.bitwise_and(i, 1) == 0, block, self.blocks - 1 - block)

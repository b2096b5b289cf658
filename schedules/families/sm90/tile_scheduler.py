"""The tile scheduler: which work tiles there are, and which block computes them in which order."""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.mma.registers import anew
from schedules.families.sm90.config import ALL, BY_LENGTH, Config
from schedules.families.sm90.packing import Rows
from schedules.tile.geometry import Geometry, local
from schedules.tile.static import static
from schedules.tile.tile_scheduler import ceildiv

#: Work tiles that a section of heads has at least, so that those of a round of blocks are nearly equally long.  In a
#: simulation of 132 blocks, of 4 to 256 heads of 4k to 128k positions, the last block ends 0.06% later than in strips
#: of all heads, at most 1.2%; with 512 0.2% and 2.7% (docs/hopper.md).
SECTION_TILES = 768


@T.meta_class
class TileScheduler:
    """Places ``(x, y, z)``, x the fastest, with one work tile each: ``block_m`` rows of a head; or with two of them.

    Rows are the fastest, so that a head's K and V stay in the cache; or batch entries are and rows come next.  Or heads
    are, strip by strip: those of all heads and batches, or of one *section* of them after the other.

    Either each place has a block, or the kernel is persistent: ``blocks`` of them take the places in snake order, in
    which the first of a round takes the last place of the next.  So lengths that change little from place to place add
    up to nearly the same for every block.  Strips of sections therefore go to and fro: the last section goes from its
    longest strip to its shortest, the one before it from the shortest to the longest, and so on.

    Made before ``T.device_entry()``, of host expressions.
    """

    #: Whether a warp looks work tiles up; else each follows from its number.
    looks_up = False

    def __init__(self, geometry: Geometry, rows: Rows, config: Config):
        self.config, self.rows = config, rows
        self.m_blocks = T.bind(ceildiv(rows.count, config.block_m * config.tiles_per_cta))
        if config.batches_beside:
            self.x, self.y, self.z = geometry.batch, self.m_blocks, rows.heads
        elif config.head_section == 1:
            self.x, self.y, self.z = self.m_blocks, rows.heads, geometry.batch
        elif config.head_section == ALL:
            self.x, self.y, self.z = rows.heads, geometry.batch, self.m_blocks
        else:
            self.pairs = T.bind(rows.heads * geometry.batch)
            self.section = T.bind(ceildiv(T.int32(SECTION_TILES), self.m_blocks))
            self.sections = T.bind(T.max(T.truncdiv(self.pairs, self.section), 1))
            self.x, self.y, self.z = self.pairs, self.m_blocks, 1
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
        """Read what belongs to the head of the work tile that a block has come to; a block of its own has one head."""
        if static(self.config.persistent):
            block.parameters.read(block.batch, block.head)

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
        n = self._number(block, i)
        rest = T.truncdiv(n, self.x)
        z = T.truncdiv(rest, self.y)
        return n - rest * self.x, rest - z * self.y, z

    def work_tile(self, at, tile):
        """Place among those of its head, first query head and batch of work tile ``tile`` of the block at ``at``."""
        config = self.config
        if config.head_section == BY_LENGTH:
            return self._in_sections(self._number(at[0], anew(tile)))
        x, y, z = at
        if config.persistent:
            x, y, z = self.visit(x, T.shift_right(anew(tile), config.tiles_per_cta - 1))
        if config.batches_beside:
            return y, z * self.rows.head_step, x
        if config.head_section == 1:
            return x, y * self.rows.head_step, z
        return z, x * self.rows.head_step, y

    def _in_sections(self, number):
        """The same of the work tile that is visited after ``number`` others.

        Counted from the last one, sections are equally wide but for the one that is visited first, which has what is
        left of the heads.
        """
        rest = self.count - 1 - number
        section = T.min(T.truncdiv(rest, self.section * self.m_blocks), self.sections - 1)
        first = section * self.section
        rest = rest - first * self.m_blocks
        width = T.Select(section == self.sections - 1, self.pairs - first, self.section)
        strip = T.truncdiv(rest, width)
        pair = first + rest - strip * width
        batch = T.truncdiv(pair, self.rows.heads)
        place = T.Select(T.bitwise_and(section, 1) == 0, self.m_blocks - 1 - strip, strip)
        return place, (pair - batch * self.rows.heads) * self.rows.head_step, batch

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

    def _number(self, block, i):
        """How many places are taken before the one that block number ``block`` takes after ``i`` others."""
        return i * self.blocks + self._position(block, i)

    def _position(self, block, i):
        return T.Select(T.bitwise_and(i, 1) == 0, block, self.blocks - 1 - block)

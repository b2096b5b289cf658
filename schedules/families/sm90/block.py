"""What one block computes: which rows of which heads, and which tiles of keys they visit."""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.mma.registers import anew
from schedules.families.sm90.config import ALL, Config
from schedules.families.sm90.rows import Rows
from schedules.tile.geometry import Geometry, Parameters, local, site
from schedules.tile.key_range import KeyTiles


@T.meta_class
class Places:
    """The places of work, ``(x, y, z)`` with x the fastest: a row tile of a head each, or two of them.

    Row tiles are the fastest, so that a head's K and V stay in the cache; with head sections, the heads of one are.  If
    one section is all heads, row tiles are the slowest, from the longest of a causal mask to the shortest.

    Either each place has a block, or there are ``blocks``, which go over the places to and fro: the first of a round
    takes the last place of the next.  So lengths that fall add up to nearly the same for every block.

    Made before ``T.device_entry()``, of host expressions.
    """

    def __init__(self, geometry: Geometry, rows: Rows, config: Config):
        self.config = config
        self.groups = T.bind(_ceildiv(rows.count, config.block_m * config.tiles_per_cta))
        if config.head_section == 1:
            self.x, self.y, self.z = self.groups, rows.heads, geometry.batch
        elif config.head_section == ALL:
            self.x, self.y, self.z = rows.heads, geometry.batch, self.groups
        else:
            # Heads that don't divide into sections form one that is as wide as all of them.
            whole = T.truncmod(rows.heads, config.head_section) == 0
            section = T.bind(T.Select(whole, T.int32(config.head_section), rows.heads))
            self.sections = T.bind(T.truncdiv(rows.heads, section))
            self.x, self.y, self.z = section, self.groups, geometry.batch * self.sections
        if config.persistent:
            resident = T.call_extern("int32", "multiprocessors") * config.blocks_per_sm
            self.count = T.bind(self.x * self.y * self.z)
            self.blocks = T.bind(T.min(resident * config.waves, self.count))

    def grid(self):
        """Blocks along each axis."""
        return [self.blocks, 1, 1] if self.config.persistent else [self.x, self.y, self.z]

    def visits(self, block):
        """How many places a block of ``blocks`` visits."""
        whole = T.truncdiv(self.count, self.blocks)
        return whole + T.Cast("int32", whole * self.blocks + self._turn(block, whole) < self.count)

    def visit(self, block, i):
        """Place number ``i`` of a block of ``blocks``."""
        n = i * self.blocks + self._turn(block, i)
        rest = T.truncdiv(n, self.x)
        z = T.truncdiv(rest, self.y)
        return n - rest * self.x, rest - z * self.y, z

    def _turn(self, block, i):
        return T.Select(T.bitwise_and(i, 1) == 0, block, self.blocks - 1 - block)


def _ceildiv(a, b):
    return T.truncdiv(a + (b - 1), b)


@T.meta_class
class Block:
    """What one block computes, a row tile after the other.

    ``head``, ``kv_head``, ``batch`` and ``row_first`` are those of the row tile that it has come to, number ``tile`` of
    ``tiles``.  Row tiles are taken from the last to the first, the order that starts with the longest where a mask is
    causal.  A place with two has one from each end, so that all places are about equally long.

    Everything is computed anew from the number of the tile, since each register counts throughout the steps.
    """

    def __init__(self, pattern: Pattern, config: Config, geometry: Geometry, rows: Rows, places: Places, at):
        self.pattern, self.config, self.geometry, self.rows, self.places = pattern, config, geometry, rows, places
        self.at = at
        self.tile = local(T.int32(0))
        self.tiles = config.tiles_per_cta
        if config.persistent:
            self.tiles = local(places.visits(at[0]) * config.tiles_per_cta)
        group, head, batch = self.where(0)
        self.head, self.batch, self.row_first = local(head), local(batch), local(self.first_row(group, T.int32(0)))
        self.kv_head = local(T.truncdiv(self.head, rows.group))
        self.parameters = Parameters(geometry, self.batch, self.head)
        self.site = site(geometry, self.parameters, self.batch, self.head)

    def where(self, tile):
        """Of row tile number ``tile``: its place's group of row tiles, its first query head, its batch."""
        config, places = self.config, self.places
        x, y, z = self.at
        if config.persistent:
            x, y, z = places.visit(x, T.shift_right(anew(tile), config.tiles_per_cta - 1))
        if config.head_section == 1:
            return x, y * self.rows.head_step, z
        if config.head_section == ALL:
            return z, x * self.rows.head_step, y
        batch = T.truncdiv(z, places.sections)
        return y, ((z - batch * places.sections) * places.x + x) * self.rows.head_step, batch

    def first_row(self, group, tile):
        """First row of row tile number ``tile``."""
        block_m, tiles = self.config.block_m, self.config.tiles_per_cta
        last = self.places.groups * tiles - 1 - group
        return (T.Select(T.bitwise_and(tile, 1) == 0, last, group) if tiles == 2 else last) * block_m

    def queries(self, row):
        """Where rows from ``row`` of the row tile on are: position, head in its group, group, batch."""
        row = self.row_first + row
        head = self.head - self.kv_head * self.rows.group + self.rows.head(row)
        return self.rows.position(row), head, self.kv_head, self.batch

    def keys(self, key):
        """Where keys from ``key`` on are: position, head, batch."""
        return key, self.kv_head, self.batch

    @T.inline
    def advance(self):
        """Go on to the next row tile."""
        self.tile = self.tile + 1
        where = T.meta_var(self.where(self.tile))
        self.head = where[1]
        self.batch = where[2]
        self.kv_head = T.truncdiv(self.head, self.rows.group)
        self.row_first = self.first_row(where[0], self.tile)


@T.meta_class
class Walk:
    """The tiles of keys that a row tile visits, from right to left: step ``i`` is tile ``last - i``, ``steps`` in all.

    Of these, ``rows`` rows from row ``row`` of the tile on see nothing in the first ``blind``, and need no mask in
    steps from ``full_begin`` to ``full_end`` (exclusive).  There always is a step 0, which masks if it must, even for
    rows that see nothing, and one that isn't blind.  ``has_full`` and ``has_left`` say which of the three parts there
    can be.
    """

    def __init__(self, block: Block, row, rows: int):
        self.block = block
        self.tiles = tiles = self._tiles(0, block.config.block_m)
        # A tile past the last row (a place has two, and an odd number was needed) takes the one step.
        steps = T.max(tiles.end - tiles.begin, 1)
        is_tile = block.row_first < block.rows.count
        self.steps = local(T.Select(is_tile, steps, 1) if block.config.tiles_per_cta == 2 else steps)
        self.last = local(T.max(tiles.end - 1, tiles.begin))
        self.own = own = self._tiles(row, rows)
        self.has_full, self.has_left = own.has_full, own.has_left
        self.full_begin = local(self.last + 1 - own.full_end) if own.has_full else self.steps
        self.full_end = local(self.last + 1 - own.full_begin) if own.has_full else self.steps
        self.blind = T.max(T.min(self.last + 1 - own.end, self.steps - 1), 0)

    def _tiles(self, row, rows):
        block = self.block
        return KeyTiles(block.pattern, block.site, *block.rows.span(block.row_first + row, rows), block.config.block_n)

    def key_first(self, step):
        """First key of a step's tile."""
        return (self.last - step) * self.block.config.block_n

    def live(self, step):
        """Whether a step has anything to see; asked only of masks with gaps, and not of step 0."""
        block, config = self.block, self.block.config
        key = self.key_first(step)
        rows = block.rows.span(block.row_first, config.block_m)
        return block.pattern.tile_live(block.site, *rows, key, key + (config.block_n - 1))

"""Which parts of the keys a block of a decoding kernel computes: equal shares of all sequences' tiles.

A *part* is a split of a sequence's keys with a row tile of the query heads that read one head of keys.  There are as
many blocks as the machine runs at a time.  Those of a head of keys, or of one query head where heads aren't packed,
share the tiles of all sequences, laid end to end: block ``i`` of ``n`` has the ``i``-th of ``n`` equal ranges of them,
and takes the splits that begin in its range, one after the other.  So all blocks have as much to read, however
different sequences are, and a block's copies never cease from its first part to its last; blocks of the heads of a
sequence read the same positions at about the same time.

Where splits begin depends on nothing but the sequence's own number of keys.  How many blocks share them decides about
time alone: every part is computed for itself.
"""

from __future__ import annotations

from dataclasses import replace

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.config import WARPGROUP_ROWS
from schedules.tile.combine import Sinks
from schedules.tile.geometry import Geometry, local, site
from schedules.tile.levels import from_lane, sum_up_to_lane
from schedules.tile.packing import PackedRows
from schedules.tile.parameters import Parameters
from schedules.tile.sequences import count_lanes
from schedules.tile.shares import RaggedShares, kept_states

_LANES = 32


@T.meta_class
class PartScheduler:
    """How the parts are shared among blocks; made before ``T.device_entry()``, of host expressions."""

    def __init__(self, geometry: Geometry, config, shares: RaggedShares):
        self.geometry, self.config, self.shares = geometry, config, shares
        self.group = shares.group

    def grid(self):
        """Blocks along each axis."""
        return [self.shares.units, self.shares.count]

    def key_tiles(self, part: Part):
        """First and end of the tiles of keys of a part."""
        return part.tiles_before(part.split), part.tiles_before(part.split + 1)


@T.meta_class
class PartRows:
    """The rows of a row tile: each is a query of a head of the group (:class:`schedules.tile.packing.PackedRows`).

    ``positions`` are the queries of this lane's rows in the accumulator, computed once for a part.
    """

    may_be_absent = False

    def __init__(self, packed: PackedRows):
        self.packed = packed

    @property
    def count(self):
        """Rows of all row tiles."""
        return self.packed.sequence.length

    def position(self, row):
        """The query of a row."""
        return self.packed.position(row)

    def span(self, row_first, rows: int):
        """First and last position (inclusive) of ``rows`` rows."""
        return T.int32(0), self.packed.seqlen - 1


@T.meta_class
class Part:
    """The part that a block has come to, as the main loop asks of a work tile.

    ``exists`` says whether there is one, ``other_rows`` whether its rows are others than those of the part before.
    Parts of the same rows one after the other are a run: ``begin`` is the first split of it, ``end`` the one after the
    last.
    """

    def __init__(self, pattern: Pattern, geometry: Geometry, scheduler: PartScheduler, boxes, unit, share):
        self.pattern, self.config, self.geometry, self.scheduler = pattern, scheduler.config, geometry, scheduler
        self.boxes = boxes
        self.share = share
        self.head = local(unit * scheduler.group)
        self.kv_head = local(unit if self.config.pack_heads else geometry.kv_head(self.head))
        # The tiles before those of the sequence, and the end of the range that splits of the block begin in.
        self.before, self.range_end, self.all_tiles = (local(T.int32(0)) for _ in range(3))
        self.batch, self.split, self.m_block = (local(T.int32(0)) for _ in range(3))
        self.begin, self.end = (local(T.int32(0)) for _ in range(2))
        self.query_first, self.seqlen_q, self.seqlen_kv = (local(T.int32(0)) for _ in range(3))
        self.other_rows = local(T.int32(1))
        self.rows = PartRows(
            PackedRows(geometry.q, self.batch, self.head, scheduler.group, self.seqlen_q, self.query_first)
        )
        self.parameters = Parameters(geometry, T.int32(0), self.head)
        own = site(geometry, self.parameters, self.batch, self.head)
        self.site = replace(own, seqlen_q=self.seqlen_q, seqlen_kv=self.seqlen_kv)
        self.tile = T.int32(0)  # the queries of all are in one place
        self.at = self

    @property
    def tiles(self):
        """How many tiles the sequence counts for."""
        return self.scheduler.shares.tiles_of(self.seqlen_q, self.seqlen_kv)

    def tiles_before(self, split):
        """Tiles of the sequence before a split."""
        return T.shift_left(split, self.scheduler.shares.split_bits(self.seqlen_kv))

    def splits_within(self, tiles):
        """How many splits begin in the first ``tiles`` tiles of the sequence."""
        return self.scheduler.shares.splits_within(tiles, self.seqlen_kv)

    @property
    def splits(self):
        """How many splits the sequence has."""
        return self.splits_within(self.tiles)

    @property
    def exists(self):
        """Whether the block has come to a part, and not to its end."""
        return self.before + self.tiles_before(self.split) < self.range_end

    @property
    def row_first(self):
        """First row of the row tile."""
        return self.m_block * WARPGROUP_ROWS

    @T.inline
    def find(self, lane):
        """A whole warp: find the block's first part."""
        shares = T.meta_var(self.scheduler.shares)
        batch = T.meta_var(self.geometry.batch)
        # 1. A lane sums the tiles of as many sequences as it has.
        each: T.int32 = T.shift_right(batch + (_LANES - 1), 5)
        mine: T.int32 = 0
        for i in T.serial(each):
            if lane * each + i < batch:
                mine = mine + shares.tiles(lane * each + i)
        sums: T.int32 = sum_up_to_lane(mine, lane)
        total: T.int32 = from_lane(sums, _LANES - 1)
        # 2. The block's range, and the sequence in which it begins.
        self.all_tiles = total
        size: T.int32 = shares.size(total)
        begin: T.int32 = self.share * size
        self.range_end = T.min(begin + size, total)
        owner: T.int32 = count_lanes(sums <= begin)
        self.before = from_lane(sums - mine, T.bitwise_and(owner, _LANES - 1))
        self.batch = owner * each
        if begin < self.range_end:
            self.enter()
            while self.before + self.tiles <= begin:
                self.leave()
                self.enter()
            # 3. The first split that begins there.
            self.split = self.splits_within(begin - self.before)
            self.go_on()
        else:
            self.range_end = 0

    @T.inline
    def enter(self):
        """Read what belongs to the sequence."""
        queries = T.meta_var(self.geometry.queries.of(self.batch))
        self.query_first = queries.offset
        self.seqlen_q = queries.length
        self.seqlen_kv = self.geometry.keys.of(self.batch).length
        self.parameters.read(self.batch, self.head)
        self.other_rows = 1

    @T.inline
    def leave(self):
        """Go on to the next sequence."""
        self.before = self.before + self.tiles
        self.batch = self.batch + 1

    @T.inline
    def go_on(self):
        """To the first split of a later sequence, if this one has no more."""
        while T.And(self.split >= self.splits, self.before + self.tiles < self.range_end):
            self.leave()
            self.enter()
            self.split = 0
        if self.split >= self.splits:
            self.range_end = 0

    @property
    def first_run(self):
        """How many splits the first run of the rows has."""
        return self.scheduler.shares.first_run(
            self.before, self.all_tiles, self.splits, self.seqlen_kv, self.rows.count
        )

    @property
    def number(self):
        """The split of the part."""
        return self.split

    @property
    def count(self):
        """Rows of the row tile."""
        return T.min(self.rows.count - self.row_first, WARPGROUP_ROWS)

    def has_row(self, row):
        """Whether the row tile has a row."""
        return row < self.count

    def row_number(self, row):
        """The number of a row of the row tile among all, int64."""
        return self.rows.packed.number(self.geometry, self.row_first + row)

    def output(self, row, column):
        """Elements of o before a column of a row, int64."""
        return replace(self.rows.packed, tensor=self.geometry.o).offset(self.row_first + row, column)

    def sink(self, row):
        """The logit that a row has beside those of its keys, None if rows have none."""
        if not self.pattern.has_sink:
            return None
        sinks = Sinks(self.pattern, self.geometry.parameters)
        return sinks.of(self.batch, self.rows.packed.head_of(self.row_first + row))

    @T.inline
    def begin_run(self):
        """A run begins with the part: as many as the block has of the rows, and there is room for the states of."""
        kept = T.meta_var(kept_states(self.rows.count))
        self.begin = self.split
        self.end = T.min(T.min(self.splits, self.splits_within(self.range_end - self.before)), self.split + kept)

    @T.inline
    def end_run(self):
        """Go on from the end of a run to the next part."""
        self.split = self.end - 1
        self.advance()

    @T.inline
    def advance(self):
        """Go on to the next part."""
        self.other_rows = 0
        self.m_block = self.m_block + 1
        if self.m_block * WARPGROUP_ROWS < self.rows.count:
            self.other_rows = 1
        else:
            if self.m_block > 1:
                self.other_rows = 1
            self.m_block = 0
            self.split = self.split + 1
            self.go_on()

"""Which parts of the keys a block of a decoding kernel computes: equal shares of all sequences' tiles.

A *part* is a split of a sequence's keys with a row tile of the query heads that read one head of keys.  There are as
many blocks as the machine runs at a time.  Those of a head of keys, or of one query head where heads aren't packed,
share the tiles of all sequences, laid end to end: block ``i`` of ``n`` has the ``i``-th of ``n`` equal ranges of them,
and takes the splits that begin in its range, one after the other.  So all blocks have as much to read, however
different sequences are, and a block's copies never cease from its first part to its last; blocks of the heads of a
sequence read the same positions at about the same time.

Or, where sequences are few and short, a cluster of blocks has a sequence's splits of a head of keys, each block as many
as the next one.  The host decides so by shapes (:func:`schedules.families.split_keys.parts_program`), as it can't know
lengths.

Where splits begin depends on nothing but the sequence's own number of keys.  How many blocks share them decides about
time alone: every part is computed for itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.config import WARPGROUP_ROWS
from schedules.tile.geometry import Geometry, local, site
from schedules.tile.levels import from_lane, sum_up_to_lane
from schedules.tile.packing import PackedRows
from schedules.tile.parameters import Parameters
from schedules.tile.sequences import count_lanes
from schedules.tile.static import static
from schedules.tile.tile_scheduler import ceildiv

_LANES = 32
#: What the reciprocal of the number of blocks of a cluster is multiplied by; exact for up to 8 blocks and 8191 splits.
_ONE_BITS = 16
_ONE = 1 << _ONE_BITS


@T.meta_class
class PartScheduler:
    """How the parts are shared among blocks; made before ``T.device_entry()``, of host expressions.

    Parameters
    ----------
    split_bits: ``split_bits(keys)``, of how many tiles of ``config.block_n`` keys the splits of a sequence of so many
        keys are, as a power of two.
    most_splits: that no sequence has more than, where blocks share the tiles of all; else None.
    runs: how many blocks a cluster has that takes all splits of a sequence and a head of keys; else None.
    """

    #: Whether one of two kernels is for clusters.
    may_cluster = True

    def __init__(
        self,
        pattern: Pattern,
        geometry: Geometry,
        config,
        split_bits: Callable[[Expr], Expr],
        most_splits: Expr | None = None,
        runs: Expr | None = None,
    ):
        self.geometry, self.config, self.split_bits, self.most_splits = geometry, config, split_bits, most_splits
        self.runs = runs
        if runs is not None:
            self.of_one_block = T.bind(T.truncdiv(T.max(runs, 1) + (_ONE - 1), T.max(runs, 1)))
        one = not config.pack_heads
        self.group = T.int32(1) if one else T.bind(T.truncdiv(geometry.heads, geometry.kv_heads))
        self.units = T.bind(self.count_units())
        if runs is None:
            resident = T.call_extern("int32", "multiprocessors") * config.blocks_per_sm
            most = most_splits * geometry.batch
            self.shares = T.bind(T.max(T.min(T.truncdiv(resident, self.units), most), 1))

    @property
    def in_clusters(self) -> bool:
        """Whether clusters of blocks have a sequence each."""
        return self.runs is not None

    def count_units(self) -> Expr:
        """How many heads of the grid there are."""
        return T.truncdiv(self.geometry.heads, self.group)

    def grid(self):
        """Blocks along each axis."""
        if self.in_clusters:
            return [self.units, T.max(self.runs, 1), self.geometry.batch]  # an axis as long as a cluster isn't lowered
        return [self.units, self.shares]

    def cluster(self):
        """Blocks of a cluster along each axis."""
        return [1, self.runs, 1]

    def of_each_block(self, splits: Expr) -> Expr:
        """``splits`` divided by the blocks of a cluster, rounded up; of so few, without a division."""
        return T.shift_right((splits + (self.runs - 1)) * self.of_one_block, _ONE_BITS)

    def tiles(self, sequence: Expr) -> Expr:
        """How many tiles of keys a sequence counts for: none if it has no queries."""
        return self.tiles_of(self.geometry.queries.of(sequence).length, self.geometry.keys.of(sequence).length)

    def tiles_of(self, queries: Expr, keys: Expr) -> Expr:
        """The same of a sequence of so many queries and keys."""
        # Without a branch, so that both are read at the same time.
        most = T.shift_left(T.min(T.max(queries, 0), 1), 30)
        return T.min(ceildiv(keys, self.config.block_n), most)

    def key_tiles(self, part: Part):
        """First and end of the tiles of keys of a part."""
        return part.tiles_before(part.split), part.tiles_before(part.split + 1)


@T.meta_class
class PartRows:
    """The rows of a row tile: each is a query of a head of the group (:class:`schedules.tile.packing.PackedRows`).

    ``positions`` are the queries of this lane's rows in the accumulator, computed once for a part.
    """

    may_be_absent = False
    are_positions = False

    def __init__(self, packed: PackedRows):
        self.packed = packed

    @property
    def count(self):
        """Rows of all row tiles."""
        return self.packed.sequence.length

    def position(self, row):
        """The query of a row."""
        return self.packed.position(row)

    def head(self, row):
        """The query head of a row, counted from that of row 0."""
        return T.truncdiv(row, self.packed.seqlen)

    def span(self, row_first, rows: int):
        """First and last position (inclusive) of ``rows`` rows."""
        return T.int32(0), self.packed.seqlen - 1


@T.meta_class
class Part:
    """The part that a block has come to, as the main loop asks of a work tile.

    ``exists`` says whether there is one, ``other_rows`` whether its rows are others than those of the part before.
    """

    def __init__(self, pattern: Pattern, geometry: Geometry, scheduler: PartScheduler, boxes, unit, share, batch=0):
        self.pattern, self.config, self.geometry, self.scheduler = pattern, scheduler.config, geometry, scheduler
        self.boxes = boxes
        self.share = share
        self.head = local(unit * scheduler.group)
        self.kv_head = local(unit if self.config.pack_heads else geometry.kv_head(self.head))
        # The tiles before those of the sequence, and the end of the range that splits of the block begin in.
        self.before, self.end = (local(T.int32(0)) for _ in range(2))
        self.batch = local(T.int32(0) if isinstance(batch, int) else batch)  # of a cluster; that of a share is found
        self.split, self.m_block = (local(T.int32(0)) for _ in range(2))
        self.query_first, self.seqlen_q, self.seqlen_kv = (local(T.int32(0)) for _ in range(3))
        # Of how many tiles its splits are, as a power of two; of latents that is computed where it is asked for.
        self.split_bits = local(T.int32(0)) if scheduler.may_cluster else None
        # Of a cluster: splits of a block, and rows that it has room for the states of.
        self.run_length, self.most_rows = 1, WARPGROUP_ROWS
        if scheduler.may_cluster:
            self.run_length, self.most_rows = local(T.int32(1)), local(T.int32(WARPGROUP_ROWS))
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
        return self.scheduler.tiles_of(self.seqlen_q, self.seqlen_kv)

    @property
    def of_split(self):
        """Of how many tiles the splits of the sequence are, as a power of two."""
        return self.scheduler.split_bits(self.seqlen_kv) if self.split_bits is None else self.split_bits

    def tiles_before(self, split):
        """Tiles of the sequence before a split."""
        return T.shift_left(split, self.of_split)

    def splits_within(self, tiles):
        """How many splits begin in the first ``tiles`` tiles of the sequence."""
        return T.shift_right(tiles + T.shift_left(T.int32(1), self.of_split) - 1, self.of_split)

    @property
    def splits(self):
        """How many splits the sequence has."""
        splits, most = self.splits_within(self.tiles), self.scheduler.most_splits
        return splits if most is None else T.min(splits, most)

    @property
    def exists(self):
        """Whether the block has come to a part, and not to its end."""
        return self.before + self.tiles_before(self.split) < self.end

    @property
    def row_first(self):
        """First row of the row tile."""
        return self.m_block * WARPGROUP_ROWS

    @property
    def run(self):
        """The block's place in its cluster."""
        return self.share

    @property
    def count(self):
        """Rows of the row tile."""
        return T.min(self.rows.count - self.row_first, self.most_rows)

    @property
    def number(self):
        """The split that the block has come to."""
        return self.split

    @property
    def kept(self):
        """How many the block of a cluster has come to before this one."""
        return self.split - self.run * self.run_length

    @property
    def folded(self):
        """How many states a row has; a sequence without keys has one of nothing."""
        return T.max(self.splits, 1)

    def place_of(self, position):
        """Where a query of the sequence is in q and o."""
        return self.query_first + position

    def has_row(self, row):
        """Whether there is such a row."""
        return row < self.rows.count

    def number_of_row(self, row):
        """Number of a row among all of the output, int64."""
        return self.rows.packed.number(self.geometry, row)

    @T.inline
    def find(self, lane):
        """A whole warp: find the block's first part."""
        if self.scheduler.in_clusters:
            self.find_in_cluster()
        else:
            self.find_share(lane)

    @T.inline
    def find_in_cluster(self):
        """Of a sequence's splits, the block has as many as others of its cluster; one without keys counts as one."""
        self.enter()
        splits: T.int32 = T.Select(self.seqlen_q > 0, T.max(self.splits, 1), 0)
        self.run_length = self.scheduler.of_each_block(splits)
        self.split = self.run * self.run_length
        last: T.int32 = T.min(self.split + self.run_length, splits) - 1
        self.end = T.Select(self.split <= last, self.tiles_before(last) + 1, 0)

    @T.inline
    def find_room(self):
        """Of how many rows the block of a cluster has room for the states; those that fetch don't ask."""
        self.most_rows = T.truncdiv(WARPGROUP_ROWS, T.max(self.run_length, 1))

    @T.inline
    def find_share(self, lane):
        """The first split that begins in the block's range of all tiles."""
        scheduler = T.meta_var(self.scheduler)
        batch = T.meta_var(self.geometry.batch)
        # 1. A lane sums the tiles of as many sequences as it has.
        each: T.int32 = T.shift_right(batch + (_LANES - 1), 5)
        mine: T.int32 = 0
        for i in T.serial(each):
            if lane * each + i < batch:
                mine = mine + scheduler.tiles(lane * each + i)
        sums: T.int32 = sum_up_to_lane(mine, lane)
        total: T.int32 = from_lane(sums, _LANES - 1)
        # 2. The block's range, and the sequence in which it begins.
        size: T.int32 = T.truncdiv(total + (scheduler.shares - 1), scheduler.shares)
        begin: T.int32 = self.share * size
        self.end = T.min(begin + size, total)
        owner: T.int32 = count_lanes(sums <= begin)
        self.before = from_lane(sums - mine, T.bitwise_and(owner, _LANES - 1))
        self.batch = owner * each
        if begin < self.end:
            self.enter()
            while self.before + self.tiles <= begin:
                self.leave()
                self.enter()
            # 3. The first split that begins there.
            self.split = self.splits_within(begin - self.before)
            self.go_on()
        else:
            self.end = 0

    @T.inline
    def enter(self):
        """Read what belongs to the sequence."""
        queries = T.meta_var(self.geometry.queries.of(self.batch))
        self.query_first = queries.offset
        self.seqlen_q = queries.length
        self.seqlen_kv = self.geometry.keys.of(self.batch).length
        if static(self.split_bits is not None):
            self.split_bits = self.scheduler.split_bits(self.seqlen_kv)
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
        while T.And(self.split >= self.splits, self.before + self.tiles < self.end):
            self.leave()
            self.enter()
            self.split = 0
        if self.split >= self.splits:
            self.end = 0

    @T.inline
    def advance(self):
        """Go on to the next part."""
        self.other_rows = 0
        if self.scheduler.in_clusters:
            self.split = self.split + 1  # rows are those of one row tile
        else:
            self.m_block = self.m_block + 1
            if self.m_block * WARPGROUP_ROWS < self.rows.count:
                self.other_rows = 1
            else:
                if self.m_block > 1:
                    self.other_rows = 1
                self.m_block = 0
                self.split = self.split + 1
                self.go_on()

"""The machine of the joint launch: that for dk and dv, whose dS other warps of the block make a part of dq of.

Every warp leaves its dS in shared memory, keys by queries, where ``dQ = dSᵀ K`` of a tile of queries is a product over
all keys of the block, and each warp has 32 rows, or all that there are, by some columns of it.  It is made at the end
of the next step, so that a step has one barrier of the whole block.  Parts are added to a tile of sums in memory, in
the order of the blocks of keys (:mod:`schedules.tile.ordered_sums`); the last block that a tile is visible to begins
with the sum, and writes dq.  All blocks of a head go from the last tile of queries to the first, and wait only for
blocks that were started before them.

A block tells what it has added at the beginning of a step, before it fetches anything, as who tells waits for all that
is on its way.  Each warp asks for itself, right before it adds: until then the block before may be late.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.mma.backward.config import DQ_ROWS, PLACES, LaunchConfig
from schedules.families.mma.backward.key_machine import KeyMachine
from schedules.families.mma.backward.key_part import KeyPart
from schedules.families.mma.backward.machine import GradientMachine, Sides
from schedules.families.mma.backward.query_part import QueryPart
from schedules.families.mma.registers import anew, fresh
from schedules.tile.geometry import local, wide
from schedules.tile.gradients import Tensors
from schedules.tile.ordered_sums import await_count, tell
from schedules.tile.static import static
from schedules.tile.tile_scheduler import WorkTile

_COPY_NUMBER = "cp.async.ca.shared.global"
_NUMBER_BYTES = 4


@dataclass(frozen=True)
class JointMemory:
    """Flat views of workspaces: shift and −delta of each row, tile by tile; sums of dq; how far each block has come;
    sums of dv and dk, and how many heads are in them.

    ``tiles`` and ``blocks`` are how many tiles of queries, and blocks of keys, each head has; ``shares`` is how many
    blocks share keys and a group's heads.
    """

    shifts: object
    starts: object
    sums: object
    progress: object
    key_sums: object
    key_progress: object
    tiles: Expr
    blocks: Expr
    shares: Expr


@T.meta_class
class JointMachine(QueryPart, KeyPart, KeyMachine):
    """The block's own rows are keys and values; it is number ``number`` of its head."""

    #: Tiles of a head from which on a block tells only of every so many (``told_tiles``): with fewer, blocks that are
    #: started together wait for one another.
    many = 64

    def __init__(
        self,
        pattern: Pattern,
        config: LaunchConfig,
        own: Sides,
        number: Expr,
        tensors: Tensors,
        memory: JointMemory,
    ):
        self.tensors, self.parameter_sums, self.memory, self.number = tensors, None, memory, number
        # a warp's part of dq
        self.rows = min(DQ_ROWS, config.step_rows)
        self.dq_columns = pattern.head_dim * config.step_rows // (self.rows * config.num_warps)
        self.across = pattern.head_dim // self.dq_columns
        self.dq_stride = self.fragment.registers(self.dq_columns)
        self.dq_tiles = self.rows // self.fragment.tile_rows
        GradientMachine.__init__(self, pattern, config, own, number * config.own_rows, transposed=True)
        self.step = local(T.int32(0))
        self.dQ = T.alloc_local([self.dq_tiles * self.dq_stride], "float32")
        self.dq_rows = T.alloc_local([self.dq_tiles * 4], "uint32")
        self.packed = T.alloc_local([1], "uint32")

    def place_shared(self, pool):
        self.numbers = pool.alloc((self.config.number_slots, 2, self.config.step_rows), "float32", align=16)
        self.known = pool.alloc((self.config.num_warps,), "int32", align=4)  # how far the block before has come
        self.place = pool.alloc((PLACES,), "int32", align=4)

    @T.inline
    def enter(self, b, head, left):
        """All warps: go to a head of a batch, of ``left`` heads, once none is at the one before."""
        T.cuda.cta_sync()
        thread: T.int32 = fresh("tid.x")
        if thread == 0:
            self.place[0] = b
            self.place[1] = head
            self.place[2] = left
        if thread % 32 == 0:
            self.known[thread // 32] = 0
        T.cuda.cta_sync()

    @T.inline
    def keep_place(self, kv_head, share):
        """Keep the head of keys, and which of the blocks that share its keys this is, for the end; before a barrier."""
        if fresh("tid.x") == 0:
            self.place[3] = kv_head
            self.place[4] = share

    def own_place(self, m_block):
        """The work tile of the block's keys."""
        return WorkTile(self.place[0], self.place[3], m_block)

    @property
    def share(self):
        """Which of the blocks that share keys this is: the number of its head in the group."""
        return self.place[4]

    def here(self):
        """Batch and head; pairs of warps, which are short of registers, read them where they are used."""
        places = self.place[0], self.place[1]
        return places if self.parts > 1 else tuple(local(x).source[0] for x in places)

    def numbers_in_use(self):
        """They are there for longer than their tile is."""
        return self.step % self.config.number_slots

    def tile_place(self, at, tile):
        """Number of a tile of queries of a head among those of all, int64."""
        row = self.tensors.head_row(anew(at.b), anew(at.h))
        return wide(row) * wide(self.memory.tiles) + wide(tile)

    def progress_of(self, at, before: int = 0):
        """Where it stands how far this block has come in a head, or that ``before`` it."""
        row = self.tensors.head_row(anew(at.b), anew(at.h))
        return self.memory.progress.ptr_to([wide(row) * wide(self.memory.blocks) + wide(self.number - before)])

    @T.inline
    def load_numbers(self, at, live):
        """Start copying what belongs to the queries of the tile that is next: a number a thread."""
        rows = T.meta_var(self.config.step_rows)
        thread: T.int32 = fresh("tid.x")
        if T.And(live, thread < 2 * rows):
            row: T.int32 = thread % rows
            slot: T.int32 = (self.step + (self.stages - 1)) % self.config.number_slots
            to = T.meta_var(T.cuda.cvta_generic_to_shared(self.numbers.ptr_to([slot, thread // rows, row])))
            place: T.int64 = self.tile_place(at, self.fetched) * T.int64(rows) + wide(row)
            if thread < rows:
                T.ptx[_COPY_NUMBER](to, self.memory.shifts.ptr_to([place]), _NUMBER_BYTES, T.uint32(_NUMBER_BYTES))
            else:
                T.ptx[_COPY_NUMBER](to, self.memory.starts.ptr_to([place]), _NUMBER_BYTES, T.uint32(_NUMBER_BYTES))

    @T.inline
    def store_numbers(self, stage):
        """They come by themselves."""

    # ------------------------------------------------------------ order

    @T.inline
    def await_turn(self, at, wanted):
        """This warp waits until the block of keys before has added to ``wanted`` tiles of a head."""
        if self.number > 0:
            thread: T.int32 = fresh("tid.x")
            if thread % 32 == 0:
                if self.known[thread // 32] < wanted:
                    self.known[thread // 32] = await_count(self.progress_of(at, 1), T.int32(0), wanted)
            T.cuda.warp_sync()

    @T.inline
    def tell(self, at, count):
        """Tell the block of keys after this one that all warps have added to ``count`` tiles of a head."""
        if fresh("tid.x") == self.threads - 32:
            T.evaluate(tell(self.progress_of(at), count))

    # ------------------------------------------------------------ steps

    def exchange(self, row, chunk):
        """Of two slots, that of this step."""
        return self.exchanged.address(row, chunk) + T.Cast("uint32", self.step % 2 * self.exchanged.stage_bytes)

    @T.inline
    def clear_missing(self, at, masked):
        """Clear dS of keys past the last one, which no mask hides: of rows whose log-sum-exp is low it is infinite, and
        times their K, which is 0, not a number."""
        if static(not masked):
            if self.own_first + self.config.own_rows > at.seqlen_kv:
                thread: T.int32 = fresh("tid.x")
                row: T.int32 = self.first_row(thread) + self.fragment.row(thread % 32)
                for t in T.unroll(self.m_tiles):
                    for word in T.unroll(self.s_stride // 2):
                        if row + (t * self.tile_step + word % 2 * self.fragment.row_step) >= at.seqlen_kv:
                            self.dS[t * (self.s_stride // 2) + word] = T.uint32(0)

    @T.inline
    def leave_nothing(self):
        """A warp whose keys no query of a tile sees: its dS is 0."""
        for i in T.unroll(self.m_tiles * self.s_stride // 2):
            self.dS[i] = T.uint32(0)
        if self.parts > 1:
            self.hand_over(self.dS)

    @T.inline
    def step_down(self, visited, weights, tiles, i):
        """Step ``i``, from the last tile on; the one that is ``stages - 1`` steps further on is fetched.

        In it dq of the tile before is made, of which dS of all keys is there.
        """
        tile: T.int32 = tiles.tile(tiles.steps - 1 - i)
        self.use = i % self.stages
        self.step = i
        self.fetched = tile - (self.stages - 1)
        self.arrive(self.stages - 2)
        if i > 1:
            if static(self.config.told_tiles > 1):
                if T.Or(tiles.steps < self.many, (i - 1) % self.config.told_tiles == 0):
                    self.tell(weights.at, i - 1)
            else:
                self.tell(weights.at, i - 1)
        live: T.bool = i + (self.stages - 1) < tiles.steps
        self.load_numbers(weights.at, live)
        self.fetch(visited, self.before, live)
        if static(tiles.has_full and tiles.has_masked):
            if i < tiles.steps - tiles.left:
                self.compute(weights, tile, False)
            else:
                self.compute_masked(weights, tile)
        elif static(tiles.has_full):
            self.compute(weights, tile, False)
        else:
            self.compute_masked(weights, tile)
        if self.parts == 1:
            self.hand_over(self.dS)
        self.make_queries(weights.at, tile + 1)
        self.land(visited, self.before)

    @T.inline
    def make_queries(self, at, tile):
        """dq of the tile of the step before."""
        if self.step > 0:
            for i in T.unroll(self.dq_tiles * self.dq_stride):
                self.dQ[i] = T.float32(0)
            if self.is_last(at, tile):
                self.await_turn(at, self.step)
                self.take_sums(at, tile)
            self.multiply_queries()
            if self.is_last(at, tile):
                self.write_queries(at, tile)
            else:
                self.await_turn(at, self.step)
                self.add_queries(at, tile)

    @T.inline
    def compute_masked(self, weights, tile):
        """The products of a step that needs a mask."""
        self.clear_blind()
        if self.is_seen(weights.at, tile):
            self.compute(weights, tile, True)
        else:
            self.leave_nothing()

    @T.inline
    def visit_down(self, visited, weights, tiles):
        """All steps over the tiles of one head: ``tiles`` as :class:`QueryTiles`."""
        for n in T.unroll(self.stages - 1):
            self.step = n - (self.stages - 1)
            self.fetched = tiles.tile(tiles.steps - 1 - n)
            self.load_numbers(weights.at, n < tiles.steps)
            self.fetch(visited, n, n < tiles.steps)
            self.land(visited, n)
        for i in T.serial(tiles.steps):
            self.step_down(visited, weights, tiles, i)
        self.arrive(0)
        self.step = tiles.steps
        if tiles.steps > 1:
            self.tell(weights.at, tiles.steps - 1)
        self.make_queries(weights.at, tiles.tile(0))
        T.cuda.cta_sync()
        self.tell(weights.at, tiles.steps)

"""The consumer warpgroups where values are the first columns of keys, which share the columns of their outputs.

How they take turns is told in :mod:`schedules.families.sm90.latent_kernel`.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.barriers import WARPGROUP_THREADS, SharedColumnBarriers
from schedules.families.sm90.config import PANEL, WARPGROUP_ROWS
from schedules.families.sm90.latent_tiles import WARPGROUPS, LatentPart, Turns, columns_of_half
from schedules.families.sm90.pipeline import Pipeline, PipelineState
from schedules.families.sm90.split_kernel import PartRowsConsumer
from schedules.families.sm90.wgmma import Products, k_major, mn_major, swizzled
from schedules.families.sm90.work_tile import KeyWalk
from schedules.tile.dtypes import element_type
from schedules.tile.epilogue import normalise
from schedules.tile.geometry import flat
from schedules.tile.partial import PartialResults
from schedules.tile.softmax import LAZY
from schedules.tile.static import static


@dataclass(frozen=True)
class Registers:
    """Those of ``buffer`` from ``first`` on."""

    buffer: object
    first: int

    def __getitem__(self, i: int):
        return self.buffer[self.first + i]


@T.meta_class
class HandedOver:
    """Shared memory for what each warpgroup hands over of its rows: references, and at the end sums."""

    def __init__(self, pool):
        self.references = pool.alloc((WARPGROUPS, WARPGROUP_ROWS), "float32", align=16)
        self.sums = pool.alloc((WARPGROUPS, WARPGROUP_ROWS), "float32", align=16)


@T.meta_class
class LatentConsumer(PartRowsConsumer):
    """Warpgroup ``index``, a constant, of the two: it scores every other tile, and has half of the output's columns."""

    threads = WARPGROUPS * WARPGROUP_THREADS
    on_the_way = 9
    unrolls = False

    def __init__(self, pattern: Pattern, config, part: LatentPart, memory, results: PartialResults, index, warp, lane):
        self.pattern, self.config, self.block = pattern, config, part
        self.q, self.keys, self.handed = memory
        self.index, self.warp, self.lane = index, warp, lane
        self.row = warp * 16
        self.barriers = SharedColumnBarriers()
        columns = columns_of_half(pattern)
        self.first_column = index * columns
        self.outputs = columns // 2
        # Of a warpgroup's 64 rows, 128 threads: (64, 64), (64, columns) float32; (64, 64) 16-bit in pairs.
        self.acc_s = T.alloc_local([config.block_n // 2], "float32")
        self.acc_o = T.alloc_local([self.outputs], "float32")
        self.p = T.alloc_local([config.block_n // 4], "uint32")
        self.turns = Turns()
        self.add_rows(results)

    @property
    def thread(self):
        return self.index * WARPGROUP_THREADS + self.warp * 32 + self.lane

    @T.inline
    def meet(self):
        self.barriers.meet()

    def q_state(self) -> PipelineState:
        """Of the queries, which have one place."""
        return self.q.state(T.int32(0))

    def _row0(self):
        return self.block.row_first + self.row + self.softmax.fragment.row(self.lane)

    def _own_row(self, r):
        """Row in the row tile of this lane's row ``r``, 0 or 1."""
        return self.row + self.softmax.fragment.row(self.lane) + r * self.softmax.fragment.row_step

    # ------------------------------------------------------------ products

    def _moving(self):
        """0 that only looks as if it changed from step to step: descriptors aren't kept in registers then."""
        return T.Cast("uint64", T.shift_right(self.turns.first, 31))

    def _q_descriptor(self, part: Pipeline):
        return k_major(self.q.tiles.ptr_to([0, part.first_panel, 0, 0])) + self._moving()

    def _k_descriptor(self, part: Pipeline, stage: int):
        return k_major(part.tiles.ptr_to([stage, 0, 0, 0])) + self._moving()

    def _v_descriptor(self, part: Pipeline, stage: int):
        return mn_major(part.tiles.ptr_to([stage, 0, 0, 0]), self.config.block_n) + self._moving()

    def _products(self, part: Pipeline) -> Products:
        """Those of a part, as columns of keys or of values."""
        columns = part.panels * PANEL
        return Products(self.pattern.dtype, WARPGROUP_ROWS, self.config.block_n, columns, columns)

    def _outputs_of(self, part: Pipeline) -> Registers:
        """The registers of the output's columns that a part has."""
        return Registers(self.acc_o, (part.first_panel * PANEL - self.first_column) // 2)

    @T.inline
    def score_part(self, part, stage, add):
        """Start what a part of a tile adds to its scores, when it has come."""
        part.consumer_wait(self.turns.state(stage))
        T.ptx.wgmma.fence.sync.aligned()
        self._products(part).qk(self.acc_s, self._q_descriptor(part), self._k_descriptor(part, stage), add)

    @T.inline
    def begin_score(self, stage):
        """Start the scores of the tile in a stage with its first part: one group of products."""
        self.score_part(self.keys.parts[0], stage, False)
        T.ptx.wgmma.commit_group.sync.aligned()

    def score_others(self, stage: int):
        """What the other parts add, in the order in which they come."""
        for part in self.keys.parts[1:]:
            self.score_part(part, stage, True)

    @T.inline
    def end_score(self, stage):
        """The other parts, and wait for the scores."""
        self.score_others(stage)
        T.ptx.wgmma.commit_group.sync.aligned()
        T.ptx.wgmma.wait_group.sync.aligned(0)

    @T.inline
    def add_own(self, stage):
        """Add the product of this warpgroup's probabilities and its columns of the tile in a stage."""
        T.ptx.wgmma.fence.sync.aligned()
        self.add_parts(stage, None)
        T.ptx.wgmma.commit_group.sync.aligned()
        T.ptx.wgmma.wait_group.sync.aligned(0)

    @T.inline
    def add_other(self, stage):
        """Start the same of the other warpgroup's probabilities, which are in shared memory: one group of products."""
        self.await_parts(stage)
        T.ptx.wgmma.fence.sync.aligned()
        self.add_parts(stage, self._k_descriptor(self.keys.rest, stage))
        T.ptx.wgmma.commit_group.sync.aligned()

    def add_parts(self, stage: int, p):
        """Start the products with this warpgroup's columns, of the probabilities that ``p`` describes, or its own."""
        for part in self.keys.of_half(self.index):
            products, to, v = self._products(part), self._outputs_of(part), self._v_descriptor(part, stage)
            if p is None:
                products.pv(to, self.p, v)
            else:
                products.pv_shared(to, p, v)

    def await_parts(self, stage: int):
        """Until this warpgroup's columns of the tile in a stage are there, which it hasn't scored."""
        for part in self.keys.of_half(self.index):
            part.consumer_wait(self.turns.state(stage))

    def release_own(self, stage: int):
        """This warpgroup, the only one that still needs them, is done with its columns of the tile in a stage."""
        for part in self.keys.of_half(self.index):
            part.consumer_release(self.turns.state(stage), self.lane)

    @T.inline
    def release_rest(self, stage):
        """The same of what was handed over in the place of the rest."""
        self.keys.rest.consumer_release(self.turns.state(stage), self.lane)

    @T.inline
    def release_first(self):
        """Warpgroup 1 is done with the first of a pair of tiles."""
        self.release_own(0)
        self.release_rest(0)

    # ------------------------------------------------------------ softmax

    @T.inline
    def weigh(self, walk, step, slack):
        """Probabilities of the tile of a step, relative to references that exceed no score by more than ``slack``."""
        column0 = T.meta_var(walk.key_first(step) + self.softmax.fragment.column(self.lane))
        if T.And(walk.full_begin <= step, step < walk.full_end):
            self.softmax.scores(self.acc_s, self._row0(), column0, False)
        else:
            self.softmax.scores(self.acc_s, self._row0(), column0, True)
        self.softmax.track(self.acc_s, slack)
        self.softmax.probabilities(self.acc_s, self.softmax.scale, self.acc_s)
        self.softmax.pack(self.acc_s, self.p)
        self.softmax.add_sums()
        self.rescale()

    @T.inline
    def rescale(self):
        """Bring the output to references that were raised."""
        if self.softmax.grown != 0:
            self.softmax.rescale(self.acc_o, self.outputs)

    @T.inline
    def hand_over(self, stage):
        """Leave probabilities and references of the tile in a stage to the other warpgroup."""
        place = T.meta_var(self.keys.rest.pointer(self.turns.state(stage)))
        self.barriers.scored(self.index)
        for c in T.unroll(self.config.block_n // 16):
            T.ptx["stmatrix.sync.aligned.m8n8.x4.shared.b16"](
                place(0, self.row + self.lane % 16, swizzled(c * 2 + self.lane // 16, self.lane % 8)),
                *[self.p[c * 4 + x] for x in range(4)],
            )
        if self.softmax.fragment.column(self.lane) == 0:
            for r in T.unroll(2):
                self.handed.references[self.index, self._own_row(r)] = self.softmax.row_max[r]
        T.ptx.fence.proxy.async_.shared__cta()
        self.barriers.hand_over(self.index)

    @T.inline
    def take_over(self):
        """Wait for what the other warpgroup hands over, and raise references to its own."""
        other = T.meta_var(1 - self.index)
        self.barriers.take_over(other)
        for r in T.unroll(2):
            self.softmax.peak[r] = self.handed.references[other, self._own_row(r)]
        self.softmax.raise_references()
        self.rescale()

    # ------------------------------------------------------------ the whole

    @T.inline
    def run(self):
        """Compute the parts."""
        part = T.meta_var(self.block)
        while part.exists:
            if part.other_rows != 0:
                self.read_queries()
            self.compute(KeyWalk(part, 0, WARPGROUP_ROWS))
            part.advance()

    @T.inline
    def compute(self, walk):
        """A part; its rows may see nothing of it."""
        for i in T.unroll(self.outputs):
            self.acc_o[i] = T.float32(0)
        self.softmax.reset()
        for i in T.serial(T.truncdiv(walk.tiles.end - walk.tiles.begin + 1, 2)):
            self.pair(walk, i)
        self.finished.keep(self.softmax)
        self.add_up_sums()
        splits: T.int32 = self.block.splits
        if splits == 1:
            self.write_rows()
        else:
            self.write_partial()

    @T.inline
    def pair(self, walk, i):
        """The tiles of steps ``2 i`` and ``2 i + 1``, which may not be there."""
        has_second: T.int32 = T.Cast("int32", 2 * i + 1 < walk.steps)
        if static(self.index == 0):
            self.begin_score(0)
            self.end_score(0)
            self.weigh(walk, 2 * i, T.Select(i == 0, T.float32(0), T.float32(LAZY)))
            self.hand_over(0)
            self.add_own(0)
            self.release_own(0)
            if has_second != 0:
                self.take_over()
                self.add_other(1)
                T.ptx.wgmma.wait_group.sync.aligned(0)
                self.release_own(1)
                self.release_rest(1)
        else:
            self.take_over()
            self.add_other(0)
            if has_second != 0:
                self.begin_score(1)  # beside that product
                T.ptx.wgmma.wait_group.sync.aligned(1)
                self.release_first()
                self.end_score(1)
                self.weigh(walk, 2 * i + 1, LAZY)
                self.hand_over(1)
                self.add_own(1)
                self.release_own(1)
            else:
                T.ptx.wgmma.wait_group.sync.aligned(0)
                self.release_first()
        self.turns.advance(1, has_second)

    @T.inline
    def add_up_sums(self):
        """Row sums of both warpgroups' tiles, in the same order in both."""
        self.meet()
        if self.softmax.fragment.column(self.lane) == 0:
            for r in T.unroll(2):
                self.handed.sums[self.index, self._own_row(r)] = self.finished.row_sum[r]
        self.meet()
        for r in T.unroll(2):
            row = T.meta_var(self._own_row(r))
            self.finished.row_sum[r] = self.handed.sums[0, row] + self.handed.sums[1, row]

    @T.inline
    def write_rows(self):
        """Write the rows of this lane that there are, of a sequence with a single split, to the output."""
        normalise(self.finished, self.acc_o, self.outputs)
        geometry, fragment = T.meta_var((self.block.geometry, self.softmax.fragment))
        o, lse = T.meta_var((flat(geometry.o.buffer), flat(geometry.lse)))
        packed = T.alloc_local([1], "uint32")
        pack = T.meta_var(element_type(self.pattern.dtype).pack)
        column: T.int32 = fragment.column(self.lane) + self.first_column
        for r in T.unroll(2):
            row: T.int32 = self._row0() + r * fragment.row_step
            if row < self.block.rows.count:
                packed_rows = T.meta_var(self.block.rows.packed)
                to: T.int64 = packed_rows.output_offset(geometry.o, row, column)
                if T.And(geometry.lse_wanted, column == 0):
                    lse[packed_rows.number(geometry, row)] = self.finished.lse(r)
                for g in T.unroll(self.outputs // 4):
                    i = T.meta_var(g * 4 + r * 2)
                    if column + fragment.output_column(g) < geometry.head_dim_v:
                        T.ptx[pack](packed[0], self.acc_o[i + 1], self.acc_o[i])
                        T.ptx["st.global.b32"](o.ptr_to([to + fragment.output_column(g)]), packed[0])

"""The consumer warpgroups where values are the first columns of keys, which share the columns of their outputs.

How they take turns is told in :mod:`schedules.families.sm90.latent_kernel`.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.barriers import WARPGROUP_THREADS, SharedColumnBarriers
from schedules.families.sm90.config import PANEL, WARPGROUP_ROWS
from schedules.families.sm90.latent_tiles import WARPGROUPS, LatentPart, Turns, columns_of_half
from schedules.families.sm90.pipeline import Pipeline, PipelineState
from schedules.families.sm90.split_kernel import CHUNK, PartRowsConsumer
from schedules.families.sm90.wgmma import Products, k_major, mn_major, swizzled
from schedules.families.sm90.work_tile import KeyWalk
from schedules.tile.dtypes import element_type
from schedules.tile.epilogue import normalise
from schedules.tile.geometry import flat
from schedules.tile.partial import PartialResults
from schedules.tile.softmax import LAZY
from schedules.tile.static import static

#: A copy of a chunk to shared memory, and how many of these a panel's row has.
_COPY, _CHUNKS = "cp.async.cg.shared.global", PANEL // CHUNK


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

    @T.inline
    def read_queries(self):
        """Copy the queries of a row tile to shared memory, zeros where there are none; all copies at once."""
        part = T.meta_var(self.block)
        lanes = T.meta_var(self.threads // WARPGROUP_ROWS)  # that share a row
        source, to = T.meta_var((flat(part.geometry.q.buffer), self.q.pointer(self.q_state())))
        row: T.int32 = T.truncdiv(self.thread, lanes)
        place: T.int32 = T.truncmod(self.thread, lanes)
        exists: T.bool = part.row_first + row < part.rows.count
        first: T.int64 = part.rows.packed.offset(part.row_first + T.Select(exists, row, 0), place * CHUNK)
        self.meet()
        for i in T.unroll(self.q.panels * _CHUNKS // lanes):
            chunk = T.meta_var(i * lanes % _CHUNKS + place)
            seen = T.meta_var(T.And(exists, (i * lanes + place) * CHUNK < part.geometry.head_dim))
            T.ptx[_COPY](
                to(i * lanes // _CHUNKS, row, swizzled(chunk, row)),
                source.ptr_to([first + i * lanes * CHUNK]),
                16,
                T.Select(seen, T.uint32(16), T.uint32(0)),
            )
        T.ptx.cp.async_.commit_group()
        T.ptx.cp.async_.wait_group(0)
        T.ptx.fence.proxy.async_.shared__cta()
        self.meet()
        self.softmax.place(self._row0())

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

    @T.inline
    def score_part(self, part, stage, add):
        """Start what a part of a tile adds to its scores, when it has come."""
        part.consumer_wait(self.turns.state(stage))
        T.ptx.wgmma.fence.sync.aligned()
        self._products(part).qk(self.acc_s, self._q_descriptor(part), self._k_descriptor(part, stage), add)

    def score_parts(self, stage: int):
        """What the parts of a tile add, in the order in which they come."""
        for part in self.keys.parts:
            self.score_part(part, stage, part is not self.keys.parts[0])

    @T.inline
    def score(self, stage):
        """Start the scores of the tile in a stage: one group of products."""
        self.score_parts(stage)
        T.ptx.wgmma.commit_group.sync.aligned()

    @property
    def own(self) -> Pipeline:
        """The part with this warpgroup's columns."""
        return self.keys.parts[self.index]

    @T.inline
    def add_own(self, stage):
        """Start the product of this warpgroup's probabilities and its columns of the tile in a stage: one group."""
        T.ptx.wgmma.fence.sync.aligned()
        self._products(self.own).pv(self.acc_o, self.p, self._v_descriptor(self.own, stage))
        T.ptx.wgmma.commit_group.sync.aligned()

    @T.inline
    def end_own(self, stage):
        """Wait for that, and release the columns, which nobody else needs then."""
        T.ptx.wgmma.wait_group.sync.aligned(0)
        self.own.consumer_release(self.turns.state(stage), self.lane)

    @T.inline
    def add_other(self, stage):
        """Start the same of the other warpgroup's probabilities, when they are in shared memory, and of the columns of
        a tile that this one hasn't scored, when they are there."""
        self.own.consumer_wait(self.turns.state(stage))
        self.barriers.take_over(1 - self.index)
        T.ptx.wgmma.fence.sync.aligned()
        p = T.meta_var(self._k_descriptor(self.keys.rest, stage))
        self._products(self.own).pv_shared(self.acc_o, p, self._v_descriptor(self.own, stage))
        T.ptx.wgmma.commit_group.sync.aligned()

    @T.inline
    def end_other(self, stage):
        """The same; and release what was handed over in the place of the rest."""
        self.end_own(stage)
        self.keys.rest.consumer_release(self.turns.state(stage), self.lane)

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
        self.leave_references()
        self.softmax.probabilities(self.acc_s, self.softmax.scale, self.acc_s)

    @T.inline
    def pack(self):
        """Round these probabilities, and count them in."""
        self.softmax.pack(self.acc_s, self.p)
        self.softmax.add_sums()

    @T.inline
    def rescale(self):
        """Bring the output to references that were raised."""
        if self.softmax.grown != 0:
            self.softmax.rescale(self.acc_o, self.outputs)

    @T.inline
    def leave_references(self):
        """Leave references to the other warpgroup."""
        if self.softmax.fragment.column(self.lane) == 0:
            for r in T.unroll(2):
                self.handed.references[self.index, self._own_row(r)] = self.softmax.row_max[r]
        self.barriers.refer(self.index)

    @T.inline
    def leave_probabilities(self, stage):
        """Put probabilities of the tile in a stage where the other warpgroup will find them, once it is scored.

        All of warpgroup 1 have scored their tile before they get references.
        """
        place = T.meta_var(self.keys.rest.pointer(self.turns.state(stage)))
        if static(self.index == 0):
            self.barriers.scored()
        for c in T.unroll(self.config.block_n // 16):
            T.ptx["stmatrix.sync.aligned.m8n8.x4.shared.b16"](
                place(0, self.row + self.lane % 16, swizzled(c * 2 + self.lane // 16, self.lane % 8)),
                *[self.p[c * 4 + x] for x in range(4)],
            )

    @T.inline
    def hand_over(self):
        """Say that they are there."""
        T.ptx.fence.proxy.async_.shared__cta()
        self.barriers.hand_over(self.index)

    @T.inline
    def take_references(self):
        """Wait for the other warpgroup's references, and raise these to them."""
        other = T.meta_var(1 - self.index)
        self.barriers.take_references(other)
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
            self.score(0)
            if has_second != 0:
                self.barriers.first_issued()
            T.ptx.wgmma.wait_group.sync.aligned(0)
            self.weigh(walk, 2 * i, T.Select(i == 0, T.float32(0), T.float32(LAZY)))
            self.pack()
            self.rescale()
            self.leave_probabilities(0)
            self.hand_over()
            self.add_own(0)
            self.end_own(0)
            if has_second != 0:
                self.take_references()
                self.add_other(1)
                self.end_other(1)
        else:
            if has_second != 0:
                self.barriers.await_first()
                self.score(1)
                T.ptx.wgmma.wait_group.sync.aligned(0)
                self.take_references()
                self.weigh(walk, 2 * i + 1, LAZY)  # beside the other one's product
                self.add_other(0)
                self.pack()
                self.leave_probabilities(1)
                self.hand_over()
                self.end_other(0)
                self.rescale()
                self.add_own(1)
                self.end_own(1)
            else:
                self.take_references()
                self.add_other(0)
                self.end_other(0)
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

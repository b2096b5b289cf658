"""The consumer warpgroups of the launch for dq: 64 queries each, like the forward's.

A step, for tile n of keys:

1. issue ``S = Q K(n)ᵀ``, ``dQ += dS K(n−1)`` and ``dP = dO V(n)ᵀ``, which starts from −delta; wait for S;
2. weights while the other two run: in place of S the factors ``F = P ∂score/∂s``;
3. wait for both, release K(n−1) and V(n), ``dS = F dP``, packed.

A step by itself, which takes fewer registers, waits for S and dP at once, and for its own dQ.  Only such a step
sums the gradients of parameters.

Registers of a thread, at head_dim 128 and 96 keys: dQ 64, S 48, dP 48, dS 24.
"""

from __future__ import annotations

import functools

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.backward.config import BLOCK, CONSUMERS
from schedules.families.sm90.backward.operands import KEPT_PANELS, own_rows
from schedules.families.sm90.backward.parameters import SHARES, ParameterGradients
from schedules.families.sm90.backward.step_weights import has_fetched, step_weights
from schedules.families.sm90.backward.stores import add_rows, stage_rows, store_rows
from schedules.families.sm90.barriers import WARPGROUP_THREADS, WARPS, NamedBarriers
from schedules.families.sm90.config import WARPGROUP_ROWS, Config
from schedules.families.sm90.pipeline import Pipeline, TileCounter
from schedules.families.sm90.tensor_boxes import BoxedTile, TensorBoxes
from schedules.families.sm90.tensor_tile import TensorTile
from schedules.families.sm90.tma import wait_stored
from schedules.families.sm90.wgmma import Products, k_major, mn_major, rows_offset
from schedules.families.sm90.work_tile import Block, KeyWalk
from schedules.tile.fragment import M16N8
from schedules.tile.geometry import flat, wide
from schedules.tile.place_gradients import PlaceGradients, Targets
from schedules.tile.score import LOG2_E, NEGATIVE_INFINITY
from schedules.tile.static import static
from schedules.tile.table_gradients import Slices, TableGradients, TableSums


@T.meta_class
class QueryConsumer:
    """Warpgroup ``index`` of the block's consumers, seen by warp ``warp`` of it and lane ``lane``.

    ``pipelines`` are those of Q, K, V and dO; ``numbers`` are the flat memory of shifts and of −delta, how many tiles
    each head has a place for there, and their rows; ``parameters`` are those whose gradients are summed, those that
    have values for queries, and tables, for which there is ``slice_memory``.  Either it ``overlaps`` the product of a
    step with the next one's, or each step is by itself.
    """

    def __init__(
        self,
        pattern: Pattern,
        config: Config,
        block: Block,
        pipelines,
        numbers,
        parameters: tuple[ParameterGradients, Targets, TableSums],
        overlaps: bool,
        index,
        warp,
        lane,
        slice_memory=None,
        boxes: TensorBoxes | None = None,
    ):
        self.pattern, self.config, self.block = pattern, config, block
        self.q, self.k, self.v, self.do = pipelines
        self.index, self.warp, self.lane = index, warp, lane
        D, E, N = pattern.head_dim, pattern.head_dim_v, config.block_n
        self.scores = Products(pattern.dtype, BLOCK, N, D, D)
        self.gradients = Products(pattern.dtype, BLOCK, N, E, E)
        self.numbers, self.overlaps = numbers, overlaps
        self.parameters, targets, of_tables = parameters
        self.places = PlaceGradients(targets, block.site, M16N8, 1, M16N8.tile_rows, False) if targets.params else None
        self.tables = None
        if of_tables.params:
            of_warp = (slice_memory, index * WARPS + warp, lane)
            self.tables = TableGradients(of_tables, pattern, block.site, Slices(M16N8, N), *of_warp)
        self.boxes = boxes
        tile_type = TensorTile if boxes is None else functools.partial(BoxedTile, boxes, index, warp)
        fetches = config.tensors_ahead or boxes is not None
        self.weights = step_weights(
            pattern, block.site, N, False, lane, fetches, None, tile_type, places=self.places, tables=self.tables
        )
        # Of a warpgroup's 64 rows, 128 threads: (64, D) and twice (64, N) float32; (64, N) 16-bit in pairs.
        self.acc_dq = T.alloc_local([D // 2], "float32")
        self.acc_s = T.alloc_local([N // 2], "float32")
        self.acc_dp = T.alloc_local([N // 2], "float32")
        self.ds = T.alloc_local([N // 4], "uint32")
        summed = len(self.parameters.params)
        self.parameter_sums = T.alloc_local([summed], "float32") if summed else None
        self.shift = T.alloc_local([2], "float32")
        self.start = T.alloc_local([2], "float32")  # −delta
        self.n = T.local_scalar("int32")  # tiles of keys so far
        self.counter = TileCounter(self.n)
        self.row = index * WARPGROUP_ROWS + warp * 16  # first row of this warp in the work tile

    def _tile(self, describe, pipeline: Pipeline, state):
        """A pipeline's tile as ``describe`` of its first one."""
        return describe + T.Cast("uint64", state.index) * rows_offset(self.config.block_n, pipeline.panels)

    def _own(self, pipeline: Pipeline):
        """Of this warpgroup's rows of Q or dO."""
        return own_rows(pipeline, self.index * WARPGROUP_ROWS, pipeline.panels <= KEPT_PANELS)

    @T.inline
    def issue_scores(self, k):
        """Start S of K tile ``k``."""
        T.ptx.wgmma.fence.sync.aligned()
        keys = T.meta_var(self._tile(k_major(self.k.tiles.ptr_to([0, 0, 0, 0])), self.k, k))
        self.scores.qk(self.acc_s, self._own(self.q), keys)
        T.ptx.wgmma.commit_group.sync.aligned()

    @T.inline
    def issue_dp(self, v):
        """Start dP of V tile ``v``, from −delta."""
        for g in T.unroll(self.config.block_n // M16N8.group):
            for r in T.unroll(2):
                for e in T.unroll(2):
                    self.acc_dp[g * 4 + r * 2 + e] = self.start[r]
        T.ptx.wgmma.fence.sync.aligned()
        values = T.meta_var(self._tile(k_major(self.v.tiles.ptr_to([0, 0, 0, 0])), self.v, v))
        self.gradients.qk(self.acc_dp, self._own(self.do), values, add=True)
        T.ptx.wgmma.commit_group.sync.aligned()

    @T.inline
    def issue_dq(self, k):
        """Start dQ of the packed gradients and K tile ``k``."""
        T.ptx.wgmma.fence.sync.aligned()
        keys = T.meta_var(self._tile(mn_major(self.k.tiles.ptr_to([0, 0, 0, 0]), self.config.block_n), self.k, k))
        self.scores.pv(self.acc_dq, self.ds, keys)
        T.ptx.wgmma.commit_group.sync.aligned()

    # ------------------------------------------------------------ steps

    @T.inline
    def read_terms(self):
        """The shifts and −delta of this lane's two rows; rows past the last one weigh nothing."""
        geometry, batch = T.meta_var((self.block.geometry, self.block.batch))
        shifts, starts, places, rows = T.meta_var(self.numbers)
        tile = T.meta_var(geometry.head_row(batch, self.block.head) * places + geometry.first_tile(batch, rows))
        counts = T.meta_var(self.parameters.counts(geometry, batch))
        for r in T.unroll(2):
            row: T.int32 = self.block.row_first + self.row + M16N8.row(self.lane) + r * M16N8.row_step
            self.shift[r] = T.float32(NEGATIVE_INFINITY)
            self.start[r] = T.float32(0)
            if T.And(row < geometry.queries.of(batch).length, counts):
                at: T.int64 = wide(tile * rows + row)
                self.shift[r] = shifts[at]
                self.start[r] = starts[at]

    def sink_shift(self):
        """The sink in powers of two: plus a row's shift it is the exponent of its share of the row."""
        return self.block.geometry.sink(self.pattern, self.block.site) * T.float32(LOG2_E)

    @T.inline
    def add_sinks(self):
        """This lane's rows in the gradients of parameters of the sink: one of the lanes that share a row has it."""
        if M16N8.column(self.lane) == 0:
            for r in T.unroll(2):
                gradient: T.float32 = T.exp2(self.sink_shift() + self.shift[r]) * self.start[r]
                self.parameters.add_to_sinks(self.parameter_sums, self.block.site, gradient)

    @T.inline
    def clear_places(self, walk):
        """Zeros in gradients of scores where this warpgroup's rows may visit no keys."""
        has_gaps = T.meta_var(self.pattern.has_gaps or self.pattern.lists_tiles)
        visited = T.meta_var((T.int32(0), T.int32(0)) if has_gaps else self.visited_keys(walk))
        row = T.meta_var(self.block.row_first + self.index * WARPGROUP_ROWS)
        thread = T.meta_var(self.warp * 32 + self.lane)
        self.places.clear(row, WARPGROUP_ROWS, visited, thread, WARPGROUP_THREADS)
        if has_gaps:
            NamedBarriers(CONSUMERS).queries_read(self.index)

    def visited_keys(self, walk):
        """First and end of the keys that a walk without gaps visits."""
        return walk.key_first(walk.steps - 1), walk.key_first(0) + self.config.block_n

    def first_of(self, walk, i):
        """This lane's first query and key of step ``i``."""
        return self.block.row_first + self.row + M16N8.row(self.lane), walk.key_first(i) + M16N8.column(self.lane)

    @T.inline
    def fetch(self, walk, i):
        """Fetch what tensors hold for the scores of step ``i``."""
        if static(has_fetched(self.weights)):
            query, key = T.meta_var(self.first_of(walk, i))
            self.weights.fetch(query, key, walk.key_first(i) + (self.config.block_n - 1))

    @T.inline
    def fetch_now(self, walk, i):
        """At the beginning of a step, fetch for its own scores, unless the step before has."""
        if static(self.boxes is not None):
            query, key = T.meta_var(self.first_of(walk, i))
            self.weights.take(self.boxed_state(), query, key, walk.key_first(i) + (self.config.block_n - 1))
        elif self.pattern.has_gaps:
            self.fetch(walk, i)

    def boxed_state(self):
        """Of what a tensor holds for the tile of keys that is scored next."""
        return self.counter.state(self.boxes.stages)

    @T.inline
    def release_boxes(self, state):
        """What a tensor holds for a tile of keys isn't needed any more."""
        if static(self.boxes is not None):
            self.boxes.release(state, self.index, self.lane)

    @T.inline
    def fetch_ahead(self, walk, i):
        """When step ``i`` has its weights, fetch for those of the next one, if there is another; of a mask with gaps
        it isn't known which."""
        if static(has_fetched(self.weights) and not self.pattern.has_gaps and self.boxes is None):
            if i + 1 < walk.steps:
                self.fetch(walk, i + 1)

    @T.inline
    def weigh(self, walk, i, masked):
        """The factors of step ``i``."""
        query, key = T.meta_var(self.first_of(walk, i))
        self.weights.weigh(self.acc_s, None, lambda t, g, r, e: self.shift[r], query, key, masked)
        self.fetch_ahead(walk, i)

    @T.inline
    def start_steps(self, walk, masked):
        """Step 0, which has no earlier product beside it."""
        k = T.meta_var(self.counter.state(self.k.stages))
        boxed = T.meta_var(None if self.boxes is None else self.boxed_state())
        if static(self.boxes is not None):
            self.fetch_now(walk, 0)
        self.k.consumer_wait(k)
        self.issue_scores(k)
        self.v.consumer_wait(k)
        self.issue_dp(k)
        T.ptx.wgmma.wait_group.sync.aligned(1)
        self.weigh(walk, 0, masked)
        self.counter.advance()
        T.ptx.wgmma.wait_group.sync.aligned(0)
        self.v.consumer_release(k, self.lane)
        self.weights.gradients(self.acc_s, self.acc_dp, self.ds, masked)
        self.release_boxes(boxed)

    @T.inline
    def step(self, walk, i, masked):
        """Step ``i``."""
        if self.overlaps:
            self.step_after_another(walk, i, masked)
        else:
            self.step_by_itself(walk, i, masked)

    @T.inline
    def step_by_itself(self, walk, i, masked):
        """Step ``i`` with its own dQ."""
        k = T.meta_var(self.counter.state(self.k.stages))
        boxed = T.meta_var(None if self.boxes is None else self.boxed_state())
        self.fetch_now(walk, i)
        self.k.consumer_wait(k)
        self.issue_scores(k)
        self.v.consumer_wait(k)
        self.issue_dp(k)
        T.ptx.wgmma.wait_group.sync.aligned(0)
        self.v.consumer_release(k, self.lane)
        query, key = T.meta_var(self.first_of(walk, i))
        self.weights.turn(
            self.acc_s,
            self.acc_dp,
            None,
            self.ds,
            lambda t, g, r, e: self.shift[r],
            query,
            key,
            masked,
            self.parameter_sums,
        )
        self.fetch_ahead(walk, i)
        self.issue_dq(k)
        self.release_boxes(boxed)
        T.ptx.wgmma.wait_group.sync.aligned(0)
        self.k.consumer_release(k, self.lane)
        self.counter.advance()

    @T.inline
    def step_after_another(self, walk, i, masked):
        """Step ``i``, and dQ of the one before."""
        k = T.meta_var(self.counter.state(self.k.stages))
        before = T.meta_var(self.counter.state(self.k.stages, behind=1))
        boxed = T.meta_var(None if self.boxes is None else self.boxed_state())
        self.fetch_now(walk, i)
        self.k.consumer_wait(k)
        self.issue_scores(k)
        self.issue_dq(before)
        self.v.consumer_wait(k)
        self.issue_dp(k)
        T.ptx.wgmma.wait_group.sync.aligned(2)
        self.weigh(walk, i, masked)
        # V is there: a branch is what keeps ptxas from moving the wait for dP up in front of the exponentials.
        self.v.consumer_wait(k)
        self.counter.advance()
        T.ptx.wgmma.wait_group.sync.aligned(0)
        self.k.consumer_release(before, self.lane)
        self.v.consumer_release(k, self.lane)
        self.weights.gradients(self.acc_s, self.acc_dp, self.ds, masked)
        self.release_boxes(boxed)

    # ------------------------------------------------------------ the whole

    @T.inline
    def run(self, dq_map):
        """Compute the block's dq, and store it."""
        self.counter.start()
        for i in T.unroll(self.pattern.head_dim // 2):
            self.acc_dq[i] = T.float32(0)
        if len(self.parameters.params) > 0:
            for n in T.unroll(len(self.parameters.params)):
                self.parameter_sums[n] = T.float32(0)
        self.read_terms()
        walk = KeyWalk(self.block, 0, self.config.block_m)
        if self.places is not None:
            self.clear_places(walk)
        self.q.consumer_wait(self.q.state(0))
        self.do.consumer_wait(self.do.state(0))
        # 1. Tiles of keys from right to left: masked, full, masked.
        if static((self.overlaps or not self.pattern.has_gaps) and self.boxes is None):
            self.fetch(walk, 0)
        if self.overlaps:
            self.start_steps(walk, True)
        else:
            self.step(walk, 0, True)
        walk.masked_steps(1, T.min(walk.full_begin, walk.steps), self.step)
        if walk.has_full:
            for i in T.serial(T.max(walk.full_begin, 1), T.min(walk.full_end, walk.steps)):
                self.step(walk, i, False)
        if walk.has_left:
            walk.masked_steps(T.max(walk.full_end, 1), walk.steps, self.step)
        # 2. The last product.
        if self.overlaps:
            self.issue_dq(self.counter.state(self.k.stages, behind=1))
            T.ptx.wgmma.wait_group.sync.aligned(0)
        self.write(dq_map)
        if self.places is not None:
            self.places.store_sums(self.block.row_first + self.row + M16N8.row(self.lane), self.lane)
        if self.tables is not None:
            self.tables.leave()
        if len(self.pattern.learnt_of_sink) > 0:
            self.add_sinks()
        if len(self.parameters.params) > 0:
            share = T.meta_var(T.truncdiv(self.block.row_first, BLOCK) * SHARES + self.index * WARPS + self.warp)
            self.parameters.store(
                self.block.geometry,
                self.parameter_sums,
                self.block.batch,
                self.block.head,
                share,
                self.lane,
            )

    def sees_nothing(self, r):
        """Whether no key has any weight in one of this lane's rows: where there is a sink, it is all that there is."""
        nothing = self.shift[r] == T.float32(NEGATIVE_INFINITY)
        if not self.pattern.has_sink:
            return nothing
        return T.Or(nothing, T.float32(0) - self.sink_shift() == self.shift[r])

    @T.inline
    def write(self, dq_map):
        """Store dq, or add it to what is there."""
        for r in T.unroll(2):
            # a row that sees nothing may still hold the NaN of a key that it doesn't see
            if self.sees_nothing(r):
                for g in T.unroll(self.pattern.head_dim // 8):
                    for e in T.unroll(2):
                        self.acc_dq[g * 4 + r * 2 + e] = T.float32(0)
        if static(self.block.geometry.adds):
            self.add()
        else:
            self.write_over(dq_map)

    @T.inline
    def add(self):
        """Add dq to what is there."""
        block = T.meta_var(self.block)
        tensor = T.meta_var(block.geometry.gradients["dq"])
        own = T.meta_var(block.geometry.queries.of(block.batch))
        first: T.int32 = block.row_first + self.row + M16N8.row(self.lane)
        column: T.int32 = M16N8.column(self.lane)
        add_rows(
            flat(tensor.buffer), self.acc_dq, self.pattern.head_dim // 2, block.geometry.softmax_scale,
            tensor.sizes["dim"], column, first, own.length,
            lambda row: tensor.offset(block.batch, block.head, own.at(row), column),
        )  # fmt: skip

    @T.inline
    def write_over(self, dq_map):
        """Store dq from this warpgroup's rows of Q, once none of its warps reads them."""
        NamedBarriers(CONSUMERS).queries_read(self.index)
        q = T.meta_var(self.q.pointer(self.q.state(0)))
        scale = T.meta_var(self.block.geometry.softmax_scale)
        stage_rows(self.pattern.dtype, self.acc_dq, self.pattern.head_dim, scale, q, self.row, self.lane)
        store_rows(dq_map, self.pattern.head_dim, q, self.block.queries(self.row), self.row, self.lane)
        if self.lane == 0:
            T.evaluate(wait_stored())

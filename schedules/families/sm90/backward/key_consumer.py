"""The consumer warpgroups of the launch for dk and dv: 64 keys each, everything transposed, keys by queries.

A step, for a tile of queries, finds ``S = K Qᵀ`` in registers:

1. issue ``dP = V dOᵀ``, which starts from −delta;
2. weights meanwhile: P, packed, and in place of S the factors ``F = P ∂score/∂s``; issue ``dV += P dO``; wait for both;
3. ``dS = F dP``, packed in place of P;
4. issue ``dK += dS Q``, and the next step's S; wait for both.

Beside that a warpgroup doesn't overlap its own products with anything: the other one's fill the tensor cores meanwhile,
and the two never wait for each other.  No product is in flight at the end of a step, which ptxas would make all of them
wait for.
Registers of a thread, at head_dim 128 and 64 queries: dK and dV 128, S 32, dP 32, P or dS 16.

Where parameters have gradients for keys, a step has S and dP at once, and dS beside P: the sums of these gradients need
all of them.

Q is read by S and dK, dO by dP and dV: each is released after the second.  Only this warpgroup reads its rows of K and
V, so dK and dV are stored from there.

Where both warpgroups share 64 keys, one leaves out what only dK needs, the other dV; neither stores before both are
done with K and V.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.backward.barriers import ALL_CONSUMERS
from schedules.families.sm90.backward.config import CONSUMERS, Config
from schedules.families.sm90.backward.numbers import RowNumbers
from schedules.families.sm90.backward.operands import KEPT_PANELS, own_rows
from schedules.families.sm90.backward.step_weights import has_fetched, step_weights
from schedules.families.sm90.backward.stores import add_rows, stage_rows, store_rows
from schedules.families.sm90.backward.walk import KeyBlock
from schedules.families.sm90.barriers import WARPGROUP_THREADS, NamedBarriers
from schedules.families.sm90.config import WARPGROUP_ROWS
from schedules.families.sm90.pipeline import Pipeline, TileCounter
from schedules.families.sm90.tma import wait_stored
from schedules.families.sm90.wgmma import Products, k_major, mn_major, rows_offset
from schedules.tile.fragment import M16N8
from schedules.tile.geometry import flat
from schedules.tile.place_gradients import PlaceGradients, Targets
from schedules.tile.static import static


@T.meta_class
class KeyConsumer:
    """Warpgroup ``index`` of the block's consumers, seen by warp ``warp`` of it and lane ``lane``.

    ``pipelines`` are those of Q, K, V and dO, ``numbers`` the shifts and −delta of the rows of Q and dO.  ``results``
    names which of dk and dv it computes; ``targets`` are parameters that have gradients for keys.
    """

    def __init__(
        self,
        pattern: Pattern,
        config: Config,
        block: KeyBlock,
        pipelines,
        numbers: tuple[RowNumbers, RowNumbers],
        index,
        warp,
        lane,
        results: str = "kv",
        targets: Targets | None = None,
    ):
        self.pattern, self.config, self.block = pattern, config, block
        self.q, self.k, self.v, self.do = pipelines
        self.shifts, self.starts = (x.staged for x in numbers)
        self.index, self.warp, self.lane = index, warp, lane
        self.has_dk, self.has_dv = "k" in results, "v" in results
        D, E, M = pattern.head_dim, pattern.head_dim_v, config.block_m
        self.scores = Products(pattern.dtype, config.block_keys, M, D, E)
        self.gradients = Products(pattern.dtype, config.block_keys, M, E, D)
        # Of a warpgroup's 64 keys, 128 threads: (64, D), (64, E) and twice (64, M) float32; (64, M) 16-bit in pairs.
        if self.has_dk:
            self.acc_dk = T.alloc_local([D // 2], "float32")
            self.acc_dp = T.alloc_local([M // 2], "float32")
        if self.has_dv:
            self.acc_dv = T.alloc_local([E // 2], "float32")
        self.acc_s = T.alloc_local([M // 2], "float32")
        self.p = T.alloc_local([M // 4], "uint32")
        self.targets = targets if self.has_dk and targets is not None and targets.params else None
        self.packed_ds = T.alloc_local([M // 4], "uint32") if self.targets else self.p
        self.n = T.local_scalar("int32")  # tiles of queries, over all heads of the group
        self.counter = TileCounter(self.n)
        self.first = 0 if config.shares_keys else index * WARPGROUP_ROWS  # first key of this warpgroup in the block
        self.key = self.first + warp * 16  # and of this warp
        self.column = M16N8.column(lane)

    # ------------------------------------------------------------ products

    def _q_descriptor(self, state):
        first = k_major(self.q.tiles.ptr_to([0, 0, 0, 0]))
        return first + T.Cast("uint64", state.index) * rows_offset(self.config.block_m, self.q.panels)

    def _row_descriptor(self, pipeline: Pipeline, state):
        """Of a tile of queries whose rows are contracted."""
        first = mn_major(pipeline.tiles.ptr_to([0, 0, 0, 0]), self.config.block_m)
        return first + T.Cast("uint64", state.index) * rows_offset(self.config.block_m, pipeline.panels)

    def _do_descriptor(self, state):
        first = k_major(self.do.tiles.ptr_to([0, 0, 0, 0]))
        return first + T.Cast("uint64", state.index) * rows_offset(self.config.block_m, self.do.panels)

    def _own(self, pipeline: Pipeline):
        """Of this warpgroup's keys in the block's tile of K or V."""
        return own_rows(pipeline, self.first, pipeline.panels <= KEPT_PANELS)

    @T.inline
    def issue_scores(self, q):
        """Start S of the tile of queries ``q``."""
        T.ptx.wgmma.fence.sync.aligned()
        self.scores.qk(self.acc_s, self._own(self.k), self._q_descriptor(q))
        T.ptx.wgmma.commit_group.sync.aligned()

    @T.inline
    def issue_dp(self, do):
        """Start dP, from −delta, of the tile of queries ``do``."""
        self.start_dp(do)
        T.ptx.wgmma.fence.sync.aligned()
        self.gradients.qk(self.acc_dp, self._own(self.v), self._do_descriptor(do), add=True)
        T.ptx.wgmma.commit_group.sync.aligned()

    @T.inline
    def issue_dv(self, do):
        """Start dV of the tile of queries ``do``."""
        T.ptx.wgmma.fence.sync.aligned()
        self.scores.pv(self.acc_dv, self.p, self._row_descriptor(self.do, do))
        T.ptx.wgmma.commit_group.sync.aligned()

    @T.inline
    def issue_dk(self, q):
        """Start dK of the tile of queries ``q``."""
        T.ptx.wgmma.fence.sync.aligned()
        self.gradients.pv(self.acc_dk, self.packed_ds, self._row_descriptor(self.q, q))
        T.ptx.wgmma.commit_group.sync.aligned()

    # ------------------------------------------------------------ steps

    def _number(self, numbers, state, g, e):
        """That of the query in column ``e`` of this lane's group ``g``."""
        return numbers[state.index, g * M16N8.group + self.column + e]

    @T.inline
    def start_dp(self, state):
        """−delta of each query to its accumulators."""
        for g in T.unroll(self.config.block_m // M16N8.group):
            for e in T.vectorized(2):
                self.acc_dp[g * 4 + e] = self._number(self.starts, state, g, e)
            for e in T.unroll(2):
                self.acc_dp[g * 4 + 2 + e] = self.acc_dp[g * 4 + e]

    def first_of(self, tile):
        """This lane's first query and key of a tile of queries."""
        return tile * self.config.block_m + self.column, self.block.key_first + self.key + M16N8.row(self.lane)

    @T.inline
    def fetch(self, weights, tile):
        """Fetch what tensors hold for the scores of a tile of queries."""
        if static(has_fetched(weights)):
            query, key = T.meta_var(self.first_of(tile))
            weights.fetch(query, key, tile * self.config.block_m + (self.config.block_m - 1))

    @T.inline
    def step(self, weights, walk, i, masked):
        """Step ``i``, whose S is there; the next one's is issued if there is one."""
        q = T.meta_var(self.counter.state(self.q.stages))
        query, key = T.meta_var(self.first_of(walk.tile(i)))
        more = T.meta_var(i + 1 < walk.steps)
        self.do.consumer_wait(q)
        if self.targets is not None:
            self.turn(weights, q, query, key, masked)
        else:
            self.weigh(weights, q, query, key, masked)
        if static(has_fetched(weights)):
            if more:
                self.fetch(weights, walk.tile(i + 1))
        self.counter.advance()
        # Past the last tile S is that of whatever is in the stage, and nobody looks at it.
        if more:
            self.q.consumer_wait(self.counter.state(self.q.stages))
        self.issue_scores(self.counter.state(self.q.stages))
        T.ptx.wgmma.wait_group.sync.aligned(0)
        if not self.has_dk or self.targets is not None:
            self.do.consumer_release(q, self.lane)
        self.q.consumer_release(q, self.lane)

    @T.inline
    def turn(self, weights, q, query, key, masked):
        """Gradients of a step whose S and dP are there at once; issue what follows from them."""
        p = T.meta_var(self.p if self.has_dv else None)
        self.issue_dp(q)
        T.ptx.wgmma.wait_group.sync.aligned(0)
        weights.turn(
            self.acc_s,
            self.acc_dp,
            p,
            self.packed_ds,
            lambda t, g, r, e: self._number(self.shifts, q, g, e),
            query,
            key,
            masked,
        )
        if self.has_dv:
            self.issue_dv(q)
        self.issue_dk(q)

    @T.inline
    def weigh(self, weights, q, query, key, masked):
        """Weights of a step while dP is computed, then gradients; issue what follows from them."""
        p = T.meta_var(self.p if self.has_dv else None)
        if self.has_dk:
            self.issue_dp(q)
        weights.weigh(self.acc_s, p, lambda t, g, r, e: self._number(self.shifts, q, g, e), query, key, masked)
        if self.has_dv:
            self.issue_dv(q)
        if self.has_dk:
            T.ptx.wgmma.wait_group.sync.aligned(0)
            self.do.consumer_release(q, self.lane)
            weights.gradients(self.acc_s, self.acc_dp, self.p, masked)
            self.issue_dk(q)

    # ------------------------------------------------------------ the whole

    @T.inline
    def run(self, dk_map, dv_map):
        """Compute the block's dk and dv, and store them."""
        self.counter.start()
        if self.has_dk:
            for i in T.unroll(self.pattern.head_dim // 2):
                self.acc_dk[i] = T.float32(0)
        if self.has_dv:
            for i in T.unroll(self.pattern.head_dim_v // 2):
                self.acc_dv[i] = T.float32(0)
        self.k.consumer_wait(self.k.state(0))
        for g in T.serial(self.block.group):
            site = T.meta_var(self.block.site(g))
            walk = self.block.tiles(site)
            places = T.meta_var(self.place_gradients(site))
            weights = step_weights(
                self.pattern,
                site,
                self.config.block_m,
                True,
                self.lane,
                self.config.tensors_ahead,
                self.block.site_anew,
                descending=self.config.joint,
                places=places,
            )
            if walk.steps > 0:
                self.fetch(weights, self.first_tile(walk))
                first = T.meta_var(self.counter.state(self.q.stages))
                self.q.consumer_wait(first)
                self.issue_scores(first)
                self.v.consumer_wait(self.v.state(0))
                T.ptx.wgmma.wait_group.sync.aligned(0)
                self.steps(walk, weights)
            if places is not None:
                places.store_sums(self.block.key_first + self.key + M16N8.row(self.lane), self.lane)
        self.write(dk_map, dv_map)

    def place_gradients(self, site) -> PlaceGradients | None:
        """What takes the gradients of parameters that have values for keys, in one head."""
        if self.targets is None:
            return None
        return PlaceGradients(self.targets, site, M16N8, 1, M16N8.tile_rows, True)

    def first_tile(self, walk):
        """The tile of queries of the first step."""
        return walk.tile(0)

    @T.inline
    def steps(self, walk, weights):
        """All steps of one query head, from the first tile to the last."""
        if walk.has_masked:
            for i in T.serial(walk.left):
                self.step(weights, walk, i, True)
        if walk.has_full:
            for i in T.serial(walk.left, walk.right):
                self.step(weights, walk, i, False)
            if walk.has_right:
                for i in T.serial(walk.right, walk.steps):
                    self.step(weights, walk, i, True)

    @T.inline
    def write(self, dk_map, dv_map):
        """Store dk and dv from their rows of K and V, once no warp reads them; or add them to what is there."""
        if static(self.block.tensors.adds):
            if self.has_dv:
                self.add("dv", self.v, self.acc_dv, self.pattern.head_dim_v, T.float32(1))
            if self.has_dk:
                self.add("dk", self.k, self.acc_dk, self.pattern.head_dim, self.block.tensors.softmax_scale)
        else:
            self.write_over(dk_map, dv_map)

    @T.inline
    def add(self, name, keys, acc, columns, factor):
        """Add accumulators times ``factor`` to this warp's rows of a result."""
        # of a block of no queries it may still be on its way
        keys.consumer_wait(keys.state(0))
        block = T.meta_var(self.block)
        tensor = T.meta_var(block.tensors.gradients[name])
        own = T.meta_var(block.tensors.keys.of(block.batch))
        first: T.int32 = block.key_first + self.key + M16N8.row(self.lane)
        add_rows(
            flat(tensor.buffer), acc, columns // 2, factor, tensor.sizes["dim"], self.column, first, own.length,
            lambda row: tensor.offset(block.batch, block.kv_head, own.at(row), self.column),
        )  # fmt: skip

    @T.inline
    def write_over(self, dk_map, dv_map):
        """Store dk and dv from their rows of K and V, once no warp reads them."""
        if self.config.shares_keys:
            T.ptx.bar.sync(ALL_CONSUMERS, CONSUMERS * WARPGROUP_THREADS)
        else:
            NamedBarriers(CONSUMERS).queries_read(self.index)
        if self.has_dv:
            self.store(self.v, self.acc_dv, self.pattern.head_dim_v, T.float32(1), dv_map)
        self.release_keys()
        if self.has_dk:
            self.store(self.k, self.acc_dk, self.pattern.head_dim, self.block.tensors.softmax_scale, dk_map)
        if self.lane == 0:
            T.evaluate(wait_stored())

    @T.inline
    def release_keys(self):
        """Until nobody else reads K."""

    @T.inline
    def store(self, keys, acc, columns, factor, descriptor):
        """Store accumulators times ``factor`` from this warp's rows of ``keys``."""
        # of a block of no queries it may still be on its way
        keys.consumer_wait(keys.state(0))
        pointer = T.meta_var(keys.pointer(keys.state(0)))
        stage_rows(self.pattern.dtype, acc, columns, factor, pointer, self.key, self.lane)
        store_rows(descriptor, columns, pointer, self.block.keys(self.key), self.key, self.lane)

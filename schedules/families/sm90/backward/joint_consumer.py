"""The consumer warpgroups of the joint launch: 64 keys each, as in ``key_consumer.py``, whose dS others make dq of.

A step, for a tile of queries, finds ``S = K Qᵀ`` in registers:

1. weights: P, packed, from S;
2. issue ``dP = V dOᵀ``, which starts from −delta, and ``dV += P dO``; wait for both;
3. ``dS = P dP`` in place of P, and to shared memory, keys by queries;
4. issue ``dK += dS Q``, and the next step's S; wait for both.

P is multiplied as it was rounded, so that S and dP never are in registers together: with the warpgroup for dq there are
208 registers a thread, at head_dim 128 and 64 queries 128 of dK and dV, 32 of S or dP, 16 of P or dS.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.sm90.backward.key_consumer import KeyConsumer
from schedules.families.sm90.backward.step_weights import has_fetched
from schedules.families.sm90.config import PANEL
from schedules.families.sm90.wgmma import swizzled
from schedules.tile.delta import halves
from schedules.tile.dtypes import element_type
from schedules.tile.fragment import M16N8
from schedules.tile.static import static


@T.meta_class
class JointConsumer(KeyConsumer):
    """As :class:`KeyConsumer`; ``ds`` is the pipeline to the warpgroup for dq, of tiles keys by queries; ``parts``
    sums the results of the blocks that share a group of query heads."""

    def __init__(self, pattern, config, block, pipelines, numbers, ds, parts, index, warp, lane):
        KeyConsumer.__init__(self, pattern, config, block, pipelines, numbers, index, warp, lane)
        self.ds, self.parts = ds, parts
        self.row = T.local_scalar("int32")  # of tiles of dS, to which this lane's address points

    @T.inline
    def issue_dp_dv(self, do):
        """Start dP, from −delta, and dV of the tile of queries ``do``, with one fence: two take more registers."""
        self.start_dp(do)
        T.ptx.wgmma.fence.sync.aligned()
        self.gradients.qk(self.acc_dp, self._own(self.v), self._do_descriptor(do), add=True)
        self.scores.pv(self.acc_dv, self.p, self._row_descriptor(self.do, do))
        T.ptx.wgmma.commit_group.sync.aligned()

    @T.inline
    def choose_row(self):
        """Leave dS of keys past the last one 0 throughout, and have what there is of them stored behind the tile: P is
        infinite there where a row's log-sum-exp is low, and dS times their K, which is 0, not a number."""
        self.row = self.key + self.lane % 16
        if self.block.key_first + self.row >= self.block.tensors.keys.of(self.block.batch).length:
            zero = T.alloc_local([1], "uint32")
            zero[0] = T.uint32(0)
            for stage in T.unroll(self.ds.stages):
                for panel in T.unroll(self.ds.panels):
                    for chunk in T.unroll(PANEL // 16):
                        column = T.meta_var((self.lane // 16 * (PANEL // 16) + chunk) * 8)
                        T.ptx["st.shared.v4.b32"](
                            self.ds.tiles.ptr_to([stage, panel, self.row, column]), *[zero[0]] * 4
                        )
            self.row = self.config.block_keys + self.lane % 8

    @T.inline
    def run(self, dk_map, dv_map):
        self.choose_row()
        KeyConsumer.run(self, dk_map, dv_map)

    @T.inline
    def multiply(self, state, masked):
        """dS of the packed P and dP, in place of P and to shared memory."""
        pack = T.meta_var(element_type(self.pattern.dtype).pack)
        for c in T.unroll(self.config.block_m // 16):
            for x in T.unroll(4):
                word = T.meta_var(c * 4 + x)
                at = T.meta_var(c * 8 + x * 2)
                low, high = T.meta_var(halves(self.p[word], self.pattern.dtype))
                self.acc_dp[at] = self._product(low, self.acc_dp[at], masked)
                self.acc_dp[at + 1] = self._product(high, self.acc_dp[at + 1], masked)
                T.ptx[pack](self.p[word], self.acc_dp[at + 1], self.acc_dp[at])
            T.ptx["stmatrix.sync.aligned.m8n8.x4.shared.b16"](
                self.ds.pointer(state)(c // 4, self.row, swizzled(c % 4 * 2 + self.lane // 16, self.lane % 8)),
                *[self.p[c * 4 + x] for x in range(4)],
            )

    def _product(self, p, gradient, masked):
        return T.Select(p == T.float32(0), T.float32(0), p * gradient) if masked else p * gradient

    @T.inline
    def step(self, weights, tile, more, masked, asks=None):
        """The step of a tile of queries whose S is there; the next one's is issued if there are ``more``, and its mask
        asked if that ``asks`` for it."""
        q = T.meta_var(self.counter.state(self.q.stages))
        ds = T.meta_var(self.counter.state(self.ds.stages))
        query = T.meta_var(tile * self.config.block_m + self.column)
        key = T.meta_var(self.block.key_first + self.key + M16N8.row(self.lane))
        weights.weigh(self.acc_s, self.p, lambda t, g, r, e: self._number(self.shifts, q, g, e), query, key, masked)
        self.do.consumer_wait(q)
        self.issue_dp_dv(q)
        self.ds.producer_acquire(ds)
        T.ptx.wgmma.wait_group.sync.aligned(0)
        self.multiply(ds, masked)
        T.ptx.fence.proxy.async_.shared__cta()
        T.cuda.warp_sync()
        if self.lane == 0:
            self.ds.full.arrive(ds.index)
        self.issue_dk(q)
        if static(has_fetched(weights)):
            if asks:
                self.fetch(weights, tile - 1)
        self.counter.advance()
        # Past the last tile S is that of whatever is in the stage, and nobody looks at it.
        if more:
            self.q.consumer_wait(self.counter.state(self.q.stages))
        self.issue_scores(self.counter.state(self.q.stages))
        T.ptx.wgmma.wait_group.sync.aligned(0)

    def first_tile(self, walk):
        """The tile of queries of the first step."""
        return walk.tile(walk.steps - 1)

    @T.inline
    def steps(self, walk, weights):
        """All steps of one query head, from the last tile to the first."""
        if static(walk.has_right):
            begin: T.int32 = walk.tile(0)
            full_begin: T.int32 = walk.tile(walk.left)
            full_end: T.int32 = walk.tile(walk.right)
            tile: T.int32 = walk.tile(walk.steps - 1)
            while tile >= begin:
                asks = T.meta_var(T.And(tile > begin, T.Or(tile <= full_begin, tile > full_end)))
                if T.And(tile >= full_begin, tile < full_end):
                    self.step(weights, tile, tile > begin, False, asks)
                else:
                    self.step(weights, tile, tile > begin, True, asks)
                tile = tile - 1
        else:
            self.steps_in_two_parts(walk, weights)

    @T.inline
    def steps_in_two_parts(self, walk, weights):
        """The same where those that need a mask are the first tiles."""
        if walk.has_full:
            for i in T.serial(walk.steps - walk.left):
                self.step(weights, walk.tile(walk.steps - 1 - i), i + 1 < walk.steps, False)
        if walk.has_masked:
            for i in T.serial(walk.left):
                self.step(weights, walk.tile(walk.left - 1 - i), i + 1 < walk.left, True)

    @T.inline
    def write(self, dk_map, dv_map):
        """Store dk and dv, or if others share the group add them to the sums, which the last one stores."""
        if self.parts.count == 1:
            KeyConsumer.write(self, dk_map, dv_map)
        else:
            self.parts.add(self.acc_dk, self.acc_dv)
            if self.block.part == self.parts.count - 1:
                KeyConsumer.write(self, dk_map, dv_map)

    @T.inline
    def release_keys(self):
        """Until the warpgroup for dq has read K for the last time."""
        if self.counter.count > 0:
            last = T.meta_var(self.counter.state(self.ds.stages, behind=1))
            self.ds.empty.wait(last.index, last.phase)

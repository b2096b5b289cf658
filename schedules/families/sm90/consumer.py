"""The consumer warpgroups: products, softmax, output.

A step of a warpgroup, for tile n of keys, overlaps its own softmax with its own products:

1. issue ``S = Q K(n)ᵀ``, then ``O += P V(n−1)`` (with ping-pong: when the other warpgroup has issued its own);
2. wait for S, score and mask it, make probabilities of it while the second product runs;
3. wait for O, release V(n−1), pack P, bring O to the reference if that was raised.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.epilogue import normalise, store_lse
from schedules.families.sm90.block import Block, Walk
from schedules.families.sm90.config import WARPGROUP_ROWS, Config, panels
from schedules.families.sm90.copy import WAIT_STORED, Ring
from schedules.families.sm90.multiply import Products, k_major, mn_major, rows_offset, swizzled
from schedules.families.sm90.softmax import PACK, Finished, Softmax
from schedules.geometry import flat
from schedules.pattern import Pattern
from schedules.softmax import LAZY

#: First of the named barriers of the warpgroups' turns; barrier 0 is the whole block's.
TURN = 1


@T.meta_class
class Consumer:
    """Warpgroup ``index`` of the block's consumers, seen by warp ``warp`` of it and lane ``lane``."""

    def __init__(
        self, pattern: Pattern, config: Config, block: Block, rings: tuple[Ring, Ring, Ring], index, warp, lane
    ):
        self.pattern, self.config, self.block = pattern, config, block
        self.q, self.k, self.v = rings
        self.index, self.warp, self.lane = index, warp, lane
        self.products = Products(pattern.dtype, config.block_m, config.block_n, pattern.head_dim, pattern.head_dim_v)
        # Warpgroups that take turns have to take as many, and chained row tiles begin together.
        self.may_skip = not (pattern.is_unmasked or pattern.has_gaps or config.pingpong or config.tiles_per_cta > 1)
        self.outputs = pattern.head_dim_v // 2
        self.acc_s = T.alloc_local([config.block_n // 2], "float32")
        self.acc_o = T.alloc_local([self.outputs], "float32")
        self.p = T.alloc_local([config.block_n // 4], "uint32")
        self.softmax = Softmax(pattern, block.site, config.block_n)
        self.finished = Finished(self.softmax)
        self.n = T.local_scalar("int32")  # tile of keys whose scores are next, counted over all row tiles
        self.first = T.local_scalar("int32")  # step that a row tile begins with, for this warpgroup
        self.total = T.local_scalar("int32")  # of all steps, where they have to be counted
        self.row = index * WARPGROUP_ROWS + warp * 16  # first row of this warp in the row tile

    # ------------------------------------------------------------ products

    @T.inline
    def issue_qk(self, turn):
        """Start the scores of row tile number ``turn`` and the K tile that is next."""
        T.ptx.wgmma.fence.sync.aligned()
        self.products.qk(self.acc_s, self._q(turn), self._k())
        T.ptx.wgmma.commit_group.sync.aligned()

    @T.inline
    def issue_pv(self):
        """Start the product of the packed probabilities and the V tile of the scores before."""
        self.v.wait(self.n - 1)
        T.ptx.wgmma.fence.sync.aligned()
        self.products.pv(self.acc_o, self.p, self._v())
        T.ptx.wgmma.commit_group.sync.aligned()

    @T.inline
    def issue(self, turn):
        """Start both products of a step, and wait for the scores."""
        if self.config.pingpong:
            T.ptx.bar.sync(T.Cast("uint32", TURN + self.index), 256)
        self.issue_qk(turn)
        self.issue_pv()
        if self.config.pingpong:
            T.ptx.bar.arrive(T.Cast("uint32", TURN + self._next()), 256)
        T.ptx.wgmma.wait_group.sync.aligned(1)

    def _next(self):
        return T.Select(self.index == self.config.num_consumer_warpgroups - 1, 0, self.index + 1)

    def _q(self, turn):
        first = k_major(self.q.tiles.ptr_to([0, 0, 0, 0])) + rows_offset(self.index * WARPGROUP_ROWS, 1)
        return first + T.Cast("uint64", turn) * rows_offset(self.config.block_m, self.q.panels)

    def _k(self):
        first = k_major(self.k.tiles.ptr_to([0, 0, 0, 0]))
        return first + T.Cast("uint64", self.k.slot(self.n)) * rows_offset(self.config.block_n, self.k.panels)

    def _v(self):
        first = mn_major(self.v.tiles.ptr_to([0, 0, 0, 0]), self.config.block_n)
        return first + T.Cast("uint64", self.v.slot(self.n - 1)) * rows_offset(self.config.block_n, self.v.panels)

    def _more(self, walk, turn, i):
        """Whether another tile of keys comes after step ``i`` of row tile number ``turn``."""
        if self.pattern.has_gaps:
            return self.n + 1 < self.total
        return T.Or(i + 1 < walk.steps, turn < self.config.tiles_per_cta - 1)

    @T.inline
    def next_k(self, more):
        """Wait for the next K tile if there is one.

        It stands between softmax and the wait for O on purpose: a branch is what keeps ptxas from moving that wait up
        in front of the exponentials (72 to 77% of the tensor cores' time).
        """
        if more:
            self.k.wait(self.n + 1)
        self.n = self.n + 1

    @T.inline
    def finish_pv(self):
        """After ``next_k``: wait for the output and let its V tile go."""
        T.ptx.wgmma.wait_group.sync.aligned(0)
        self.v.release(self.n - 2, self.lane)

    # ------------------------------------------------------------ steps

    def _row0(self, row_first):
        return row_first + self.row + self.softmax.fragment.row(self.lane)

    def _column0(self, key_first):
        return key_first + self.softmax.fragment.column(self.lane)

    @T.inline
    def step(self, walk, turn, row_first, i, masked):
        """Step ``i`` of row tile number ``turn``, with the maximum."""
        key_first = T.meta_var(walk.key_first(i))
        self.issue(turn)
        self.k.release(self.n, self.lane)
        self.softmax.scores(self.acc_s, self._row0(row_first), self._column0(key_first), masked)
        self.softmax.track(self.acc_s, T.float32(LAZY))
        self.softmax.probabilities(self.acc_s, self.softmax.scale)
        self.next_k(self._more(walk, turn, i))
        self.finish_pv()
        self.softmax.pack(self.acc_s, self.p, True)
        self.softmax.add_sums()
        if self.softmax.grown != 0:
            self.softmax.rescale(self.acc_o, self.outputs)

    @T.inline
    def step_unchecked(self, walk, turn, row_first, i):
        """A step without mask and maximum; a warp whose references are too low takes it again from the scores on."""
        key_first = T.meta_var(walk.key_first(i))
        self.issue(turn)
        self.softmax.modify(self.acc_s, self._row0(row_first), self._column0(key_first), False)
        self.softmax.probabilities(self.acc_s, self.softmax.signed_scale())
        self.next_k(self._more(walk, turn, i))
        self.finish_pv()
        self.softmax.pack(self.acc_s, self.p, False)
        if self.softmax.overflowed():
            # The scores are lost, and a probability may be infinite; K and Q are still in place.
            self.products.qk_again(self.acc_s, self.q.pointer(turn), self.k.pointer(self.n - 1), self.row, self.lane)
            self.softmax.scores(self.acc_s, self._row0(row_first), self._column0(key_first), False)
            self.softmax.track(self.acc_s, T.float32(0))
            self.softmax.probabilities(self.acc_s, self.softmax.scale)
            self.softmax.pack(self.acc_s, self.p, True)
            if self.softmax.grown != 0:
                self.softmax.rescale(self.acc_o, self.outputs)
        self.k.release(self.n - 1, self.lane)
        self.softmax.add_sums()

    @T.inline
    def first_softmax(self, walk, row_first):
        """Probabilities of a row tile's first step, with the exact maximum."""
        column0 = T.meta_var(self._column0(walk.key_first(self.first)))
        self.k.release(self.n, self.lane)
        self.softmax.reset()
        if T.And(walk.full_begin <= self.first, self.first < walk.full_end):
            self.softmax.scores(self.acc_s, self._row0(row_first), column0, False)
        else:
            self.softmax.scores(self.acc_s, self._row0(row_first), column0, True)
        self.softmax.track(self.acc_s, T.float32(0))
        self.softmax.probabilities(self.acc_s, self.softmax.scale)

    @T.inline
    def masked_steps(self, walk, turn, row_first, begin, end):
        """Steps ``begin .. end`` (exclusive) with the mask; those that see nothing are left out."""
        for i in T.serial(begin, end):
            if self.pattern.has_gaps:
                if walk.live(row_first, i):
                    self.step(walk, turn, row_first, i, True)
            else:
                self.step(walk, turn, row_first, i, True)

    # ------------------------------------------------------------ the whole

    @T.inline
    def run(self, output):
        """Compute the block's row tiles and store them; ``output`` is the TMA descriptor of o."""
        self.n = 0
        for i in T.unroll(self.outputs):
            self.acc_o[i] = T.float32(0)
        if self.config.pingpong:  # noqa: SIM102, decided when the kernel is made
            if self.index == self.config.num_consumer_warpgroups - 1:
                T.ptx.bar.arrive(TURN, 256)
        # 1. The first tile of keys has no earlier product beside it.
        first = Walk(self.block, self.block.row_first(0))
        if self.pattern.has_gaps:
            self.count(first)
        self.first = 0
        if self.may_skip:
            self.skip(first.blind(self.block.row_first(0) + self.index * WARPGROUP_ROWS, WARPGROUP_ROWS))
        self.q.wait(0)
        self.k.wait(self.n)
        self.issue_qk(0)
        T.ptx.wgmma.wait_group.sync.aligned(0)
        self.first_softmax(first, self.block.row_first(0))
        self.softmax.pack(self.acc_s, self.p, True)
        self.softmax.add_sums()
        self.next_k(self._more(first, 0, self.first))
        for turn in T.serial(self.config.tiles_per_cta):
            row_first: T.int32 = self.block.row_first(turn)
            walk = Walk(self.block, row_first)
            # 2. The other tiles of keys from right to left: masked, full, masked.
            if not self.pattern.is_unmasked:
                self.masked_steps(walk, turn, row_first, self.first + 1, T.min(walk.full_begin, walk.steps))
            if walk.has_full:
                for i in T.serial(T.max(walk.full_begin, self.first + 1), T.min(walk.full_end, walk.steps)):
                    if self.config.running_max:
                        self.step(walk, turn, row_first, i, False)
                    else:
                        self.step_unchecked(walk, turn, row_first, i)
            if walk.has_left:
                self.masked_steps(walk, turn, row_first, T.max(walk.full_end, self.first + 1), walk.steps)
            # 3. The last product, beside the first of the next row tile.
            if self.config.tiles_per_cta == 2:  # noqa: SIM102, decided when the kernel is made
                if turn == 0:
                    self.change_tile(output, row_first)
        self.issue_pv()
        T.ptx.wgmma.wait_group.sync.aligned(0)
        self.finished.keep(self.softmax)
        self.write(output, self.config.tiles_per_cta - 1, self.block.row_first(self.config.tiles_per_cta - 1))
        T.evaluate(T.cuda.func_call("wait_stored", source_code=WAIT_STORED))

    @T.inline
    def skip(self, steps):
        """Let tiles of keys pass that this warpgroup's rows don't see, though others of the row tile do."""
        for _ in T.serial(steps):
            self.k.wait(self.n)
            self.k.release(self.n, self.lane)
            self.v.wait(self.n)
            self.v.release(self.n, self.lane)
            self.n = self.n + 1
        self.first = self.n

    @T.inline
    def count(self, walk):
        """How many steps there are to take, of a mask with gaps."""
        self.total = 1
        for i in T.serial(1, walk.steps):
            self.total = self.total + T.Cast("int32", walk.live(self.block.row_first(0), i))

    @T.inline
    def change_tile(self, output, row_first):
        """The first step of row tile 1, beside which row tile 0 is finished."""
        next_first: T.int32 = self.block.row_first(1)
        walk = Walk(self.block, next_first)
        self.q.wait(1)
        self.issue(1)
        self.finished.keep(self.softmax)
        self.first_softmax(walk, next_first)
        self.next_k(self._more(walk, 1, 0))
        self.finish_pv()
        self.write(output, 0, row_first)
        self.softmax.pack(self.acc_s, self.p, True)
        self.softmax.add_sums()
        for i in T.unroll(self.outputs):
            self.acc_o[i] = T.float32(0)

    @T.inline
    def write(self, output, turn, row_first):
        """Normalise the output of row tile number ``turn`` and store it, by way of the shared memory of its queries."""
        lse = flat(self.block.geometry.lse)
        store_lse(self.block.geometry, self.finished, lse, self._row0(row_first), self.lane)
        normalise(self.finished, self.acc_o, self.outputs)
        # When the four warps meet first, they have read these queries for the last time; when again, written here.
        self.meet()
        packed = T.alloc_local([4], "uint32")
        for c in T.unroll(self.pattern.head_dim_v // 16):
            for i in T.unroll(4):
                T.ptx[PACK[self.pattern.dtype]](packed[i], self.acc_o[c * 8 + i * 2 + 1], self.acc_o[c * 8 + i * 2])
            T.ptx["stmatrix.sync.aligned.m8n8.x4.shared.b16"](
                self.q.pointer(turn)(
                    c // 4, self.row + self.lane % 16, swizzled(c % 4 * 2 + self.lane // 16, self.lane % 8)
                ),
                *[packed[x] for x in range(4)],
            )
        T.ptx.fence.proxy.async_.shared__cta()
        self.meet()
        if self.warp == 0:  # noqa: SIM102, only a whole warp may elect
            if T.cuda.elect_sync():
                self.q.store(
                    turn, output, panels(self.pattern.head_dim_v), self.index * WARPGROUP_ROWS,
                    row_first + self.index * WARPGROUP_ROWS, self.block.head, self.block.batch,
                )  # fmt: skip

    @T.inline
    def meet(self):
        """The four warps of this warpgroup wait for each other."""
        T.ptx.bar.sync(T.Cast("uint32", TURN + self.config.num_consumer_warpgroups + self.index), 128)

"""The consumer warpgroups: products, softmax, output.

A step of a warpgroup, for tile n of keys, overlaps its own softmax with its own products:

1. issue ``S = Q K(n)ᵀ``, then ``O += P V(n−1)`` (with ping-pong: when the other warpgroup has issued its own);
2. wait for S, score and mask it, make probabilities of it while the second product runs;
3. wait for O, release V(n−1), pack P, bring O to the reference if that was raised.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.sm90.block import Block, Walk
from schedules.families.sm90.config import WARPGROUP_ROWS, Config
from schedules.families.sm90.copy import Ring
from schedules.families.sm90.multiply import Products, k_major, mn_major, rows_offset, swizzled
from schedules.families.sm90.softmax import PACK, Finished, Softmax
from schedules.tile.epilogue import normalise
from schedules.tile.softmax import LAZY

#: First of the named barriers of the warpgroups' turns; barrier 0 is the whole block's.
TURN = 1
#: Largest head_dim at which descriptors of Q may be kept from step to step: beyond it they take registers that scores
#: and output need (110 moves to uniform registers against 73, and spills).
MANY_COLUMNS = 128


@T.meta_class
class Consumer:
    """Warpgroup ``index`` of the block's consumers, seen by warp ``warp`` of it and lane ``lane``."""

    def __init__(
        self, pattern: Pattern, config: Config, block: Block, rings: tuple[Ring, Ring, Ring], output, index, warp, lane
    ):
        self.pattern, self.config, self.block = pattern, config, block
        self.q, self.k, self.v = rings
        self.output = output
        self.index, self.warp, self.lane = index, warp, lane
        self.products = Products(pattern.dtype, config.block_m, config.block_n, pattern.head_dim, pattern.head_dim_v)
        # A product of the row tile before may still need its V tile.
        self.may_skip = not (pattern.is_unmasked or pattern.has_gaps or config.overlap_tiles)
        self.outputs = pattern.head_dim_v // 2
        self.acc_s = T.alloc_local([config.block_n // 2], "float32")
        self.acc_o = T.alloc_local([self.outputs], "float32")
        self.p = T.alloc_local([config.block_n // 4], "uint32")
        self.softmax = Softmax(pattern, block.site, block.rows, config.block_n)
        self.finished = Finished(self.softmax)
        self.n = T.local_scalar("int32")  # tile of keys whose scores are next, counted over all row tiles
        self.first = T.local_scalar("int32")  # step that a row tile begins with, for this warpgroup
        self.total = T.local_scalar("int32")  # of all steps, where they have to be counted
        self.row = index * WARPGROUP_ROWS + warp * 16  # first row of this warp in the row tile

    # ------------------------------------------------------------ products

    @T.inline
    def issue_qk(self):
        """Start the scores of the row tile and the K tile that is next."""
        T.ptx.wgmma.fence.sync.aligned()
        self.products.qk(self.acc_s, self._q(), self._k())
        T.ptx.wgmma.commit_group.sync.aligned()

    @T.inline
    def issue_pv(self):
        """Start the product of the packed probabilities and the V tile of the scores before."""
        self.v.wait(self.n - 1)
        T.ptx.wgmma.fence.sync.aligned()
        self.products.pv(self.acc_o, self.p, self._v())
        T.ptx.wgmma.commit_group.sync.aligned()

    @T.inline
    def issue(self):
        """Start both products of a step, and wait for the scores."""
        if self.config.pingpong:
            T.ptx.bar.sync(T.Cast("uint32", TURN + self.index), 256)
        self.issue_qk()
        self.issue_pv()
        if self.config.pingpong:
            T.ptx.bar.arrive(T.Cast("uint32", TURN + self._next()), 256)
        T.ptx.wgmma.wait_group.sync.aligned(1)

    def _next(self):
        return T.Select(self.index == self.config.num_consumer_warpgroups - 1, 0, self.index + 1)

    def _q(self):
        first = k_major(self.q.tiles.ptr_to([0, 0, 0, 0])) + rows_offset(self.index * WARPGROUP_ROWS, 1)
        if self.pattern.head_dim > MANY_COLUMNS:  # add 0, which only looks as if it changed from step to step
            first = first + T.Cast("uint64", T.shift_right(self.n, 31))
        return first + T.Cast("uint64", self.q.slot(self.block.tile)) * rows_offset(self.config.block_m, self.q.panels)

    def _k(self):
        first = k_major(self.k.tiles.ptr_to([0, 0, 0, 0]))
        return first + T.Cast("uint64", self.k.slot(self.n)) * rows_offset(self.config.block_n, self.k.panels)

    def _v(self):
        first = mn_major(self.v.tiles.ptr_to([0, 0, 0, 0]), self.config.block_n)
        return first + T.Cast("uint64", self.v.slot(self.n - 1)) * rows_offset(self.config.block_n, self.v.panels)

    def _more(self, walk, i):
        """Whether another tile of keys comes after step ``i`` of the row tile."""
        if self.pattern.has_gaps:
            return self.n + 1 < self.total
        if not self.config.overlap_tiles:
            return i + 1 < walk.steps
        return T.Or(i + 1 < walk.steps, self.block.tile < self.block.tiles - 1)

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

    def _row0(self):
        return self.block.row_first + self.row + self.softmax.fragment.row(self.lane)

    def _column0(self, key_first):
        return key_first + self.softmax.fragment.column(self.lane)

    @T.inline
    def step(self, walk, i, masked):
        """Step ``i`` of the row tile, with the maximum."""
        key_first = T.meta_var(walk.key_first(i))
        self.issue()
        self.k.release(self.n, self.lane)
        self.softmax.scores(self.acc_s, self._row0(), self._column0(key_first), masked)
        self.softmax.track(self.acc_s, LAZY)
        self.softmax.probabilities(self.acc_s, self.softmax.scale)
        self.next_k(self._more(walk, i))
        self.finish_pv()
        self.softmax.pack(self.acc_s, self.p)
        self.softmax.add_sums()
        if self.softmax.grown != 0:
            self.softmax.rescale(self.acc_o, self.outputs)

    @T.inline
    def step_unchecked(self, walk, i):
        """A step without mask and maximum; a warp whose references are too low takes it again from the scores on."""
        key_first = T.meta_var(walk.key_first(i))
        self.issue()
        self.softmax.modify(self.acc_s, self._row0(), self._column0(key_first), False)
        self.softmax.probabilities(self.acc_s, self.softmax.signed_scale())
        self.next_k(self._more(walk, i))
        self.finish_pv()
        self.softmax.pack(self.acc_s, self.p)
        if self.softmax.overflowed():
            # The scores are lost, and a probability may be infinite; K and Q are still in place.
            self.products.qk_again(
                self.acc_s, self.q.pointer(self.block.tile), self.k.pointer(self.n - 1), self.row, self.lane
            )
            self.softmax.scores(self.acc_s, self._row0(), self._column0(key_first), False)
            self.softmax.track(self.acc_s, 0.0)
            self.softmax.probabilities(self.acc_s, self.softmax.scale)
            self.softmax.pack(self.acc_s, self.p)
            if self.softmax.grown != 0:
                self.softmax.rescale(self.acc_o, self.outputs)
        self.k.release(self.n - 1, self.lane)
        self.softmax.add_sums()

    @T.inline
    def first_softmax(self, walk):
        """Probabilities of a row tile's first step, with the exact maximum."""
        column0 = T.meta_var(self._column0(walk.key_first(self.first)))
        self.k.release(self.n, self.lane)
        self.softmax.reset()
        if T.And(walk.full_begin <= self.first, self.first < walk.full_end):
            self.softmax.scores(self.acc_s, self._row0(), column0, False)
        else:
            self.softmax.scores(self.acc_s, self._row0(), column0, True)
        self.softmax.track(self.acc_s, 0.0)
        self.softmax.probabilities(self.acc_s, self.softmax.scale)

    @T.inline
    def masked_steps(self, walk, begin, end):
        """Steps ``begin .. end`` (exclusive) with the mask; those that see nothing are left out."""
        for i in T.serial(begin, end):
            if self.pattern.has_gaps:
                if walk.live(i):
                    self.step(walk, i, True)
            else:
                self.step(walk, i, True)

    # ------------------------------------------------------------ the whole

    @T.inline
    def run(self):
        """Compute the block's row tiles."""
        self.n = 0
        if self.config.pingpong:  # noqa: SIM102, decided when the kernel is made
            if self.index == self.config.num_consumer_warpgroups - 1:
                T.ptx.bar.arrive(TURN, 256)
        if self.config.overlap_tiles:
            self.start()
        for t in T.serial(self.block.tiles):
            # 1. The first tile of keys, unless it was begun beside the row tile before.
            if not self.config.overlap_tiles:
                if self.config.several_tiles:  # noqa: SIM102, decided when the kernel is made
                    if t > 0:
                        self.block.advance()
                self.start()
            # 2. The other tiles of keys from right to left: masked, full, masked.
            walk = self.walk()
            if not self.pattern.is_unmasked:
                self.masked_steps(walk, self.first + 1, T.min(walk.full_begin, walk.steps))
            if walk.has_full:
                for i in T.serial(T.max(walk.full_begin, self.first + 1), T.min(walk.full_end, walk.steps)):
                    if self.config.running_max:
                        self.step(walk, i, False)
                    else:
                        self.step_unchecked(walk, i)
            if walk.has_left:
                self.masked_steps(walk, T.max(walk.full_end, self.first + 1), walk.steps)
            # 3. The last product, perhaps beside the first of the next row tile.
            if self.config.overlap_tiles:
                if t + 1 < self.block.tiles:
                    self.change_tile()
            else:
                self.end()
        if self.config.overlap_tiles:
            self.end()

    @T.inline
    def start(self):
        """The first step of a row tile, which has no earlier product beside it."""
        for i in T.unroll(self.outputs):
            self.acc_o[i] = T.float32(0)
        walk = self.walk()
        if self.pattern.has_gaps:
            self.count(walk)
        self.first = 0
        if self.may_skip:
            self.skip(walk.blind)
        self.q.wait(self.block.tile)
        self.k.wait(self.n)
        self.issue_qk()
        T.ptx.wgmma.wait_group.sync.aligned(0)
        self.first_softmax(walk)
        self.softmax.pack(self.acc_s, self.p)
        self.softmax.add_sums()
        self.next_k(self._more(walk, self.first))

    @T.inline
    def end(self):
        """The last product of a row tile, and its output."""
        self.output.scored(self.block.tile, self.lane)
        self.issue_pv()
        T.ptx.wgmma.wait_group.sync.aligned(0)
        if self.config.several_tiles:
            self.v.release(self.n - 1, self.lane)
        self.finished.keep(self.softmax)
        self.write(self.block.tile)

    def walk(self):
        """The steps of the row tile, as this warpgroup's rows see them."""
        return Walk(self.block, self.index * WARPGROUP_ROWS, WARPGROUP_ROWS)

    @T.inline
    def skip(self, steps):
        """Let tiles of keys pass that this warpgroup's rows don't see, though others of the row tile do."""
        for _ in T.serial(steps):
            self.k.wait(self.n)
            self.k.release(self.n, self.lane)
            if self.config.pingpong:
                T.ptx.bar.sync(T.Cast("uint32", TURN + self.index), 256)
                T.ptx.bar.arrive(T.Cast("uint32", TURN + self._next()), 256)
            self.v.wait(self.n)
            self.v.release(self.n, self.lane)
            self.n = self.n + 1
        self.first = steps

    @T.inline
    def count(self, walk):
        """How many steps there are to take, of a mask with gaps."""
        self.total = 1
        for i in T.serial(1, walk.steps):
            self.total = self.total + T.Cast("int32", walk.live(i))

    @T.inline
    def change_tile(self):
        """The first step of the next row tile, beside which this one is finished."""
        self.output.scored(self.block.tile, self.lane)
        self.block.advance()
        walk = self.walk()
        self.q.wait(self.block.tile)
        self.issue()
        self.finished.keep(self.softmax)
        self.first_softmax(walk)
        self.next_k(self._more(walk, 0))
        self.finish_pv()
        self.write(self.block.tile - 1)
        self.softmax.pack(self.acc_s, self.p)
        self.softmax.add_sums()
        for i in T.unroll(self.outputs):
            self.acc_o[i] = T.float32(0)

    @T.inline
    def write(self, tile):
        """Normalise the output of row tile number ``tile``, and leave it in shared memory, to be stored."""
        self.finished.store_lse(self.block, tile, self.row + self.softmax.fragment.row(self.lane), self.lane)
        normalise(self.finished, self.acc_o, self.outputs)
        self.output.take(tile, self.index, TURN + self.config.num_consumer_warpgroups + self.index)
        packed = T.alloc_local([4], "uint32")
        for c in T.unroll(self.pattern.head_dim_v // 16):
            for i in T.unroll(4):
                T.ptx[PACK[self.pattern.dtype]](packed[i], self.acc_o[c * 8 + i * 2 + 1], self.acc_o[c * 8 + i * 2])
            T.ptx["stmatrix.sync.aligned.m8n8.x4.shared.b16"](
                self.output.pointer(tile, self.index)(
                    c // 4, self.warp * 16 + self.lane % 16, swizzled(c % 4 * 2 + self.lane // 16, self.lane % 8)
                ),
                *[packed[x] for x in range(4)],
            )
        T.ptx.fence.proxy.async_.shared__cta()
        T.cuda.warp_sync()
        if self.lane == 0:
            self.output.hand_over(tile, self.index)

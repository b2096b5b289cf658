"""The consumer warpgroups: how one walks over its work tiles, from the first product to the output.

What happens with a tile of keys is in ``steps.py``.  The first one of a work tile has no earlier product beside it, or,
with ``overlap_tiles``, the last one of the work tile before; its last product stands alone, or beside the first of the
next.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.sm90.config import WARPGROUP_ROWS
from schedules.families.sm90.steps import Steps
from schedules.families.sm90.wgmma import swizzled
from schedules.families.sm90.work_tile import KeyWalk
from schedules.tile.dtypes import element_type
from schedules.tile.epilogue import normalise
from schedules.tile.static import static


@T.meta_class
class Consumer(Steps):
    """A warpgroup of the block's consumers."""

    @T.inline
    def run(self):
        """Compute the block's work tiles."""
        self.counter.start()
        if static(self.config.pingpong):
            if self.index == self.config.num_consumer_warpgroups - 1:
                self.barriers.start_turns()
        if self.config.overlap_tiles:
            self.start()

        @T.inline
        def compute(t):
            # 1. The first tile of keys, unless it was begun beside the work tile before.
            if not self.config.overlap_tiles:
                self.start()
            # 2. The other tiles of keys from right to left: masked, full, masked.
            walk = self.walk()
            if not self.pattern.is_unmasked:
                walk.masked_steps(self.first + 1, T.min(walk.full_begin, walk.steps), self.step)
            if walk.has_full:
                for i in T.serial(T.max(walk.full_begin, self.first + 1), T.min(walk.full_end, walk.steps)):
                    if self.config.running_max or self.boxes is not None:
                        self.step(walk, i, False)
                    else:
                        self.step_unchecked(walk, i, False)
            if walk.has_left:
                walk.masked_steps(T.max(walk.full_end, self.first + 1), walk.steps, self.step)
            # 3. The last product, perhaps beside the first of the next work tile.
            if self.config.overlap_tiles:
                if t + 1 < self.block.tiles:
                    self.change_tile()
            else:
                self.end()

        self.block.scheduler.each_tile(self.block, not self.config.overlap_tiles, self.lane, compute)
        if self.config.overlap_tiles:
            self.end()

    @T.inline
    def start(self):
        """The first step of a work tile, which has no earlier product beside it."""
        for i in T.unroll(self.outputs):
            self.acc_o[i] = T.float32(0)
        walk = self.walk()
        if self.pattern.has_gaps:
            self.count(walk)
        self.first = 0
        if self.may_skip:
            self.skip(walk.hidden)
        k = T.meta_var(self.k_state())
        self.fetch(walk.key_first(self.first))
        self.q.consumer_wait(self.q_state())
        self.k.consumer_wait(k)
        self.issue_qk(k)
        T.ptx.wgmma.wait_group.sync.aligned(0)
        self.first_softmax(walk, k)
        self.pack()
        if static(self.boxes is not None):
            self.boxes.release(self.boxed_state(), self.index, self.lane)
        self.next_k(k, self._more(walk, self.first))

    @T.inline
    def end(self):
        """The last product of a work tile, and its output."""
        v = T.meta_var(self.v_state())
        self.epilogue.scores_done(self.block.tile, self.lane)
        self.issue_pv(v)
        T.ptx.wgmma.wait_group.sync.aligned(0)
        if static(self.config.several_tiles):
            self.v.consumer_release(v, self.lane)
        self.keep()
        self.write(self.block.tile)

    @T.inline
    def keep(self):
        """Keep the sums of a work tile that is scored; the sink is that of the head that the block has come to."""
        self.finished.keep(self.softmax)
        if self.finished.has_sink:
            self.finished.add_sink(lambda row: self.block.geometry.sink(self.pattern, self.block.site))

    def walk(self):
        """The steps of the work tile, as this warpgroup's rows see them."""
        return KeyWalk(self.block, self.index * WARPGROUP_ROWS, WARPGROUP_ROWS)

    @T.inline
    def skip(self, hidden):
        """Let tiles of keys pass that this warpgroup's rows don't see, though others of the work tile do."""
        for _ in T.serial(hidden):
            k = T.meta_var(self.k_state())
            v = T.meta_var(self.v_state().next())  # of the same keys
            self.k.consumer_wait(k)
            self.k.consumer_release(k, self.lane)
            if static(self.boxes is not None):
                self.boxes.skip(self.boxed_state(), self.index, self.lane)
            if static(self.config.pingpong):
                self.barriers.await_turn(self.index)
                self.barriers.pass_turn(self.index)
            self.v.consumer_wait(v)
            self.v.consumer_release(v, self.lane)
            self.counter.advance()
        self.first = hidden

    @T.inline
    def count(self, walk):
        """How many steps there are to take, of a mask with gaps."""
        self.total = self.counter.count + 1 if self.config.several_tiles else 1
        for i in T.serial(1, walk.steps):
            self.total = self.total + T.Cast("int32", walk.visible(i))

    @T.inline
    def change_tile(self):
        """The first step of the next work tile, beside which this one is finished."""
        k = T.meta_var(self.k_state())
        v = T.meta_var(self.v_state())
        self.epilogue.scores_done(self.block.tile, self.lane)
        self.block.advance()
        walk = self.walk()
        self.fetch(walk.key_first(self.first))
        self.q.consumer_wait(self.q_state())
        self.issue(k, v)
        self.keep()
        self.first_softmax(walk, k)
        if static(self.boxes is not None):
            self.boxes.release(self.boxed_state(), self.index, self.lane)
        self.next_k(k, self._more(walk, 0))
        self.finish_pv(v)
        self.write(self.block.tile - 1)
        self.pack()
        for i in T.unroll(self.outputs):
            self.acc_o[i] = T.float32(0)

    @T.inline
    def write(self, tile):
        """Normalise the output of work tile number ``tile``, and leave it in shared memory, to be stored."""
        self.finished.store_lse(self.block, tile, self.row + self.softmax.fragment.row(self.lane), self.lane)
        normalise(self.finished, self.acc_o, self.outputs)
        self.epilogue.acquire(tile, self.index, self.barriers)
        packed = T.alloc_local([4], "uint32")
        pack = T.meta_var(element_type(self.pattern.dtype).pack)
        for c in T.unroll(self.pattern.head_dim_v // 16):
            for i in T.unroll(4):
                T.ptx[pack](packed[i], self.acc_o[c * 8 + i * 2 + 1], self.acc_o[c * 8 + i * 2])
            T.ptx["stmatrix.sync.aligned.m8n8.x4.shared.b16"](
                self.epilogue.pointer(tile, self.index)(
                    c // 4, self.warp * 16 + self.lane % 16, swizzled(c % 4 * 2 + self.lane // 16, self.lane % 8)
                ),
                *[packed[x] for x in range(4)],
            )
        T.ptx.fence.proxy.async_.shared__cta()
        T.cuda.warp_sync()
        if self.lane == 0:
            self.epilogue.commit(tile, self.index)

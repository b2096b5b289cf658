"""Sums of dk and dv over the blocks that share the query heads of a group, in the order of their parts."""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.sm90.backward.config import CONSUMERS
from schedules.families.sm90.backward.walk import KeyBlock
from schedules.families.sm90.barriers import WARPS
from schedules.tile.geometry import wide
from schedules.tile.ordered_sums import add_to_tile, await_count, store_tile, take_tile, tell


@T.meta_class
class Parts:
    """The sums of consumer warp ``warp`` of the block, for its own 16 keys.

    ``count`` blocks share a group; ``dk``, ``dv`` and ``done`` are flat views of the workspaces.
    """

    def __init__(self, block: KeyBlock, count, dk, dv, done, warp, lane):
        self.block, self.count = block, count
        self.sums, self.done = (dk, dv), done
        self.warp, self.lane = warp, lane

    def _row(self):
        """Number of these 16 keys among all, int64."""
        place = self.block.block_place(self.block.tensors.kv_heads, self.block.kv_head)
        return wide(place * (CONSUMERS * WARPS) + self.warp)

    @T.inline
    def add(self, acc_dk, acc_dv):
        """Add this part's results when it is its turn; the last part finds the sums in ``acc_dk`` and ``acc_dv``."""
        row: T.int64 = self._row()
        done = T.meta_var(self.done.ptr_to([row]))
        if self.block.part > 0:
            if self.lane == 0:
                T.evaluate(await_count(done, T.int32(0), self.block.part))
            T.cuda.warp_sync()
        self.add_one(acc_dk, self.sums[0], row, self.block.pattern.head_dim)
        self.add_one(acc_dv, self.sums[1], row, self.block.pattern.head_dim_v)
        T.cuda.warp_sync()
        if self.lane == 0:
            T.evaluate(tell(done, self.block.part + 1))

    @T.inline
    def add_one(self, acc, sums, row, columns):
        """The same of one result of so many columns."""
        at: T.int64 = row * (16 * columns) + wide(self.lane * 4)
        if self.block.part == 0:
            for i in T.unroll(columns // 8):
                T.evaluate(store_tile(sums.ptr_to([at + i * 128]), *[acc[i * 4 + x] for x in range(4)]))
        else:
            for i in T.unroll(columns // 8):
                T.evaluate(add_to_tile(sums.ptr_to([at + i * 128]), *[acc[i * 4 + x] for x in range(4)]))
        if self.block.part == self.count - 1:
            for i in T.unroll(columns // 8):
                T.evaluate(take_tile(T.address_of(acc[i * 4]), sums.ptr_to([at + i * 128])))

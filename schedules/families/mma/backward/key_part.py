"""What a block of the joint launch adds to dv and dk where the query heads of a group have blocks of their own.

They add in the order of the heads, accumulators of all threads by all of the same places, and the last one goes on with
the sum.
"""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.mma.registers import fresh
from schedules.tile.geometry import wide
from schedules.tile.ordered_sums import add_element, await_count, store_element, take_element, tell


class KeyPart:
    """Mixed into a :class:`schedules.families.mma.backward.joint_machine.JointMachine`."""

    @T.inline
    def add_up(self, block):
        """All warps: add what the block's heads have made of its keys, the work tile ``block``."""
        thread: T.int32 = fresh("tid.x")
        share: T.int32 = self.share
        keys: T.int64 = wide(block.batch * self.tensors.kv_heads + block.head) * wide(self.memory.blocks) + wide(
            block.m_block
        )
        told = T.meta_var(self.memory.key_progress.ptr_to([keys]))
        of_p, of_ds = T.meta_var((self.m_tiles * self.e_stride, self.m_tiles * self.d_stride))
        first: T.int64 = keys * T.int64((of_p + of_ds) * self.threads) + wide(
            thread // 32 * ((of_p + of_ds) * 32) + thread % 32
        )
        if share > 0:
            if thread % 32 == 0:
                T.evaluate(await_count(told, T.int32(0), share))
            T.cuda.warp_sync()
        self.add_accumulators(self.sum_p, of_p, first, share)
        self.add_accumulators(self.sum_ds, of_ds, first + T.int64(of_p * 32), share)
        if share < self.memory.shares - 1:
            T.cuda.cta_sync()
            if thread == 0:
                T.evaluate(tell(told, share + 1))

    @T.inline
    def add_accumulators(self, acc, count, first, share):
        """Store, add or take over ``count`` accumulators; what is read comes by way of the registers of dq."""
        sums, size = T.meta_var((self.memory.key_sums, self.dq_tiles * self.dq_stride))
        if share == 0:
            for i in T.unroll(count):
                T.evaluate(store_element(sums.ptr_to([first + i * 32]), acc[i]))
        elif share < self.memory.shares - 1:
            for i in T.unroll(count):
                T.evaluate(add_element(sums.ptr_to([first + i * 32]), acc[i]))
        else:
            for n in T.unroll(-(-count // size)):
                for i in T.unroll(size):
                    if n * size + i < count:
                        T.evaluate(take_element(T.address_of(self.dQ[i]), sums.ptr_to([first + (n * size + i) * 32])))
                for i in T.unroll(size):
                    if n * size + i < count:
                        acc[n * size + i] = self.dQ[i] + acc[n * size + i]

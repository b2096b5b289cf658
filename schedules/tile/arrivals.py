"""Who of several blocks is the last: counters in memory at which they arrive when they have written their share.

A launch clears the counters (:func:`clear_counters`) and lets the next one begin at once, whose blocks wait for it
before they arrive.  The last one to arrive sees what all of them have written.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.tile.geometry import flat
from schedules.tile.tile_scheduler import ceildiv

_THREADS = 256
#: Counters of a thread.
_EACH = 4

_ARRIVE = """
__forceinline__ __device__ int arrive(void* counter, int count) {
  int before;
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  asm volatile("atom.relaxed.gpu.global.add.s32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(count) : "memory");
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
  return before + count;
}
"""


def arrive(counter, count: Expr) -> Expr:
    """One thread: what it, and threads whose writes it has seen, have written is ``count`` more; how much there is now,
    all of which it sees."""
    return T.cuda.func_call("arrive", counter, count, source_code=_ARRIVE, return_type="int32")


def clear_counters(name: str) -> PrimFunc:
    """``(counters,)``: zeros to int32 counters; the launch that follows may begin at once."""

    @T.prim_func(check_well_formed=False)
    def kernel(counters: T.handle):
        length = T.meta_var(tirx.Var("counters_length", "int32"))
        buffer = T.match_buffer(counters, (length,), "int32", align=4)
        T.device_entry()
        block = T.cta_id([ceildiv(length, _THREADS * _EACH)])
        thread = T.thread_id([_THREADS])
        T.ptx.griddepcontrol.launch_dependents()
        to = T.meta_var(flat(buffer))
        for i in T.unroll(_EACH):
            number: T.int32 = (block * _EACH + i) * _THREADS + thread
            if number < length:
                to[number] = 0

    return kernel.with_attr("global_symbol", name)

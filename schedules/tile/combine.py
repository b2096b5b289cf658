"""The launch that combines partial results of disjoint ranges of keys, on any GPU.

The definition is linear in ``exp(lse)``: with outputs ``o_s`` and log-sum-exps ``l_s`` of the splits, the whole has
``lse = log(sum exp(l_s))`` and ``o = sum exp(l_s - lse) o_s``.  Splits are summed in an order that depends on nothing
but their number, so a row has the same bits whatever else a launch computes.

A block has one row.  Groups of its threads take every n-th split each, with four columns a thread and ``AHEAD`` splits
in flight, and are then summed one after the other.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.tile.dtypes import element_type
from schedules.tile.geometry import Tensor, flat, wide
from schedules.tile.partial import PartialResults
from schedules.tile.score import LN_2, LOG2_E
from schedules.tile.softmax import LOWEST, from_lane
from schedules.tile.tile_scheduler import Traversal

THREADS = 256
#: Splits that a thread reads before it adds them.
AHEAD = 4
#: Columns of a thread: 16 bytes of float32.
COLUMNS = 4
#: Blocks of a multiprocessor that registers are meant for: left to itself, the assembler for sm_86 and sm_89 went for
#: six, with 40 registers, and spilled 8 bytes.
BLOCKS_PER_SM = 4


@T.meta_class
class Partials:
    """The arguments of the launch: the splits' ``partial`` results, tensor ``o``, flat ``lse``, and sizes."""

    def __init__(self, pattern: Pattern, traversal: Traversal, handles, alignment: int):
        o_partial, lse_partial, o, lse = handles
        names = ("batch", "heads", "seqlen_q", "head_dim_v", "lse_length")
        batch, self.heads, self.seqlen_q, self.head_dim_v, self.lse_length = (tirx.Var(n, "int32") for n in names)
        sizes = {"batch": batch, "heads": self.heads, "seq": self.seqlen_q, "dim": self.head_dim_v}
        self.o = Tensor(o, "o", sizes, pattern.dtype, traversal.layout, alignment)
        self.lse = T.match_buffer(lse, (self.lse_length,), "float32", align=4)
        self.partial = PartialResults((o_partial, lse_partial), pattern.head_dim_v)
        self.rows, self.splits = self.partial.rows, self.partial.splits


@T.inline
def _largest(lse, first, splits, lane, value, peak):
    """``peak`` becomes the largest log-sum-exp of a row's splits, ``lse[first ...]``, in every lane of a warp.

    Loads are instructions that the compiler can't move in front of the wait for the launch that writes.
    """
    for i in T.serial(T.truncdiv(splits + 31, 32)):
        split: T.int32 = i * 32 + lane
        if split < splits:
            T.ptx["ld.global.f32"](value[0], lse.ptr_to([first + wide(split)]))
            peak = T.max(peak, value[0])
    for step in T.unroll(5):
        peak = T.max(peak, from_lane(peak, 1 << step))


def combine(pattern: Pattern, traversal: Traversal, name: str, alignment: int, waits: bool) -> PrimFunc:
    """``(o_partial, lse_partial, o, lse)``: float32 ``(rows, splits, head_dim_v)`` and ``(rows, splits)`` to o and lse.

    ``rows`` are those of o in the order (batch, heads, seqlen_q); an ``lse_partial`` of −inf says that a split sees
    nothing, and then its ``o_partial`` is never looked at.

    Parameters
    ----------
    waits: whether the launch before lets this one begin early, so that it has to wait for what that writes.
    """
    columns = pattern.head_dim_v
    lanes = columns // COLUMNS
    groups = THREADS // lanes
    store_type = element_type(pattern.dtype)

    @T.prim_func(check_well_formed=False)
    def kernel(o_partial: T.handle, lse_partial: T.handle, o: T.handle, lse: T.handle):
        # 1. Arguments.
        at = Partials(pattern, traversal, (o_partial, lse_partial, o, lse), alignment)
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": BLOCKS_PER_SM})
        parts = T.meta_var(flat(at.partial.o))
        logs = T.meta_var(flat(at.partial.lse))
        row = T.cta_id([at.rows])
        thread = T.thread_id([THREADS])
        acc_shared = T.alloc_shared([groups * columns], "float32")
        sum_shared = T.alloc_shared([groups], "float32")
        acc = T.alloc_local([COLUMNS], "float32")
        words = T.alloc_local([AHEAD * COLUMNS], "uint32")
        weight = T.alloc_local([AHEAD], "float32")
        first: T.int64 = wide(row) * wide(at.splits)
        group: T.int32 = T.truncdiv(thread, lanes)
        column: T.int32 = T.truncmod(thread, lanes) * COLUMNS
        if waits:
            T.ptx.griddepcontrol.wait()
        # 2. The largest log-sum-exp; finite, so that −inf minus it is −inf.
        peak: T.float32 = T.float32(LOWEST)
        _largest(logs, first, at.splits, T.truncmod(thread, 32), weight, peak)
        # 3. Each group sums its splits, weighted.
        total: T.float32 = T.float32(0)
        for x in T.unroll(COLUMNS):
            acc[x] = T.float32(0)
        if group < groups:
            for i in T.serial(T.truncdiv(at.splits - group + (groups * AHEAD - 1), groups * AHEAD)):
                for a in T.unroll(AHEAD):
                    split: T.int32 = group + (i * AHEAD + a) * groups
                    weight[a] = T.float32(0)
                    for x in T.unroll(COLUMNS):
                        words[a * COLUMNS + x] = T.uint32(0)
                    if split < at.splits:
                        T.ptx["ld.global.f32"](weight[a], logs.ptr_to([first + wide(split)]))
                        weight[a] = T.exp2((weight[a] - peak) * T.float32(LOG2_E))
                        T.ptx["ld.global.v4.b32"](
                            *[words[a * COLUMNS + x] for x in range(COLUMNS)],
                            parts.ptr_to([(first + wide(split)) * columns + wide(column)]),
                        )
                for a in T.unroll(AHEAD):
                    total = total + weight[a]
                    for x in T.unroll(COLUMNS):
                        value = T.meta_var(T.reinterpret("float32", words[a * COLUMNS + x]))
                        # what a split that sees nothing has left there may be anything
                        acc[x] = acc[x] + T.Select(weight[a] == T.float32(0), T.float32(0), weight[a] * value)
            for x in T.unroll(COLUMNS):
                acc_shared[group * columns + column + x] = acc[x]
            if column == 0:
                sum_shared[group] = total
        T.cuda.cta_sync()
        # 4. The first group sums the groups, and writes the row.
        if thread < lanes:
            for x in T.unroll(COLUMNS):
                acc[x] = T.float32(0)
            total = T.float32(0)
            for g in T.unroll(groups):
                total = total + sum_shared[g]
                for x in T.unroll(COLUMNS):
                    acc[x] = acc[x] + acc_shared[g * columns + column + x]
            inverse: T.float32 = T.Select(total == T.float32(0), T.float32(0), T.float32(1) / total)
            position: T.int32 = T.truncmod(row, at.seqlen_q)
            head_row: T.int32 = T.truncdiv(row, at.seqlen_q)
            head: T.int32 = T.truncmod(head_row, at.heads)
            b: T.int32 = T.truncdiv(head_row, at.heads)
            packed = T.alloc_local([2], "uint32")
            for x in T.unroll(2):
                T.ptx[store_type.pack](packed[x], acc[2 * x + 1] * inverse, acc[2 * x] * inverse)
            to = T.meta_var(flat(at.o.buffer))
            if column < at.head_dim_v:
                T.ptx["st.global.v2.b32"](to.ptr_to([at.o.offset(b, head, position, column)]), packed[0], packed[1])
            if T.And(thread == 0, wide(at.lse_length) >= wide(at.rows)):
                at.lse[row] = peak + T.log2(total) * T.float32(LN_2)

    return kernel.with_attr("global_symbol", name)

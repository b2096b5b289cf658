"""The last launch of a joint backward with a sink: the gradients of the sink's parameters.

A sink takes no part in dq, dk and dv but by the log-sum-exp: the other launches are those of the same attention
without it.  It is a key more whose value is 0, and its gradient the sum of all rows' shares in it, which a block for
each head adds up in an order that follows from the sizes alone.  A row that sees no key has a log-sum-exp all the same,
that of the sink: the launch writes the zeros of its dq, which no other one does.
"""

from __future__ import annotations

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.parameters import append_arguments, gradient_name, gradient_symbols
from schedules.definition.pattern import Pattern
from schedules.families.interface import ScheduledLaunch
from schedules.families.row_terms import STARTS
from schedules.families.sm90.backward.parameters import add_lanes
from schedules.tile.dtypes import element_type
from schedules.tile.functions import accurate
from schedules.tile.geometry import flat, local, parameterised, site, wide
from schedules.tile.gradients import tensors_of
from schedules.tile.parameters import Parameters
from schedules.tile.static import static
from schedules.tile.tile_scheduler import Traversal, ceildiv
from schedules.tile.weights import negative, sink_share

#: Warps of a block.
WARPS = 16
ROLES = ("q", "k", "v", "lse", STARTS, "dq", "softmax_scale")


def build(pattern: Pattern, traversal: Traversal, name: str, block_m: int, adds: bool) -> ScheduledLaunch:
    """The launch; rows' numbers lie in tiles of ``block_m``.  ``adds``: results to what is there."""
    arguments, targets = gradient_symbols(pattern.learnt_of_sink, pattern.index_dtype)
    func = parameterised(pattern, lambda parameters: _kernel(pattern, traversal, block_m, parameters, targets, adds))
    func = append_arguments(func, arguments)
    roles = (*ROLES, *(p.name for p in pattern.params), *(gradient_name(p) for p in pattern.learnt_of_sink))
    return ScheduledLaunch(func.with_attr("global_symbol", name), roles)


def _write(pattern: Pattern, at, total, targets: dict, adds: bool):
    """One thread: the gradients of the parameters of a head, of the sum of its rows' shares."""
    for name, target in targets.items():
        batch_stride, head_stride = target.ty.strides
        to = wide(at.b) * wide(batch_stride) + wide(at.h) * wide(head_stride)
        value = total * accurate(pattern.sink_gradient(name, at))
        T.buffer_store(flat(target), flat(target)[to] + value if adds else value, [to])


def _kernel(
    pattern: Pattern, traversal: Traversal, block_m: int, parameters: dict, targets: dict, adds: bool
) -> PrimFunc:
    chunk, threads = element_type(pattern.dtype).chunk, WARPS * 32

    @T.prim_func(check_well_formed=False)
    def kernel(
        q: T.handle,
        k: T.handle,
        v: T.handle,
        lse: T.handle,
        row_starts: T.handle,
        dq: T.handle,
        softmax_scale: T.float32,
    ):
        handles = T.meta_var({"q": q, "k": k, "v": v, "lse": lse, "delta": row_starts, "dq": dq})
        tensors = T.meta_var(tensors_of(pattern, traversal, handles, None, softmax_scale, parameters, adds=adds))
        places = T.bind(tensors.tiles_of_rows(block_m) * block_m)
        T.device_entry()
        block = T.cta_id([tensors.batch * tensors.heads])
        thread = T.thread_id([threads])
        shared = T.alloc_shared([WARPS], "float32")
        b: T.int32 = T.truncdiv(block, tensors.heads)
        h: T.int32 = block - b * tensors.heads
        at = T.meta_var(site(tensors, Parameters(tensors, b, h), b, h))
        sums, starts = T.meta_var(tensors.row_terms())
        # 1. Each thread's rows, then all of them.
        total = T.meta_var(local(T.float32(0)))
        for i in T.serial(ceildiv(tensors.seqlen_q, threads)):
            row: T.int32 = i * threads + thread
            if row < tensors.seqlen_q:
                delta = T.meta_var(negative(starts[wide(block) * wide(places) + wide(row)]))
                share = T.meta_var(sink_share(pattern, tensors, at, sums[tensors.lse_offset(b, h, row)], delta))
                T.buffer_store(total.source, total + share, [0])
        add_lanes(total)
        if T.truncmod(thread, 32) == 0:
            shared[T.truncdiv(thread, 32)] = total.source[0]
        T.cuda.cta_sync()
        if thread == 0:
            whole = T.meta_var(local(T.float32(0)))
            for w in T.unroll(WARPS):
                T.buffer_store(whole.source, whole + shared[w], [0])
            _write(pattern, at, whole, targets, adds)
        # 2. Zeros of rows that see no key: those before the first one that sees any.
        if static(not adds):
            out = T.meta_var(tensors.gradients["dq"])
            hidden: T.int32 = pattern.rows_of_tile(at, T.int32(0), tensors.seqlen_kv - 1).visible[0]
            chunks: T.int32 = ceildiv(tensors.head_dim, chunk)
            for i in T.serial(ceildiv(T.min(hidden, tensors.seqlen_q) * chunks, threads)):
                number: T.int32 = i * threads + thread
                of_row: T.int32 = T.truncdiv(number, chunks)
                if of_row < T.min(hidden, tensors.seqlen_q):
                    T.ptx["st.global.v4.b32"](
                        flat(out.buffer).ptr_to([out.offset(b, h, of_row, (number - of_row * chunks) * chunk)]),
                        *[T.uint32(0)] * 4,
                    )

    return kernel

"""The launch after a backward, on any GPU: gradients of parameters, from the shares of the blocks that had scores."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.attention import append_arguments
from schedules.definition.parameters import gradient_symbols
from schedules.tile.geometry import RAGGED_LAYOUT, Tensor, flat, wide
from schedules.tile.gradients import ALIGNMENT, Starts
from schedules.tile.sequences import Ragged
from schedules.tile.softmax import from_lane
from schedules.tile.tile_scheduler import ceildiv
from tvm_flash.packs.manifest import Param

#: Threads of a block that adds the shares of a head, and of one that may have those of all heads to add.
_LANES, _THREADS = 32, 512


def parameter_sums(asked: Sequence[Param], name: str, adds: bool = False) -> PrimFunc:
    """``(sums, *gradients)``: ``sums`` has for each parameter in turn those of ``(batch, heads, blocks)``, float32.

    A warp adds the shares of one element of a gradient, and all threads of the first block those of a number, always in
    the same order; ``gradients`` are ``(batch, heads)``, or have one element.  ``adds``: to what they have.
    """
    arguments, values = gradient_symbols(tuple(asked), "int32")
    per_head = next((values[p.name] for p in asked if p.axes), None)
    elements = per_head.shape[0] * per_head.shape[1] if per_head is not None else T.int32(1)
    length = tirx.Var("sums_length", "int32")

    def add(memory, n, param, block, thread):
        """Add the shares of element ``block`` of the gradient of the ``n``-th parameter."""
        if not param.axes:
            count = T.bind(T.truncdiv(length, len(asked)))
            _add_all(memory, n * count, count, values[param.name], block, thread, adds)
            return
        count = T.bind(T.truncdiv(length, elements * len(asked)))
        first = T.bind(T.min(block, elements - 1) * count + n * (count * elements))
        _add(memory, first, count, values[param.name], block, elements, thread, adds)

    @T.prim_func(check_well_formed=False)
    def kernel(sums: T.handle):
        shares = T.match_buffer(sums, (length,), "float32", align=4)
        T.device_entry()
        block = T.cta_id([elements])
        lane = T.thread_id([_threads(asked)])  # in the whole block, where that is more than a warp
        memory = T.meta_var(flat(shares))
        T.evaluate(_each(lambda n, param: add(memory, n, param, block, lane), asked, lane))

    return append_arguments(kernel.with_attr("global_symbol", name), arguments)


def ragged_parameter_sums(asked: Sequence[Param], name: str, rows: int, dtype: str, starts: Starts) -> PrimFunc:
    """``(sums, q, *gradients, cu_seqlens_q)``: the same where each slot of ``rows`` rows of ragged sequences has a
    share, in the order ``(heads, slots)`` (:mod:`schedules.tile.sequences`).  That of a slot without rows is read of a
    number alone.
    """
    arguments, values = gradient_symbols(tuple(asked), "int32")
    length = tirx.Var("sums_length", "int32")
    sizes = {name: tirx.Var(name, "int32") for name in ("seq", "heads", "dim")}
    batch = starts.ends - 1

    def add(memory, n, param, queries, block, thread):
        """Add the shares of element ``block`` of the gradient of the ``n``-th parameter."""
        heads, slots = sizes["heads"], queries.tiles(rows)
        if not param.axes:
            count = T.bind(heads * slots)
            _add_all(memory, n * count, count, values[param.name], block, thread)
            return
        sequence = T.bind(T.truncdiv(block, heads))
        own = queries.of(sequence)
        first = (n * heads + T.truncmod(block, heads)) * slots + queries.first_slot(sequence, rows)
        count = T.bind(ceildiv(own.length, rows))
        _add(memory, T.bind(first), count, values[param.name], block, batch * heads, thread)

    @T.prim_func(check_well_formed=False)
    def kernel(sums: T.handle, q: T.handle):
        shares = T.match_buffer(sums, (length,), "float32", align=4)
        _rows = Tensor(q, "q", sizes, dtype, RAGGED_LAYOUT, ALIGNMENT)
        T.device_entry()
        block = T.cta_id([batch * sizes["heads"]])
        lane = T.thread_id([_threads(asked)])  # in the whole block, where that is more than a warp
        memory = T.meta_var(flat(shares))
        queries = T.meta_var(Ragged(starts.arguments[0], batch, sizes["seq"]))
        T.evaluate(_each(lambda n, param: add(memory, n, param, queries, block, lane), asked, lane))

    return append_arguments(kernel.with_attr("global_symbol", name), [*arguments, starts.arguments[0]])


def _threads(asked: Sequence[Param]) -> int:
    """How many threads a block has."""
    return _LANES if all(p.axes for p in asked) else _THREADS


def _add(memory, first, count, out, block, elements, lane, adds: bool = False):
    """A warp: the sum of ``count`` shares from number ``first`` on, to element ``block`` of ``elements`` of ``out``.

    ``adds``: to what it has.
    """
    total = _sum(memory, first, count, lane, _LANES)
    batch_stride, head_stride = out.ty.strides
    heads = out.shape[1]
    place = wide(T.truncdiv(block, heads)) * wide(batch_stride) + wide(T.truncmod(block, heads)) * wide(head_stride)
    with T.If(T.And(lane == 0, block < elements)), T.Then():
        _store(flat(out), place, total[0], adds)


def _add_all(memory, first, count, out, block, thread, adds: bool = False):
    """All threads of the first block: the sum of ``count`` shares from number ``first`` on, to the element of ``out``.

    ``adds``: to what it has.
    """
    warps = T.alloc_shared([_THREADS // _LANES], "float32")
    with T.If(block == 0), T.Then():
        total = _sum(memory, first, count, thread, _THREADS)
        with T.If(T.truncmod(thread, _LANES) == 0), T.Then():
            T.buffer_store(warps, total[0], [T.truncdiv(thread, _LANES)])
        T.evaluate(T.cuda.cta_sync())
        with T.If(thread == 0), T.Then():
            for w in range(1, _THREADS // _LANES):
                T.buffer_store(total, total[0] + warps[w], [0])
            _store(flat(out), T.int64(0), total[0], adds)


def _sum(memory, first, count, thread, threads: int):
    """What the warp of a thread, one of so many, has of the sum of ``count`` shares from number ``first`` on."""
    total = T.alloc_local([1], "float32")
    T.buffer_store(total, T.float32(0), [0])
    with T.serial(ceildiv(count, threads)) as i:
        at = i * threads + thread
        share = T.if_then_else(at < count, memory[wide(first + at)], T.float32(0))
        T.buffer_store(total, total[0] + share, [0])
    for step in range(_LANES.bit_length() - 1):
        T.buffer_store(total, operator.add(total[0], from_lane(total[0], 1 << step)), [0])
    return total


def _store(target, place, total, adds: bool):
    """One thread: a sum, to where it belongs."""
    T.buffer_store(target, target[place] + total if adds else total, [place])


def _each(do, params, thread) -> int:
    """``do(n, param)`` for each parameter, of a head by the first warp alone; what a kernel's text may call."""
    for n, param in enumerate(params):
        if param.axes and _threads(params) > _LANES:
            with T.If(thread < _LANES), T.Then():
                do(n, param)
        else:
            do(n, param)
    return 0

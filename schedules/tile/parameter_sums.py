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

_LANES = 32


def parameter_sums(asked: Sequence[Param], name: str, adds: bool = False) -> PrimFunc:
    """``(sums, *gradients)``: ``sums`` has for each parameter in turn those of ``(batch, heads, blocks)``, float32.

    A warp adds the shares of one element of a gradient, always in the same order; ``gradients`` are ``(batch, heads)``,
    or have one element.  ``adds``: to what they have.
    """
    arguments, values = gradient_symbols(tuple(asked), "int32")
    per_head = next((values[p.name] for p in asked if p.axes), None)
    elements = per_head.shape[0] * per_head.shape[1] if per_head is not None else T.int32(1)
    length = tirx.Var("sums_length", "int32")

    def add(memory, n, param, block, lane):
        """Add the shares of element ``block`` of the gradient of the ``n``-th parameter."""
        own = elements if param.axes else T.int32(1)
        count = T.bind(T.truncdiv(length, own * len(asked)))
        first = T.bind(T.min(block, own - 1) * count + n * (count * own))
        _add(memory, first, count, values[param.name], param, block, own, lane, adds)

    @T.prim_func(check_well_formed=False)
    def kernel(sums: T.handle):
        shares = T.match_buffer(sums, (length,), "float32", align=4)
        T.device_entry()
        block = T.cta_id([elements])
        lane = T.thread_id([_LANES])
        memory = T.meta_var(flat(shares))
        T.evaluate(_each(lambda n, param: add(memory, n, param, block, lane), asked))

    return append_arguments(kernel.with_attr("global_symbol", name), arguments)


def ragged_parameter_sums(asked: Sequence[Param], name: str, rows: int, dtype: str, starts: Starts) -> PrimFunc:
    """``(sums, q, *gradients, cu_seqlens_q)``: the same where each slot of ``rows`` rows of ragged sequences has a
    share, in the order ``(heads, slots)`` (:mod:`schedules.tile.sequences`); all gradients are ``(batch, heads)``.
    """
    arguments, values = gradient_symbols(tuple(asked), "int32")
    length = tirx.Var("sums_length", "int32")
    sizes = {name: tirx.Var(name, "int32") for name in ("seq", "heads", "dim")}
    batch = starts.ends - 1

    def add(memory, n, param, queries, block, lane):
        """Add the shares of element ``block`` of the gradient of the ``n``-th parameter."""
        heads = sizes["heads"]
        sequence = T.bind(T.truncdiv(block, heads))
        own, slots = queries.of(sequence), queries.tiles(rows)
        first = (n * heads + T.truncmod(block, heads)) * slots + queries.first_slot(sequence, rows)
        count = T.bind(ceildiv(own.length, rows))
        _add(memory, T.bind(first), count, values[param.name], param, block, batch * heads, lane)

    @T.prim_func(check_well_formed=False)
    def kernel(sums: T.handle, q: T.handle):
        shares = T.match_buffer(sums, (length,), "float32", align=4)
        _rows = Tensor(q, "q", sizes, dtype, RAGGED_LAYOUT, ALIGNMENT)
        T.device_entry()
        block = T.cta_id([batch * sizes["heads"]])
        lane = T.thread_id([_LANES])
        memory = T.meta_var(flat(shares))
        queries = T.meta_var(Ragged(starts.arguments[0], batch, sizes["seq"]))
        T.evaluate(_each(lambda n, param: add(memory, n, param, queries, block, lane), asked))

    return append_arguments(kernel.with_attr("global_symbol", name), [*arguments, starts.arguments[0]])


def _add(memory, first, count, out, param: Param, block, elements, lane, adds: bool = False):
    """The sum of ``count`` shares from number ``first`` on, to element ``block`` of the ``elements`` of ``out``.

    ``adds``: to what it has.
    """
    total = T.alloc_local([1], "float32")
    T.buffer_store(total, T.float32(0), [0])
    with T.serial(ceildiv(count, _LANES)) as i:
        at = i * _LANES + lane
        share = T.if_then_else(at < count, memory[wide(first + at)], T.float32(0))
        T.buffer_store(total, total[0] + share, [0])
    for step in range(_LANES.bit_length() - 1):
        T.buffer_store(total, operator.add(total[0], from_lane(total[0], 1 << step)), [0])
    place = T.int64(0)
    if param.axes:
        batch_stride, head_stride = out.ty.strides
        heads = out.shape[1]
        place = wide(T.truncdiv(block, heads)) * wide(batch_stride) + wide(T.truncmod(block, heads)) * wide(head_stride)
    with T.If(T.And(lane == 0, block < elements)), T.Then():
        target = flat(out)
        T.buffer_store(target, target[place] + total[0] if adds else total[0], [place])


def _each(do, params) -> int:
    """``do(n, param)`` for each parameter; what a kernel's text may call."""
    for n, param in enumerate(params):
        do(n, param)
    return 0

"""Gradients of parameters that are summed: each warp of the launch for dq leaves its share, the next one adds them.

They are added in an order that follows from the sizes alone, by the block that has the first keys of a head of keys.
"""

from __future__ import annotations

import operator

from tvm import tirx
from tvm.script import tirx as T

from schedules.definition.parameters import gradient_name, gradient_symbols
from schedules.definition.pattern import Pattern
from schedules.families.sm90.backward.config import BLOCK, CONSUMERS
from schedules.families.sm90.barriers import WARPS
from schedules.tile.functions import accurate
from schedules.tile.geometry import flat, local, wide
from schedules.tile.gradients import tiles_of
from schedules.tile.softmax import from_lane
from schedules.tile.tile_scheduler import ceildiv
from schedules.tile.weights import summed
from tvm_flash.packs.manifest import Workspace

#: Shares of each 128 queries: one a consumer warp.
SHARES = WARPS * CONSUMERS
#: The workspace with the shares, in the order (parameter, batch, heads, share).
NAME = "parameter_shares"


def workspaces(pattern: Pattern, ragged: bool) -> tuple[Workspace, ...]:
    """Memory for the shares, if a parameter asks for a gradient."""
    count = len(summed(pattern))
    size = ("*", count, tiles_of(BLOCK, ragged), SHARES)
    return (Workspace(NAME, "float32", (size,)),) if count else ()


@T.meta_class
class ParameterGradients:
    """The arguments of a launch beside the pattern's parameters: the shares, and ``d_NAME`` if it ``writes`` them, or
    ``adds`` to them.
    """

    def __init__(self, pattern: Pattern, *, writes: bool, adds: bool = False):
        self.adds = adds
        self.pattern, self.params, self.has_sink = pattern, summed(pattern), pattern.has_sink
        targets, self.targets = gradient_symbols(self.params if writes else (), pattern.index_dtype)
        self.arguments, self.roles = [*targets], tuple(gradient_name(p) for p in self.params if writes)
        if self.params:
            self.shares = tirx.decl_buffer([tirx.Var(f"{NAME}_length", "int32")], "float32", name=NAME)
            self.arguments.append(self.shares)
            self.roles += (NAME,)

    def _first(self, tensors, n: int, batch, head):
        """Where the shares of a head begin, and how many it has."""
        tiles = tensors.tiles_of_rows(BLOCK)
        row = n * tensors.head_rows + tensors.head_row(batch, head)
        count = ceildiv(tensors.queries.of(batch).length, BLOCK) * SHARES
        if tensors.may_lack_keys and not self.has_sink:
            count = T.Select(tensors.keys.of(batch).length > 0, count, 0)
        return wide(row * tiles + tensors.first_tile(batch, BLOCK)) * SHARES, count

    def counts(self, tensors, batch):
        """Whether the rows of a block have a place among those of all: those after the last sequence have none.

        Without a sink, rows that have no keys have no gradients, and don't count either.
        """
        if self.has_sink and tensors.may_lack_keys:
            return tensors.queries.of(batch).offset < tensors.all_queries.begin(tensors.batch)
        return tensors.keys.of(batch).length > 0

    def add_to_sinks(self, sums, site, gradient):
        """Add the gradient of the sink times its derivatives to the sums of its parameters."""
        for n, param in enumerate(self.params):
            if param in self.pattern.learnt_of_sink:
                T.buffer_store(sums, sums[n] + gradient * accurate(self.pattern.sink_gradient(param.name, site)), [n])

    def store(self, tensors, sums, batch, head, share, lane):
        """A warp: leave what its lanes have in ``sums`` as share number ``share`` of a head.

        Rows that don't count leave none (:meth:`counts`).
        """
        for n in range(len(self.params)):
            total = local(sums[n])
            add_lanes(total)
            first, _ = self._first(tensors, n, batch, head)
            leaves = lane == 0
            if tensors.may_lack_keys:
                leaves = T.And(leaves, self.counts(tensors, batch))
            with T.If(leaves), T.Then():
                T.buffer_store(flat(self.shares), total.source[0], [first + wide(share)])

    def add(self, tensors, batch, kv_head, warp, warps: int, lane):
        """All warps of a block: write the gradients of the parameters of a head of keys' query heads."""
        group = tensors.group
        for n, p in enumerate(self.params):
            if p.axes:
                # each warp takes every so many of the heads
                with T.serial(T.truncdiv(group - warp + (warps - 1), warps)) as i:
                    head = kv_head * group + warp + i * warps
                    first, count = self._first(tensors, n, batch, head)
                    target = self.targets[p.name]
                    batch_stride, head_stride = target.ty.strides
                    at = wide(batch) * wide(batch_stride) + wide(head) * wide(head_stride)
                    self._write(first, count, flat(target), at, lane)
            else:
                with T.If(T.And(T.And(kv_head == 0, batch == 0), warp == 0)), T.Then():
                    first, count = self._first(tensors, n, T.int32(0), T.int32(0))
                    count = count * tensors.batch * tensors.heads
                    self._write(first, count, flat(self.targets[p.name]), T.int64(0), lane)

    def _write(self, first, count, target, at, lane):
        """A warp: the sum of ``count`` shares from ``first`` on."""
        total = local(T.float32(0))
        shares = flat(self.shares)
        with T.serial(ceildiv(count, 32)) as i:
            number = i * 32 + lane
            with T.If(number < count), T.Then():
                T.buffer_store(total.source, total + shares[first + wide(number)], [0])
        add_lanes(total)
        with T.If(lane == 0), T.Then():
            T.buffer_store(target, target[at] + total.source[0] if self.adds else total.source[0], [at])


def add_lanes(total):
    """The sum over a warp's lanes, in all of them."""
    for step in range(5):
        T.buffer_store(total.source, operator.add(total, from_lane(total.source[0], 1 << step)), [0])

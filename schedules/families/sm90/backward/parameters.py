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

    @T.inline
    def leave_nothing(self, tensors, rows, scheduler, at, thread):
        """All threads of a block: zeros as the shares of a slot of ragged sequences without rows that count, since a
        number's gradient is the sum of the shares of all slots."""
        own = T.meta_var(scheduler.own(tensors, rows, 0)[0])
        counts = T.meta_var(T.And(scheduler.found.exists, self.counts(own, scheduler.found.sequence)))
        if T.And(thread < SHARES, T.Not(counts)):
            for n in T.unroll(len(self.params)):
                place: T.int32 = (n * tensors.heads + at[1]) * tensors.tiles_of_rows(BLOCK) + at[0]
                flat(self.shares)[wide(place) * SHARES + wide(thread)] = T.float32(0)

    def add_memory(self, pool, warps: int):
        """Take what :meth:`add` needs of shared memory."""
        numbers = sum(not p.axes for p in self.params)
        self.of_warps = pool.alloc((numbers, warps), "float32", align=4) if numbers else None

    def add(self, tensors, batch, kv_head, warp, warps: int, lane):
        """All warps of a block: write the gradients of the parameters of a head of keys' query heads, the first block
        also those of numbers."""
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
        if self.of_warps is not None:
            with T.If(T.And(kv_head == 0, batch == 0)), T.Then():
                self._add_numbers(tensors, warp, warps, lane)

    def _add_numbers(self, tensors, warp, warps: int, lane):
        """All warps of a block: write the gradients of numbers, of the shares of all heads."""
        numbers = [(n, p) for n, p in enumerate(self.params) if not p.axes]
        count = tensors.head_rows * tensors.tiles_of_rows(BLOCK) * SHARES
        for m, (n, _) in enumerate(numbers):
            total = self._sum(wide(n) * wide(count), count, warp * 32 + lane, 32 * warps)
            with T.If(lane == 0), T.Then():
                T.buffer_store(self.of_warps, total.source[0], [m, warp])
        T.evaluate(T.cuda.cta_sync())
        for m, (_, p) in enumerate(numbers):
            with T.If(T.And(warp == 0, lane == m)), T.Then():
                whole = local(T.float32(0))
                for w in range(warps):
                    T.buffer_store(whole.source, whole + self.of_warps[m, w], [0])
                self._store(flat(self.targets[p.name]), T.int64(0), whole)

    def _write(self, first, count, target, at, lane):
        """A warp: the sum of ``count`` shares from ``first`` on."""
        total = self._sum(first, count, lane, 32)
        with T.If(lane == 0), T.Then():
            self._store(target, at, total)

    def _sum(self, first, count, thread, threads: int):
        """What the warp of a thread, one of so many, has of the sum of ``count`` shares from ``first`` on."""
        total = local(T.float32(0))
        shares = flat(self.shares)
        with T.serial(ceildiv(count, threads)) as i:
            number = i * threads + thread
            with T.If(number < count), T.Then():
                T.buffer_store(total.source, total + shares[first + wide(number)], [0])
        add_lanes(total)
        return total

    def _store(self, target, at, total):
        """One thread: write a sum, or add it to what is there."""
        T.buffer_store(target, target[at] + total.source[0] if self.adds else total.source[0], [at])


def add_lanes(total):
    """The sum over a warp's lanes, in all of them."""
    for step in range(5):
        T.buffer_store(total.source, operator.add(total, from_lane(total.source[0], 1 << step)), [0])

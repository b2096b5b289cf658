"""Attention of the queries that a rank holds, and its gradients, step by step of a plan.

Messages of the next step are on their way while one is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tvm_flash.distributed.exchange import Arrival, Return, Transport
from tvm_flash.distributed.kernels import Kernels
from tvm_flash.distributed.launches import Heads, Work
from tvm_flash.distributed.merge import add_sinks
from tvm_flash.distributed.messages import Messages
from tvm_flash.distributed.peers import Layout, Memory, Reads
from tvm_flash.distributed.plan import Call, Plan, Step
from tvm_flash.distributed.rows import Sums


@dataclass(frozen=True)
class Stage:
    """A step for some heads: its number among all, and its keys, of which some come from other ranks."""

    number: int
    heads: Heads
    step: Step
    arrival: Arrival


@dataclass(frozen=True)
class Job:
    """What a rank does.

    Attributes
    ----------
    plan: its steps.
    group: the ranks that exchange keys; None if there is one.
    peers: the memory that they read of each other; None if they send messages.
    kernels: what is computed.
    sinks: float32 ``(heads,)`` or ``(batch, heads)``, or none.
    """

    plan: Plan
    group: dist.ProcessGroup | None
    peers: Memory | None
    kernels: Kernels
    sinks: torch.Tensor | None = None

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The result and its log-sum-exp of tensors ``(batch, heads, rows, head_dim)``."""
        merges = self.plan.merges or self.sinks is not None
        out = empty_as(q, v.shape[3], torch.float32 if merges else q.dtype)
        if not self.plan.covers or (merges and self._needs_numbers(q, v)):
            out.zero_()
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
        for stage in self._stages(q, k, v, self._transport(self._layout(k, v)), 1, in_parts=True):
            kernels = self.kernels.of_heads(*stage.heads.queries)
            for call in sorted(stage.step.calls, key=stage.step.parts):
                rows = _rows(call, stage.heads)
                tensors = (q[rows], *stage.arrival.keys(stage.step.parts(call)).by_head(call.keys))
                if merges:
                    kernels.merge(call, *tensors, out[rows], lse[rows])
                else:
                    lse[rows] = kernels.forward(call, *tensors, out[rows])
            stage.arrival.keys()  # what this rank sends is gone
        if self.sinks is not None:
            add_sinks(out, lse, self.sinks)
        return out.to(q.dtype), lse

    def _needs_numbers(self, q: torch.Tensor, v: torch.Tensor) -> bool:
        """Whether results are merged by what also reads those of rows that have seen nothing."""
        ragged = any(call.starts for step in self.plan.steps for call in step.calls)
        return ragged or not self.kernels.merges(q, v)

    def backward(self, dout, q, k, v, out, lse, dlse, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, of the keys and values that this rank holds, in a dtype, and of the slopes if they learn."""
        learns = self.kernels.learns
        once = not self.plan.merges and not self.kernels.adds(q, v)
        dq = empty_as(q, q.shape[3], q.dtype if once else torch.float32)
        if not (once and self.plan.covers):
            dq.zero_()
        dk, dv = empty_as(k, k.shape[3], dtype), empty_as(v, v.shape[3], dtype)
        d_slopes = q.new_zeros(q.shape[:2], dtype=torch.float32) if learns else None
        sums: dict[Heads, Sums] = {}

        def write(heads):
            sums.pop(heads).write(dk[:, slice(*heads.keys)], dv[:, slice(*heads.keys)])

        last = None
        layout = self._layout(k, v, backward=True)
        transport = self._transport(layout)
        for stage in self._stages(q, k, v, transport, layout.groups, in_parts=False):
            heads, step = stage.heads, stage.step
            keys = stage.arrival.keys()
            shared = transport.room(stage.number, keys, step.keys, goes=bool(step.receives))
            gradients = shared.rows
            if heads not in sums:
                sums[heads] = Sums(k.shape[2], step.own, gradients)
            kernels = self.kernels.of_heads(*heads.queries)
            for call in step.calls:
                rows = _rows(call, heads)
                places = (dq[rows], *gradients.by_head(call.keys), d_slopes[rows[:2]] if learns else None)
                kept = (out[rows], lse[rows], None if dlse is None else dlse[rows])
                tensors = (dout[rows], q[rows], *keys.by_head(call.keys))
                kernels.backward(call, *tensors, *kept, *places, once=once)
            if last is not None:
                last.wait()
            for done in [x for x in sums if x != heads]:
                write(done)
            last = Return(transport, 2 * stage.number + 1, step, shared, sums[heads])
        if last is not None:
            last.wait()
        for done in [*sums]:
            write(done)
        return dq.to(q.dtype), dk, dv, d_slopes

    def layout(self, batch: int, kv_heads: int, dims: tuple[int, int], itemsize: int, *, backward: bool) -> Layout:
        """Where rows lie that others read, of tensors of such sizes; the same on all ranks."""
        plan, groups = self.plan, 1
        if backward:
            fetches = self.group is not None and len(plan.steps) == 1
            window = self.kernels.left, self.kernels.right
            groups = Work(batch, kv_heads, plan.positions, *window, fetches, self.peers is not None).in_backward
        stages = groups * len(plan.steps) if backward else 0
        return Layout(groups, plan.most_rows, stages, plan.most_keys, batch, kv_heads // groups, dims, itemsize)

    def _layout(self, k: torch.Tensor, v: torch.Tensor, *, backward: bool = False) -> Layout:
        dims = k.shape[3], v.shape[3]
        return self.layout(k.shape[0], k.shape[1], dims, k.element_size(), backward=backward)

    def _transport(self, layout: Layout) -> Transport:
        return Messages(self.group) if self.peers is None else Reads(self.peers, layout)

    def _stages(self, q, k, v, transport: Transport, count: int, *, in_parts: bool) -> Iterator[Stage]:
        """All steps, those of the first of ``count`` groups of heads first; the messages of each begin before the one
        before is computed."""
        groups = Heads((0, q.shape[1]), (0, k.shape[1])).parts(count)
        held = dict.fromkeys(groups)
        order = [(heads, step) for heads in groups for step in self.plan.steps]
        goes = any(step.sends for step in self.plan.steps)

        def begin(number):
            heads, step = order[number]
            if held[heads] is None:
                some = (x[:, slice(*heads.keys)] for x in (k, v))
                held[heads] = transport.hold(groups.index(heads), *some, goes=goes)
            arrival = Arrival(transport, 2 * number, step, held[heads], in_parts=in_parts)
            return Stage(number, heads, step, arrival)

        following = begin(0)
        for number in range(len(order)):
            stage = following
            if number + 1 < len(order):
                following = begin(number + 1)
            yield stage


def _rows(call: Call, heads: Heads) -> tuple[slice, slice, slice]:
    """Where a call's rows are in tensors ``(batch, heads, rows, …)``."""
    return slice(None), slice(*heads.queries), slice(*call.rows)


def empty_as(x: torch.Tensor, last: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of the shape of x but for the last dimension, with the same order of dimensions in memory."""
    order = sorted(range(x.ndim - 1), key=lambda dim: (-x.stride(dim), dim))
    return torch.empty_permuted((*x.shape[:-1], last), (*order, x.ndim - 1), dtype=dtype, device=x.device)

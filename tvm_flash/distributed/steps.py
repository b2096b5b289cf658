"""Attention of the queries that a rank holds, and its gradients, step by step of a plan.

Messages of the next step are on their way while one is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tvm_flash.distributed.exchange import Arrival, Return, Transport
from tvm_flash.distributed.kernels import Kernels
from tvm_flash.distributed.lanes import Lanes
from tvm_flash.distributed.launches import Heads, Work
from tvm_flash.distributed.merge import add_sinks
from tvm_flash.distributed.messages import Messages
from tvm_flash.distributed.peers import Layout, Memory, Reads, explaining
from tvm_flash.distributed.plan import Call, Plan, Step
from tvm_flash.distributed.rows import Sums


@dataclass(frozen=True)
class Stage:
    """A step for some heads: its number among all, its keys, of which some come from other ranks, the lane in which it
    is computed, None for the current stream, and whether it is the last one of its heads."""

    number: int
    heads: Heads
    step: Step
    arrival: Arrival
    lane: int | None
    is_last: bool


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
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        if merges or not self.plan.covers:
            lse.fill_(-torch.inf)
        layout = self._layout(k, v)
        with self._transport(layout) as transport, Lanes(q.device) as lanes:
            for stage in self._stages(q, k, v, transport, lanes, layout.groups, in_parts=True):
                with lanes.of(stage.lane):
                    self._forward(stage, q, merges, out, lse)
                    stage.arrival.keys()  # what this rank sends is gone
        if self.sinks is not None:
            add_sinks(out, lse, self.sinks)
        return out.to(q.dtype), lse

    def _forward(self, stage: Stage, q: torch.Tensor, merges: bool, out: torch.Tensor, lse: torch.Tensor) -> None:
        """The calls of a stage.

        Of rows that wait and rows that don't, neither needs the other: those that don't are computed in a few launches,
        of which some fill the time until the others begin, and the rest what is left of multiprocessors when these have
        no more blocks, before which they have no turn.
        """
        calls = sorted(stage.step.calls, key=stage.step.parts)
        least, most = (stage.step.parts(call) for call in (calls[0], calls[-1])) if calls else (0, 0)
        apart = least < most and not merges
        in_parts = apart and sum(stage.step.parts(call) == least for call in calls) == 1
        stage.arrival.keys(least)
        with Lanes(q.device, first=True) as beside:
            for call in calls:
                parts = stage.step.parts(call)
                waits = apart and parts > least
                for heads in stage.heads.meanwhile if in_parts and not waits else [stage.heads]:
                    kernels, rows = self.kernels.of_heads(*heads.queries), _rows(call, heads)
                    with beside.of(stage.lane or 0) if waits else contextlib.nullcontext():
                        some = slice(heads.keys[0] - stage.heads.keys[0], heads.keys[1] - stage.heads.keys[0])
                        tensors = (q[rows], *(x[:, some] for x in stage.arrival.keys(parts).by_head(call.keys)))
                        if merges:
                            kernels.merge(call, *tensors, out[rows], lse[rows])
                        else:
                            lse[rows] = kernels.forward(call, *tensors, out[rows])

    def _needs_numbers(self, q: torch.Tensor, v: torch.Tensor) -> bool:
        """Whether results are merged by what also reads those of rows that have seen nothing."""
        ragged = any(call.starts for step in self.plan.steps for call in step.calls)
        return ragged or not self.kernels.merges(q, v)

    def backward(self, dout, q, k, v, out, lse, dlse, dtype: torch.dtype) -> tuple[torch.Tensor | None, ...]:
        """Gradients of q, of the keys and values that this rank holds, in a dtype, and of the slopes if they learn."""
        learns = self.kernels.learns
        once = not self.plan.merges and not self.kernels.adds(q, v)
        dq = empty_as(q, q.shape[3], q.dtype)
        if once and not self.plan.covers:
            dq.zero_()
        dk, dv = empty_as(k, k.shape[3], dtype), empty_as(v, v.shape[3], dtype)
        d_slopes = q.new_zeros(q.shape[:2], dtype=torch.float32) if learns else None
        sums: dict[Heads, Sums] = {}
        dqs: dict[Heads, torch.Tensor] = {}

        def end(stage, back):
            """What came back of a stage is added; after the last of its heads their gradients are written."""
            of_heads = [x[:, slice(*stage.heads.keys)] for x in (dk, dv)]
            with lanes.of(stage.lane):
                if stage.is_last:
                    found = sums.pop(stage.heads)
                    back.wait(lambda rows: found.write(rows, *of_heads))
                else:
                    back.wait()

        last = None
        layout = self._layout(k, v, backward=True)
        with self._transport(layout) as transport, Lanes(q.device) as lanes:
            for stage in self._stages(q, k, v, transport, lanes, layout.groups, in_parts=False):
                heads, step = stage.heads, stage.step
                kernels = self.kernels.of_heads(*heads.queries)
                with lanes.of(stage.lane):
                    if heads not in dqs:
                        mine = dq[:, slice(*heads.queries)]
                        dqs[heads] = mine if once else empty_as(mine, mine.shape[3], torch.float32).zero_()
                    keys = stage.arrival.keys(None if transport.takes_processors else 0)
                    shared = transport.room(stage.number, keys, step.keys, goes=bool(step.receives))
                    gradients = shared.rows
                    if heads not in sums:
                        sums[heads] = Sums(k.shape[2], step.own, gradients)
                    for call in sorted(step.calls, key=step.parts):
                        stage.arrival.keys(step.parts(call))
                        rows, of_dq = _rows(call, heads), dqs[heads][:, :, slice(*call.rows)]
                        places = (of_dq, *gradients.by_head(call.keys), d_slopes[rows[:2]] if learns else None)
                        kept = (out[rows], lse[rows], None if dlse is None else dlse[rows])
                        tensors = (dout[rows], q[rows], *keys.by_head(call.keys))
                        kernels.backward(call, *tensors, *kept, *places, once=once)
                    stage.arrival.keys()
                if last is not None:
                    end(*last)
                with lanes.of(stage.lane):
                    back = Return(transport, 2 * stage.number + 1, step, shared, sums[heads])
                    if stage.is_last and not once:
                        dq[:, slice(*heads.queries)].copy_(dqs.pop(heads))
                last = stage, back
            if last is not None:
                end(*last)
        return dq, dk, dv, d_slopes

    def layout(self, batch: int, kv_heads: int, dims: tuple[int, int], itemsize: int, *, backward: bool) -> Layout:
        """Where rows lie that others read, of tensors of such sizes; the same on all ranks."""
        fetches = self.group is not None and len(self.plan.steps) == 1
        window = self.kernels.left, self.kernels.right
        work = Work(batch, kv_heads, self.plan.positions, *window, fetches, self.peers is not None)
        groups = work.in_backward if backward else work.in_forward
        stages = groups * len(self.plan.steps) if backward else 0
        return Layout(groups, stages, self.plan.most_keys, batch, kv_heads // groups, dims, itemsize)

    def _layout(self, k: torch.Tensor, v: torch.Tensor, *, backward: bool = False) -> Layout:
        dims = k.shape[3], v.shape[3]
        return self.layout(k.shape[0], k.shape[1], dims, k.element_size(), backward=backward)

    @contextlib.contextmanager
    def _transport(self, layout: Layout) -> Iterator[Transport]:
        """The transport of a call, to whose end nothing is on its way any more."""
        with contextlib.nullcontext() if self.peers is None else explaining(self.group):
            transport = Messages(self.group) if self.peers is None else Reads(self.peers, layout)
            failed = True
            try:
                yield transport
                failed = False
            finally:
                transport.close(failed)

    def _stages(self, q, k, v, transport: Transport, lanes: Lanes, count: int, *, in_parts: bool) -> Iterator[Stage]:
        """All steps, those of the first of ``count`` groups of heads first, in lanes by group; the keys of each are on
        their way before the one before is computed."""
        groups = Heads((0, q.shape[1]), (0, k.shape[1])).parts(count)
        held = dict.fromkeys(groups)
        order = [(heads, step) for heads in groups for step in self.plan.steps]
        goes = any(step.sends for step in self.plan.steps)

        def begin(number):
            heads, step = order[number]
            group = groups.index(heads)
            some = (x[:, slice(*heads.keys)] for x in (k, v))
            lane = group % 2 if count > 1 else None
            with lanes.of(lane):
                if transport.lays and step.laid is not None:
                    arrival = Arrival.laid(transport, 2 * number, step, group, *some)
                else:
                    if held[heads] is None:
                        held[heads] = transport.hold(group, *some, goes=goes)
                    arrival = Arrival(transport, 2 * number, step, held[heads], in_parts=in_parts)
            return Stage(number, heads, step, arrival, lane, step is self.plan.steps[-1])

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

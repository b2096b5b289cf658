"""Rows of keys, values and their gradients on their way between the ranks of one axis of a mesh.

How they get there is a transport's matter: by messages (``messages.py``), or because each rank reads the memory of the
others (``peers.py``).  All ranks begin the exchanges of the same steps in the same order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from tvm_flash.distributed.plan import Step
from tvm_flash.distributed.rows import Rows, Sums
from tvm_flash.errors import ProcessGroupError


@contextlib.contextmanager
def talking(to: dist.ProcessGroup | tuple[int, ...]) -> Iterator[None]:
    """Say of an error of the transport among the ranks of a group, or some ranks, what it was about.

    Raises
    ------
    ProcessGroupError: whatever went wrong.
    """
    try:
        yield
    except RuntimeError as e:
        if isinstance(e, ProcessGroupError):
            raise
        ranks = list(to) if isinstance(to, tuple) else dist.get_process_group_ranks(to)
        raise ProcessGroupError(
            f"mesh: rank {dist.get_rank()} had no answer from another of the ranks {ranks} (a process that is gone, or "
            f"that was not there within the group's timeout): {str(e).strip().splitlines()[0]}"
        ) from e


class Send(NamedTuple):
    """Rows ``first`` to ``first + rows`` of what this rank shares, for another rank, with a part of a step's."""

    rank: int
    part: int
    first: int
    rows: int


class Receive(NamedTuple):
    """Rows from ``first`` on of what another rank shares, and where they come."""

    rank: int
    part: int
    first: int
    into: Rows


class Shared(Protocol):
    """Rows of this rank that others get, and where those of the others are."""

    rows: Rows


class Waiting(Protocol):
    """An exchange that has begun."""

    def wait(self, parts: int | None = None) -> None:
        """Until what comes with the first parts is there, or all of it and what goes is gone; on a GPU the current
        stream waits, nobody else."""


class Transport(Protocol):
    """A way to get rows from rank to rank, for one call.

    ``takes_processors`` says of a GPU that rows on their way need multiprocessors, and wait for these beside kernels.
    """

    takes_processors: bool

    def hold(self, group: int, k: torch.Tensor, v: torch.Tensor, *, goes: bool) -> Shared:
        """Share keys and values ``(batch, kv_heads, rows, dim)`` of a group of heads; ``goes``: others get some."""

    def room(self, stage: int, like: Rows, rows: int, *, goes: bool) -> Shared:
        """Share so many rows, float32 zeros, in a stage; ``goes``: others get some, and they last until the second
        stage after this one."""

    def begin(self, number: int, shared: Shared, sends: list[Send], receives: list[Receive]) -> Waiting:
        """Begin an exchange; ``number`` tells it from others of the call."""


class Arrival:
    """Keys of a step on their way.

    Messages take multiprocessors, and those that have none when a large kernel begins get none until its last blocks
    have theirs.  So with ``in_parts`` the rank's own rows are copied when the first part of messages is there:
    meanwhile the second one begins.
    """

    def __init__(self, transport: Transport, number: int, step: Step, held: Shared, *, in_parts: bool):
        """``held`` are the rows of this rank; ``in_parts``: some are waited for before the others."""
        self._step, self._held, self._own = step, held.rows, step.own or ()
        self._keys = held.rows if step.own is None else held.rows.like(step.keys)
        self._own_first = not transport.takes_processors
        sends = [Send(rank, m.part * in_parts, m.source, m.rows) for rank, moves in step.sends for m in moves]
        receives = [
            Receive(rank, m.part * in_parts, m.source, self._keys.target(m))
            for rank, moves in step.receives
            for m in moves
        ]
        self._exchange = transport.begin(number, held, sends, receives)

    def keys(self, parts: int | None = None) -> Rows:
        """The keys, of which those of the first parts are there, or all; on a GPU for the current stream."""
        if not self._own_first:
            self._exchange.wait(None if parts is None else min(parts, 1))
        for move in self._own:
            self._keys.target(move).copy_(self._held.source(move))
        self._own = ()
        self._exchange.wait(parts)
        return self._keys


class Return:
    """Gradients of a step's keys on their way back to the ranks that hold these."""

    def __init__(self, transport: Transport, number: int, step: Step, gradients: Shared, sums: Sums):
        """``gradients`` are those of the step's keys; to ``sums``, of this rank's, is added what comes."""
        self._sums = sums
        self._rooms = [(rank, move, gradients.rows.like(move.rows)) for rank, moves in step.sends for move in moves]
        sends = [Send(rank, 0, m.target, m.rows) for rank, moves in step.receives for m in moves]
        receives = [Receive(rank, 0, m.target, room) for rank, m, room in self._rooms]
        self._exchange = transport.begin(number, gradients, sends, receives)

    def wait(self) -> None:
        """Until what comes is added, in the order of the ranks."""
        self._exchange.wait()
        for _, move, room in self._rooms:
            self._sums.add(move.source, room)

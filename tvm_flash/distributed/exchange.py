"""Rows of keys, values and their gradients on their way between the ranks of one axis of a mesh.

How they get there is a transport's matter: by messages (``messages.py``), or because each rank reads the memory of the
others (``peers.py``).  All ranks begin the exchanges of the same steps in the same order.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from tvm_flash.distributed.placement import Interval, gaps
from tvm_flash.distributed.plan import Move, Step, joined_sorted
from tvm_flash.distributed.rows import Rows, Sums
from tvm_flash.errors import ProcessGroupError


def first_line(error: Exception) -> str:
    """Of what an error says, which may be nothing."""
    return str(error).strip().partition("\n")[0]


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
            f"that was not there within the group's timeout): {first_line(e)}"
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
    """Rows of this rank that others get, and what a transport must know of them."""

    rows: Rows


class Exchange(Protocol):
    """Rows that go and come in a step."""

    def offer(self, part: int) -> None:
        """Let others have what goes with a part, which is there now, and begin what comes with it; in order."""

    def wait(self, parts: int | None = None) -> None:
        """Until what comes with the first parts is there, or all of it and what goes is gone; on a GPU the current
        stream waits, nobody else."""


class Transport(Protocol):
    """A way to get rows from rank to rank, for one call.

    Attributes
    ----------
    takes_processors: rows on their way need a GPU's multiprocessors, and wait for these beside kernels.
    lays: rows are shared best among the keys of a step, so that the rank's own aren't copied twice.
    """

    takes_processors: bool
    lays: bool

    def hold(self, group: int, k: torch.Tensor, v: torch.Tensor, *, goes: bool) -> Shared:
        """Share keys and values ``(batch, kv_heads, rows, dim)`` of a group of heads; ``goes``: others get some."""

    def keys(self, group: int, like: Rows, rows: int) -> Shared:
        """Share so many rows of keys of a group, which the caller fills."""

    def room(self, stage: int, like: Rows, rows: int, *, goes: bool) -> Shared:
        """Share so many rows, float32 zeros, in a stage; ``goes``: others get some, and they last until the second
        stage after this one."""

    def begin(self, number: int, shared: Shared, sends: list[Send], receives: list[Receive]) -> Exchange:
        """An exchange; ``number`` tells it from others of the call."""

    def close(self, failed: bool) -> None:
        """Nothing of the call's is on its way any more, unless it failed."""


#: Parts of a step at most.
PARTS = 2


class Arrival:
    """Keys of a step on their way."""

    def __init__(self, transport: Transport, number: int, step: Step, held: Shared, *, in_parts: bool):
        """``held`` are the rows of this rank; ``in_parts``: some are waited for before the others."""
        self._held, self._own = held.rows, step.own or ()
        self._keys = held.rows if step.own is None else held.rows.like(step.keys)
        self._own_first = not transport.takes_processors
        sends = [Send(rank, m.part * in_parts, m.source, m.rows) for rank, m in _each(step.sends)]
        comes = [(rank, m.part * in_parts, m) for rank, m in _each(step.receives)]
        receives = [Receive(rank, part, m.source, self._keys.target(m)) for rank, part, m in comes]
        self._exchange = transport.begin(number, held, sends, receives)
        for part in range(PARTS):
            self._exchange.offer(part)

    @classmethod
    def laid(cls, transport: Transport, number: int, step: Step, group: int, k: torch.Tensor, v: torch.Tensor):
        """The same where this rank's rows ``(batch, kv_heads, rows, dim)`` are shared among the keys, part by part."""
        lying = Rows.of(k, v, sent=False)
        shared = transport.keys(group, lying, step.keys)
        found = cls.__new__(cls)
        found._held, found._own, found._keys, found._own_first = lying, (), shared.rows, True
        sends = [Send(rank, m.part, m.laid, m.rows) for rank, m in _each(step.sends)]
        receives = [Receive(rank, m.part, m.laid, shared.rows.target(m)) for rank, m in _each(step.receives)]
        found._exchange = transport.begin(number, shared, sends, receives)
        for part in range(PARTS):
            for move in step.laid:
                if move.part == part:
                    shared.rows.target(move).copy_(lying.source(move))
            found._exchange.offer(part)
        return found

    def keys(self, parts: int | None = None) -> Rows:
        """The keys, of which those of the first parts are there, or all; on a GPU for the current stream.

        Messages take multiprocessors, and those that have none when a large kernel begins get none until its last
        blocks have theirs.  So the rank's own rows are copied when the first part of messages is there: meanwhile the
        second one begins.
        """
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
        """``gradients`` are those of the step's keys; to ``sums``, of this rank's, is added what comes.

        Where copies need no multiprocessors they come in parts, of which one is added while the next is on its way.
        """
        in_parts = not transport.takes_processors
        self._sums = sums
        self._rooms: list[list[tuple[Move, Rows]]] = [[] for _ in range(PARTS)]
        sends = [Send(rank, m.part * in_parts, m.target, m.rows) for rank, m in _each(step.receives)]
        receives = []
        for rank, move in _each(step.sends):
            room, part = gradients.rows.like(move.rows), move.part * in_parts
            self._rooms[part].append((move, room))
            receives.append(Receive(rank, part, move.target, room))
        self._exchange = transport.begin(number, gradients, sends, receives)
        for part in range(PARTS):
            self._exchange.offer(part)

    def wait(self, settle: Callable[[Interval], None] = lambda rows: None) -> None:
        """Until what comes is added, in the order of the ranks; ``settle`` gets rows as soon as all of theirs is."""
        parts = [[(move.source, move.source + move.rows) for move, _ in rooms] for rooms in self._rooms]
        settled = gaps(itertools.chain(*parts), self._sums.rows)
        for part, rooms in enumerate(self._rooms):
            for rows in settled:
                settle(rows)
            self._exchange.wait(part + 1)
            for move, room in rooms:
                self._sums.add(move.source, room)
            settled = joined_sorted(parts[part])
        for rows in settled:
            settle(rows)
        self._exchange.wait()


def _each(moves: Iterable[tuple[int, tuple[Move, ...]]]) -> Iterator[tuple[int, Move]]:
    """Moves with their rank, one by one."""
    return ((rank, move) for rank, of in moves for move in of)

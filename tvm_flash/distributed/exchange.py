"""Rows of keys, values and their gradients on their way between the ranks of one axis of a mesh."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch
import torch.distributed as dist

from tvm_flash.distributed.plan import Move, Step
from tvm_flash.errors import ProcessGroupError

#: Messages between two ranks in one step that tags tell apart.
_MOST_MESSAGES = 1 << 12


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


class Messages:
    """Messages of one step between this rank and the others of a group, begun at once.

    All ranks begin those of the same steps in the same order.
    """

    def __init__(self, group: dist.ProcessGroup, number: int, sends, receives):
        """``sends`` and ``receives`` are pairs of a rank of the group and contiguous memory; ``number`` tells steps
        apart."""
        self._group = group
        operations = []
        for act, messages in ((dist.isend, sends), (dist.irecv, receives)):
            counts: dict[int, Iterator[int]] = {}
            for rank, memory in messages:
                tag = number * _MOST_MESSAGES + next(counts.setdefault(rank, itertools.count()))
                operations.append(dist.P2POp(act, memory, dist.get_global_rank(group, rank), group, tag))
        with talking(group):
            self._works = dist.batch_isend_irecv(operations) if operations else []

    def wait(self) -> None:
        """Until the messages are there; on a GPU the current stream waits, and nobody else."""
        with talking(self._group):
            for work in self._works:
                work.wait()
        self._works = []


def fetch(group: dist.ProcessGroup, number: int, step: Step, held: torch.Tensor) -> tuple[torch.Tensor, Messages]:
    """The keys of a step, complete once the messages are there; ``held`` are those of this rank, rows first."""
    if step.own is None:
        keys = held
    else:
        keys = held.new_empty((step.keys, *held.shape[1:]))
        for move in step.own:
            _target(keys, move).copy_(_source(held, move))
    sends = [(rank, _source(held, move)) for rank, moves in step.sends for move in moves]
    receives = [(rank, _target(keys, move)) for rank, moves in step.receives for move in moves]
    return keys, Messages(group, number, sends, receives)


class Return:
    """Gradients of a step's keys on their way back to the ranks that hold these."""

    def __init__(self, group: dist.ProcessGroup, number: int, step: Step, gradients: torch.Tensor, held: torch.Tensor):
        """``gradients`` are those of the step's keys; ``held``, those of this rank's, get what comes, added."""
        self._held, self._step = held, step
        for move in step.own or ():
            _source(held, move).add_(_target(gradients, move))
        self._rooms = [
            (move, held.new_empty((move.rows, *held.shape[1:]))) for _, moves in step.sends for move in moves
        ]
        ranks = [rank for rank, moves in step.sends for _ in moves]
        receives = [(rank, room) for rank, (_, room) in zip(ranks, self._rooms, strict=True)]
        sends = [(rank, _target(gradients, move)) for rank, moves in step.receives for move in moves]
        self._messages = Messages(group, number, sends, receives)

    def wait(self) -> None:
        """Until what comes is added, in the order of the ranks."""
        self._messages.wait()
        for move, room in self._rooms:
            _source(self._held, move).add_(room)


def _source(held: torch.Tensor, move: Move) -> torch.Tensor:
    return held[move.source : move.source + move.rows]


def _target(keys: torch.Tensor, move: Move) -> torch.Tensor:
    return keys[move.target : move.target + move.rows]

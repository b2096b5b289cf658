"""Rows of keys, values and their gradients on their way between the ranks of one axis of a mesh."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch.distributed as dist

from tvm_flash.distributed.plan import Step
from tvm_flash.distributed.rows import Rows, Sums
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
    """Messages of one step between this rank and the others of a group, begun at once, part after part.

    All ranks begin those of the same steps in the same order.
    """

    def __init__(self, group: dist.ProcessGroup, number: int, sends, receives):
        """``sends`` and ``receives`` are of a rank of the group, the part, and rows; ``number`` tells steps apart."""
        self._group = group
        tags: dict[tuple, Iterator[int]] = {}
        operations: dict[int, list[dist.P2POp]] = {}
        for act, messages in ((dist.isend, sends), (dist.irecv, receives)):
            for rank, part, rows in messages:
                for memory in rows:
                    tag = number * _MOST_MESSAGES + next(tags.setdefault((act, rank), itertools.count()))
                    to = dist.get_global_rank(group, rank)
                    operations.setdefault(part, []).append(dist.P2POp(act, memory, to, group, tag))
        self._works = {}
        with talking(group):
            for part in sorted(operations):
                self._works[part] = dist.batch_isend_irecv(operations[part])

    def wait(self, parts: int | None = None) -> None:
        """Until the messages of the first parts are there, or all; on a GPU the current stream waits, nobody else."""
        with talking(self._group):
            for part in [x for x in self._works if parts is None or x < parts]:
                for work in self._works.pop(part):
                    work.wait()


class Arrival:
    """Keys of a step on their way.

    Messages take multiprocessors, and those that have none when a large kernel begins get none until its last blocks
    have theirs.  So with ``in_parts`` the rank's own rows are copied when the first part is there: meanwhile the second
    one begins.
    """

    def __init__(self, group: dist.ProcessGroup, number: int, step: Step, held: Rows, *, in_parts: bool):
        """``held`` are the rows of this rank; ``in_parts``: some are waited for before the others."""

        def moves(of, place):
            return [(rank, move.part * in_parts, place(move)) for rank, moves in of for move in moves]

        self._step, self._held, self._own = step, held, step.own or ()
        self._keys = held if step.own is None else held.like(step.keys)
        self._messages = Messages(
            group, number, moves(step.sends, held.source), moves(step.receives, self._keys.target)
        )

    def keys(self, parts: int | None = None) -> Rows:
        """The keys, of which those of the first parts are there, or all; on a GPU for the current stream."""
        self._messages.wait(None if parts is None else min(parts, 1))
        for move in self._own:
            self._keys.target(move).copy_(self._held.source(move))
        self._own = ()
        self._messages.wait(parts)
        return self._keys


class Return:
    """Gradients of a step's keys on their way back to the ranks that hold these."""

    def __init__(self, group: dist.ProcessGroup, number: int, step: Step, gradients: Rows, sums: Sums):
        """``gradients`` are those of the step's keys; to ``sums``, of this rank's, is added what comes."""
        self._sums = sums
        self._rooms = [(rank, move, gradients.like(move.rows)) for rank, moves in step.sends for move in moves]
        sends = [(rank, 0, gradients.target(move)) for rank, moves in step.receives for move in moves]
        self._messages = Messages(group, number, sends, [(rank, 0, room) for rank, _, room in self._rooms])

    def wait(self) -> None:
        """Until what comes is added, in the order of the ranks."""
        self._messages.wait()
        for _, move, room in self._rooms:
            self._sums.add(move.source, room)

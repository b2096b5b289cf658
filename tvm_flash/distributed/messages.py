"""Rows that go from rank to rank as messages of ``torch.distributed``, over whatever its backend has: any processors,
any hosts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tvm_flash.distributed.exchange import Receive, Send, talking
from tvm_flash.distributed.rows import Rows

#: Messages between two ranks in one exchange that tags tell apart.
_MOST_MESSAGES = 1 << 12


@dataclass(frozen=True)
class Sent:
    """Rows that are sent from where they lie."""

    rows: Rows


class Messages:
    """The transport among the ranks of a group; of none if there is nobody to send to."""

    takes_processors, lays = True, False

    def __init__(self, group: dist.ProcessGroup | None):
        self._group = group

    def hold(self, group: int, k: torch.Tensor, v: torch.Tensor, *, goes: bool) -> Sent:
        """As they lie, if rows follow each other or none is sent; else a copy."""
        return Sent(Rows.of(k, v, sent=goes))

    def room(self, stage: int, like: Rows, rows: int, *, goes: bool) -> Sent:
        """Memory of their own."""
        return Sent(like.like(rows, torch.float32, zeros=True))

    def keys(self, group: int, like: Rows, rows: int) -> Sent:
        """Memory of their own."""
        return Sent(like.like(rows))

    def begin(self, number: int, shared: Sent, sends: list[Send], receives: list[Receive]) -> Batches:
        """All messages, of which each part is a batch."""
        moves = [(dist.isend, x.rank, x.part, shared.rows.between(x.first, x.first + x.rows)) for x in sends]
        moves += [(dist.irecv, x.rank, x.part, x.into) for x in receives]
        return Batches(self._group, number, moves)

    def close(self, failed: bool) -> None:
        """Nothing: torch.distributed keeps the memory of messages until they are gone."""


class Batches:
    """Messages of an exchange, a batch for each part."""

    def __init__(self, group: dist.ProcessGroup | None, number: int, moves):
        """``moves`` are of an operation, a rank of the group, the part, and rows."""
        self._group = group
        tags: dict[tuple, Iterator[int]] = {}
        operations: dict[int, list[dist.P2POp]] = {}
        for act, rank, part, rows in moves:
            for memory in rows:
                tag = number * _MOST_MESSAGES + next(tags.setdefault((act, rank), itertools.count()))
                to = dist.get_global_rank(group, rank)
                operations.setdefault(part, []).append(dist.P2POp(act, memory, to, group, tag))
        self._operations, self._works = operations, {}

    def offer(self, part: int) -> None:
        """Begin the messages of a part."""
        if part in self._operations:
            with talking(self._group):
                self._works[part] = dist.batch_isend_irecv(self._operations.pop(part))

    def wait(self, parts: int | None = None) -> None:
        """Until the messages of the first parts are there, or all; on a GPU the current stream waits, nobody else."""
        with talking(self._group):
            for part in [x for x in self._works if parts is None or x < parts]:
                for work in self._works.pop(part):
                    work.wait()

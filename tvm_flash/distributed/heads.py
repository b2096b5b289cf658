"""From all heads of some positions to some heads of all positions, and back: an all-to-all among the inner ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from tvm_flash.distributed.exchange import talking
from tvm_flash.distributed.placement import Interval, size


@dataclass(frozen=True)
class HeadExchange:
    """The exchange of one inner group.

    Attributes
    ----------
    group: the inner ranks.
    rank: the own one among them.
    rows: which rows of the outer rank's each holds, in the order in which it holds them; together they are all of them.
    """

    group: dist.ProcessGroup
    rank: int
    rows: tuple[tuple[Interval, ...], ...]

    def to_heads(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """All rows ``(batch, heads / ranks, rows, dim)`` of tensors ``(batch, heads, own rows, dim)``."""
        ranks = len(self.rows)
        parts = [x.unflatten(1, (ranks, -1)) for x in tensors]
        sends = [[_bytes(x[:, i]) for x in parts] for i in range(ranks)]
        shapes = [[(x.shape[0], x.shape[2], self._count(i), x.shape[4]) for x in parts] for i in range(ranks)]
        received = self._exchanged(sends, shapes, [x.dtype for x in tensors])
        return [self._in_order(parts) for parts in received]

    def to_rows(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Own rows ``(batch, heads, own rows, dim)`` of tensors ``(batch, heads / ranks, rows, dim)``."""
        ranks = len(self.rows)
        sends = [[_bytes(_taken(x, held)) for x in tensors] for held in self.rows]
        shapes = [(x.shape[0], x.shape[1], self._count(self.rank), x.shape[3]) for x in tensors]
        received = self._exchanged(sends, [shapes] * ranks, [x.dtype for x in tensors])
        return [torch.cat(parts, 1) for parts in received]

    def _count(self, rank: int) -> int:
        return size(self.rows[rank])

    def _in_order(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The rows of all ranks, each where the outer rank has it."""
        pieces = {}
        for part, held in zip(parts, self.rows, strict=True):
            pieces |= zip(held, part.split([b - a for a, b in held], 2) if held else (), strict=True)
        return torch.cat([pieces[rows] for rows in sorted(pieces)] or list(parts), 2)

    def _exchanged(self, sends, shapes, dtypes) -> list[list[torch.Tensor]]:
        """What the ranks sent: of each tensor the part of each."""
        sizes = [[math.prod(shape) * dtype.itemsize for shape, dtype in zip(of, dtypes, strict=True)] for of in shapes]
        sent = torch.cat([x for of in sends for x in of])
        received = sent.new_empty(sum(map(sum, sizes)))
        with talking(self.group):
            dist.all_to_all_single(
                received, sent, [sum(x) for x in sizes], [sum(map(len, of)) for of in sends], group=self.group
            )
        parts = [of.split(size) for of, size in zip(received.split([sum(x) for x in sizes]), sizes, strict=True)]
        return [
            [part[i].view(dtype).view(shape[i]) for part, shape in zip(parts, shapes, strict=True)]
            for i, dtype in enumerate(dtypes)
        ]


def _taken(x: torch.Tensor, held: tuple[Interval, ...]) -> torch.Tensor:
    """Some rows of a tensor, one after the other."""
    return torch.cat([x[:, :, a:b] for a, b in held] or [x[:, :, :0]], 2)


def _bytes(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(-1).view(torch.uint8)

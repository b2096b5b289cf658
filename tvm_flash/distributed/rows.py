"""Rows of keys and values, and of their gradients, as they are sent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from tvm_flash.distributed.placement import Interval, common, gaps
from tvm_flash.distributed.plan import Move

#: What is copied at a time: 16 bytes, where elements of 2 bytes would take a GPU about three times as long.
_WIDE = torch.complex128


class Rows(NamedTuple):
    """Keys and values, or their gradients, each ``(rows, batch, kv_heads, dim)``; contiguous if they are sent, so that
    any rows of them are a message each, into their place."""

    k: torch.Tensor
    v: torch.Tensor

    @staticmethod
    def of(k: torch.Tensor, v: torch.Tensor, *, sent: bool) -> Rows:
        """Of tensors ``(batch, kv_heads, rows, dim)``: views if they lie like that, or aren't sent."""
        found = []
        for x in (k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)):
            if sent and not x.is_contiguous():
                lying, x = x, torch.empty_like(x, memory_format=torch.contiguous_format)
                copy(x, lying)
            found.append(x)
        return Rows(*found)

    def like(self, rows: int, dtype: torch.dtype | None = None, *, zeros: bool = False) -> Rows:
        """So many rows of the same sizes, of the same dtype unless one is given."""
        make = torch.Tensor.new_zeros if zeros else torch.Tensor.new_empty
        return Rows(*(make(x, (rows, *x.shape[1:]), dtype=dtype or x.dtype) for x in self))

    def between(self, first: int, end: int) -> Rows:
        """Some rows."""
        return Rows(*(x[first:end] for x in self))

    def source(self, move: Move) -> Rows:
        """The rows of a move among those that a rank holds."""
        return self.between(move.source, move.source + move.rows)

    def target(self, move: Move) -> Rows:
        """The rows of a move among those of a step."""
        return self.between(move.target, move.target + move.rows)

    def copy_(self, other: Rows) -> None:
        """Take over the numbers of others."""
        for x, y in zip(self, other, strict=True):
            copy(x, y)

    def add_(self, other: Rows) -> None:
        """Add others."""
        for x, y in zip(self, other, strict=True):
            x.add_(y)

    def by_head(self, rows: Interval) -> tuple[torch.Tensor, torch.Tensor]:
        """Some rows, as views ``(batch, kv_heads, rows, dim)``."""
        k, v = (x[slice(*rows)].permute(1, 2, 0, 3) for x in self)
        return k, v


class Sums:
    """Gradients of the rows that a rank holds, in pieces that lie where they were computed.

    Attributes
    ----------
    rows: how many there are.
    """

    def __init__(self, rows: int, own: tuple[Move, ...] | None, gradients: Rows):
        """``gradients`` are those of a step's keys, ``own`` where the rank's are among them: None if they are it."""
        moves = (Move(0, 0, rows),) if own is None else own
        pieces = [(move.source, gradients.target(move)) for move in moves]
        unseen = gaps(((move.source, move.source + move.rows) for move in moves), rows)
        pieces += [(first, gradients.like(end - first, zeros=True)) for first, end in unseen]
        self.rows, self._pieces = rows, pieces

    def add(self, first: int, other: Rows) -> None:
        """Add gradients of rows from ``first`` on."""
        for piece, place in self._places((first, first + len(other.k))):
            piece.add_(other.between(place[0] - first, place[1] - first))

    def write(self, rows: Interval, dk: torch.Tensor, dv: torch.Tensor) -> None:
        """Put some of the rows, rounded, into tensors ``(batch, kv_heads, rows, dim)`` of all."""
        for piece, place in self._places(rows):
            for to, x in zip((dk, dv), piece, strict=True):
                copy(to[:, :, slice(*place)], x.to(to.dtype).permute(1, 2, 0, 3))

    def _places(self, rows: Interval) -> Iterator[tuple[Rows, Interval]]:
        """The sums of some rows, piece by piece, and of which rows each is."""
        for first, piece in self._pieces:
            begin, end = common(rows, (first, first + len(piece.k)))
            if begin < end:
                yield piece.between(begin - first, end - first), (begin, end)


def copy(to: torch.Tensor, x: torch.Tensor) -> None:
    """Copy between tensors of one dtype that may lie in different orders, in elements of 16 bytes if all are whole."""
    wide = _WIDE.itemsize // x.element_size()

    def is_whole(x: torch.Tensor) -> bool:
        steps = (x.storage_offset(), x.shape[-1], *x.stride()[:-1])
        return x.stride(-1) == 1 and x.data_ptr() % _WIDE.itemsize == 0 and all(n % wide == 0 for n in steps)

    if x.numel() and is_whole(to) and is_whole(x):
        to, x = to.view(_WIDE), x.view(_WIDE)
    to.copy_(x)

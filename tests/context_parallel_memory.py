"""Memory that processes on a CPU read of each other, in place of what GPUs have: files that each of them maps.

Copies and signals are done at once, so that what is tested is which rows are read from where, and that no process waits
for another for ever.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import torch

from tests.shared import HANGS
from tvm_flash.distributed.agreement import Axes

#: Signals of a direction at most.
_CHANNELS = 16


class Done:
    """A mark of what is done."""

    def wait(self) -> None:
        pass


class FileMemory:
    """What ``tvm_flash.distributed.peers.Memory`` describes, among the ranks of an axis of a mesh."""

    device, is_fixed = torch.device("cpu"), False

    def __init__(self, folder: Path, axes: Axes, most: int):
        self._folder, self._count = folder / "-".join(map(str, (axes.place[1], *axes.ranks))), axes.sizes[0]
        self._folder.mkdir(parents=True, exist_ok=True)
        self.rank, self.most, self.size, self.copies, self.is_full = axes.place[0], most, 0, 0, False
        self.buffers: list[torch.Tensor] = []
        self._signals = self._mapped("signals", self._count**2 * _CHANNELS)

    def _mapped(self, name: str, size: int) -> torch.Tensor:
        return torch.from_file(str(self._folder / name), shared=True, size=size, dtype=torch.uint8)

    def allocate(self, size: int) -> bool:
        self._wanted = size
        return not self.is_full

    def connect(self) -> None:
        self.size = self._wanted
        self.buffers = [self._mapped(f"{self.size} of {r}", self.size) for r in range(self._count)]

    def refuse(self, size: int) -> None:
        self.most = size - 1

    def acquire(self) -> None:
        pass

    def release(self, failed: bool) -> None:
        pass

    def put(self, rank: int, channel: int) -> None:
        self._change(self.rank, rank, channel, 0, 1)

    def wait(self, rank: int, channel: int) -> None:
        self._change(rank, self.rank, channel, 1, 0)

    def _change(self, source: int, target: int, channel: int, old: int, new: int) -> None:
        at = (source * self._count + target) * _CHANNELS + channel
        until = time.monotonic() + HANGS
        while self._signals[at] != old:
            assert time.monotonic() < until, f"no signal on channel {channel} between {source} and {target}"
            time.sleep(1e-4)
        self._signals[at] = new

    @contextlib.contextmanager
    def aside(self):
        self.copies += 1
        yield

    def mark(self) -> Done:
        return Done()

"""Streams of a GPU that take turns."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch


class Lanes:
    """Streams that take turns: where launches on one leave the GPU without work at their end, those on another run.

    What is on different lanes must not depend on each other.  On a processor, or where one lane is asked for, all is
    computed where the caller stands.
    """

    def __init__(self, device: torch.device, count: int):
        self._device = device
        several = count > 1 and device.type == "cuda"
        self._streams = [torch.cuda.Stream(device) for _ in range(count if several else 0)]
        self._turns = itertools.cycle(self._streams)
        self._kept: list[Any] = []

    @contextlib.contextmanager
    def next(self, *used: Any) -> Iterator[None]:
        """Compute on the next lane, after all that the caller's stream has begun.

        ``used`` is what the lane needs of the memory of other streams: it isn't given back before :meth:`join`.
        """
        if not self._streams:
            yield
            return
        stream = next(self._turns)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        self._kept.append(used)
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """Have the caller's stream wait for all lanes."""
        for stream in self._streams:
            torch.cuda.current_stream(self._device).wait_stream(stream)
        self._kept.clear()

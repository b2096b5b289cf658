"""Streams of a GPU for launches that don't depend on each other: where one has no blocks left for some multiprocessors,
these take those of the next.  On a processor there is nothing to it."""

from __future__ import annotations

import contextlib
import functools

import torch


class Lanes:
    """Lanes that begin where the current stream is, and that it joins again.

    Memory that is made in a lane is for that lane; what the current stream has is free for all between the two.
    """

    def __init__(self, device: torch.device, *, first: bool = False):
        """``first``: blocks of the lanes go before those of other streams."""
        self._device, self._priority = device, -1 if first else 0
        self._used: dict[int, torch.cuda.Stream] = {}
        self._begin = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def __enter__(self) -> Lanes:
        return self

    def of(self, number: int | None) -> contextlib.AbstractContextManager:
        """A block in a lane; None is the current stream."""
        if self._begin is None or number is None:
            return contextlib.nullcontext()
        if number not in self._used:
            self._used[number] = _stream(self._device, number, self._priority)
            self._used[number].wait_event(self._begin)
        return torch.cuda.stream(self._used[number])

    def __exit__(self, *_: object) -> None:
        """Let the current stream wait for all lanes."""
        for stream in self._used.values():
            torch.cuda.current_stream(self._device).wait_stream(stream)


@functools.cache
def _stream(device: torch.device, number: int, priority: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority=priority)

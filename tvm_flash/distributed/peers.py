"""Rows that the ranks of a host read in each other's memory, by the copy engines of their GPUs.

NCCL's messages run on multiprocessors, which they take from the kernel that they were to hide behind: on two H200 64
MiB each way take 0.26 ms alone, and make attention of 6.1 ms beside them 0.3 to 0.5 ms longer.  A copy engine takes
0.18 ms, and attention beside it the time that it takes alone.  The memory is PyTorch's symmetric memory, and so are the
signals that say when it may be read and written again.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from tvm_flash.distributed.exchange import Receive, Send, talking
from tvm_flash.distributed.rows import Rows, copy
from tvm_flash.errors import InvalidArgumentError

#: Set to 1, rows are read; else they go as messages.
VARIABLE = "TVM_FLASH_PEER_MEMORY"

#: Bytes that a rank keeps for others to read at most.  A call that needs more sends messages: it computes for so long
#: that these hardly count (0.95 to 0.98 of 256k positions' time is computing, by messages).
MOST_BYTES = 4 << 30

#: What memory is taken in, so that lengths that grow slowly don't each take it anew.
_STEP = 32 << 20

_ALIGNMENT = 256

#: Exchanges of a call that are begun and not over: the keys of two stages and the gradients of two.
_IN_FLIGHT = 4


def is_asked_for() -> bool:
    """Whether this process is told to read what others hold.

    Raises
    ------
    InvalidArgumentError: the variable is neither 0 nor 1.
    """
    wanted = os.environ.get(VARIABLE) or "0"
    if wanted not in ("0", "1"):
        raise InvalidArgumentError(f"{VARIABLE}: is {wanted!r}, expected 0 or 1, or unset")
    return wanted == "1"


def about(device: torch.device) -> dict[str, Any]:
    """What others must know of this process to tell whether they can read its memory."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    host = f"{socket.gethostname()} {boot.read_text().strip() if boot.exists() else ''}"
    return {"host": host, "gpu": _gpus()[device.index]}


def obstacle(device: torch.device, others: Mapping[int, dict[str, Any]]) -> str | None:
    """Why this process doesn't reach the memory of some ranks, itself among them; None if it does."""
    gpus = _gpus()
    own = about(device)
    for rank, other in others.items():
        if other["host"] != own["host"]:
            return f"rank {rank} is on another host"
        if other["gpu"] not in gpus:
            return f"this process doesn't see the GPU of rank {rank}"
        number = gpus.index(other["gpu"])
        if other["gpu"] != own["gpu"] and not torch.cuda.can_device_access_peer(device.index, number):
            return f"{device} has no access to the memory of cuda:{number}, the GPU of rank {rank}"
    return None


def _gpus() -> list[str]:
    """The GPUs that this process sees, by what is theirs alone; by their numbers where PyTorch doesn't tell."""
    return [str(getattr(torch.cuda.get_device_properties(i), "uuid", i)) for i in range(torch.cuda.device_count())]


class Memory(Protocol):
    """Memory that the ranks of a group read of each other, and signals between two of them.

    Attributes
    ----------
    rank: the own one.
    buffers: of each rank, uint8, as many bytes on all.
    most: how many they may be.
    """

    rank: int
    buffers: list[torch.Tensor]
    most: int

    @property
    def size(self) -> int:
        """Bytes of each rank."""

    @property
    def is_fixed(self) -> bool:
        """Whether no memory can be taken now, as while a graph is captured."""

    def allocate(self, size: int) -> bool:
        """Take memory for so many bytes; whether there is so much.  All ranks then either connect or refuse it."""

    def connect(self) -> None:
        """Let all ranks read what each has allocated, in place of what there was."""

    def refuse(self, size: int) -> None:
        """Give back what was allocated, since some rank has no room for so many bytes: none is asked for again."""

    def acquire(self) -> None:
        """Before the own memory is written: after all that earlier calls do with it."""

    def release(self) -> None:
        """After the last of what a call does with it."""

    def put(self, rank: int, channel: int) -> None:
        """Signal to another rank; after what the current stream has done."""

    def wait(self, rank: int, channel: int) -> None:
        """Until another rank's signal is there, which is then gone; the current stream waits."""

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """A block whose copies run beside what the current stream does next."""

    def mark(self) -> Any:
        """What has a ``wait()`` until all that was begun so far in the block is done."""


class PeerMemory:
    """The same between GPUs of a host."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device):
        """All ranks of the group make it together.

        Raises
        ------
        RuntimeError, ImportError, AttributeError: this PyTorch, or this machine, can't.
        """
        from torch.distributed._symmetric_memory import get_backend

        if get_backend(device) != "CUDA":
            raise RuntimeError(f"symmetric memory is {get_backend(device)}'s here, expected CUDA's own, with signals")
        self._group, self._device = group, device
        self._timeout = int(group._get_backend(device).options._timeout.total_seconds() * 1000)
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._free = torch.cuda.Event()
        self._is_captured, self._kept = False, []
        self._signals, _ = self._mapped(self._allocated(1))
        self.rank = self._signals.rank
        self.buffers: list[torch.Tensor] = []
        self._handle, self._waiting = None, None
        self.most = MOST_BYTES

    @property
    def size(self) -> int:
        return self.buffers[0].numel() if self.buffers else 0

    @property
    def is_fixed(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def allocate(self, size: int) -> bool:
        for prepare in (lambda: None, torch.cuda.empty_cache):  # PyTorch's own allocator may keep what is free
            prepare()
            with contextlib.suppress(RuntimeError):  # out of memory
                self._waiting = self._allocated(-(-size // _STEP) * _STEP)
                return True
        return False

    def refuse(self, size: int) -> None:
        self._waiting, self.most = None, size - 1

    def connect(self) -> None:
        torch.cuda.synchronize(self._device)  # nobody reads the old
        if self._is_captured:  # a graph reads it whenever it runs
            self._kept.append((self._handle, self.buffers))
        mine, self._waiting = self._waiting, None
        with talking(self._group):
            self._handle, self.buffers = self._mapped(mine)

    def _allocated(self, size: int) -> torch.Tensor:
        from torch.distributed._symmetric_memory import _SymmetricMemory

        return _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, self._device)

    def _mapped(self, mine: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
        from torch.distributed._symmetric_memory import rendezvous

        handle = rendezvous(mine, self._group.group_name)
        of = range(handle.world_size)
        return handle, [mine if r == handle.rank else handle.get_buffer(r, mine.shape, mine.dtype) for r in of]

    def acquire(self) -> None:
        if self.is_fixed:
            self._is_captured = True
        else:
            self._free.wait()

    def release(self) -> None:
        if not self.is_fixed:
            self._free.record()

    def put(self, rank: int, channel: int) -> None:
        self._signals.put_signal(rank, channel, self._timeout)

    def wait(self, rank: int, channel: int) -> None:
        self._signals.wait_signal(rank, channel, self._timeout)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event:
        return self._stream.record_event()


@dataclass(frozen=True)
class Layout:
    """Where in a rank's memory a call has what, the same on all ranks: keys and values of each group of heads, then
    gradients of two stages.

    Attributes
    ----------
    groups: how many groups of heads there are.
    held: the most rows that a rank holds.
    stages: how many stages there are with gradients.
    keys: the most rows of keys that a rank has in a step.
    batch, kv_heads: of a group.
    dims: head_dim and head_dim_v.
    itemsize: bytes of an element of keys.
    """

    groups: int
    held: int
    stages: int
    keys: int
    batch: int
    kv_heads: int
    dims: tuple[int, int]
    itemsize: int

    @property
    def size(self) -> int:
        """Bytes in all."""
        return self.groups * self._held + min(2, self.stages) * self._room

    def of_held(self, group: int) -> int:
        """Where keys and values of a group begin."""
        return group * self._held

    def of_room(self, stage: int) -> int:
        """Where a stage's gradients begin."""
        return self.groups * self._held + stage % 2 * self._room

    @property
    def _held(self) -> int:
        return sum(self._bytes(self.held, dim, self.itemsize) for dim in self.dims)

    @property
    def _room(self) -> int:
        return sum(self._bytes(self.keys, dim, torch.float32.itemsize) for dim in self.dims)

    def _bytes(self, rows: int, dim: int, itemsize: int) -> int:
        """Bytes of rows, up to where the next may begin."""
        return -(-rows * self.batch * self.kv_heads * dim * itemsize // _ALIGNMENT) * _ALIGNMENT

    def rows(self, buffer: torch.Tensor, begin: int, most: int, dtype: torch.dtype) -> Rows:
        """``most`` rows from a byte of a rank's memory on."""
        found = []
        for dim in self.dims:
            end = begin + self._bytes(most, dim, dtype.itemsize)
            shape = (most, self.batch, self.kv_heads, dim)
            count = most * self.batch * self.kv_heads * dim
            found.append(buffer[begin:end].view(dtype)[:count].view(shape))
            begin = end
        return Rows(*found)


@dataclass(frozen=True)
class Region:
    """Rows in memory that others read; ``everywhere`` are as many as a rank has at most in the same place of each."""

    rows: Rows
    everywhere: tuple[Rows, ...]


class Reads:
    """The transport of a call over such memory."""

    takes_processors = False

    def __init__(self, memory: Memory, layout: Layout):
        self._memory, self._layout = memory, layout

    def hold(self, group: int, k: torch.Tensor, v: torch.Tensor, *, goes: bool) -> Region:
        """A copy if others read some, else as they lie."""
        lying = Rows.of(k, v, sent=False)
        everywhere = self._everywhere(self._layout.of_held(group), self._layout.held, k.dtype)
        if not goes:
            return Region(lying, everywhere)
        mine = self._own(everywhere, len(lying.k))
        for to, x in zip(mine, lying, strict=True):
            copy(to, x)
        return Region(mine, everywhere)

    def room(self, stage: int, like: Rows, rows: int, *, goes: bool) -> Region:
        """What the stage before the last had; memory of their own if nobody reads any."""
        everywhere = self._everywhere(self._layout.of_room(stage), self._layout.keys, torch.float32)
        if not goes:
            return Region(like.like(rows, torch.float32, zeros=True), everywhere)
        mine = self._own(everywhere, rows)
        for x in mine:
            x.zero_()
        return Region(mine, everywhere)

    def _everywhere(self, begin: int, most: int, dtype: torch.dtype) -> tuple[Rows, ...]:
        return tuple(self._layout.rows(x, begin, most, dtype) for x in self._memory.buffers)

    def _own(self, everywhere: tuple[Rows, ...], rows: int) -> Rows:
        self._memory.acquire()
        return everywhere[self._memory.rank].between(0, rows)

    def begin(self, number: int, shared: Region, sends: list[Send], receives: list[Receive]) -> Reading:
        """Say to those who read that they may, and read."""
        return Reading(self._memory, number % _IN_FLIGHT, shared, sends, receives)


class Reading:
    """An exchange: what this rank reads of others is on its way, and others read of it.

    Between two ranks goes a signal that rows are there, and one back that they were read.  A signal is a kernel of one
    warp, for which there may be no room beside another kernel until some of its blocks are done.  So that rows are
    there is said by the stream that made them, before it goes on, and reading itself needs no kernel but the one that
    waits for that.
    """

    def __init__(self, memory: Memory, channel: int, shared: Region, sends: list[Send], receives: list[Receive]):
        self._memory = memory
        self._readers = [*dict.fromkeys(x.rank for x in sends)]
        self._there, self._read = 2 * channel, 2 * channel + 1
        self._marks: dict[int, Any] = {}
        self._end = None
        for rank in self._readers:
            memory.put(rank, self._there)
        if not receives:
            return
        owners = set()
        with memory.aside():
            for receive in sorted(receives, key=lambda x: x.part):
                if receive.rank not in owners:
                    memory.wait(receive.rank, self._there)
                    owners.add(receive.rank)
                end = receive.first + len(receive.into.k)
                receive.into.copy_(shared.everywhere[receive.rank].between(receive.first, end))
                self._marks[receive.part] = memory.mark()
            for rank in sorted(owners):
                memory.put(rank, self._read)
            self._end = memory.mark()

    def wait(self, parts: int | None = None) -> None:
        """Until what comes with the first parts is there, or all of it, and others have read what is theirs."""
        for part in [x for x in self._marks if parts is None or x < parts]:
            self._marks.pop(part).wait()
        if parts is None:
            if self._end is not None:
                self._end.wait()
            for rank in self._readers:
                self._memory.wait(rank, self._read)
            self._memory.release()
            self._end, self._readers = None, []

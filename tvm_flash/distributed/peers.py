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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from tvm_flash.distributed.exchange import PARTS, Receive, Send, first_line, talking
from tvm_flash.distributed.rows import Rows
from tvm_flash.errors import InvalidArgumentError, ProcessGroupError

#: 0: rows go as messages; 1: they are read, and a warning says so where they can't be; unset: they are read if they can
#: be.
VARIABLE = "TVM_FLASH_PEER_MEMORY"

#: Bytes that a rank keeps for others to read at most, and the part of its GPU's memory.  A call that needs more sends
#: messages: it computes for so long that these hardly count (0.95 to 0.98 of 256k positions' time is computing, by
#: messages).
_MOST_BYTES, _MOST_OF_GPU = 4 << 30, 16

#: What memory is taken in, so that lengths that grow slowly don't each take it anew.
_STEP = 32 << 20

_ALIGNMENT = 256

#: Bytes of an element of gradients, and of a signal.
_WIDE, _SIGNAL = torch.float32.itemsize, 4

#: Exchanges of a call that are begun and not over: the keys of two stages and the gradients of two.
_IN_FLIGHT = 4

#: Signals from one rank to another: of an exchange one for each part, and one back.
_CHANNELS = _IN_FLIGHT * (PARTS + 1)

#: In a GPU's error after a signal that didn't come: what PyTorch says, and the driver.
FAILURES = ("unspecified launch failure", "CUDA_ERROR_LAUNCH_FAILED")


def told() -> bool | None:
    """Whether this process is told to read what others hold; None if it isn't told anything.

    Raises
    ------
    InvalidArgumentError: the variable is neither 0 nor 1.
    """
    said = os.environ.get(VARIABLE) or None
    if said not in ("0", "1", None):
        raise InvalidArgumentError(f"{VARIABLE}: is {said!r}, expected 0 or 1, or unset")
    return None if said is None else said == "1"


def about(device: torch.device) -> dict[str, Any]:
    """What others must know of this process to tell whether they can read its memory.

    Memory is handed over through the operating system, by the numbers of processes and files of a container.
    """
    host, boot = socket.gethostname(), Path("/proc/sys/kernel/random/boot_id")
    with contextlib.suppress(OSError):
        host += f" {boot.read_text().strip()}"
    most = min(_MOST_BYTES, torch.cuda.get_device_properties(device).total_memory // _MOST_OF_GPU)
    return {"host": host, "container": _container(), "gpu": _gpus()[device.index], "most": most}


def obstacle(device: torch.device, others: Mapping[int, dict[str, Any]]) -> str | None:
    """Why this process doesn't reach the memory of some ranks, itself among them; None if it does."""
    if os.environ.get("NCCL_P2P_DISABLE") == "1":
        return "NCCL_P2P_DISABLE is 1"
    if torch.cuda.is_current_stream_capturing():
        return "the first call on the mesh is captured in a graph"
    gpus = _gpus()
    own = about(device)
    for rank, other in others.items():
        if other["host"] != own["host"]:
            return f"rank {rank} is on another host"
        if other["container"] != own["container"]:
            return f"rank {rank} is in another container, or another user's"
        if other["gpu"] not in gpus:
            return f"this process doesn't see the GPU of rank {rank}"
        number = gpus.index(other["gpu"])
        if other["gpu"] != own["gpu"] and not torch.cuda.can_device_access_peer(device.index, number):
            return f"{device} has no access to the memory of cuda:{number}, the GPU of rank {rank}"
    return None


def _container() -> list[str]:
    """What sets the processes of a container apart from others, and a user's."""
    found = [str(getattr(os, "getuid", int)())]
    for name in ("pid", "mnt"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/ns/{name}"))
    return found


def _gpus() -> list[str]:
    """The GPUs that this process sees, by what is theirs alone; by their numbers where PyTorch doesn't tell."""
    return [str(getattr(torch.cuda.get_device_properties(i), "uuid", i)) for i in range(torch.cuda.device_count())]


class Memory(Protocol):
    """Memory that the ranks of a group read of each other, and signals between two of them.

    Attributes
    ----------
    device: where the own is.
    rank: the own one.
    buffers: of each rank, uint8, as many bytes on all.
    most: how many they may be.
    """

    device: torch.device
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

    def release(self, failed: bool) -> None:
        """After the last of what a call does with it, or if it failed, after what it has begun."""

    def put(self, rank: int, channel: int) -> None:
        """Signal to another rank; after what the current stream has done."""

    def wait(self, rank: int, channel: int) -> None:
        """Until another rank's signal is there, which is then gone; the current stream waits."""

    def aside(self) -> contextlib.AbstractContextManager[None]:
        """A block whose copies run beside what the current stream does next."""

    def mark(self) -> Any:
        """What has a ``wait()`` until all that was begun so far in the block is done."""


class PeerMemory:
    """The same between GPUs of a host.

    What can fail on one rank alone does before ranks wait for each other: first each is made, then all ``meet()``.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, most: int):
        """
        Raises
        ------
        RuntimeError, ImportError, AttributeError, TypeError: this PyTorch, or this machine, can't.
        """
        import torch.distributed._symmetric_memory as symmetric

        if (backend := symmetric.get_backend(device)) != "CUDA":
            raise RuntimeError(f"symmetric memory is {backend}'s here, expected CUDA's own, with signals")
        if group.group_name in _gone and group.group_name in getattr(symmetric, "_group_name_to_store", ()):
            raise RuntimeError(f"it still asks the processes of a group {group.group_name!r} that was destroyed")
        self.group, self.device, self.most = group, device, most
        self._timeout = int(group._get_backend(device).options._timeout.total_seconds() * 1000)
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._free = torch.cuda.Event()
        self._is_captured, self._kept = False, []
        self.buffers: list[torch.Tensor] = []
        self._handle, self._waiting = None, self._allocated(1)

    def meet(self) -> None:
        """All ranks of the group do this together.

        Raises
        ------
        RuntimeError, ImportError, AttributeError, TypeError: they can't.
        """
        self._signals, _ = self._mapped(self._waiting)
        self.rank, self._waiting = self._signals.rank, None
        if self._signals.signal_pad_size < self._signals.world_size * _CHANNELS * _SIGNAL:
            raise RuntimeError(f"there are signals for fewer than {self._signals.world_size} ranks")
        _made.append(self)

    def drop(self) -> None:
        """Give the memory back, unless a graph may read it."""
        if not self._is_captured:
            self.buffers, self._handle, self._signals = [], None, None

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
        torch.cuda.synchronize(self.device)  # nobody reads the old
        if self._is_captured:  # a graph reads it whenever it runs
            self._kept.append((self._handle, self.buffers))
        mine, self._waiting = self._waiting, None
        with talking(self.group):
            self._handle, self.buffers = self._mapped(mine)

    def _allocated(self, size: int) -> torch.Tensor:
        from torch.distributed._symmetric_memory import _SymmetricMemory

        return _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, self.device)

    def _mapped(self, mine: torch.Tensor) -> tuple[Any, list[torch.Tensor]]:
        from torch.distributed._symmetric_memory import rendezvous

        with _without_multicast():
            handle = rendezvous(mine, self.group.group_name)
        of = range(handle.world_size)
        return handle, [mine if r == handle.rank else handle.get_buffer(r, mine.shape, mine.dtype) for r in of]

    def acquire(self) -> None:
        if self.is_fixed:
            self._is_captured = True
        else:
            self._free.wait()

    def release(self, failed: bool) -> None:
        if failed:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
        if not self.is_fixed:
            self._free.record()

    def put(self, rank: int, channel: int) -> None:
        self._signals.put_signal(rank, channel, self._timeout)

    def wait(self, rank: int, channel: int) -> None:
        self._signals.wait_signal(rank, channel, self._timeout)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            yield

    def mark(self) -> torch.cuda.Event:
        return self._stream.record_event()


#: What this process has of groups that it hasn't seen to be gone, and the names of those that are.
_made: list[PeerMemory] = []
_gone: set[str] = set()


def drop_gone() -> None:
    """Give back the memory of groups that were destroyed."""
    for memory in [x for x in _made if x.group not in dist.distributed_c10d._world.pg_map]:
        _made.remove(memory)
        _gone.add(memory.group.group_name)
        memory.drop()


@contextlib.contextmanager
def _without_multicast() -> Iterator[None]:
    """Memory without the addresses of all ranks' at once, which nothing here needs and some machines fail to give."""
    variable = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


@contextlib.contextmanager
def explaining(group: dist.ProcessGroup) -> Iterator[None]:
    """Say of an error of the GPU in a call whose ranks read each other's memory what it may come of.

    Raises
    ------
    ProcessGroupError: the error is the one that ends a GPU which waits for another longer than it may.
    """
    try:
        yield
    except RuntimeError as e:
        if not any(x in str(e) for x in FAILURES):
            raise
        raise ProcessGroupError(
            f"mesh: the GPU of rank {dist.get_rank()} failed, as it does if another of the ranks "
            f"{dist.get_process_group_ranks(group)} is gone, or wasn't there within the group's timeout (then a line "
            f"on standard error names it): {first_line(e)}"
        ) from e


@dataclass(frozen=True)
class Layout:
    """Where in a rank's memory a call has what, the same on all ranks: keys and values of two groups of heads, then
    gradients of two stages, each in place of those before the last.

    Attributes
    ----------
    groups: how many groups of heads there are.
    stages: how many stages with gradients.
    keys: the most rows of keys that a rank holds or has in a step.
    batch, kv_heads: of a group.
    dims: head_dim and head_dim_v.
    itemsize: bytes of an element of keys.
    """

    groups: int
    stages: int
    keys: int
    batch: int
    kv_heads: int
    dims: tuple[int, int]
    itemsize: int

    @property
    def size(self) -> int:
        """Bytes in all."""
        return min(2, self.groups) * self._bytes(self.itemsize) + min(2, self.stages) * self._bytes(_WIDE)

    def of_keys(self, group: int) -> int:
        """Where keys and values of a group begin."""
        return group % 2 * self._bytes(self.itemsize)

    def of_gradients(self, stage: int) -> int:
        """Where a stage's gradients begin."""
        return min(2, self.groups) * self._bytes(self.itemsize) + stage % 2 * self._bytes(_WIDE)

    def _bytes(self, itemsize: int) -> int:
        """Bytes of all keys with both dims, each up to where something else may begin."""
        rows = self.keys * self.batch * self.kv_heads * itemsize
        return sum(-(-rows * dim // _ALIGNMENT) * _ALIGNMENT for dim in self.dims)

    def rows(self, buffer: torch.Tensor, begin: int, dtype: torch.dtype) -> Rows:
        """As many rows as there are keys from a byte of a rank's memory on."""
        found = []
        for dim in self.dims:
            count = self.keys * self.batch * self.kv_heads * dim
            size = count * dtype.itemsize
            found.append(buffer[begin : begin + size].view(dtype).view(self.keys, self.batch, self.kv_heads, dim))
            begin += -(-size // _ALIGNMENT) * _ALIGNMENT
        return Rows(*found)


@dataclass(frozen=True)
class Region:
    """Rows in memory that others read; ``of`` gives as many as a rank has at most in the same place of another's."""

    rows: Rows
    of: Callable[[int], Rows]


class Reads:
    """The transport of a call over such memory."""

    takes_processors, lays = False, True

    def __init__(self, memory: Memory, layout: Layout):
        self._memory, self._layout = memory, layout
        memory.acquire()

    def hold(self, group: int, k: torch.Tensor, v: torch.Tensor, *, goes: bool) -> Region:
        """A copy if others read some, else as they lie."""
        lying = Rows.of(k, v, sent=False)
        region = self.keys(group, lying, len(lying.k))
        if not goes:
            return Region(lying, region.of)
        region.rows.copy_(lying)
        return region

    def keys(self, group: int, like: Rows, rows: int) -> Region:
        """What the group before the last had."""
        return self._region(self._layout.of_keys(group), rows, like.k.dtype)

    def room(self, stage: int, like: Rows, rows: int, *, goes: bool) -> Region:
        """What the stage before the last had; memory of their own if nobody reads any."""
        region = self._region(self._layout.of_gradients(stage), rows, torch.float32)
        if not goes:
            return Region(like.like(rows, torch.float32, zeros=True), region.of)
        for x in region.rows:
            x.zero_()
        return region

    def _region(self, begin: int, rows: int, dtype: torch.dtype) -> Region:
        def of(rank: int) -> Rows:
            return self._layout.rows(self._memory.buffers[rank], begin, dtype)

        return Region(of(self._memory.rank).between(0, rows), of)

    def begin(self, number: int, shared: Region, sends: list[Send], receives: list[Receive]) -> Reading:
        """Nothing is read until it is offered."""
        return Reading(self._memory, number % _IN_FLIGHT, shared, sends, receives)

    def close(self, failed: bool) -> None:
        """Nothing reads or writes the memory of what the current stream does next."""
        self._memory.release(failed)


class Reading:
    """An exchange: what this rank reads of others, and others of it.

    Between two ranks goes a signal for each part that rows are there, and one back that all were read.  A signal is a
    kernel of one warp, for which there may be no room beside another kernel until some of its blocks are done.  So that
    rows are there is said by the stream that made them, before it goes on, and reading itself needs no kernel but the
    one that waits for that.
    """

    def __init__(self, memory: Memory, number: int, shared: Region, sends: list[Send], receives: list[Receive]):
        self._memory, self._shared = memory, shared
        self._there, self._read = number * (PARTS + 1), number * (PARTS + 1) + PARTS
        self._readers = {part: _ranks(sends, part) for part in range(PARTS)}
        self._receives = {part: [x for x in receives if x.part == part] for part in range(PARTS)}
        self._owners = sorted({x.rank for x in receives})
        self._marks: dict[int, Any] = {}

    def offer(self, part: int) -> None:
        """Say to those who read what goes with a part that they may, and read what comes with it."""
        for rank in self._readers[part]:
            self._memory.put(rank, self._there + part)
        receives = self._receives.pop(part)
        if not receives:
            return
        with self._memory.aside():
            for rank in _ranks(receives, part):
                self._memory.wait(rank, self._there + part)
                theirs = self._shared.of(rank)
                for receive in [x for x in receives if x.rank == rank]:
                    receive.into.copy_(theirs.between(receive.first, receive.first + len(receive.into.k)))
            self._marks[part] = self._memory.mark()
            if not any(self._receives.values()):
                for rank in self._owners:
                    self._memory.put(rank, self._read)
                self._marks[PARTS] = self._memory.mark()

    def wait(self, parts: int | None = None) -> None:
        """Until what comes with the first parts is there, or all of it, and others have read what is theirs."""
        for part in [x for x in self._marks if parts is None or x < min(parts, PARTS)]:
            self._marks.pop(part).wait()
        if parts is None:
            for rank in dict.fromkeys(rank for part in range(PARTS) for rank in self._readers.pop(part, ())):
                self._memory.wait(rank, self._read)


def _ranks(moves: Iterable[Send | Receive], part: int) -> list[int]:
    """The ranks of what goes or comes with a part, each once, in order."""
    return [*dict.fromkeys(x.rank for x in moves if x.part == part)]

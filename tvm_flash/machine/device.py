"""Which device a call runs on, and which archs it can run."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError
from tvm_flash.machine import cpu, cuda
from tvm_flash.machine.arch import arch_of, by_closeness, capability_of
from tvm_flash.packs.registry import registry


@dataclass(frozen=True)
class Device:
    """The host processor (``kind`` ``"cpu"``) or one CUDA device."""

    kind: str
    index: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"

    @property
    def name(self) -> str:
        """What its maker calls it."""
        return cpu.name() if self.kind == "cpu" else cuda.gpu(self.index).name

    @property
    def capability(self) -> tuple[int, int] | None:
        """CUDA compute capability; None for the processor."""
        return None if self.kind == "cpu" else cuda.gpu(self.index).capability

    @property
    def multiprocessors(self) -> int:
        """How many a GPU has; 0 of the processor, and where it isn't known."""
        return 0 if self.kind == "cpu" else cuda.gpu(self.index).multiprocessors

    @property
    def native_arch(self) -> str:
        """The arch that is built for it."""
        return "cpu" if self.kind == "cpu" else arch_of(self.capability)

    def archs(self) -> list[str]:
        """Archs of installed packs that it can run, the one made for it first."""
        if self.kind == "cpu":
            return ["cpu"]
        return by_closeness(registry().archs(), self.capability)


@dataclass(frozen=True)
class Imagined(Device):
    """A GPU that this machine needn't have, for asking what would run on it."""

    arch: str = ""

    def __str__(self) -> str:
        return f"a GPU of arch {self.arch}"

    @property
    def name(self) -> str:
        return "imagined"

    @property
    def multiprocessors(self) -> int:
        return 0

    @property
    def capability(self) -> tuple[int, int]:
        return capability_of(self.arch)


def of_arch(arch: str, name: str = "arch") -> Device:
    """The processor for ``"cpu"``, or an imagined GPU of a CUDA arch; ``name`` is that of the argument.

    Raises
    ------
    InvalidArgumentError: there is no such arch.
    """
    if arch == "cpu":
        return Device("cpu")
    if capability_of(arch) is None:
        raise InvalidArgumentError(f"{name}: is {arch!r}, expected cpu or a CUDA arch such as sm_80 or sm_90a")
    return Imagined("cuda", arch=arch)


def parse(device: Any) -> Device:
    """A device as users write it: None, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, an index, or a framework's device object.

    None is the first CUDA device, or the processor where there is none.

    Raises
    ------
    InvalidArgumentError, ArgumentTypeError: it isn't a device, or the machine has no such device.
    """
    if device is None:
        return default_device()
    if isinstance(device, Device):
        return device
    text = f"cuda:{device}" if isinstance(device, int) and not isinstance(device, bool) else str(device)
    parts = re.fullmatch(r"(cpu|cuda)(?::(\d+))?", text)
    if parts is None:
        raise ArgumentTypeError(f"device: is {device!r}, expected 'cpu', 'cuda' or 'cuda:<index>'")
    if parts[1] == "cpu":
        return Device("cpu")
    index, count = int(parts[2] or 0), cuda.device_count()
    if index >= count:
        raise InvalidArgumentError(f"device: is {text!r}, but this machine has {count} CUDA devices; use 'cpu'")
    return Device("cuda", index)


@functools.cache
def default_device() -> Device:
    """The first CUDA device, or the processor where there is none."""
    return Device("cuda", 0) if cuda.device_count() else Device("cpu")

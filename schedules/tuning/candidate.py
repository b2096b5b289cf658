"""What is to be measured, as files that a machine without TVM understands."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from tvm_flash.packs.manifest import KernelEntry


@dataclass(frozen=True)
class Candidate:
    """A kernel with one configuration.

    Attributes
    ----------
    id: its symbol and the beginning of its kernel hash; the name of its files.
    isa: of a CPU kernel.
    entry: how it is called, and what it was made from.
    kernel_hash: as in :class:`schedules.builder.records.Measurement`.
    search: which strategy proposed it, and how many it had proposed before.
    """

    id: str
    isa: str
    entry: KernelEntry
    kernel_hash: str
    search: str

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Candidate:
        raw = json.loads(text)
        return Candidate(**{**raw, "entry": KernelEntry.from_dict(raw["entry"])})


@dataclass(frozen=True)
class Batch:
    """Candidates that are timed together, in one process, on the same workloads.

    Attributes
    ----------
    name: also its place in the order.
    candidates: ids.
    workloads: as text.
    incumbents: by kernel (its symbol) and workload, the id of the family's default, which is timed beside the
        candidates.
    """

    name: str
    candidates: tuple[str, ...]
    workloads: tuple[str, ...]
    incumbents: dict[str, dict[str, str]]

    def incumbent_ids(self) -> tuple[str, ...]:
        """All that are the default for some workload."""
        return tuple(dict.fromkeys(i for by_workload in self.incumbents.values() for i in by_workload.values()))

    def all_ids(self) -> tuple[str, ...]:
        """The incumbents and the candidates."""
        return tuple(dict.fromkeys((*self.incumbent_ids(), *self.candidates)))

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Batch:
        raw = json.loads(text)
        return Batch(**{**raw, "candidates": tuple(raw["candidates"]), "workloads": tuple(raw["workloads"])})


@dataclass(frozen=True)
class Emission:
    """What holds for all candidates of a folder.

    ``sources`` is the hash of the files that kernels are made from; ``rejections`` counts, by kernel and reason, the
    configurations that were refused before compiling.
    """

    arch: str
    isa: str
    versions: dict[str, str]
    sources: str
    rejections: dict[str, dict[str, int]]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> Emission:
        raw: dict[str, Any] = json.loads(text)
        return Emission(**raw)

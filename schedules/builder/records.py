"""``tuning_logs/``: what was measured on hardware, one JSON object a line, one file a device.

A line of kind ``"verified"`` says that a kernel, identified by the hash of its source, passed the case list on a
device, and how fast it was.  A line of kind ``"waves"`` says how long full waves of a kernel's work tiles took.  A line
of kind ``"measured"`` is a configuration that the tuner tried on one problem, and one of kind ``"peer"`` is somebody
else's kernel on that problem.  Needs no TVM.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvm_flash.packs.manifest import KernelEntry, Waves

SCHEMA = 1
#: In the folder of the logs: kernels without a record.
AWAITING_NAME = "awaiting.txt"
LOGS = Path(__file__).resolve().parents[2] / "tuning_logs"


@dataclass(frozen=True)
class Record:
    """A kernel that was verified.

    Attributes
    ----------
    kind: ``"verified"``.
    device, driver: the GPU's name and the driver's CUDA version.
    arch: what the kernel was compiled for; ``run_as`` is what ran: ``"native"`` machine code, ``"recompiled for
        sm_90"``, ``"ptx"`` that the driver compiled for the device, or the same source for another arch of the family.
    symbol, template, dtype, head_dim, head_dim_v, mask, score, bucket, config, source_hash: as in the manifest.
    cases: how many cases of the shared list it passed.
    error: the largest error of these, as a share of what is allowed (2 × PyTorch's own error plus one rounding).
    problem: what was timed; ``microseconds`` is the median, ``spread`` the 10th to the 90th percentile.
    tflops: floating-point operations of the two products (half of them under a causal mask) by the median time.
    versions: of the compilers, from the manifest, and of torch.
    date: UTC.
    """

    kind: str
    device: str
    driver: str
    arch: str
    run_as: str
    symbol: str
    template: str
    dtype: str
    head_dim: int
    head_dim_v: int
    mask: str
    score: str
    bucket: int
    config: dict[str, Any]
    source_hash: str
    cases: int
    error: float
    problem: str
    microseconds: float
    spread: tuple[float, float]
    tflops: float
    versions: dict[str, str]
    date: str
    schema: int = SCHEMA

    @property
    def identity(self) -> tuple:
        """What makes two lines the same measurement."""
        return (self.kind, self.device, self.source_hash, self.date)


@dataclass(frozen=True)
class WavesRecord:
    """How long waves of a kernel's work tiles took (:class:`tvm_flash.packs.manifest.Waves`).

    ``kind`` is ``"waves"``.  ``points`` are problems whose work tiles are spread evenly over the ``multiprocessors`` of
    the device: ``waves`` in which each of these computes ``at_a_time`` of them, ``microseconds`` in all, the median of
    replayed graphs.  ``launch`` and ``tiles`` are fitted to them; the rest is as in :class:`Record` and
    :class:`~tvm_flash.packs.manifest.Waves`.
    """

    kind: str
    device: str
    driver: str
    arch: str
    run_as: str
    symbol: str
    source_hash: str
    block_m: int
    block_n: int
    multiprocessors: int
    points: tuple[dict[str, Any], ...]
    launch: int
    tiles: tuple[tuple[int, int], ...]
    versions: dict[str, str]
    date: str
    schema: int = SCHEMA

    @property
    def identity(self) -> tuple:
        """What makes two lines the same measurement."""
        return (self.kind, self.device, self.source_hash, self.date)

    @property
    def name(self) -> str:
        """How manifests cite it."""
        return _cited(self.device, self.identity)

    @property
    def waves(self) -> Waves:
        """What a pack says of the kernel."""
        return Waves(self.block_m, self.block_n, self.launch, self.tiles, self.name)


def _cited(device: str, identity: tuple) -> str:
    """A short name of a line, unique in practice, with that of its file: ``"nvidia_h200.jsonl#5e1f0a93c2"``."""
    return f"{log_of(device).name}#{hashlib.sha256(chr(0).join(identity).encode()).hexdigest()[:10]}"


@dataclass(frozen=True)
class Measurement:
    """A configuration that was tried on one problem.

    Attributes
    ----------
    kind: ``"measured"``.
    device, driver, arch, run_as: as in :class:`Record`; ``isa`` and ``threads`` are of a processor.
    template, dtype, head_dim, head_dim_v, mask, score: of the kernel, as in the manifest; ``kernel_kind`` is its kind,
        ``"forward"`` in records that are older than the field.
    problem: what was timed, as :class:`tvm_flash.measure.workloads.Workload` reads it.
    config: the configuration as JSON.
    status: ``"ok"``; ``"wrong"`` numbers; ``"hung"``, ``"crashed"``; ``"not built"``: by ``reason``.
    microseconds: the median; ``spread`` the 10th to the 90th percentile; None unless ``"ok"``, as all figures below.
    tflops: operations of the products, two or a backward's five, by the median time; ``percent_of_peak`` of what a
        large matrix product of the same dtype reached in the same process.
    gain: time of the incumbent over this time, both as medians of the same rounds.
    incumbent: kernel hash of that incumbent; ``default`` tells that this configuration is the family's default here.
    rounds: how many there were; ``given_up`` if that is fewer than the others had, since it was clearly slower.
    error: the largest error, as a share of what is allowed (2 × the usual error of the dtype plus one rounding).
    kernel_hash: of the source without the kernel's name, which contains a bucket; ``source_hash`` is as in the
        manifest.
    search: strategy, and the how-manieth of its search it was.
    versions, date: of the compilers and torch; UTC, when the measurement ended.
    """

    kind: str
    device: str
    driver: str
    arch: str
    isa: str
    threads: int
    run_as: str
    template: str
    dtype: str
    head_dim: int
    head_dim_v: int
    mask: str
    score: str
    problem: str
    config: dict[str, Any]
    status: str
    reason: str
    microseconds: float | None
    spread: tuple[float, float] | None
    tflops: float | None
    percent_of_peak: float | None
    gain: float | None
    incumbent: str
    default: bool
    rounds: int
    error: float | None
    kernel_hash: str
    source_hash: str
    search: str
    versions: dict[str, str]
    date: str
    given_up: bool = False
    kernel_kind: str = "forward"
    schema: int = SCHEMA

    @property
    def identity(self) -> tuple:
        """What makes two lines the same measurement."""
        return (self.kind, self.device, self.kernel_hash, self.problem, self.date)

    @property
    def name(self) -> str:
        """How manifests cite it."""
        return _cited(self.device, self.identity)


@dataclass(frozen=True)
class PeerMeasurement:
    """Somebody else's attention on a problem, in the rounds in which ours was measured.

    ``kind`` is ``"peer"``, ``peer`` its name, ``about`` the function; the rest is as in :class:`Measurement`.
    """

    kind: str
    device: str
    driver: str
    threads: int
    peer: str
    about: str
    problem: str
    microseconds: float
    spread: tuple[float, float]
    tflops: float
    versions: dict[str, str]
    date: str
    schema: int = SCHEMA

    @property
    def identity(self) -> tuple:
        """What makes two lines the same measurement."""
        return (self.kind, self.device, self.peer, self.problem, self.date)


Line = Record | WavesRecord | Measurement | PeerMeasurement
_KINDS = {"verified": Record, "waves": WavesRecord, "measured": Measurement, "peer": PeerMeasurement}


def log_of(device: str) -> Path:
    """The file of a device: ``tuning_logs/nvidia_h200.jsonl``."""
    return LOGS / (re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".jsonl")


def append(path: Path, records: Iterable[Line]) -> None:
    """Add records at the end of a log; each line is on disk before the next is written.

    A line that was cut off by a power failure is ended first, so that it spoils no other.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as log:
        if log.tell():
            log.seek(-1, os.SEEK_END)
            if log.read(1) != b"\n":
                log.write(b"\n")
        for record in records:
            log.write(json.dumps(dataclasses.asdict(record), ensure_ascii=False).encode() + b"\n")
            log.flush()
            os.fsync(log.fileno())


def read(path: Path) -> Iterator[Line]:
    """The records of a log, oldest first; a line that can't be read (a power cut) is skipped with a warning."""
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            yield _parse(json.loads(line))
        except (ValueError, TypeError, KeyError, AttributeError) as e:
            warnings.warn(f"{path.name}, line {number}: skipped, it is no record of this version ({e})", stacklevel=2)


def _parse(fields: dict[str, Any]) -> Line:
    kind = fields.get("kind")
    if kind not in _KINDS or fields.get("schema") != SCHEMA:
        raise ValueError(f"kind {kind!r}, schema {fields.get('schema')!r}")
    if kind == "waves":
        tiles = tuple((start, step) for start, step in fields["tiles"])
        return WavesRecord(**{**fields, "points": tuple(fields["points"]), "tiles": tiles})
    spread = fields["spread"]
    return _KINDS[kind](**{**fields, "spread": None if spread is None else tuple(spread)})


def merge(sources: Iterable[Path], target: Path, devices: Collection[str] | None = None) -> tuple[int, int]:
    """Make ``target`` the records of itself and of ``sources``, each once, by date; gives its records before and after.

    ``devices`` are those whose records are taken from the sources; None takes all.  The file is replaced in one step.
    Lines that can't be read are left out, with a warning.
    """
    before = list(read(target)) if target.exists() else []
    lines = {record.identity: record for record in before}
    for path in sources:
        lines |= {r.identity: r for r in read(path) if devices is None or r.device in devices}
    after = sorted(lines.values(), key=lambda r: r.date)
    draft = target.with_name(target.name + ".new")
    draft.unlink(missing_ok=True)
    append(draft, after)
    os.replace(draft, target)
    return len(before), len(after)


def awaiting(folder: Path = LOGS) -> frozenset[tuple[str, str]]:
    """Kernels of the core set that no GPU has run in their present form, as ``(arch, symbol)``: what must not ship.

    The list is kept by hand beside the logs, and a test holds it to be neither too short nor too long.
    """
    path = folder / AWAITING_NAME
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return frozenset(tuple(line.split()) for line in lines if line and not line.startswith("#"))


def verified(folder: Path = LOGS) -> dict[str, Record]:
    """The newest ``"verified"`` record of each source hash, over all logs."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        for record in read(path):
            if isinstance(record, Record):
                found[record.source_hash] = record
    return found


def waves(folder: Path = LOGS) -> dict[str, WavesRecord]:
    """The newest ``"waves"`` record of each source hash, over all logs."""
    lines = (r for path in sorted(folder.glob("*.jsonl")) for r in read(path) if isinstance(r, WavesRecord))
    return {r.source_hash: r for r in sorted(lines, key=lambda r: r.date)}


def unverified(kernels: Iterable[KernelEntry]) -> list[KernelEntry]:
    """The CUDA kernels among those of a manifest that no GPU has run in exactly their form: what must not ship."""
    known = verified()
    return [k for k in kernels if k.arch != "cpu" and k.source_hash not in known]


def measured(folder: Path = LOGS) -> list[Measurement]:
    """All ``"measured"`` records of a folder of logs, oldest first in each."""
    return [r for path in sorted(folder.glob("*.jsonl")) for r in read(path) if isinstance(r, Measurement)]

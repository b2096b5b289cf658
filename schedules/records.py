"""``tuning_logs/``: what was measured on hardware, one JSON object a line, one file a device.

A record of kind ``"verified"`` says that a kernel, identified by the hash of its source, passed the case list on a
device, and how fast it was.  Needs no TVM.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SCHEMA = 1
LOGS = Path(__file__).resolve().parent.parent / "tuning_logs"


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes
    ----------
    kind: ``"verified"``.
    device, driver: the GPU's name and the driver's CUDA version.
    arch: what the kernel was compiled for; ``run_as`` is what ran: ``"native"`` machine code, ``"recompiled for
        sm_90"``, or ``"ptx"`` that the driver compiled for the device.
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


def log_of(device: str) -> Path:
    """The file of a device: ``tuning_logs/nvidia_h200.jsonl``."""
    return LOGS / (re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".jsonl")


def append(path: Path, records: Iterable[Record]) -> None:
    """Add records at the end of a log; each line is on disk before the next is written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as log:
        for record in records:
            log.write(json.dumps(dataclasses.asdict(record)) + "\n")
            log.flush()
            os.fsync(log.fileno())


def read(path: Path) -> Iterator[Record]:
    """The records of a log, oldest first; a line that can't be read (a power cut) is skipped with a warning."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            fields = json.loads(line)
            yield Record(**{**fields, "spread": tuple(fields["spread"])})
        except (ValueError, TypeError, KeyError) as e:
            warnings.warn(f"{path.name}, line {number}: skipped, it is no record of this version ({e})", stacklevel=2)


def verified(folder: Path = LOGS) -> dict[str, Record]:
    """The newest ``"verified"`` record of each source hash, over all logs."""
    found = {}
    for path in sorted(folder.glob("*.jsonl")):
        for record in read(path):
            if record.kind == "verified":
                found[record.source_hash] = record
    return found

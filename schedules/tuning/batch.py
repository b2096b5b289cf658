"""One batch of candidates: in as many processes as it takes, with a record for each candidate and workload."""

from __future__ import annotations

import datetime
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from schedules.builder import records
from schedules.builder.records import Measurement, PeerMeasurement
from schedules.tuning.candidate import Batch, Candidate
from schedules.tuning.folder import Folder
from schedules.tuning.process import Process, describe
from tvm_flash.machine.arch import runs_on
from tvm_flash.measure.timing import digits
from tvm_flash.measure.workloads import Workload

#: Seconds until a step (a check, one block of calls) counts as hung; for the first, which starts torch and the device.
STEP_LIMIT, START_LIMIT = 20.0, 180.0
#: So often a device that isn't well is asked again, and the pause before.
HEALTH_TRIES, HEALTH_PAUSE = 3, 5.0


class UnhealthyDeviceError(RuntimeError):
    """After a kernel that hung or crashed the device doesn't work any more."""


@dataclass(frozen=True)
class Options:
    """How a folder is measured.

    Attributes
    ----------
    jobs: compilers at a time.
    peers: time PyTorch's attention too.
    recompile_for: as for :func:`schedules.tuning.compiler.compile_module`.
    log: a file that gets every record too, beside the folder's own.
    deadline: of :func:`time.monotonic`; no batch is begun after it.
    step_limit: seconds until a step counts as hung.
    effort: fields of :class:`schedules.tuning.timing.Effort`, in place of the usual ones.
    """

    jobs: int = 1
    peers: bool = False
    recompile_for: str = ""
    log: Path | None = None
    deadline: float = float("inf")
    step_limit: float = STEP_LIMIT
    effort: dict[str, Any] = field(default_factory=dict)


class BatchRun:
    """One batch, in as many processes as it takes.

    Parameters
    ----------
    folder, batch: whose candidates have modules, or reasons why not.
    device: ``"cpu"``, ``"cuda:0"``, ….
    process: gives a fresh child.
    write: puts a record on disk.
    """

    def __init__(
        self,
        folder: Folder,
        batch: Batch,
        options: Options,
        device: str,
        process: Callable[[], Process],
        write: Callable[[records.Line], None],
    ):
        self.folder, self.batch, self.options, self.process, self.write = folder, batch, options, process, write
        self.emission = folder.emission()
        self.device = device
        self.candidates: dict[str, Candidate] = {id: self.folder.candidate(id) for id in batch.all_ids()}
        self.done = {(r.kernel_hash, r.problem) for r in self.folder.records() if isinstance(r, Measurement)}
        self.about = describe(self.device)
        self.reason = "nothing came out of it"
        self.seconds: dict[tuple[str, str], list[float]] = {}  # by candidate and workload, until a workload is complete
        self.errors: dict[tuple[str, str], float] = {}
        self.failed = {
            id
            for r in self.folder.records()
            for id, candidate in self.candidates.items()
            if isinstance(r, Measurement) and r.kernel_hash == candidate.kernel_hash and r.status != "ok"
        }

    def run(self) -> bool:
        """Until every candidate has a record for every workload, or the time is over; whether it is complete."""
        for id in self.candidates:
            if (reason := self.folder.failure(id)) is not None:
                self._fail(id, "not built", reason)
        sick = 0
        while self._left() and time.monotonic() <= self.options.deadline:
            before = len(self._left())
            self._run_process()
            sick = 0 if len(self._left()) < before else sick + 1
            if sick == HEALTH_TRIES:
                raise UnhealthyDeviceError(f"{self.device}: doesn't work (any more): {self.reason}")
            if sick:
                time.sleep(HEALTH_PAUSE)
        return not self._left()

    def _left(self) -> list[tuple[str, str]]:
        pairs = ((id, w) for id in self.batch.candidates if id not in self.failed for w in self.batch.workloads)
        return [(id, w) for id, w in pairs if (self.candidates[id].kernel_hash, w) not in self.done]

    def _run_process(self) -> None:
        """One process, to its end or to what stopped it."""
        process = self.process()
        process.ask(self._request())
        at: dict[str, Any] = {}
        limit = START_LIMIT
        while True:
            try:
                event = process.next(limit)
            except TimeoutError:
                process.kill()
                self._blame(at, "hung", f"no answer for {limit:g} s: {at.get('what', 'start')}")
                return
            if event is None:
                status = process.end()
                ended = f"signal {-status}" if status < 0 else f"exit status {status}"
                self._blame(at, "crashed", f"{ended}: {at.get('what', 'start')}")
                return
            kind = event.pop("event")
            if kind == "begin":
                at, limit = event, START_LIMIT if event["what"] == "health" else self.options.step_limit
            elif kind == "end":
                process.end()
                return
            elif kind == "fault":
                process.end()
                self._blame(event, "crashed", event["reason"])
                return
            elif self._take(kind, event):
                process.kill()
                return

    def _request(self) -> dict[str, Any]:
        left = {id for id, _ in self._left()} | set(self.batch.incumbent_ids())
        usable = [id for id in self.candidates if id in left and id not in self.failed]
        todo = set(self._left())
        return {
            "device": self.device,
            "candidates": [
                [id, str(self.folder.module(id).resolve()), json.loads(self.candidates[id].to_json())["entry"]]
                for id in usable
            ],
            "workloads": self.batch.workloads,
            "incumbents": {
                symbol: {w: id for w, id in ids.items() if id in usable}
                for symbol, ids in self.batch.incumbents.items()
            },
            "skip": [[id, w] for id in usable for w in self.batch.workloads if (id, w) not in todo],
            "peers": self.options.peers,
            "effort": self.options.effort,
            "seed": 0,
            "peaks": self.about.get("peaks", {}),
        }

    def _blame(self, at: dict[str, Any], status: str, reason: str) -> None:
        """Write down what stopped a process, and with whom."""
        self.reason = f"{status}, {reason}; its output is in {self.folder.path / 'child.log'}"
        if "id" in at:
            self._fail(at["id"], status, reason, at.get("workload"))

    def _take(self, kind: str, event: dict[str, Any]) -> bool:
        """Deal with news; whether the time is over."""
        if kind == "healthy":
            self.about |= event
        elif kind == "wrong":
            self._fail(event["id"], "wrong", event["reason"], event.get("workload"))
        elif kind == "peer":
            self._write_peer(event)
        elif kind == "figures":
            self.seconds[event["id"], event["workload"]] = event["seconds"]
            self.errors[event["id"], event["workload"]] = event["error"]
        elif kind == "measured":
            for id, workload in list(self.seconds):
                if workload == event["workload"] and (self.candidates[id].kernel_hash, workload) not in self.done:
                    self._write_figures(id, workload)
            return time.monotonic() > self.options.deadline
        return False

    def _fail(self, id: str, status: str, reason: str, workload: str | None = None) -> None:
        """A candidate failed: at one workload, or (before it had one) at all of them; it isn't tried again."""
        self.failed.add(id)
        for w in (workload,) if workload else self.batch.workloads:
            if (self.candidates[id].kernel_hash, w) not in self.done:
                self._record(id, w, status=status, reason=reason)

    def _write_figures(self, id: str, workload: str) -> None:
        seconds, w = self.seconds[id, workload], Workload.parse(workload)
        microseconds = [s * 1e6 for s in seconds]
        median = statistics.median(microseconds)
        flops = w.flops / median * 1e6
        peak = self.about["peaks"][w.dtype]
        incumbent = self._incumbent(id, workload) or ""
        of_incumbent = self.seconds.get((incumbent, workload))
        gain = statistics.median(of_incumbent[: len(seconds)]) / statistics.median(seconds) if of_incumbent else None
        self._record(
            id,
            workload,
            status="ok",
            microseconds=round(median, 2),
            spread=_deciles(microseconds),
            tflops=digits(flops / 1e12, 4),
            percent_of_peak=round(100 * flops / peak, 1),
            gain=gain and round(gain, 4),
            rounds=len(seconds),
            given_up=len(seconds) < max(len(s) for (_, of), s in self.seconds.items() if of == workload),
            error=round(self.errors[id, workload], 3),
        )

    def _record(self, id: str, workload: str, *, status: str, reason: str = "", **figures: Any) -> None:
        if id not in self.batch.candidates:  # an incumbent, whose own record is another batch's
            return
        candidate = self.candidates[id]
        entry = candidate.entry
        incumbent = self._incumbent(id, workload)
        unknown = dict.fromkeys(("microseconds", "spread", "tflops", "percent_of_peak", "gain", "error"))
        record = Measurement(
            kind="measured",
            **self._where(),
            arch=entry.arch,
            isa=candidate.isa,
            run_as=self._run_as(),
            **{
                name: getattr(entry, name)
                for name in ("template", "dtype", "head_dim", "head_dim_v", "mask", "score", "config", "source_hash")
            },
            problem=workload,
            status=status,
            reason=reason,
            **{**unknown, "rounds": 0, **figures},
            incumbent=self.candidates[incumbent].kernel_hash if incumbent else "",
            default=incumbent == id,
            kernel_hash=candidate.kernel_hash,
            search=candidate.search,
            kernel_kind=entry.kind,
        )
        self.done.add((candidate.kernel_hash, workload))
        self.write(record)

    def _incumbent(self, id: str, workload: str) -> str | None:
        """The candidate that is the default beside another one."""
        return self.batch.incumbents.get(self.candidates[id].entry.symbol, {}).get(workload)

    def _write_peer(self, event: dict[str, Any]) -> None:
        microseconds = [s * 1e6 for s in event["seconds"]]
        median = statistics.median(microseconds)
        self.write(
            PeerMeasurement(
                kind="peer",
                **self._where(),
                peer=event["peer"],
                about=event["about"],
                problem=event["workload"],
                microseconds=round(median, 2),
                spread=_deciles(microseconds),
                tflops=digits(Workload.parse(event["workload"]).flops / median / 1e6, 4),
            )
        )

    def _where(self) -> dict[str, Any]:
        versions = {**self.emission.versions, "torch": self.about.get("torch", "")}
        if self.options.recompile_for:
            versions["recompiled_for"] = self.options.recompile_for
        return {
            "device": self.about["name"],
            "driver": self.about["driver"],
            "threads": self.about["threads"],
            "versions": versions,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"),
        }

    def _run_as(self) -> str:
        if self.options.recompile_for:
            return f"recompiled for {self.options.recompile_for}"
        capability = self.about["capability"]
        return "ptx" if capability and not runs_on(self.emission.arch, capability) else "native"


def _deciles(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return (round(values[0], 2), round(values[0], 2))
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return (round(cuts[0], 2), round(cuts[-1], 2))

"""Measuring a folder of candidates on the hosts of a Ray cluster.

Ray (https://docs.ray.io) knows the hosts, gives each task the GPU or the processors that it needs, and runs it again
where a host is lost.  The process that holds the folder is the only one that writes it: a batch travels to a host as
bytes, and its records come back.  Hosts need what :mod:`schedules.tuning.measure` needs (torch, numpy, apache-tvm-ffi,
and for CUDA nvcc and a C++ compiler); this project's own files travel along.

For the CPU a task takes all processors of a host, of those that have the most: others aren't used, and the hosts of one
search should be alike.
"""

from __future__ import annotations

import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from schedules.builder import records
from schedules.builder.records import Line, Measurement
from schedules.tuning.batch import BatchRun, Options, UnhealthyDeviceError
from schedules.tuning.candidate import Batch, Candidate, Emission
from schedules.tuning.compiler import compile_module
from schedules.tuning.folder import Folder
from schedules.tuning.measure import Recorder, begin
from schedules.tuning.process import ROOT, Process
from schedules.tuning.progress import Progress

#: So often Ray runs a task again whose host or process was lost.
RETRIES = 3

#: Of a cluster that is started here.  By default Ray's processes let all others on the host go first (niceness 15):
#: what is measured there would be disturbed by each of them, and beside a few busy ones it hardly came on.
_OWN_CLUSTER = {"worker_niceness": 0}

#: What doesn't travel to the hosts.
_LEFT_HERE = ["**/__pycache__", ".*", "build", "dist", "docs", "tests", "tuning_logs", "tvm_flash/packs/*/"]


@dataclass(frozen=True)
class Parcel:
    """A batch with everything that a host needs of its folder.

    ``modules`` are the bytes of a candidate's module, or the reason why it has none; ``shared`` are files beside the
    modules that these load; ``known`` are the records of its candidates that exist already.
    """

    emission: Emission
    batch: Batch
    candidates: tuple[Candidate, ...]
    modules: Mapping[str, bytes | str]
    shared: Mapping[str, bytes]
    known: tuple[Measurement, ...]

    @staticmethod
    def of(folder: Folder, batch: Batch) -> Parcel:
        """The parcel of a batch, with the modules that are there."""
        candidates = tuple(folder.candidate(id) for id in batch.all_ids())
        hashes = {c.kernel_hash for c in candidates}
        known = tuple(r for r in folder.records() if isinstance(r, Measurement) and r.kernel_hash in hashes)
        of_candidates = {folder.module(path.stem) for path in (folder.path / "candidates").glob("*.json")}
        return Parcel(
            folder.emission(),
            batch,
            candidates,
            {c.id: _result(folder, c.id) for c in candidates if folder.is_compiled(c.id)},
            {p.name: p.read_bytes() for p in (folder.path / "modules").glob("*.so") if p not in of_candidates},
            known,
        )

    def unpack(self, path: Path) -> Folder:
        """The folder on a host."""
        folder = Folder(path).make()
        folder.write_emission(self.emission)
        folder.add_batch(self.batch)
        for candidate in self.candidates:
            folder.add(candidate)
        for id, module in self.modules.items():
            if isinstance(module, str):
                folder.fail(id, module)
            else:
                folder.module(id).write_bytes(module)
        for name, contents in self.shared.items():
            (path / "modules" / name).write_bytes(contents)
        records.append(folder.log(), self.known)
        return folder


@dataclass(frozen=True)
class Outcome:
    """What a host made of a batch: records, whether it is complete, and what is wrong with the device."""

    records: tuple[Line, ...]
    complete: bool
    unhealthy: str = ""


def compile_on_host(source: str, emission: Emission, recompile_for: str) -> bytes | str:
    """A task: the module of a candidate's source, or the reason why there is none."""
    with tempfile.TemporaryDirectory() as scratch:
        path, module = Path(scratch) / "kernel.cu", Path(scratch) / "kernel.so"
        path.write_text(source)
        reason = compile_module(path, module, emission, recompile_for)
        return module.read_bytes() if reason is None else reason


def measure_on_host(
    parcel: Parcel, options: Options, seconds: float, device: str, ids: Sequence[str], *modules: bytes | str
) -> Outcome:
    """A task: one batch on the device that Ray has given.

    Parameters
    ----------
    seconds: are left when it is asked for; ``options.deadline`` is of another host's clock.
    ids, modules: candidates that other tasks have compiled, and what came out.
    """
    options = replace(options, deadline=time.monotonic() + seconds)
    parcel = replace(parcel, modules={**parcel.modules, **dict(zip(ids, modules, strict=True))})
    found: list[Line] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = parcel.unpack(Path(scratch))
        run = BatchRun(folder, parcel.batch, options, device, lambda: Process(folder.path / "child.log"), found.append)
        try:
            complete, unhealthy = run.run(), ""
        except UnhealthyDeviceError as e:
            complete, unhealthy = False, f"{socket.gethostname()}: {e}"
    return Outcome(tuple(found), complete, unhealthy)


@dataclass(frozen=True)
class RayCluster:
    """Measures on a Ray cluster: the one at ``address``, or one that is started on this host and ends with it.

    ``resources`` are further ones that a task needs, such as ``{"accelerator_type:T4": 0.001}``.
    """

    address: str = ""
    resources: Mapping[str, float] = field(default_factory=dict)

    def measure(self, folder: Folder, options: Options, progress: Progress) -> None:
        """See :meth:`schedules.tuning.measure.Engine.measure`."""
        ray = require_ray()
        with folder.locked():
            left = begin(folder, progress, f"the Ray cluster {self.address}" if self.address else "Ray, on this host")
            if not left:
                return
            own = {} if self.address else {"include_dashboard": False, "_system_config": _OWN_CLUSTER}
            ray.init(
                address=self.address or None,
                runtime_env={"working_dir": str(ROOT), "excludes": _LEFT_HERE},
                configure_logging=False,
                **own,
            )
            try:
                self._measure(ray, folder, left, options, Recorder(folder, options, progress.record))
            finally:
                ray.shutdown()

    def _measure(self, ray: Any, folder: Folder, left: list[Batch], options: Options, recorder: Recorder) -> None:
        on_cpu = folder.emission().arch == "cpu"
        device, needs = ("cpu", {"num_cpus": _processors(ray)}) if on_cpu else ("cuda:0", {"num_gpus": 1})
        # Ray chooses a GPU for a process, so that each task needs a process of its own.
        task = ray.remote(max_calls=1, max_retries=RETRIES, resources=dict(self.resources), **needs)(measure_on_host)
        compiled = self._compile(ray, folder, left, options)
        running: dict[Any, Batch] = {}
        for batch in left:
            ids = [id for id in batch.all_ids() if id in compiled]
            modules = [compiled[id] for id in ids]
            seconds = options.deadline - time.monotonic()
            started = task.remote(Parcel.of(folder, batch), replace(options, log=None), seconds, device, ids, *modules)
            running[started] = batch
        unhealthy = []
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            batch, outcome = running.pop(done), ray.get(done)
            for record in outcome.records:
                recorder.write(record)
            if outcome.complete:
                folder.finish(batch)
            if outcome.unhealthy:
                unhealthy.append(outcome.unhealthy)
        if unhealthy:
            raise UnhealthyDeviceError("; ".join(unhealthy))

    def _compile(self, ray: Any, folder: Folder, left: list[Batch], options: Options) -> dict[str, Any]:
        """Tasks that compile what has no module yet, by candidate."""
        task = ray.remote(num_cpus=1, max_retries=RETRIES)(compile_on_host)
        ids = dict.fromkeys(id for batch in left for id in batch.all_ids() if not folder.is_compiled(id))
        emission = folder.emission()
        return {id: task.remote(folder.source(id).read_text(), emission, options.recompile_for) for id in ids}


def _result(folder: Folder, id: str) -> bytes | str:
    reason = folder.failure(id)
    return folder.module(id).read_bytes() if reason is None else reason


def _processors(ray: Any) -> float:
    """Those of the largest host."""
    return max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])


def require_ray() -> Any:
    """The module ``ray``.

    Raises
    ------
    ValueError: it isn't installed.
    """
    try:
        import ray
    except ImportError:
        raise ValueError('--engine ray: needs the package ray; install it with pip install "ray>=2.9"') from None
    return ray


def parse_resources(text: str) -> dict[str, float]:
    """``"accelerator_type:T4=0.001 big=1"`` as Ray names resources.

    Raises
    ------
    ValueError: an amount is missing or isn't a positive number.
    """
    found = {}
    for word in text.split():
        name, _, amount = word.rpartition("=")
        try:
            found[name] = float(amount)
        except ValueError:
            found[name] = 0.0
        if not name or found[name] <= 0:
            raise ValueError(f"--resources: {word!r} isn't understood; expected NAME=AMOUNT, such as big=1")
    return found

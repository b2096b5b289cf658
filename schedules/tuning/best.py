"""From records to what ``build_kernels`` builds: the best configuration of each kernel, from which length on.

A record speaks for exactly the source that was measured: the builder takes a configuration from it only if the kernel
that comes out is still that one.  A CUDA kernel must also have been verified on hardware, unless the measured device is
in this machine.  Needs no TVM.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from schedules.builder import records
from schedules.builder.configs import NO_RECORDS, Proposal, Tuned
from schedules.builder.records import Measurement
from schedules.builder.suite import KernelSpec
from schedules.families import FAMILY
from schedules.families.interface import Target
from schedules.tuning import kinds, tables
from tvm_flash.machine import cpu, cuda
from tvm_flash.measure.workloads import Workload
from tvm_flash.packs.manifest import Speed

#: A configuration replaces the default, and a further bucket is made, only for more than the noise of a measurement:
#: medians of one kernel differ by up to 0.5% on an H200, and by some 2% on a processor that others use too.
WORTH = {"cuda": math.log(1.01), "cpu": math.log(1.03)}

#: How tuned configurations are used: those that may ship, none, or all that were measured.
MODES = ("auto", "default", "measured")


class Tuning:
    """The records that a build goes by.

    Parameters
    ----------
    mode: one of ``MODES``.
    folder: of the logs.
    """

    def __init__(self, mode: str, folder: Path = records.LOGS):
        self.mode = mode
        self.measured: dict[tuple, list[Measurement]] = {}  # by kernel
        for r in records.measured(folder) if mode != "default" else ():
            if r.status == "ok":
                self.measured.setdefault(kinds.kernel_of(r), []).append(r)
        self.verified: dict[tuple[str, str], list[str]] = {}  # hashes of sources, by arch and kernel
        for r in records.verified(folder).values():
            self.verified.setdefault((r.arch, r.symbol.removesuffix(f"_s{r.bucket}")), []).append(r.source_hash)
        self.waves = records.waves(folder)
        self.here = devices_here() if self.measured else frozenset()

    def __call__(self, spec: KernelSpec, target: Target) -> Tuned:
        """What the records say of a kernel."""
        arch, isa = target.arch, target.isa
        waves = {h: r.waves for h, r in self.waves.items() if r.arch == arch and r.symbol.startswith(spec.symbol)}
        of_it = self.measured.get(kinds.kernel_of_spec(spec), ())
        if not of_it:
            return Tuned(waves=waves) if waves else NO_RECORDS
        own = [r for r in of_it if (r.arch, r.isa) == (arch, isa)]
        chosen = self._nearest(of_it, arch, isa)
        needs_no_proof = arch == "cpu" or self.mode == "measured" or any(r.device in self.here for r in chosen)
        return Tuned(
            proposals=proposals(chosen, bool(chosen) and chosen[0].arch == arch, kinds.has_buckets(spec.kind)),
            longest=max((Workload.parse(r.problem).seqlen_kv for r in chosen), default=0),
            verified=None if needs_no_proof else tuple(sorted(self.verified.get((arch, spec.symbol), ()))),
            speeds=speeds(r for r in own if r.run_as == "native"),
            waves=waves,
        )

    def knows(self, target: Target) -> bool:
        """Whether anything was measured for a target."""
        of_all = itertools.chain.from_iterable(self.measured.values())
        return any((r.arch, r.isa) == (target.arch, target.isa) for r in of_all)

    def _nearest(self, measured: Sequence[Measurement], arch: str, isa: str) -> list[Measurement]:
        """Those of the device that counts: one of this machine, else of the same arch, else of the nearest."""
        groups: dict[tuple, list[Measurement]] = {}
        for r in measured:
            distance = self._distance(r, arch, isa)
            if distance is not None:
                groups.setdefault((distance, r.device, r.run_as), []).append(r)
        return groups[min(groups, key=lambda key: (key[0], -len(groups[key])))] if groups else []

    def _distance(self, record: Measurement, arch: str, isa: str) -> tuple | None:
        if record.isa != isa or FAMILY.get(record.arch) != FAMILY[arch]:
            return None
        return (_steps(record.arch, arch), record.run_as != "native", record.device not in self.here)


def _steps(one: str, other: str) -> int:
    """How far apart two archs of a family are."""
    archs = [arch for arch, family in FAMILY.items() if family == FAMILY[one]]
    return abs(archs.index(one) - archs.index(other))


def devices_here() -> frozenset[str]:
    """Names of the processor and the GPUs of this machine."""
    return frozenset({cpu.name(), *(cuda.gpu(index).name for index in range(cuda.device_count()))})


def speeds(measured: Iterable[Measurement]) -> dict[str, tuple[Speed, ...]]:
    """What was measured of each kernel hash; of several measurements of a problem on a device the newest counts."""
    newest: dict[tuple[str, str, str], Measurement] = {}
    for r in sorted(measured, key=lambda r: r.date):
        newest[r.kernel_hash, r.device, r.problem] = r
    found: dict[str, list[Speed]] = {}
    for (kernel_hash, device, problem), r in newest.items():
        w = Workload.parse(problem)
        seqlen_q, seqlen_kv = w.totals
        speed = Speed(
            device=device,
            **{n: getattr(w, n) for n in ("batch", "heads", "head_dim")},
            seqlen_q=seqlen_q,
            seqlen_kv=seqlen_kv,
            microseconds=r.microseconds,
            tflops=r.tflops,
            record=r.name,
        )
        found.setdefault(kernel_hash, []).append(speed)
    return {kernel_hash: tuple(of_it) for kernel_hash, of_it in found.items()}


def proposals(measured: Sequence[Measurement], exact: bool, by_length: bool = True) -> tuple[Proposal, ...]:
    """Configurations by length for one kernel on one device; none where the default is the best everywhere.

    ``exact``: whether the records are of the arch that is built for.  ``by_length``: whether there may be several.
    """

    def length_of(r: Measurement) -> int:
        return Workload.parse(r.problem).seqlen_kv if by_length else 0

    current = tables.of_newest_source(measured)
    lengths = sorted(set(map(length_of, current)))
    costs, found = _costs(current, length_of)
    worth = WORTH["cpu" if any(r.arch == "cpu" for r in current) else "cuda"]
    segments = _segments(lengths, costs, worth)
    if all(config is None for _, config in segments):
        return ()
    chosen = []
    for start, (first, config) in enumerate(segments):
        bucket = 0 if start == 0 else first
        if config is None:
            chosen.append(Proposal(bucket, None))
        else:
            record = found[config, first]
            chosen.append(Proposal(bucket, record.config, record.kernel_hash if exact else "", record.name))
    return tuple(chosen)


def _costs(measured: Sequence[Measurement], length_of: Callable[[Measurement], int]) -> tuple[dict, dict]:
    """Logarithms of time over the default's by configuration (None: the default) and length; a record of each."""
    ratios: dict[tuple[str | None, int], dict[str, float]] = {}
    found: dict[tuple[str | None, int], Measurement] = {}
    for r in sorted(measured, key=lambda r: r.date):
        if r.default or (r.gain and not r.given_up):
            key = (None if r.default else json.dumps(r.config, sort_keys=True), length_of(r))
            ratios.setdefault(key, {})[r.problem] = 0.0 if r.default else -math.log(r.gain)
            found[key] = r
    problems = {length: set() for _, length in ratios}
    for (_, length), by_problem in ratios.items():
        problems[length] |= set(by_problem)
    costs: dict[str | None, dict[int, float]] = {}
    for (config, length), by_problem in ratios.items():
        if config is None or set(by_problem) == problems[length]:
            costs.setdefault(config, {})[length] = statistics.fmean(by_problem.values())
    costs.setdefault(None, {})
    costs[None] = {length: costs[None].get(length, 0.0) for length in problems}
    return costs, found


def _segments(
    lengths: Sequence[int], costs: Mapping[str | None, Mapping[int, float]], worth: float
) -> list[tuple[int, str | None]]:
    """The cheapest division of the lengths into ranges with one configuration each: their first lengths, and which."""
    best: list[tuple[float, list[tuple[int, str | None]]]] = [(0.0, [])]
    for end in range(1, len(lengths) + 1):
        options = []
        for start in range(end):
            inside = lengths[start:end]
            for config, by_length in costs.items():
                if all(length in by_length for length in inside):
                    price = worth * (config is not None) * len(inside) + worth * (start > 0)
                    total = best[start][0] + sum(by_length[length] for length in inside) + price
                    options.append((total, [*best[start][1], (lengths[start], config)]))
        best.append(min(options, key=lambda option: option[0]))
    segments = best[-1][1]
    return [s for i, s in enumerate(segments) if i == 0 or s[1] != segments[i - 1][1]]

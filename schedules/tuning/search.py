"""A search: strategies propose, candidates are built and measured, strategies hear what came out.  Needs TVM."""

from __future__ import annotations

import dataclasses
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from schedules.builder import records
from schedules.builder.plan import sources_digest
from schedules.builder.records import Measurement
from schedules.builder.suite import KernelSpec
from schedules.families import maker_of
from schedules.families.interface import Target
from schedules.tuning import kinds
from schedules.tuning.batch import Options
from schedules.tuning.budget import Budget
from schedules.tuning.emit import NotMade, Proposal, begin, defaults_of, emit, space_of
from schedules.tuning.folder import Folder
from schedules.tuning.measure import Engine
from schedules.tuning.progress import Progress
from schedules.tuning.strategy import STRATEGIES, geometric_mean
from tvm_flash.measure.workloads import Workload


@dataclass(frozen=True)
class Search:
    """What is searched, where and for how long.

    Attributes
    ----------
    target: the machine.
    tasks: kernels, with the workloads of each.
    strategy: a name of ``STRATEGIES``; ``seed`` is of its random numbers.
    generation: configurations of a kernel that are built and measured before the strategy is asked again.
    jobs: processes that build.
    resume: go on with what the folder and the log know.
    variations: fields of each kernel's defaults, and their values, that are tried before what the strategy proposes.
    log: of the device; all of ``tuning_logs/`` if it isn't known.
    """

    target: Target
    tasks: Mapping[KernelSpec, Sequence[Workload]]
    strategy: str
    budget: Budget
    folder: Path
    generation: int = 8
    seed: int = 0
    jobs: int = 1
    resume: bool = False
    variations: Sequence[Mapping[str, Any]] = ()
    log: Path | None = None
    not_made: list[NotMade] = field(default_factory=list)

    def prepare(self) -> Folder:
        """The folder, empty unless it can be resumed.

        Raises
        ------
        ValueError: it holds something else.
        """
        if self.folder.exists() and not (self.resume and self._can_go_on()):
            if any(self.folder.iterdir()) and not (self.folder / "candidates").is_dir():
                raise ValueError(f"{self.folder}: holds something else than candidates; name a new folder")
            shutil.rmtree(self.folder)
        folder = Folder(self.folder).make()
        begin(folder, self.target, self.tasks)
        return folder

    def _can_go_on(self) -> bool:
        """Whether what the folder holds is of this target and of the present sources."""
        try:
            emission = Folder(self.folder).emission()
        except ValueError:  # an earlier run was stopped before it wrote anything
            return False
        now = (sources_digest(self.target.arch), self.target.arch, self.target.isa)
        return (emission.sources, emission.arch, emission.isa) == now

    def emit(self, progress: Progress) -> int:
        """Write one generation of the whole budget, to be measured elsewhere; how many configurations it has."""
        folder = self.prepare()
        known = self._known(folder)
        strategies = self._strategies(known)
        proposals = self._variations(known)
        proposals += self._propose(strategies, known, math.ceil(self.budget.configs / len(self.tasks)))
        self._emit(folder, proposals, "000", progress)
        return len(proposals)

    def run(self, options: Options, engine: Engine, progress: Progress) -> None:
        """Search until the budget is used up or there is nothing left to try."""
        start = time.monotonic()
        options = replace(options, deadline=start + self.budget.seconds)
        folder = self.prepare()
        engine.measure(folder, options, progress)  # what an earlier run left
        known = self._known(folder)
        if variations := self._variations(known):
            self._emit(folder, variations, f"{len(folder.batches()):05d}", progress)
            engine.measure(folder, options, progress)
            known = self._known(folder)
        strategies = self._strategies(known)
        tried = sum(map(len, known.values()))
        number = len(folder.batches())
        while tried < self.budget.configs and time.monotonic() < options.deadline:
            left = (
                math.ceil((self.budget.configs - tried) / len(self.tasks)) if self.budget.configs < math.inf else None
            )
            proposals = self._propose(strategies, known, min(self.generation, left or self.generation))
            if not proposals:
                return
            tried += len(proposals)
            self._emit(folder, proposals, f"{number:05d}", progress)
            number += 1
            engine.measure(folder, options, progress)
            known = self._known(folder)
            for spec, strategy in strategies.items():
                strategy.tell(known[spec])

    def _variations(self, known) -> list[Proposal]:
        """The variations that nobody has measured yet.

        Raises
        ------
        ValueError: the family's configurations have no such field.
        """
        given = {name for fields in self.variations for name in fields}
        for kind in dict.fromkeys(spec.kind for spec in self.tasks):
            names = [f.name for f in dataclasses.fields(maker_of(self.target, kind).Config)]
            for name in sorted(given - set(names)):
                whose = f"a {kind} configuration for {self.target}"
                raise ValueError(f"--variation {name}: unknown; {whose} has {', '.join(names)}")
        proposals = {}
        for spec in self.tasks:
            for fields in self.variations:
                for base in defaults_of(spec, self.target).values():
                    config = replace(base, **fields)
                    if config not in known[spec]:
                        proposals[spec, config] = Proposal(spec, config, f"variation {len(proposals)}")
        return list(proposals.values())

    def _strategies(self, known) -> dict[KernelSpec, Any]:
        make = STRATEGIES[self.strategy]
        return {spec: make(space_of(spec, self.target), self.seed, known[spec]) for spec in self.tasks}

    def _propose(self, strategies, known, count: int) -> list[Proposal]:
        proposals = []
        for spec, strategy in strategies.items():
            first = len(known[spec])
            proposals += [
                Proposal(spec, config, f"{self.strategy} {first + i}") for i, config in enumerate(strategy.next(count))
            ]
        return proposals

    def _emit(self, folder: Folder, proposals: list[Proposal], prefix: str, progress: Progress) -> None:
        progress.begin("building", len(proposals))
        _, not_made = emit(folder, self.target, self.tasks, proposals, prefix, self.jobs, progress.step)
        self.not_made.extend(not_made)

    def _known(self, folder: Folder) -> dict[KernelSpec, dict[Any, float]]:
        """Costs by configuration: of this folder's measurements, and if resumed of the logs'; defaults cost 1."""
        logs = [self.log] if self.log else sorted(records.LOGS.glob("*.jsonl"))
        found = [line for path in logs if self.resume and path.exists() for line in records.read(path)]
        measured = [r for r in (*found, *folder.records()) if isinstance(r, Measurement)]
        known = {}
        for spec in self.tasks:
            costs = costs_of(measured, spec, self.target, maker_of(self.target, spec.kind).Config)
            known[spec] = dict.fromkeys(defaults_of(spec, self.target).values(), 1.0) | costs
            known[spec] |= {n.proposal.config: math.inf for n in self.not_made if n.proposal.spec == spec}
        return known


def costs_of(measured: Iterable[Measurement], spec: KernelSpec, target: Target, config: type) -> dict[Any, float]:
    """Time over that of the incumbent by configuration, geometric mean over the problems; infinite where it failed."""
    ratios: dict[Any, dict[str, float]] = {}
    for r in measured:
        if kinds.kernel_of(r) == kinds.kernel_of_spec(spec) and (r.arch, r.isa) == (target.arch, target.isa):
            try:
                key = config(**r.config)
            except TypeError:  # an older version of the family had other fields
                continue
            ratio = math.inf if r.status != "ok" else 1 / r.gain if r.gain else 1.0
            ratios.setdefault(key, {})[r.problem] = ratio
    return {key: geometric_mean(by_problem.values()) for key, by_problem in ratios.items()}

"""Configurations to candidates in a folder: CUDA sources, or compiled modules for the CPU.  Needs TVM."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schedules.builder import compile as compiling
from schedules.builder.plan import sources_digest
from schedules.builder.suite import KernelSpec
from schedules.builder.workers import worker_pool
from schedules.definition.pattern import Pattern
from schedules.families import family_of, kinds_of, maker_of
from schedules.families.interface import Rejected, Target
from schedules.toolchain import cpu
from schedules.toolchain.process import ToolchainError
from schedules.tuning import kinds
from schedules.tuning.candidate import Batch, Candidate, Emission
from schedules.tuning.folder import Folder
from schedules.tuning.space import Space
from tvm_flash.measure.workloads import Workload

#: Candidates of one batch: enough to share the start of a process, few enough to lose little with it.
BATCH = 24


@dataclass(frozen=True)
class Proposal:
    """A configuration of a kernel to be tried; ``search`` as in :class:`Candidate`."""

    spec: KernelSpec
    config: Any
    search: str


@dataclass(frozen=True)
class NotMade:
    """A configuration that is no candidate, and why."""

    proposal: Proposal
    reason: str


def space_of(spec: KernelSpec, target: Target) -> Space:
    """The configurations of a kernel."""
    return Space.of(spec.template, _pattern(spec, target), target, spec.kind)


@functools.lru_cache(maxsize=64)
def _pattern(spec: KernelSpec, target: Target) -> Pattern:
    return compiling.pattern_of(spec, target)


def defaults_of(spec: KernelSpec, target: Target) -> Mapping[int, Any]:
    """The family's configurations for a kernel by bucket."""
    return maker_of(target, spec.kind).default_configs(spec.template, _pattern(spec, target), target)


def default_for(spec: KernelSpec, target: Target, workload: Workload) -> Any:
    """The configuration that the family has for a kernel at a length."""
    configs = defaults_of(spec, target)
    return configs[max(bucket for bucket in configs if bucket <= workload.seqlen_kv)]


def begin(folder: Folder, target: Target, specs: Iterable[KernelSpec]) -> None:
    """Say what the candidates of a folder have in common, and put what they share into it."""
    rejections = {spec.symbol: dict(space_of(spec, target).rejections()) for spec in specs}
    versions = compiling.versions_for(target)
    folder.write_emission(Emission(target.arch, target.isa, versions, sources_digest(target.arch), rejections))
    if target.arch == "cpu" and not _runtime(folder).exists():
        draft = folder.path / "runtime.draft"
        cpu.build_runtime(draft, soname=cpu.runtime_name())
        os.replace(draft, _runtime(folder))


def _runtime(folder: Folder) -> Path:
    return folder.path / "modules" / cpu.runtime_name()


def emit(
    folder: Folder,
    target: Target,
    tasks: Mapping[KernelSpec, Sequence[Workload]],
    proposals: Sequence[Proposal],
    prefix: str,
    jobs: int,
    progress: Callable[[], None] = lambda: None,
) -> tuple[dict[Proposal, Candidate], list[NotMade]]:
    """Write candidates, the defaults beside them, and the batches in which they are measured.

    Several proposals may turn out to be the same kernel, and then are one candidate.

    Parameters
    ----------
    tasks: the workloads of each kernel.
    prefix: of the batches' names, which are measured in alphabetical order.
    jobs: processes.
    progress: called for each that is made.
    """
    # 1. The defaults for every length are candidates too: they are what others are compared with.
    defaults = {
        (spec, w): Proposal(spec, default_for(spec, target, w), "default") for spec, ws in tasks.items() for w in ws
    }
    wanted = list(dict.fromkeys((*defaults.values(), *proposals)))
    candidates, not_made = _make_all(folder, target, tasks, wanted, jobs, progress)
    # 2. Kernels of both templates and of several kinds for the same workloads share batches, so that their times can be
    #    compared.
    groups: dict[tuple[Workload, ...], list[KernelSpec]] = {}
    for spec, workloads in tasks.items():
        groups.setdefault(tuple(workloads), []).append(spec)
    for number, (workloads, specs) in enumerate(groups.items()):
        incumbents = {
            spec.symbol: {
                str(w): candidates[defaults[spec, w]].id for w in workloads if defaults[spec, w] in candidates
            }
            for spec in specs
        }
        ids = list(dict.fromkeys(c.id for p, c in candidates.items() if p.spec in specs))
        for part, start in enumerate(range(0, len(ids), BATCH)):
            name = f"{prefix}-{number:03d}-{part}"
            texts = tuple(map(str, workloads))
            folder.add_batch(Batch(name, tuple(ids[start : start + BATCH]), texts, incumbents))
    return {p: candidates[p] for p in proposals if p in candidates}, not_made


def _make_all(folder, target, tasks, wanted, jobs, progress) -> tuple[dict[Proposal, Candidate], list[NotMade]]:
    results: dict[Proposal, Candidate | NotMade] = {}
    if jobs == 1:
        for proposal in wanted:
            results[proposal] = _make(folder.path, target, proposal, tasks[proposal.spec])
            progress()
    else:
        with worker_pool(jobs) as pool:
            futures = {pool.submit(_make, folder.path, target, p, tasks[p.spec]): p for p in wanted}
            try:
                for future in as_completed(futures):
                    results[futures[future]] = future.result()
                    progress()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    made = {p: results[p] for p in wanted if isinstance(results[p], Candidate)}
    return made, [results[p] for p in wanted if p not in made]


def _make(path: Path, target: Target, proposal: Proposal, workloads: Sequence[Workload]) -> Candidate | NotMade:
    """One candidate with its source or module; in a worker process."""
    folder, spec = Folder(path), proposal.spec
    pattern = _pattern(spec, target)
    try:
        lowered = compiling.lower(spec, pattern, target, proposal.config)
    except Exception as e:  # whatever a family does wrong with one configuration, others go on
        return NotMade(proposal, f"{type(e).__name__}: {e}")
    if isinstance(lowered, Rejected):
        return NotMade(proposal, lowered.reason)
    id = f"{spec.symbol}-{lowered.kernel_hash[:12]}"
    entry = compiling.entry_of(spec, target, pattern, lowered, proposal.search, {})
    if too_many := [str(w) for w in workloads if not kinds.has_room(entry, w)]:
        return NotMade(proposal, f"it is for fewer query rows a key than {', '.join(too_many)}")
    candidate = Candidate(id, target.isa, entry, lowered.kernel_hash, proposal.search)
    if not folder.has(id):
        if target.arch == "cpu":
            _make_module(folder, target, spec, lowered, id)
        else:
            folder.source(id).write_text(lowered.text)
        folder.add(candidate)
    return candidate


def _make_module(folder: Folder, target: Target, spec: KernelSpec, lowered, id: str) -> None:
    draft = folder.path / "modules" / f"{id}.{os.getpid()}"
    compiling.make_cpu_object(lowered, target, draft.with_suffix(".o"))
    try:
        cpu.link_module([draft.with_suffix(".o")], draft, _runtime(folder))
        os.replace(draft, folder.module(id))
    except ToolchainError as e:
        folder.fail(id, str(e))
    draft.with_suffix(".o").unlink()


def tasks_for(
    workloads: Iterable[Workload], templates: Iterable[str], target: Target, asked: Sequence[str] = ()
) -> dict[KernelSpec, list[Workload]]:
    """The kernels that workloads need, with the workloads of each; those that the machine can't have are left out.

    ``asked`` names their kinds; the usual one for each workload if it is empty.
    """
    family, tasks = family_of(target), {}
    for workload in workloads:
        for kind in kinds.of(workload, asked):
            if kind in kinds_of(target) and workload.dtype in family.DTYPES:
                for template in kinds.templates_of(kind, templates, family.TEMPLATES):
                    spec = kinds.spec_for(kind, template, workload, target)
                    tasks.setdefault(spec, []).append(workload)
    return {s: w for s, w in tasks.items() if space_of(s, target).refusal(space_of(s, target).base) is None}

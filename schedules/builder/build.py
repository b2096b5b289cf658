"""The builder: what is asked for → what is missing → objects → modules → packs.

Kernels are compiled in worker processes to one object each, and the objects are kept beside the packs.  The objects of
a group (template, dtype, head_dim, definition) are linked to one module.  A build only ever replaces the kernels that
it was asked for, and of a definition of the user's own also drops those of what it no longer says.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from schedules.builder import pack, records
from schedules.builder.compile import IMAGES, Built, Failed, Job, Refused, compile_spec, versions_for
from schedules.builder.plan import BuildRequest, PackPlan, Result, is_of_this_text, plan, select, write_record
from schedules.builder.suite import KernelSpec
from schedules.builder.support import support_files
from schedules.builder.workers import worker_pool
from schedules.families import family_of
from schedules.families.interface import GRADIENT_KINDS, Target
from schedules.toolchain import cpu, cuda, inspection, nvcc
from schedules.toolchain.process import ToolchainError
from tvm_flash.machine.cpu import RUNTIME_STEM
from tvm_flash.packs.manifest import KernelEntry, Manifest, ModuleFile


@dataclass(frozen=True)
class PackReport:
    """What became of one pack: results by kernel, modules linked anew, what was there already, what was dropped.

    ``outdated`` are kernels of the definition of this build that were dropped, since they computed what it no longer
    says.
    """

    target: Target
    folder: Path
    results: tuple[Result, ...]
    up_to_date: tuple[KernelEntry, ...]
    manifest: Manifest | None
    linked: tuple[ModuleFile, ...] = ()
    dropped: tuple[KernelEntry, ...] = ()
    outdated: tuple[KernelEntry, ...] = ()

    @property
    def failed(self) -> bool:
        """Whether a kernel that should have been built was not, or nothing at all could be."""
        return any(isinstance(r, Failed) for r in self.results) or self.manifest is None


# ---------------------------------------------------------------- compiling


def compile_jobs(
    jobs: list[Job], workers: int, begun: Callable[[], None] = lambda: None
) -> Iterator[tuple[Job, list[Result]]]:
    """Compile in ``workers`` processes (in this one if that is 1), results as they come.

    ``begun`` is called when the processes have begun, before any result is given; what it raises ends them.
    """
    if workers == 1 or len(jobs) < 2:
        begun()
        for job in jobs:
            yield job, compile_spec(job)
        return
    pool = worker_pool(min(workers, len(jobs)))
    try:
        futures = {pool.submit(compile_spec, job): job for job in jobs}
        begun()
        for future in as_completed(futures):
            yield futures[future], future.result()
        pool.shutdown()
    except BrokenProcessPool as e:
        raise ToolchainError("a compiler process died; out of memory? Fewer --jobs need less of it") from e
    except BaseException:
        for process in (pool._processes or {}).values():
            process.kill()
        pool.shutdown(wait=False, cancel_futures=True)
        raise


# ---------------------------------------------------------------- modules and packs


def build(
    request: BuildRequest,
    progress: Callable[[Job, list[Result]], None] = lambda *_: None,
    begun: Callable[[int], None] = lambda _: None,
) -> list[PackReport]:
    """Build what is asked for and isn't there.

    Parameters
    ----------
    request: which kernels, for which machines.
    progress: called for every spec as it comes out of the compiler.
    begun: called with how many specs there are to compile, while the first ones are being compiled: for checks that
        take long.  What it raises ends the build; of what was compiled nothing is recorded, so that the next build,
        which compiles it again, checks again too.

    Raises
    ------
    ValueError, DefinitionError: the request can't be understood; nothing was written.
    ToolchainError: a compiler is missing or died.
    PackBusyError: somebody else is building one of the packs.
    """
    # 1. Everything is checked before anything is written.
    for target in request.targets:
        select(request, target)
        versions_for(target)
        if target.arch != "cpu":
            nvcc.code_for(target.arch, request.run_on)
    with ExitStack() as locks:
        # 2. What is missing, of all packs together, so that all workers are busy.
        works = {t: locks.enter_context(pack.locked(request.output, t.folder)) for t in request.targets}
        for target in request.targets:
            pack.restore(request.output / target.folder)
        plans = [plan(request, target) for target in request.targets]
        made_from = {(p.target, spec): of for p in plans for spec, of in p.made_from.items()}
        done: dict[tuple[Target, KernelSpec], tuple[Result, ...]] = {}
        # 3. Compile; what is finished is remembered even if the build is killed.
        jobs = _longest_first(job for p in plans for job in p.jobs)
        for job, results in compile_jobs(jobs, request.jobs, lambda: begun(len(jobs))):
            results = [_excused(job.target, r) for r in results]
            write_record(works[job.target], job.spec, made_from[job.target, job.spec], results)
            done[job.target, job.spec] = tuple(results)
            progress(job, results)
        # 4. Link and publish, pack by pack.
        return [_write_pack(request, p, {s: done.get((p.target, s)) or p.cached[s] for s in p.specs}) for p in plans]


def _longest_first(jobs: Iterable[Job]) -> list[Job]:
    """Those that take long before others of their pack and template, so that no worker is left with one in the end.

    What templates have in common is compiled with the first of them.
    """

    def order(job: Job) -> tuple:
        spec = job.spec
        return spec.template, spec.kind not in GRADIENT_KINDS, -spec.head_dim

    return [job for _, of_pack in itertools.groupby(jobs, lambda job: job.target) for job in sorted(of_pack, key=order)]


def _excused(target: Target, result: Result) -> Result:
    """A kernel that doesn't compile is no failure where none like it was ever run: it would not ship either."""
    if isinstance(result, Failed) and (target.arch, result.symbol) in records.awaiting():
        return Refused(result.symbol, f"{result.reason}; no GPU has run this kernel yet, and packs do without it")
    return result


def _write_pack(request: BuildRequest, plan_: PackPlan, results: Mapping[KernelSpec, tuple[Result, ...]]) -> PackReport:
    target, folder = plan_.target, request.output / plan_.target.folder
    work = request.output / pack.WORK_FOLDER / target.folder
    isa = family_of(target).ISAS[target.isa] if target.isa else None
    versions = versions_for(target) | ({"also_runs_on": request.run_on} if request.run_on else {})
    old = pack.read_manifest(folder)
    merge = old is not None and (old.versions, old.isa) == (versions, target.isa)
    intact = {f.file: f for f in old.modules if pack.is_intact(folder, f)} if merge else {}
    pools = {file: _pool_of(folder / file) for file in intact}
    intact = {file: f for file, f in intact.items() if not pools[file] or (folder / pools[file]).is_file()}
    present = {e.symbol: e for e in old.kernels if e.module in intact} if merge else {}
    flat = tuple(r for spec in plan_.specs for r in results[spec])
    failed = {s for s in plan_.specs if any(isinstance(r, Failed) for r in results[s])}

    # 1. Kernels that nobody asked for now, and old versions of those that failed, stay, unless they are of a definition
    #    of the user's own that says something else now: nobody could tell them from those of this build.
    asked = {spec for spec in plan_.specs if spec not in failed}
    kernels = [e for e in present.values() if _spec_of(e) not in asked]
    outdated = _outdated(request, target, kernels)
    kernels = [e for e in kernels if e not in outdated]
    # 2. A group whose kernels are all in the pack, linked to its pool of threads, stays as it is; else its objects are
    #    linked to one module.
    groups: dict[str, list[Built]] = {}
    for spec in plan_.specs:
        if spec not in failed:
            groups.setdefault(spec.group, []).extend(r for r in results[spec] if isinstance(r, Built))
    support = support_files(target.arch, folder, work, old.support_files if merge else ())
    modules, up_to_date, new = dict(intact), [], {}
    for group, built in groups.items():
        old_entries = [_entry_in(present, b.entry) for b in built]
        if all(old_entries) and {pools[e.module] for e in old_entries} <= {"", *(f.file for f in support)}:
            up_to_date += old_entries
            kernels += old_entries
        elif built:
            new[group] = built
    with ThreadPoolExecutor(request.jobs) as threads:  # each waits for a linker
        linked = [*threads.map(lambda group: _link(work, folder, target, group, new[group], support), new)]
    for module, built in zip(linked, new.values(), strict=True):
        modules[module.file] = module
        kernels += [dataclasses.replace(b.entry, module=module.file) for b in built]

    gone = tuple(e for e in old.kernels if e.symbol not in {k.symbol for k in kernels}) if old else ()
    outdated = tuple(e for e in gone if e in outdated)
    dropped = tuple(e for e in gone if e not in outdated)
    if not kernels:
        return PackReport(target, folder, flat, (), None, dropped=gone)
    # 3. The manifest makes it the pack.
    used = {e.module for e in kernels}
    earlier = {pools[file] for file in used & set(pools)} - {"", *(f.file for f in support)}
    manifest = Manifest(
        arch=target.arch,
        versions=versions,
        modules=tuple(m for m in modules.values() if m.file in used),
        kernels=tuple(sorted(kernels, key=lambda e: e.symbol)),
        isa=target.isa,
        cpu_features=tuple(isa.features) if isa else (),
        support_files=(*support, *(pack.describe(folder / name) for name in sorted(earlier))),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )
    if old != dataclasses.replace(manifest, created=old.created if old else ""):
        pack.publish(folder, manifest)
    _sweep(work, plan_, results)
    return PackReport(target, folder, flat, tuple(up_to_date), manifest, tuple(linked), dropped, outdated)


def _outdated(request: BuildRequest, target: Target, kernels: list[KernelEntry]) -> list[KernelEntry]:
    """Those of kernels of the request's own definition that compute what an earlier text of it said."""
    if request.definition is None:
        return []
    own = {e.symbol: _spec_of(e) for e in kernels if e.definition == request.definition.name}
    current = is_of_this_text(request, target, dict.fromkeys(own.values()))
    return [e for e in kernels if e.symbol in own and not current[own[e.symbol]]]


def _pool_of(module: Path) -> str:
    """The file of the pool of threads that a module was linked to; none of a CUDA module."""
    return next((x for x in inspection.needed_libraries(module) if x.startswith(RUNTIME_STEM)), "")


def _spec_of(entry: KernelEntry) -> KernelSpec:
    """The spec that an entry was made from, for all buckets."""
    fields = (f.name for f in dataclasses.fields(KernelSpec))
    return KernelSpec(**{name: getattr(entry, name) for name in fields}).with_bucket(0)


def _entry_in(present: Mapping[str, KernelEntry], entry: KernelEntry) -> KernelEntry | None:
    """The pack's own entry of a kernel, if it is the same kernel."""
    old = present.get(entry.symbol)
    return old if old and dataclasses.replace(old, module="") == entry else None


def _link(work: Path, folder: Path, target: Target, group: str, built: list[Built], support) -> ModuleFile:
    draft = work / f"{group}.draft"
    objects = [work / b.object_file for b in built]
    if target.arch == "cpu":
        cpu.link_module(objects, draft, folder / support[0].file)
    else:
        cuda.link_module(objects, draft)
    return pack.store(draft, folder, group)


def _sweep(work: Path, plan_: PackPlan, results: Mapping[KernelSpec, tuple[Result, ...]]) -> None:
    """Remove object files of earlier versions of the kernels of this build, and what only served to make objects."""
    shutil.rmtree(work / IMAGES, ignore_errors=True)
    for spec in plan_.specs:
        keep = {r.object_file for r in results[spec] if isinstance(r, Built)}
        symbols = {r.entry.symbol for r in results[spec] if isinstance(r, Built)}
        for symbol in symbols:
            for path in work.glob(f"{symbol}-*.o"):
                if path.name not in keep:
                    path.unlink()
                    path.with_suffix(".json").unlink(missing_ok=True)

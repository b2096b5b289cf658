"""What a build has to do: the kernels that are asked for, and which of them earlier builds have left.

A kernel is known to be up to date by a hash of all that it is made from (the files of this package, the definition, the
configuration, the compilers), so that nothing has to be scheduled to find out.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache, partial
from pathlib import Path

from schedules.builder import pack, sources
from schedules.builder.compile import Built, Failed, Job, Refused, versions_for
from schedules.builder.configs import NO_RECORDS, ChosenConfig, Tuned
from schedules.builder.suite import SCOPES, TEMPLATES, KernelSpec, Selection
from schedules.definition.catalogue import MASKS, SCORES
from schedules.definition.definition_file import DefinitionFile
from schedules.families import (
    FAMILY,
    core_kinds_of,
    family_of,
    further_sizes,
    has_core_kernels,
    is_verified_size,
    kinds_of,
)
from schedules.families.interface import Target
from schedules.toolchain import machine
from schedules.toolchain.host import HOST_HEADER
from tvm_flash.machine.arch import by_closeness
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, FORMS, KernelEntry

ROOT = Path(__file__).resolve().parents[2]
PACKS = ROOT / "tvm_flash" / "packs"
DTYPES = ("float32", "float16", "bfloat16")

Result = Built | Refused | Failed


def default_jobs() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class BuildRequest:
    """What to build: which kernels, for which machines, with which configurations, and where to.

    Of the kernels that are selected those count whose module has one of the names ``modules``, in which ``*`` stands
    for anything; all, if there are none.  ``configs`` gives configurations by kernel symbol in place of the families'
    defaults, and ``tuning`` what records say of a kernel of the package's own definition.  ``run_on`` adds code with
    which the kernels also run on a newer arch.
    """

    targets: tuple[Target, ...]
    selection: Selection = field(default_factory=Selection)
    definition: DefinitionFile | None = None
    modules: tuple[str, ...] = ()
    output: Path = PACKS
    jobs: int = field(default_factory=default_jobs)
    run_on: str = ""
    configs: Mapping[str, ChosenConfig] = field(default_factory=dict)
    tuning: Callable[[KernelSpec, Target], Tuned] | None = None

    def tuned(self, spec: KernelSpec, target: Target) -> Tuned:
        """What records say of a kernel."""
        return NO_RECORDS if self.tuning is None or self.definition else self.tuning(spec, target)

    def has_module_of(self, spec: KernelSpec) -> bool:
        """Whether the module of a kernel is one of those named."""
        return not self.modules or any(fnmatchcase(spec.group, name) for name in self.modules)


@dataclass(frozen=True)
class MadeFrom:
    """What a spec's kernels are made from, as hashes.

    ``key`` is that of all of it; ``meaning`` that of what a definition of the user's own says for the spec
    (:func:`meaning_of`), empty of the package's own.
    """

    key: str
    meaning: str = ""


@dataclass(frozen=True)
class PackPlan:
    """For one target: every kernel asked for, what of it has to be compiled, and what earlier builds left.

    ``made_from`` says what the kernels of each spec are made from.
    """

    target: Target
    specs: tuple[KernelSpec, ...]
    jobs: tuple[Job, ...]
    cached: Mapping[KernelSpec, tuple[Result, ...]]
    made_from: Mapping[KernelSpec, MadeFrom]


# ---------------------------------------------------------------- targets and specs


def parse_targets(names: Iterable[str], isa: str = "") -> tuple[Target, ...]:
    """Targets of arch names; ``native`` is this machine's processor and its GPUs.

    ``isa`` is for the processor: instruction sets, separated by commas, or ``all``; this machine's best if empty.

    Raises
    ------
    ValueError: an arch or an instruction set is unknown.
    """
    targets = []
    for name in names:
        if name in ("native", "cpu"):
            targets += [Target("cpu", name) for name in _isas(isa)]
        if name == "native":
            for capability in machine.gpu_capabilities():
                targets += map(Target, by_closeness(FAMILY, capability)[:1])
        elif name != "cpu":
            if name not in FAMILY:
                raise ValueError(f"--arch {name}: unknown; expected native or one of {', '.join(FAMILY)}")
            targets.append(Target(name))
    return tuple(dict.fromkeys(targets))


def _isas(text: str) -> list[str]:
    known = family_of(Target("cpu")).ISAS
    if text == "all":
        return list(known)
    names = text.split(",") if text else [machine.best_isa(known)]
    for name in names:
        if name not in known:
            raise ValueError(f"--isa {name}: unknown; expected all or some of {', '.join(known)}")
    return names


def select(request: BuildRequest, target: Target) -> tuple[KernelSpec, ...]:
    """The kernels that a request names for a target.

    Raises
    ------
    ValueError: a template, dtype, mask, score, kind or form is unknown, the target has no kernels of the kinds named,
        or a definition of the user's own has the name of the package's.
    DefinitionError: the definition can't be loaded.
    """
    family, chosen = family_of(target), request.selection
    for option, values, known in (
        ("--template", chosen.templates, TEMPLATES),
        ("--mask", chosen.masks, MASKS),
        ("--score", chosen.scores, SCORES),
        ("--dtype", chosen.dtypes, DTYPES),
        ("--kind", chosen.kinds, SCOPES),
        ("--form", chosen.forms, FORMS),
    ):
        for value in values:
            if value not in known:
                raise ValueError(f"{option} {value}: unknown; expected one of {', '.join(known)}")
    kinds = kinds_of(target)
    if chosen.kinds and not set(chosen.kinds) & set(kinds):
        raise ValueError(f"--kind {','.join(chosen.kinds)}: {target} has none; it has {', '.join(kinds)}")
    kinds = kinds if chosen.kinds else core_kinds_of(target)
    if request.definition:
        if request.definition.name == BUILTIN_DEFINITION:
            raise ValueError(
                f"--definition {request.definition.path}:{request.definition.name}: has the name of the package's own "
                f"definition, whose kernels it would replace; give it another name"
            )
        variants = [request.definition.variant()]
        specs = chosen.specs(family.DTYPES, request.definition.name, variants, kinds=kinds, templates=family.TEMPLATES)
        return tuple(filter(request.has_module_of, specs))
    specs = chosen.specs(
        family.DTYPES,
        gpu=target.arch != "cpu",
        kinds=kinds,
        templates=family.TEMPLATES,
        has=partial(has_core_kernels, target),
        further=further_sizes(target),
    )
    specs = (s for s in specs if chosen.kinds or is_verified_size(target, s.kind, s.head_dim, s.head_dim_v))
    return tuple(filter(request.has_module_of, specs))


# ---------------------------------------------------------------- what is there already


def sources_digest(arch: str) -> str:
    """Hash of every file that decides what a kernel for an arch becomes, and of its manifest entry's form."""
    return _digest_of_family(FAMILY[arch])


@cache
def _digest_of_family(name: str) -> str:
    files = sources.closure("schedules.builder.compile", f"schedules.families.{name}")
    return sources.digest(files | {HOST_HEADER})


def made_from(request: BuildRequest, target: Target, specs: Iterable[KernelSpec]) -> dict[KernelSpec, MadeFrom]:
    """What the kernels of specs are made from; as long as it stays the same, so do they."""
    specs, definition = tuple(specs), request.definition
    meanings = _meanings(definition.load(), target, specs) if definition else {}
    of_all = {
        "sources": sources_digest(target.arch),
        "target": dataclasses.asdict(target),
        "versions": versions_for(target),
        "run_on": request.run_on,
        "definition": definition.path.read_text() if definition else "",
    }
    found = {}
    for spec in specs:
        parts = {
            **of_all,
            "spec": dataclasses.asdict(spec),
            "configs": {
                symbol: dataclasses.asdict(config)
                for symbol, config in request.configs.items()
                if symbol.startswith(spec.symbol)
            },
            "tuned": dataclasses.asdict(request.tuned(spec, target)),
        }
        if definition:
            parts["meaning"] = meanings[spec]
        key = hashlib.sha256(json.dumps(parts, sort_keys=True, default=dict).encode()).hexdigest()
        found[spec] = MadeFrom(key, meanings.get(spec, ""))
    return found


def _meanings(definition: Callable, target: Target, specs: Iterable[KernelSpec]) -> dict[KernelSpec, str]:
    """Hash of what a definition of the user's own says for each spec, wherever it has that from.

    That is its TensorIR: its file's text may stay the same where a file changes that it imports or reads.  What can't
    be made has none: the compiler says why.
    """
    index_dtype = family_of(target).INDEX_DTYPE
    known: dict[tuple, str] = {}
    for spec in specs:
        of = (spec.head_dim, spec.head_dim_v, spec.dtype)
        if of not in known:
            try:
                function = definition(of[0], of[2], head_dim_v=of[1], index_dtype=index_dtype)
                known[of] = hashlib.sha256(function.script(show_meta=True).encode()).hexdigest()
            except Exception:  # whatever it is, it will come again when the kernel is made, and is reported then
                known[of] = ""
    return {spec: known[spec.head_dim, spec.head_dim_v, spec.dtype] for spec in specs}


def _record_path(work: Path, spec: KernelSpec) -> Path:
    return work / f"{spec.symbol}.record.json"


def write_record(work: Path, spec: KernelSpec, of: MadeFrom, results: Iterable[Result]) -> None:
    """Leave a spec's results for later builds, unless a kernel failed."""
    results = tuple(results)
    if any(isinstance(r, Failed) for r in results):
        return
    built = [dataclasses.asdict(r) for r in results if isinstance(r, Built)]
    refused = [dataclasses.asdict(r) for r in results if isinstance(r, Refused)]
    record = {"key": of.key, "meaning": of.meaning, "built": built, "refused": refused}
    pack.write_atomically(_record_path(work, spec), json.dumps(record, indent=1))


def _read_record(work: Path, spec: KernelSpec, key: str) -> tuple[Result, ...] | None:
    """The results of an earlier build of the same sources, if its objects are still there."""
    try:
        record = json.loads(_record_path(work, spec).read_text())
        if record["key"] != key:
            return None
        built = [Built(**{**r, "entry": KernelEntry.from_dict(r["entry"])}) for r in record["built"]]
        refused = [Refused(**r) for r in record["refused"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (*built, *refused) if all((work / r.object_file).exists() for r in built) else None


def is_of_this_text(request: BuildRequest, target: Target, specs: Iterable[KernelSpec]) -> dict[KernelSpec, bool]:
    """Of each spec of the request's own definition, whether the kernels of an earlier build compute what it says now.

    Those of which nobody knows what they were made from don't.
    """
    work = request.output / pack.WORK_FOLDER / target.folder
    specs = tuple(specs)
    meanings = _meanings(request.definition.load(), target, specs)
    return {spec: meanings[spec] != "" and _recorded_meaning(work, spec) == meanings[spec] for spec in specs}


def _recorded_meaning(work: Path, spec: KernelSpec) -> str | None:
    try:
        return json.loads(_record_path(work, spec).read_text()).get("meaning")
    except (OSError, ValueError, AttributeError):
        return None


def plan(request: BuildRequest, target: Target) -> PackPlan:
    """What has to be compiled for a target; writes nothing."""
    work = request.output / pack.WORK_FOLDER / target.folder
    specs = select(request, target)
    made = made_from(request, target, specs)
    cached, jobs = {}, []
    for spec in specs:
        results = _read_record(work, spec, made[spec].key)
        if results is None:
            jobs.append(
                Job(
                    spec, target, work, request.definition, request.configs, request.run_on, request.tuned(spec, target)
                )
            )
        else:
            cached[spec] = results
    return PackPlan(target, specs, tuple(jobs), cached, made)

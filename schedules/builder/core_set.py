"""The CUDA kernels that ship, by the hashes of their sources; ``tuning_logs/core_set.json`` keeps these.

To lower all of them takes minutes, and what comes out of a family depends on nothing but the files that make its
kernels and the versions of TVM and of the compilers.  So the file says for each family of which of these it is, and is
believed while those are the same.  ``scripts/lower_core_set.py`` writes anew what isn't.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from schedules.builder.compile import lower_for_each
from schedules.builder.plan import BuildRequest, select, sources_digest
from schedules.builder.records import LOGS
from schedules.builder.suite import KernelSpec
from schedules.families import FAMILY, family_of
from schedules.families.interface import Rejected, Target
from schedules.toolchain import cuda

PATH = LOGS / "core_set.json"


@dataclass(frozen=True)
class Group:
    """Kernels of the core set that share a module, for the archs of one family."""

    family: str
    name: str
    targets: tuple[Target, ...]
    specs: tuple[KernelSpec, ...]

    def lowered(self) -> dict[str, str]:
        """What :meth:`lowered_spec` says of all specs."""
        return {name: found for spec in self.specs for name, found in self.lowered_spec(spec).items()}

    def lowered_spec(self, spec: KernelSpec) -> dict[str, str]:
        """By arch and symbol, as ``"sm_80 v1_…"``: the hash of a source, or ``"refused: …"`` with the reason."""
        found = {}
        for one, target, _, lowered, _ in lower_for_each(spec, self.targets, {}):
            refused = isinstance(lowered, Rejected)
            found[f"{target.arch} {one.symbol}"] = f"refused: {lowered.reason}" if refused else lowered.source_hash
        return found


def groups() -> Iterator[Group]:
    """The whole core set of all GPUs."""
    for family, targets in _families().items():
        chosen = select(BuildRequest(targets), targets[0])
        specs = [s for s in chosen if s.template in family_of(targets[0]).TEMPLATES]
        for group, members in itertools.groupby(specs, key=lambda s: s.group):
            yield Group(family, f"{family}-{group}", targets, tuple(members))


def _families() -> dict[str, tuple[Target, ...]]:
    """The families of GPUs, with their archs."""
    found: dict[str, tuple[Target, ...]] = {}
    for arch, name in FAMILY.items():
        if arch != "cpu":
            found[name] = (*found.get(name, ()), Target(arch))
    return found


def inputs(family: str) -> str:
    """sha256 of all that the hashes of a family's kernels depend on."""
    archs = [target.arch for target in _families()[family]]
    versions = [importlib.metadata.version("apache-tvm"), *map(cuda.compiler_version, archs)]
    return hashlib.sha256("\0".join((*versions, *map(sources_digest, archs))).encode()).hexdigest()


def known(path: Path = PATH) -> dict[str, dict[str, str]]:
    """What is written of each group, by its name, but for families of which it is of other files or versions."""
    written = _written(path)
    present = {family for family, made_of in written["inputs"].items() if made_of == inputs(family)}
    return {name: found for name, found in written["groups"].items() if name.partition("-")[0] in present}


def _written(path: Path) -> Mapping[str, Mapping]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {"inputs": {}, "groups": {}}


def write(jobs: int, path: Path = PATH) -> Iterable[str]:
    """Lower in ``jobs`` processes what isn't known, and write everything; the names of groups as they are done."""
    before, every, found = {family: inputs(family) for family in _families()}, [*groups()], known(path)
    missing = [group for group in every if group.name not in found]
    with ProcessPoolExecutor(jobs) as pool:
        for group, lowered in zip(missing, pool.map(Group.lowered, missing), strict=True):
            found[group.name] = dict(sorted(lowered.items()))
            yield group.name
    written = {group.name: found[group.name] for group in sorted(every, key=lambda group: group.name)}
    path.write_text(json.dumps({"inputs": before, "groups": written}, indent=1) + "\n")

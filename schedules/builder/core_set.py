"""The CUDA kernels that ship, by the hashes of their sources; ``tuning_logs/core_set.json`` keeps these.

To lower all of them takes minutes, and what comes out depends on nothing but the files that make kernels and the
versions of TVM and of the compilers.  So the file says of which of these it is, and is believed while those are the
same.  ``scripts/lower_core_set.py`` writes it anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from schedules.builder.compile import lower_for_each
from schedules.builder.plan import BuildRequest, select
from schedules.builder.records import LOGS
from schedules.builder.suite import KernelSpec
from schedules.families import FAMILY, family_of
from schedules.families.interface import Rejected, Target
from schedules.toolchain import cuda

PATH = LOGS / "core_set.json"
_ROOT = Path(__file__).resolve().parents[2]

#: Folders and files that a kernel's source can depend on.
_MAKERS = (
    *(f"schedules/{name}" for name in ("definition", "families", "templates", "tile", "toolchain")),
    *(f"schedules/builder/{name}.py" for name in ("compile", "configs", "suite")),
    *(f"tvm_flash/{name}.py" for name in ("catalogue", "operators", "packs/manifest")),
)


@dataclass(frozen=True)
class Group:
    """Kernels of the core set that share a module, for the archs of one family."""

    name: str
    targets: tuple[Target, ...]
    specs: tuple[KernelSpec, ...]

    def lowered(self) -> dict[str, str]:
        """By arch and symbol, as ``"sm_80 v1_…"``: the hash of a source, or ``"refused: …"`` with the reason."""
        found = {}
        for spec in self.specs:
            for one, target, _, lowered, _ in lower_for_each(spec, self.targets, {}):
                refused = isinstance(lowered, Rejected)
                found[f"{target.arch} {one.symbol}"] = f"refused: {lowered.reason}" if refused else lowered.source_hash
        return found


def groups() -> Iterator[Group]:
    """The whole core set of all GPUs."""
    families: dict[str, list[Target]] = {}
    for arch, name in FAMILY.items():
        if arch != "cpu":
            families.setdefault(name, []).append(Target(arch))
    for name, targets in families.items():
        chosen = select(BuildRequest(tuple(targets)), targets[0])
        specs = [s for s in chosen if s.template in family_of(targets[0]).TEMPLATES]
        for group, members in itertools.groupby(specs, key=lambda s: s.group):
            yield Group(f"{name}-{group}", tuple(targets), tuple(members))


def inputs() -> str:
    """sha256 of all that the hashes depend on."""
    digest = hashlib.sha256()
    for version in (
        importlib.metadata.version("apache-tvm"),
        *(cuda.compiler_version(a) for a in FAMILY if a != "cpu"),
    ):
        digest.update(version.encode() + b"\0")
    for path in _files():
        digest.update(f"{path.relative_to(_ROOT)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _files() -> list[Path]:
    found: list[Path] = []
    for name in _MAKERS:
        path = _ROOT / name
        found += [path] if path.is_file() else [p for p in path.rglob("*") if p.suffix in (".py", ".h", ".c")]
    return sorted(path for path in found if "cpu" not in path.parts)  # another family's


def known(path: Path = PATH) -> dict[str, dict[str, str]]:
    """What is written of each group, by its name; empty if it is of other files or versions."""
    try:
        written = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return written["groups"] if written["inputs"] == inputs() else {}


def write(jobs: int, path: Path = PATH) -> Iterable[str]:
    """Lower everything in ``jobs`` processes and write it; the names of groups as they are done."""
    before, every = inputs(), sorted(groups(), key=lambda g: g.name)
    with ProcessPoolExecutor(jobs) as pool:
        found = {}
        for group, lowered in zip(every, pool.map(Group.lowered, every), strict=True):
            found[group.name] = dict(sorted(lowered.items()))
            yield group.name
    path.write_text(json.dumps({"inputs": before, "groups": found}, indent=1) + "\n")

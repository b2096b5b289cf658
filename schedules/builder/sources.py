"""Which files of this package decide what a kernel becomes: those that its modules import, followed from file to file.

A change of one family's files, or of a command's, then leaves the kernels of the other families up to date.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: The package whose files count: a kernel is made from nothing of the run time.
_PACKAGE = "schedules"


def digest(paths: Iterable[Path]) -> str:
    """sha256 of files by name and contents."""
    result = hashlib.sha256()
    for path in sorted(paths):
        result.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return result.hexdigest()


def closure(*modules: str) -> frozenset[Path]:
    """The files of modules of this package and of all that they import from it, also inside functions."""
    found: set[Path] = set()
    waiting = [path for module in modules for path in _files(module)]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imported(path)
    return frozenset(found)


def _files(module: str) -> list[Path]:
    """The file of a module, and those of the packages that it is in; none if it isn't of this package."""
    names = module.split(".")
    if names[0] != _PACKAGE:
        return []
    prefixes = [ROOT.joinpath(*names[: i + 1]) for i in range(len(names))]
    places = (place for p in prefixes for place in (p / "__init__.py", p.with_suffix(".py")))
    return [place for place in places if place.is_file()]


@cache
def _imported(path: Path) -> tuple[Path, ...]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return tuple(f for name in sorted(names) for f in _files(name))

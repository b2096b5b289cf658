"""Which files decide what a kernel becomes: those that its modules import, followed from file to file.

A change of one family's files, or of a command's, then leaves the kernels of the other families up to date.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: The packages whose files count.  Of the run time these are the tables that it shares with kernels, and not what is
#: imported with the package itself, from which no kernel is made.
_PACKAGE, _RUN_TIME = "schedules", "tvm_flash"

#: Where syntax has further statements.
_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")


def digest(paths: Iterable[Path]) -> str:
    """sha256 of files by name and contents."""
    result = hashlib.sha256()
    for path in sorted(paths):
        result.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return result.hexdigest()


def closure(*modules: str) -> frozenset[Path]:
    """The files of modules and of all that they import of this project, also inside functions."""
    found: set[Path] = set()
    waiting = [path for module in modules for path in _files(module)]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += _imported(path)
    return frozenset(found)


@cache
def _files(module: str) -> tuple[Path, ...]:
    """The file of a module, and those of the packages that it is in; none if it isn't of this project."""
    names = module.split(".")
    if names[0] == _RUN_TIME:
        place = ROOT.joinpath(*names).with_suffix(".py")
        return (place,) if place.is_file() else ()
    if names[0] != _PACKAGE:
        return ()
    prefixes = [ROOT.joinpath(*names[: i + 1]) for i in range(len(names))]
    places = (place for p in prefixes for place in (p / "__init__.py", p.with_suffix(".py")))
    return tuple(place for place in places if place.is_file())


@cache
def _imported(path: Path) -> tuple[Path, ...]:
    names = set()
    for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return tuple(f for name in sorted(names) for f in _files(name))


def _statements(of: ast.AST) -> Iterator[ast.AST]:
    """All statements, and not the expressions in them, of which a file has twenty times as many."""
    for field in _BLOCKS:
        for node in getattr(of, field, ()):
            yield node
            yield from _statements(node)

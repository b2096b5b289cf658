"""Which folder imports which: data flows one way, and no file is reached from itself."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: What build time takes from the run time: plain data, numpy twins, what a machine is, and what is measured.
_FROM_RUN_TIME = {
    "tvm_flash",
    "tvm_flash.catalogue",
    "tvm_flash.display",
    "tvm_flash.errors",
    "tvm_flash.numerics",
    "tvm_flash.operators",
    "tvm_flash.reference",
}
_FOLDERS_FROM_RUN_TIME = ("tvm_flash.machine", "tvm_flash.measure", "tvm_flash.packs")


def modules(package: str) -> dict[str, Path]:
    """Files of a package by dotted name."""
    found = {}
    for path in (ROOT / package).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = {**modules("tvm_flash"), **modules("schedules")}


def imported(path: Path) -> set[str]:
    """This project's modules that a file imports, also inside functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
            names.add(node.module)
    return {name for name in names if name in MODULES}


def without_packages(names: set[str]) -> set[str]:
    """The names but for packages whose modules are among them: a package's own file isn't what is meant."""
    return {n for n in names if not any(other.startswith(f"{n}.") for other in names)}


@pytest.mark.parametrize("package", ["tvm_flash", "schedules"])
def test_no_file_is_reached_from_itself(package):
    graph = {
        name: without_packages(imported(path)) - {name}
        for name, path in MODULES.items()
        if name.partition(".")[0] == package
    }
    # A package's own file gathers names for users; what it imports doesn't import it for them.
    graph = {name: {n for n in found if n != package} for name, found in graph.items()}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as e:
        pytest.fail(f"imports go in a circle: {' → '.join(reversed(e.args[1]))}")


def test_the_run_time_never_imports_build_time():
    for name, path in modules("tvm_flash").items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {n.partition(".")[0] for n in names} & {"tvm", "schedules"}, name


def test_build_time_takes_only_plain_parts_of_the_run_time():
    for name, path in modules("schedules").items():
        for other in without_packages(imported(path)):
            if other.partition(".")[0] == "tvm_flash":
                allowed = other in _FROM_RUN_TIME or other.startswith(_FOLDERS_FROM_RUN_TIME)
                assert allowed, f"{name} imports {other}"


#: Folders in the order in which build time flows, each importing none that comes after it.
_BUILD_TIME = ("runtime_c", "toolchain", "definition", "tile", "families", "templates", "builder", "tuning", "commands")


def test_build_time_flows_one_way():
    order = {folder: number for number, folder in enumerate(_BUILD_TIME)}
    for name, path in modules("schedules").items():
        here = name.split(".")[1:2]
        if not here:
            continue
        for other in without_packages(imported(path)):
            there = other.split(".")[1:2]
            if other.startswith("schedules.") and there:
                assert order[there[0]] <= order[here[0]], f"{name} imports {other}"


def test_frameworks_import_nothing_above_them():
    for name, path in modules("tvm_flash").items():
        if name.startswith("tvm_flash.frameworks"):
            above = {
                n for n in without_packages(imported(path)) if n.split(".")[1:2] in (["call"], ["tracing"], ["nn"])
            }
            assert not above, f"{name} imports {above}"

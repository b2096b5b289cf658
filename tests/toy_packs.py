"""Packs of the toy families: what tests of the builder ask for, and what they look at afterwards."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import tvm_ffi

from schedules.builder import pack
from schedules.builder.suite import HeadDim, Selection
from schedules.families.interface import Target
from tests import shared

CPU = Target("cpu", "toy")
D64, D128 = HeadDim(64, 64), HeadDim(128, 128)
TWO_GROUPS = Selection(("v1",), ("float32",), (D64, D128), ("full", "causal"), ("identity",))


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder, with its inode: a rewritten file differs even if its bytes don't."""
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def added(first, second) -> list:
    """Kernels of the second report that the first doesn't have; all of the first must still be there."""
    assert all(e in second.manifest.kernels for e in first.manifest.kernels)
    return [e for e in second.manifest.kernels if e not in first.manifest.kernels]


def made_once(make: Callable[..., None]) -> Callable[..., None]:
    """What makes a file whose name tells its sources: in a test run it compiles once, and from then on is a copy.

    The copy is made by another program, as what it stands for is: a builder can be killed before it.
    """

    def copy(target: Path, **options: str) -> None:
        folder = shared.once(target.name, lambda draft: make(draft / target.name, **options))
        subprocess.run(["cp", folder / target.name, target], check=True)

    return copy


def assert_whole(folder: Path) -> None:
    """Every file that the manifest names has its hash, and every kernel is in its module."""
    manifest = pack.read_manifest(folder)
    assert manifest.kernels
    assert all(pack.is_intact(folder, f) for f in (*manifest.modules, *manifest.support_files))
    for entry in manifest.kernels:
        assert tvm_ffi.load_module(str(folder / entry.module))[entry.symbol] is not None

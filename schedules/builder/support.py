"""Files of a pack beside its modules: what is made of C sources, and not of a definition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from schedules.builder import pack
from schedules.toolchain.call_path import build_call_path, call_path_name
from schedules.toolchain.cpu import build_runtime, runtime_name
from tvm_flash.packs.manifest import ModuleFile


def support_files(arch: str, folder: Path, work: Path, present: tuple[ModuleFile, ...]) -> tuple[ModuleFile, ...]:
    """The support files of a pack: the thread pool first, if it is for the CPU, then the fast path of a call.

    Of ``present``, those that the pack has, what is still the same stays; other files are made anew.

    Raises
    ------
    ToolchainError: there is no C compiler, or it fails.
    """
    wanted: dict[str, Callable[[Path], None]] = {}
    if arch == "cpu":
        wanted[runtime_name()] = partial(build_runtime, soname=runtime_name())
    wanted[call_path_name()] = build_call_path
    kept = {file.file: file for file in present if file.file in wanted and pack.is_intact(folder, file)}
    return tuple(kept.get(name) or _make(name, make, folder, work) for name, make in wanted.items())


def _make(name: str, make: Callable[[Path], None], folder: Path, work: Path) -> ModuleFile:
    draft = work / name
    make(draft)
    return pack.store(draft, folder, name)

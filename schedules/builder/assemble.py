"""Emitted sources to packs, on a machine that has nvcc and the headers of tvm-ffi: no TVM is needed."""

from __future__ import annotations

import dataclasses
import datetime
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from schedules.builder import pack
from schedules.builder.support import support_files
from schedules.toolchain import cuda
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, KernelEntry, Manifest

EMISSION_NAME = "emission.json"


def assemble(folder: Path, output: Path, jobs: int, recompile_for: str = "") -> list[Manifest]:
    """Compile, link and publish what :func:`schedules.builder.emit.emit` wrote.

    Parameters
    ----------
    folder: with one folder for each arch; output: where the packs go.
    jobs: compilers that run at a time.
    recompile_for: another arch whose machine code is made from the sources instead, so that kernels can be checked on a
        GPU of that arch.  Such a pack says so in its versions, and is for verification only; a source that several
        archs have is compiled for the first of them only (:func:`twins`).

    Raises
    ------
    ValueError: there is nothing emitted in the folder.
    ToolchainError: a kernel doesn't compile, or must not ship.
    """
    folders = sorted(path.parent for path in folder.glob(f"*/{EMISSION_NAME}"))
    if not folders:
        raise ValueError(f"{folder}: holds no */{EMISSION_NAME}; make it with scripts/build_kernels.py --emit")
    manifests = (_assemble_arch(path, output, jobs, recompile_for) for path in folders)
    return [manifest for manifest in manifests if manifest]


def twins(folder: Path) -> dict[tuple[str, str], list[KernelEntry]]:
    """Kernels whose source is another arch's: by that arch and the kernel's symbol, those of further archs."""
    found: dict[tuple[str, str], list[KernelEntry]] = {}
    for path in sorted(folder.glob(f"*/{EMISSION_NAME}")):
        for kernel in json.loads(path.read_text())["kernels"]:
            if kernel["same_as"]:
                entry = KernelEntry.from_dict(kernel["entry"])
                found.setdefault((kernel["same_as"], entry.symbol), []).append(entry)
    return found


def _assemble_arch(folder: Path, output: Path, jobs: int, recompile_for: str) -> Manifest | None:
    emission = json.loads((folder / EMISSION_NAME).read_text())
    arch = emission["arch"]
    kernels = [k for k in emission["kernels"] if not (recompile_for and k["same_as"])]
    if not kernels:
        return None
    versions = {**emission["versions"], "cuda": cuda.compiler_version(arch)}
    if recompile_for:
        versions["recompiled_for"] = recompile_for
    with pack.locked(output, arch) as work, ThreadPoolExecutor(jobs) as pool:

        def compile_one(kernel: dict) -> tuple[str, Path, KernelEntry]:
            source, raw = folder / kernel["source"], kernel["entry"]
            target = work / f"{source.stem}.o"
            own = raw["definition"] != BUILTIN_DEFINITION
            resources = compile_source(source, target, arch, recompile_for, of_user=own)
            return kernel["group"], target, KernelEntry.from_dict({**raw, **resources})

        groups: dict[str, list[tuple[Path, KernelEntry]]] = {}
        for group, target, entry in pool.map(compile_one, kernels):
            groups.setdefault(group, []).append((target, entry))
        modules, entries = [], []
        for group, members in groups.items():
            draft = work / f"{group}.draft"
            cuda.link_module([target for target, _ in members], draft)
            module = pack.store(draft, output / arch, group)
            modules.append(module)
            entries += [dataclasses.replace(entry, module=module.file) for _, entry in members]
        manifest = Manifest(
            arch=arch,
            versions=versions,
            modules=tuple(modules),
            kernels=tuple(sorted(entries, key=lambda e: e.symbol)),
            support_files=support_files(arch, output / arch, work, ()),
            created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        )
        pack.publish(output / arch, manifest)
    return manifest


def compile_source(source: Path, target: Path, arch: str, recompile_for: str = "", *, of_user: bool = False) -> dict:
    """Compile an emitted source to an object; its registers and so on, as the manifest names them.

    Raises
    ------
    ToolchainError: it doesn't compile, or must not ship.
    """
    report = cuda.compile_object(source, target, arch, recompile_for=recompile_for, of_user=of_user)
    return report.resources(cuda.dynamic_shared_memory(source.read_text()))

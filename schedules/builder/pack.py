"""Writing a pack, so that a reader, or a kill at any moment, finds the whole old one or the whole new one.

File names carry the hash of their contents, hence no file of a pack is ever overwritten.  New files are put beside the
old ones, then ``manifest.json`` is replaced in one rename: that is the moment at which the pack changes.  Files of the
replaced manifest stay until the pack is written once more, for readers that hold that manifest still; a library that a
process has mapped stays valid in any case.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from tvm_flash.packs import archive
from tvm_flash.packs.manifest import MANIFEST_NAME, Manifest, ModuleFile

#: Beside the packs: locks, and what incremental builds know.  Never shipped.
WORK_FOLDER = ".build"


class PackBusyError(RuntimeError):
    """Another process is building the same pack."""


@contextlib.contextmanager
def exclusive(path: Path, busy: Exception) -> Iterator[None]:
    """Hold a lock file; it goes with the process that holds it, however that ends.

    Raises
    ------
    The exception ``busy``: somebody else holds it.
    """
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise busy from None
        yield


@contextlib.contextmanager
def locked(output: Path, arch: str) -> Iterator[Path]:
    """Hold the right to write ``output/arch``; gives a folder for intermediate files on the same file system.

    Raises
    ------
    PackBusyError: somebody else holds it.
    """
    work = output / WORK_FOLDER / arch
    work.mkdir(parents=True, exist_ok=True)
    busy = PackBusyError(f"another process is building the pack {output / arch}; wait until it has ended")
    with exclusive(work / "lock", busy):
        for leftover in work.glob("tmp*"):  # of a builder that was killed
            shutil.rmtree(leftover)
        yield work


def read_manifest(folder: Path) -> Manifest | None:
    """What the pack says of itself; None if there is no pack or its manifest can't be read."""
    try:
        return Manifest.from_json((folder / MANIFEST_NAME).read_text())
    except (OSError, ValueError):
        return None


def restore(folder: Path) -> None:
    """Put a pack's modules beside its manifest if they lie in an archive, so that a build can go on from them.

    Raises
    ------
    PackError: the archive is damaged, or can't be unpacked.
    """
    manifest, source = read_manifest(folder), archive.archive_of(folder)
    if manifest and source:
        files = {f.file: f for f in (*manifest.modules, *manifest.support_files)}
        missing = {name: file for name, file in files.items() if not (folder / name).exists()}
        if missing:
            archive.unpack(source, folder.name, missing, folder)


def is_intact(folder: Path, file: ModuleFile) -> bool:
    """Whether a file of a pack is there with the contents that the manifest says."""
    path = folder / file.file
    return path.is_file() and path.stat().st_size == file.size and sha256(path) == file.sha256


def sha256(path: Path) -> str:
    """Hash of a file's contents."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Replace a text file in one step; a reader finds the old text or the new one, also after a power failure."""
    draft = path.with_name(path.name + ".new")
    with open(draft, "w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(draft, path)


def store(draft: Path, folder: Path, name: str) -> ModuleFile:
    """Move a finished library into a pack; nothing refers to it until the manifest does.

    ``name`` is the file's name; where it ends in ``.so`` it stays as it is, else it becomes ``<name>-<hash>.so``.
    """
    described = describe(draft)
    file = name if name.endswith(".so") else f"{name}-{described.sha256[:8]}.so"
    with open(draft, "rb") as f:
        os.fsync(f.fileno())
    folder.mkdir(parents=True, exist_ok=True)
    os.replace(draft, folder / file)
    return dataclasses.replace(described, file=file)


def describe(path: Path) -> ModuleFile:
    """What a manifest says of a file."""
    return ModuleFile(path.name, path.stat().st_size, sha256(path))


def publish(folder: Path, manifest: Manifest) -> None:
    """Make ``manifest`` the pack, then remove files that neither it nor the manifest it replaces refers to."""
    replaced = read_manifest(folder)
    write_atomically(folder / MANIFEST_NAME, manifest.to_json())
    keep = {f.file for m in (manifest, replaced) if m for f in (*m.modules, *m.support_files)}
    for path in folder.glob("*.so"):
        if path.name not in keep:
            path.unlink()

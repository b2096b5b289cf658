"""Packs whose modules lie in an archive, as those of a wheel do, and where they are unpacked.

A kernel looks much like its neighbours, and much like the same kernel of the next arch, so that packs compressed
together take a fifth of what they take file by file.  A folder of packs then holds archives (``.tar.xz``, members
``<pack>/<file>``) and :data:`INDEX`, which says whose files are in which; the manifests lie where they always do.  The
modules of a pack are unpacked when the first of them is loaded, into ``~/.cache/tvm_flash/unpacked``, or into a
temporary folder of this process where that can't be written.  What is unpacked is compared with the manifest.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tvm_flash.errors import PackError
from tvm_flash.packs.manifest import Manifest, ModuleFile

INDEX = "archives.json"
SUFFIX = ".tar.xz"

#: Temporary folders of this process by what is unpacked in them.
_temporary: dict[str, Path] = {}


def user_cache() -> Path:
    """The folder of what this package keeps for a user; it need not exist."""
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "tvm_flash")


def archive_of(folder: Path) -> Path | None:
    """The archive with the modules of the pack ``folder``; None if it isn't in one."""
    try:
        index = json.loads((folder.parent / INDEX).read_text())
    except (OSError, ValueError):
        return None
    return next((folder.parent / archive for archive, packs in index.items() if folder.name in packs), None)


def place_of(folder: Path, manifest: Manifest) -> Path:
    """The folder that has a pack's modules: its own, or where they are unpacked from an archive, now if need be.

    Raises
    ------
    PackError: the archive is damaged or can't be read, or there is no room for what is in it.
    """
    files = {f.file: f for f in (*manifest.modules, *manifest.support_files)}
    archive = None if _are_there(folder, files) else archive_of(folder)
    if archive is None:
        return folder
    contents = "".join(sorted(f.sha256 for f in files.values()))
    name = f"{folder.name}-{hashlib.sha256(contents.encode()).hexdigest()[:16]}"
    place = _temporary.get(name, user_cache() / "unpacked" / name)
    if _are_there(place, files):
        return place
    try:
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = Path(tempfile.mkdtemp(prefix=".", dir=place.parent))
    except OSError:
        place = _temporary[name] = _temporary_folder()
        unpack(archive, folder.name, files, place)
        return place
    try:
        unpack(archive, folder.name, files, draft)
        _move(draft, place, files)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return place


def unpack(archive: Path, pack: str, files: Mapping[str, ModuleFile], into: Path) -> None:
    """Write the files of one pack of an archive into the folder ``into``, each compared with what is known of it.

    Raises
    ------
    PackError: one is missing or isn't what was built, or can't be read or written.
    """
    missing = set(files)
    try:
        with tarfile.open(archive, "r|xz") as contents:
            for member in contents:
                home, _, name = member.name.rpartition("/")
                if home != pack or name not in missing or not member.isfile():
                    continue
                data = contents.extractfile(member).read()
                if hashlib.sha256(data).hexdigest() != files[name].sha256:
                    raise _damaged(archive, f"its {member.name} isn't what was built")
                with open(os.open(into / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as f:
                    f.write(data)
                missing.remove(name)
                if not missing:
                    return
    except tarfile.CompressionError as e:
        raise PackError(f"{archive}: this Python can't read it ({e}); use one that was built with lzma") from e
    except (tarfile.TarError, EOFError) as e:
        raise _damaged(archive, str(e)) from e
    except OSError as e:
        raise PackError(
            f"{archive}: can't be unpacked into {into} ({e.strerror or e}); make room there, or set XDG_CACHE_HOME to "
            f"a folder that has it"
        ) from e
    raise _damaged(archive, f"it has no {pack}/{min(missing)}")


def _are_there(folder: Path, files: Mapping[str, ModuleFile]) -> bool:
    """Whether a folder has files of these names and sizes; contents are compared when a module is loaded."""
    try:
        return all((folder / name).stat().st_size == file.size for name, file in files.items())
    except OSError:
        return False


def _move(draft: Path, place: Path, files: Mapping[str, ModuleFile]) -> None:
    """Make ``draft`` the folder ``place``, unless another process was quicker."""
    if place.exists() and not _are_there(place, files):
        shutil.rmtree(place, ignore_errors=True)
    with contextlib.suppress(OSError):
        draft.rename(place)
    if not _are_there(place, files):
        raise PackError(f"{place}: is in the way of what is unpacked there; remove it")


def _temporary_folder() -> Path:
    """A new folder that is removed when this process ends."""
    folder, owner = Path(tempfile.mkdtemp(prefix="tvm_flash-")), os.getpid()
    atexit.register(lambda: os.getpid() == owner and shutil.rmtree(folder, ignore_errors=True))
    return folder


def _damaged(archive: Path, what: str) -> PackError:
    return PackError(f"{archive}: is damaged, {what}; install the package again")

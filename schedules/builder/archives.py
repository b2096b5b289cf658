"""Archives of packs, as a wheel has them: what is alike lies side by side, and is compressed together."""

from __future__ import annotations

import io
import json
import lzma
import tarfile
from pathlib import Path

from schedules.builder.pack import write_atomically
from tvm_flash.packs.archive import INDEX, SUFFIX
from tvm_flash.packs.manifest import MANIFEST_NAME, Manifest, ModuleFile

#: How far back like code is looked for: further than the same kernels of the archs of one archive reach, and no more
#: memory than a reader of the archive can spare.
_WINDOW = 64 * 2**20

#: Archs whose code is alike, machine code of one generation: the same sources, but for shared memory, and encodings.
_ALIKE = {"sm_80": "ampere", "sm_86": "ampere", "sm_89": "ampere"}


def pack_into_archives(packs: Path) -> list[Path]:
    """Put the modules of all packs in a folder into archives there, and leave the manifests; the archives.

    Every pack must have all the files that its manifest names.
    """
    folders: dict[str, list[Path]] = {}
    for manifest in sorted(packs.glob(f"*/{MANIFEST_NAME}")):
        arch = _read(manifest.parent).arch
        folders.setdefault(_ALIKE.get(arch, arch), []).append(manifest.parent)
    archives = {f"{name}{SUFFIX}": members for name, members in folders.items()}
    for archive, members in archives.items():
        _write(packs / archive, members)
    for folder in (x for members in archives.values() for x in members):
        for file in _files(folder):
            (folder / file.file).unlink()
    index = {archive: [folder.name for folder in members] for archive, members in archives.items()}
    write_atomically(packs / INDEX, json.dumps(index, indent=1) + "\n")
    return [packs / archive for archive in archives]


def _write(archive: Path, folders: list[Path]) -> None:
    """One archive, the same bytes of the same packs: a module beside that of the same name in the other packs."""
    members = sorted((file.file, folder.name, folder) for folder in folders for file in _files(folder))
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": _WINDOW}]
    with lzma.open(archive, "wb", filters=filters) as compressed, tarfile.open(fileobj=compressed, mode="w|") as tar:
        for name, pack_name, folder in members:
            data = (folder / name).read_bytes()
            member = tarfile.TarInfo(f"{pack_name}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def _files(folder: Path) -> tuple[ModuleFile, ...]:
    manifest = _read(folder)
    return (*manifest.modules, *manifest.support_files)


def _read(folder: Path) -> Manifest:
    return Manifest.from_json((folder / MANIFEST_NAME).read_text())

"""Where packs are, what is in them, and how their modules are loaded.

A pack is a folder with a ``manifest.json``, either a folder on the search path itself or right under one.  Folders are
searched in this order: those of the environment variable ``TVM_FLASH_PACKS``, the user's own
(``~/.cache/tvm_flash/packs``), and ``packs/`` of the package.  Reading manifests loads nothing; a module is loaded when
a kernel of it is first called, after its sha256 was compared with the manifest's; modules that lie in an archive are
unpacked then (:mod:`tvm_flash.packs.archive`).
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tvm_flash.errors import PackError
from tvm_flash.machine import cpu, ffi
from tvm_flash.machine.arch import capability_of
from tvm_flash.packs import archive
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, MANIFEST_NAME, KernelEntry, Manifest, ModuleFile

PATH_VARIABLE = "TVM_FLASH_PACKS"
PACKAGE_PACKS = Path(__file__).parent


@dataclass(frozen=True)
class Pack:
    """One folder of kernels.  ``unusable`` says why this machine can't run it; None if it can."""

    folder: Path
    manifest: Manifest
    unusable: str | None = None

    @property
    def arch(self) -> str:
        return self.manifest.arch

    @property
    def lacking(self) -> list[str]:
        """Instructions that its code needs and this processor lacks."""
        return sorted(set(self.manifest.cpu_features) - cpu.features())


@dataclass(frozen=True)
class BrokenPack:
    """A folder whose manifest can't be read, and why."""

    folder: Path
    reason: str


@dataclass(frozen=True)
class Installed:
    """A kernel and the pack that it is in; ``rank`` grows with the distance from the front of the search path."""

    entry: KernelEntry
    pack: Pack
    rank: int


def search_path() -> tuple[Path, ...]:
    """Folders that are searched for packs, in order; they need not exist."""
    given = [p for p in os.environ.get(PATH_VARIABLE, "").split(os.pathsep) if p]
    return (*(Path(os.path.expanduser(p)) for p in given), own_packs(), PACKAGE_PACKS)


def own_packs() -> Path:
    """The user's own folder of packs; it need not exist."""
    return archive.user_cache() / "packs"


def build_command(arch: str, *options: str) -> str:
    """The command that builds what is missing; ``options`` are further arguments."""
    return " ".join(("python -m tvm_flash build --arch", arch, *options))


class Registry:
    """The packs that one search finds; thread-safe."""

    def __init__(self, folders: tuple[Path, ...]):
        self.folders = folders
        self.packs: list[Pack] = []
        self.broken: list[BrokenPack] = []
        self._usable: dict[str, list[Installed]] = {}
        self._candidates: dict[tuple[str, ...], list[Installed]] = {}
        self._kernels: dict[tuple[Path, str], tuple[ffi.Kernel, ...]] = {}
        self._modules: dict[Path, object] = {}
        self._places: dict[Path, Path] = {}
        self._lock = threading.Lock()
        for folder in _pack_folders(folders):
            try:
                self.packs.append(_read(folder))
            except (OSError, ValueError) as e:
                self.broken.append(BrokenPack(folder, f"{MANIFEST_NAME} can't be read: {e}"))

    def archs(self) -> set[str]:
        """Archs that there are packs for, whether this machine can run them or not."""
        return {p.arch for p in self.packs}

    @property
    def entries(self) -> list[KernelEntry]:
        """The kernels of every pack, whatever arch they are for."""
        return [entry for pack in self.packs for entry in pack.manifest.kernels]

    def kernels(self, arch: str) -> list[Installed]:
        """Kernels for an arch that this machine can run.  Of CPU packs, that with the most instructions comes first."""
        found = self._usable.get(arch)
        if found is None:
            packs = [p for p in self.packs if p.arch == arch and p.unusable is None]
            packs.sort(key=lambda p: -len(p.manifest.cpu_features))
            found = [Installed(entry, pack, rank) for rank, pack in enumerate(packs) for entry in pack.manifest.kernels]
            self._usable[arch] = found
        return found

    def candidates(self, arch: str, definition: str, dtype: str, op: str = "forward") -> list[Installed]:
        """The kernels for an arch that compute an operator of a definition in a dtype."""
        key = (arch, definition, dtype, op)
        found = self._candidates.get(key)
        if found is None:
            found = [k for k in self.of_definition(arch, definition) if (k.entry.op, k.entry.dtype) == (op, dtype)]
            self._candidates[key] = found  # as many as packs have operators, definitions and dtypes
        return found

    def of_definition(self, arch: str, definition: str) -> list[Installed]:
        """The kernels of a definition for an arch that this machine can run, in the packs that count.

        Of a definition of the user's own they are those of one pack: of CPU packs, of that with the most instructions.
        """
        folders = {pack.folder for pack in self.packs_of(definition)}
        found = [k for k in self.kernels(arch) if k.entry.definition == definition and k.pack.folder in folders]
        return found if definition == BUILTIN_DEFINITION else [k for k in found if k.pack is found[0].pack]

    def packs_of(self, definition: str) -> list[Pack]:
        """The packs whose kernels of a definition count.

        Nobody knows whether two that were built apart mean the same by a name: of a definition of the user's own these
        are the packs beside the first one on the search path that has it, and of each arch and instruction set one.
        """
        if definition == BUILTIN_DEFINITION:
            return self.packs
        found: dict[tuple[str, str], Pack] = {}
        for pack in self.packs:
            if any(entry.definition == definition for entry in pack.manifest.kernels):
                first = next(iter(found.values()), pack)
                if pack.folder.parent == first.folder.parent:
                    found.setdefault((pack.arch, pack.manifest.isa), pack)
        return list(found.values())

    def passed_over(self, definition: str) -> list[Pack]:
        """The packs that have kernels of a definition too, and whose kernels of it don't count."""
        counting = {pack.folder for pack in self.packs_of(definition)}
        having = (p for p in self.packs if any(entry.definition == definition for entry in p.manifest.kernels))
        return [pack for pack in having if pack.folder not in counting]

    def entries_of(self, definition: str) -> list[KernelEntry]:
        """The kernels of a definition in the packs that count, whatever arch they are for."""
        return [e for pack in self.packs_of(definition) for e in pack.manifest.kernels if e.definition == definition]

    def missing(self, archs: list[str], wanted: str) -> PackError:
        """The error for a device without a pack; ``archs`` are those that would do, ``wanted`` the one to build."""
        reasons = [f"{p.folder}: {p.unusable}" for p in self.packs if p.arch in archs and p.unusable]
        reasons += [f"{b.folder}: {b.reason}" for b in self.broken]
        found = "; ".join(reasons) or "looked in " + ", ".join(map(str, self.folders))
        return PackError(f"no usable pack for {wanted} ({found}); run `{build_command(wanted)}`")

    def load(self, kernel: Installed) -> tuple[ffi.Kernel, ...]:
        """The functions of a kernel's launches, in order, its module loaded and checked at the first use.

        Raises
        ------
        PackError: a file of the pack is missing, truncated or edited, or the loader refuses it.
        InvalidArgumentError: a variable of the environment that says how it runs has a value without meaning.
        """
        key = (kernel.pack.folder, kernel.entry.symbol)
        with self._lock:
            functions = self._kernels.get(key)
            if functions is None:
                module = self._module(kernel.pack, kernel.entry.module)
                functions = self._kernels[key] = tuple(
                    _function(module, kernel, launch.symbol) for launch in kernel.entry.launches
                )
        return functions

    def place_of(self, pack: Pack) -> Path:
        """The folder that has a pack's modules, where they are unpacked now if they lie in an archive.

        Raises
        ------
        PackError: they can't be unpacked.
        """
        place = self._places.get(pack.folder)
        if place is None:
            place = self._places[pack.folder] = archive.place_of(pack.folder, pack.manifest)
        return place

    def _module(self, pack: Pack, name: str):
        if (pack.folder / name) not in self._modules:
            files = {m.file: m for m in pack.manifest.modules}
            if name not in files:
                raise _damaged(pack, f"{MANIFEST_NAME} doesn't list {name}")
            if pack.arch == "cpu":
                cpu.check_threads()
            place = self.place_of(pack)
            path = place / name
            for file in (*pack.manifest.support_files, files[name]):
                _verify(pack, place, file)
                for stem, load in _on_support_file.items():
                    if file.file.startswith(stem):
                        load(path.with_name(file.file))
            try:
                self._modules[pack.folder / name] = ffi.load_module(path)
            except OSError as e:
                raise _damaged(pack, f"{name} can't be loaded: {e}", place) from e
        return self._modules[pack.folder / name]


def _function(module: object, kernel: Installed, symbol: str) -> ffi.Kernel:
    try:
        return ffi.Kernel(module, symbol)
    except AttributeError as e:
        raise _damaged(kernel.pack, f"{kernel.entry.module} has no function {symbol}") from e


def _pack_folders(folders: tuple[Path, ...]) -> Iterator[Path]:
    seen = set()
    for folder in folders:
        for manifest in (folder / MANIFEST_NAME, *sorted(folder.glob(f"*/{MANIFEST_NAME}"))):
            place = manifest.parent.resolve()
            if manifest.is_file() and place not in seen and not manifest.parent.name.startswith("."):
                seen.add(place)
                yield manifest.parent


def _read(folder: Path) -> Pack:
    pack = Pack(folder, Manifest.from_json((folder / MANIFEST_NAME).read_text()))
    manifest, unusable = pack.manifest, None
    if manifest.arch == "cpu":
        if pack.lacking:
            unusable = f"it is for {manifest.isa} and needs {', '.join(pack.lacking)}, which this processor lacks"
    elif capability_of(manifest.arch) is None:
        unusable = f"its arch {manifest.arch!r} is unknown to this version"
    if _written_by_anyone(folder) or _written_by_anyone(folder / MANIFEST_NAME):
        unusable = f"it {_BY_ANYONE}; run `chmod -R o-w {folder}` if you trust it"
    return replace(pack, unusable=unusable)


_BY_ANYONE = "can be written by every user of this machine"


def _written_by_anyone(path: Path) -> bool:
    """Whether code that this process would run may be replaced by anyone.

    Not asked in the package's own folder, whose Python files would be as open.
    """
    return not path.is_relative_to(PACKAGE_PACKS) and bool(path.stat().st_mode & stat.S_IWOTH)


def _verify(pack: Pack, place: Path, file: ModuleFile) -> None:
    path = place / file.file
    if path.name != file.file:
        raise _damaged(pack, f"{MANIFEST_NAME} names {file.file!r}, which isn't a plain file name")
    try:
        data = path.read_bytes()
    except OSError as e:
        raise _damaged(pack, f"{file.file} can't be read: {e.strerror}", place) from e
    if _written_by_anyone(path):
        raise _damaged(pack, f"{file.file} {_BY_ANYONE}; take that right away with chmod o-w if you trust it", place)
    if len(data) != file.size:
        raise _damaged(pack, f"{file.file} has {len(data)} bytes, expected {file.size}: truncated or replaced", place)
    if hashlib.sha256(data).hexdigest() != file.sha256:
        raise _damaged(pack, f"{file.file} isn't what was built: its sha256 differs from the manifest's", place)


def _damaged(pack: Pack, what: str, place: Path | None = None) -> PackError:
    """The error for a pack that can't be used as it is, and what mends it; ``place`` has its modules."""
    if place in (None, pack.folder):
        return PackError(f"pack {pack.folder}: {what}; run `{build_command(pack.arch)}`")
    return PackError(
        f"pack {pack.folder}, unpacked in {place}: {what}; remove that folder, and it is unpacked again, or set "
        f"XDG_CACHE_HOME, which says where"
    )


_current: Registry | None = None
_current_lock = threading.Lock()
_on_refresh: list[Callable[[], None]] = []
_on_support_file: dict[str, Callable[[Path], None]] = {}


def registry() -> Registry:
    """The packs of this process, found at the first call."""
    global _current
    if _current is None:
        with _current_lock:
            if _current is None:
                _current = Registry(search_path())
    return _current


def refresh() -> None:
    """Forget the packs that were found; the next use searches again.  Modules that were loaded stay loaded."""
    global _current
    with _current_lock:
        _current = None
        for forget in _on_refresh:
            forget()


def on_support_file(stem: str, load: Callable[[Path], None]) -> None:
    """Have ``load`` called with a pack's support file whose name begins with ``stem``, once that is verified."""
    _on_support_file[stem] = load


def on_refresh(forget: Callable[[], None]) -> None:
    """Have ``forget`` called at each :func:`refresh`: for what was decided from the packs."""
    _on_refresh.append(forget)

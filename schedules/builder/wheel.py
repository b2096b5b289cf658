"""The wheel: packs of every arch in archives, and a tag that says on which systems they load."""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from schedules.builder import pack, records
from schedules.builder.archives import pack_into_archives
from schedules.builder.plan import PACKS, ROOT
from schedules.toolchain.process import ToolchainError, run
from tvm_flash.packs.manifest import MANIFEST_NAME


@dataclass(frozen=True)
class Wheel:
    """A finished wheel: its path, and its size in bytes."""

    path: Path
    size: int


def build_wheel(output: Path) -> Wheel:
    """Build the wheel of this checkout with the packs that are in it, and move it into ``output``.

    Its tag is ``py3-none-manylinux_2_<n>_x86_64``, with the oldest glibc that has all that the packs call.

    Raises
    ------
    ToolchainError: there are no packs, one holds kernels that no GPU has run, or a tool is missing or fails.
    """
    folders = [path.parent for path in sorted(PACKS.glob(f"*/{MANIFEST_NAME}"))]
    if not folders:
        raise ToolchainError("there are no packs to put into a wheel; run scripts/build_kernels.py first")
    for folder in folders:
        check_verified(folder)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        run([sys.executable, "-m", "build", "--wheel", "--outdir", scratch, ROOT], "building the wheel")
        (plain,) = Path(scratch).glob("*.whl")
        platform = platform_of(plain)
        run([sys.executable, "-m", "wheel", "unpack", "--dest", scratch, plain], "unpacking the wheel")
        (content,) = (path for path in Path(scratch).iterdir() if path.is_dir())
        pack_into_archives(content / PACKS.relative_to(ROOT))
        run([sys.executable, "-m", "wheel", "pack", "--dest-dir", scratch, content], "packing the wheel")
        tag = [sys.executable, "-m", "wheel", "tags", "--remove", "--platform-tag", platform, plain]
        path = output / run(tag, "tagging the wheel").split()[-1]
        shutil.move(plain.with_name(path.name), path)
    return Wheel(path, path.stat().st_size)


def check_verified(folder: Path) -> None:
    """Refuse a pack with CUDA kernels that were never run on hardware in exactly their form: they must not ship.

    Raises
    ------
    ToolchainError: it has such kernels, or can't be read.
    """
    manifest = pack.read_manifest(folder)
    if manifest is None:
        raise ToolchainError(f"{folder}: its manifest can't be read; build the pack anew")
    missing = records.unverified(manifest.kernels)
    if missing:
        raise ToolchainError(
            f"{folder}: {len(missing)} kernels were never run on a GPU in this form ({missing[0].symbol}, …) and may "
            f"not ship; run scripts/verify_kernels.py on one, or take the pack away"
        )


def platform_of(wheel: Path) -> str:
    """The oldest platform tag whose systems have every symbol that a wheel's libraries call.

    Raises
    ------
    ToolchainError: auditwheel is missing, or names none.
    """
    shown = run([sys.executable, "-m", "auditwheel", "show", wheel], "reading what the wheel calls")
    tags = re.findall(r"manylinux_\d+_\d+_x86_64", shown)
    if not tags:
        raise ToolchainError(f"{wheel.name}: auditwheel names no manylinux tag for it\n{shown}")
    return tags[0]

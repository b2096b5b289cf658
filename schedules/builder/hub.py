"""The folder of a kernel for the Hugging Face Hub, as its package ``kernels`` loads it.

The Hub calls a build for one kind of machine a variant.  Ours are of its framework ``tvm-ffi``, for CPUs and for each
major version of CUDA that a torch may be built with; a pack needs no more of CUDA than the driver.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from schedules.builder.plan import PACKS, ROOT
from schedules.builder.wheel import check_verified
from schedules.toolchain.process import ToolchainError
from tvm_flash import __version__
from tvm_flash.packs.manifest import MANIFEST_NAME, Manifest

#: Version of the kernel on the Hub, which counts changes of what it offers.
VERSION = 1

#: The versions of CUDA of the variants: a torch built with the same or a later one of this major version takes it.
CUDA_VERSIONS = ("120", "130")

_PLATFORM = "x86_64-linux"

#: The ``__init__.py`` of a variant.  The package is imported by its own name, as its modules import each other.
_LOADER = '''"""tvm_flash, as a kernel of the Hugging Face Hub."""

import importlib.util
import sys
from pathlib import Path

VERSION = "{version}"

if importlib.util.find_spec("tvm_flash") is None:
    sys.path.append(str(Path(__file__).resolve().parent))

import tvm_flash

if tvm_flash.__version__ != VERSION:
    raise ImportError(
        f"tvm_flash {{VERSION}} of the Hub can't be loaded beside tvm_flash {{tvm_flash.__version__}}, which is "
        f"installed in {{Path(tvm_flash.__file__).parent}}; uninstall that, or call it directly"
    )

from tvm_flash.integrations.hub import *
from tvm_flash.integrations.hub import __all__
'''


def lay_out(folder: Path) -> list[Path]:
    """Write ``build/<variant>/`` for every variant whose packs are in this checkout; the folders of the variants.

    Raises
    ------
    ToolchainError: there are no packs, or one holds kernels that no GPU has run.
    """
    packs = [path.parent for path in sorted(PACKS.glob(f"*/{MANIFEST_NAME}"))]
    if not packs:
        raise ToolchainError("there are no packs to lay out; run scripts/build_kernels.py first")
    for pack in packs:
        check_verified(pack)
    on_cpu = [pack for pack in packs if pack.name.startswith("cpu")]
    on_gpu = [pack for pack in packs if pack not in on_cpu]
    written = []
    if on_cpu:
        written.append(_variant(folder, "cpu", {"type": "cpu"}, on_cpu))
    if on_gpu:
        archs = sorted({_capability(pack.name) for pack in on_gpu}, key=lambda x: float(x.rstrip("a")))
        for version in CUDA_VERSIONS:
            written.append(_variant(folder, f"cu{version}", {"type": "cuda", "archs": archs}, packs))
    return written


def _variant(folder: Path, name: str, backend: dict, packs: list[Path]) -> Path:
    """Write a variant: the package with the given packs, the loader, and what the Hub wants to know."""
    variant = folder / "build" / f"tvm-ffi01-{name}-{_PLATFORM}"
    shutil.rmtree(variant, ignore_errors=True)
    for source in (ROOT / "tvm_flash").rglob("*.py"):
        _copy(source, variant)
    for pack in packs:
        manifest = Manifest.from_json((pack / MANIFEST_NAME).read_text())
        for file in (MANIFEST_NAME, *(x.file for x in (*manifest.modules, *manifest.support_files))):
            _copy(pack / file, variant)
    (variant / "__init__.py").write_text(_LOADER.format(version=__version__))
    about = {
        "id": f"_tvm_flash_{name}_{__version__.replace('.', '_')}",
        "name": "tvm-flash",
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": ["tvm-ffi"],
        "backend": backend,
    }
    (variant / "metadata.json").write_text(json.dumps(about, indent=2) + "\n")
    return variant


def _copy(source: Path, variant: Path) -> None:
    target = variant / source.relative_to(ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


def _capability(arch: str) -> str:
    """``sm_90a`` as CUDA capabilities are written, ``9.0a``."""
    number = arch.removeprefix("sm_").rstrip("a")
    return f"{number[:-1]}.{number[-1]}{'a' if arch.endswith('a') else ''}"

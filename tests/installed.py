"""The functions of installed kernels, as torch tensors go into them; no TVM."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

from tvm_flash.packs.registry import Installed


@functools.cache
def _module(path: Path):
    import tvm_ffi

    return tvm_ffi.load_module(str(path))


def functions_of(kernel: Installed) -> tuple[Callable, ...]:
    """The kernel's launches, which take torch tensors; a module is loaded once."""
    loaded = _module(kernel.pack.folder.resolve() / kernel.entry.module)
    return tuple(loaded[launch.symbol] for launch in kernel.entry.launches)

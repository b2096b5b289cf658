"""Emitted sources to modules, on the machine that measures; no TVM is needed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from schedules.builder.assemble import compile_source
from schedules.toolchain import cuda
from schedules.toolchain.process import ToolchainError
from schedules.tuning.candidate import Emission
from schedules.tuning.folder import Folder


def compile_module(source: Path, module: Path, emission: Emission, recompile_for: str = "") -> str | None:
    """Compile one candidate's source; the reason if it can't be, or None.

    Parameters
    ----------
    source, module: the ``.cu`` file that is there, and the module to write.
    emission: says for which arch.
    recompile_for: a newer arch whose machine code is made instead, so that the kernel runs on a GPU of that arch.
    """
    draft, object_file = module.with_suffix(".draft"), module.with_suffix(".o")
    try:
        compile_source(source, object_file, emission.arch, recompile_for)
        cuda.link_module([object_file], draft)
        os.replace(draft, module)
    except ToolchainError as e:
        return str(e).split("\n$ ")[0]
    finally:
        object_file.unlink(missing_ok=True)
    return None


class Compiler:
    """Compiles the candidates of a folder in the background; a context that stops doing so at its end.

    Parameters
    ----------
    jobs: compilers at a time.
    recompile_for: as for :func:`compile_module`.
    """

    def __init__(self, folder: Folder, jobs: int, recompile_for: str = ""):
        self.folder, self.emission, self.recompile_for = folder, folder.emission(), recompile_for
        self.pool = ThreadPoolExecutor(jobs)
        self.started: dict[str, Future] = {}

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def start(self, ids: Sequence[str]) -> None:
        """Begin with candidates, in this order."""
        for id in ids:
            if id not in self.started and not self.folder.is_compiled(id):
                self.started[id] = self.pool.submit(self._compile, id)

    def wait(self, ids: Sequence[str]) -> None:
        """Until each of the candidates, which were started, has a module or a reason why not."""
        for id in ids:
            if id in self.started:
                self.started[id].result()

    def _compile(self, id: str) -> None:
        folder = self.folder
        reason = compile_module(folder.source(id), folder.module(id), self.emission, self.recompile_for)
        if reason is not None:
            folder.fail(id, reason)

"""Emitted sources to modules, on the machine that measures; no TVM is needed."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from schedules.builder.assemble import compile_source
from schedules.toolchain import cuda
from schedules.toolchain.process import ToolchainError
from schedules.tuning.candidate import Emission
from schedules.tuning.folder import Claims, Folder


class Compiler:
    """Compiles candidates in the background; a context that stops doing so at its end.

    Parameters
    ----------
    jobs: compilers at a time.
    recompile_for: a newer arch whose machine code is made instead, so that kernels run on a GPU of that arch.
    """

    def __init__(self, folder: Folder, claims: Claims, emission: Emission, jobs: int, recompile_for: str = ""):
        self.folder, self.claims, self.emission, self.recompile_for = folder, claims, emission, recompile_for
        self.pool = ThreadPoolExecutor(jobs)
        self.started: dict[str, Future] = {}

    def __enter__(self) -> Compiler:
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)

    def start(self, ids: Sequence[str]) -> None:
        """Begin with candidates, in this order."""
        for id in ids:
            if id not in self.started and not self._has_result(id):
                self.started[id] = self.pool.submit(self._compile, id)

    def wait(self, ids: Sequence[str]) -> None:
        """Until each of the candidates has a module or a reason why not, wherever it is compiled."""
        self.start(ids)
        for id in ids:
            while not self._has_result(id):
                if id in self.started:
                    self.started.pop(id).result()
                else:  # another process is at it; if it dies, its claim can be taken
                    time.sleep(0.2)
                    self.start([id])

    def _has_result(self, id: str) -> bool:
        return self.folder.module(id).exists() or self.folder.failure(id) is not None

    def _compile(self, id: str) -> None:
        task = f"compile-{id}"
        if not self.claims.take(task):
            return
        draft = self.folder.module(id).with_name(f"{id}.{socket.gethostname()}-{os.getpid()}")
        object_file, arch = draft.with_suffix(".o"), self.emission.arch
        try:
            compile_source(self.folder.source(id), object_file, arch, self.emission.spills_allowed, self.recompile_for)
            cuda.link_module([object_file], draft)
            os.replace(draft, self.folder.module(id))
        except ToolchainError as e:
            self.folder.fail(id, str(e).split("\n$ ")[0])
        finally:
            object_file.unlink(missing_ok=True)
            self.claims.release(task)

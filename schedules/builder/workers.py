"""Processes that may use TVM; light, so that a process can say how TVM is imported before anything imports it."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor

from schedules.toolchain.process import die_with_parent


def import_tvm() -> None:
    """Import TVM without PyTorch, which tvm-ffi imports first where it is: 2.6 of 3.9 s, and no kernel is made of it.

    For processes that build and do nothing else.  A definition may import it afterwards; tvm-ffi takes no tensors of it
    then.  Nothing of what is imported is ever garbage: the collector, which takes 0.1 of 0.75 s here, is off meanwhile
    and looks at none of it later.
    """
    if "torch" in sys.modules:
        return
    gc.disable()
    sys.modules["torch"] = None  # an import of it fails
    try:
        import tvm  # noqa: F401
    finally:
        del sys.modules["torch"]
    import schedules.builder.compile  # noqa: F401

    gc.freeze()
    gc.enable()


def _start(builder: int) -> None:
    """A worker leaves Ctrl-C to the builder (its process id), whose end ends it too, however that comes."""
    die_with_parent()
    if os.getppid() != builder:  # it ended while this worker started
        os._exit(1)
    signal.signal(signal.SIGINT, lambda *_: None)  # a handler, unlike "ignore", is not inherited by compilers
    import_tvm()


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that may use TVM; it has threads, so that its process must not be forked."""
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (os.getpid(),))

"""What the processes of a test run make once and share, in a folder that lives as long as the run."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

#: Seconds after which a process that a test waits for counts as one that hangs: many times what any of them takes,
#: since the machine may be slow, and others busy on it.
HANGS = 900

#: Names the folder to the processes that the first one starts, such as workers of xdist.
VARIABLE = "TVM_FLASH_TEST_RUN"


def begin() -> None:
    """Make the folder, if this is the first process of the run; it goes when that process ends."""
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = tempfile.mkdtemp(prefix="tvm-flash-tests-")
        atexit.register(shutil.rmtree, os.environ[VARIABLE], ignore_errors=True)


def once(name: str, make: Callable[[Path], None]) -> Path:
    """A folder that ``make`` has filled, in the process that came first; the others wait for it.

    It is made anew if ``make`` failed before.
    """
    begin()
    run = Path(os.environ[VARIABLE])
    folder = run / name
    with open(run / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            draft = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=run))
            make(draft)
            draft.rename(folder)
    return folder

"""Running a compiler: errors that can be read, and no process left behind when the builder is killed."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
_SHOWN_LINES = 40


class ToolchainError(RuntimeError):
    """A compiler is missing, has refused its input, or has produced what must not ship."""


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies, however that happens."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run(command: Sequence[str | os.PathLike], what: str) -> str:
    """Run a compiler and return what it printed.

    Raises
    ------
    ToolchainError: it is missing or failed; the message holds ``what``, its output and the command.
    """
    command = [str(word) for word in command]
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            preexec_fn=die_with_parent,
        )
    except OSError as e:
        raise ToolchainError(f"{what}: cannot run {command[0]}: {e.strerror}") from e
    if done.returncode:
        lines = done.stdout.strip().splitlines()
        errors = [line for line in lines if "error" in line.lower()] or lines
        shown = "\n".join(errors[:_SHOWN_LINES])
        raise ToolchainError(f"{what}: {command[0]} returned {done.returncode}\n{shown}\n$ {' '.join(command)}")
    return done.stdout


def host_compiler(language: str = "c") -> str:
    """Path of the C or C++ compiler: ``CC`` or ``CXX`` of the environment, else the system's.

    Raises
    ------
    ToolchainError: there is none.
    """
    variable, names = {"c": ("CC", ("cc", "gcc", "clang")), "c++": ("CXX", ("c++", "g++", "clang++"))}[language]
    for name in (os.environ.get(variable), *names):
        path = shutil.which(name) if name else None
        if path:
            return path
    raise ToolchainError(
        f"no {language.upper()} compiler found; install one (e.g. the package gcc or g++), or set {variable}"
    )

"""The virtual environment ``.venv`` of the README's commands: made on first use, brought up to date after.

Standard library only: it runs under the system's Python, before anything is installed.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
MINIMUM = (3, 10)
#: What builds kernels, and all that testing and benchmarks need besides.
BUILD, ALL = "build,volta", "build,volta,test,bench"
#: What of installed packages is compiled when it is imported, as little of it is: a third of all.
SELDOM = r"/(tests|transformers/models|diffusers/(models|pipelines)|ray/(air|data|rllib|serve|train|tune))/"
#: What of this clone processes of tests import hundreds of times: none would keep what it compiled where
#: PYTHONDONTWRITEBYTECODE is set.
OFTEN = ("schedules", "tvm_flash", "tests")


def prepare(*modules: str) -> Path:
    """Install the project with everything that building, testing and benchmarks need, and build this machine's kernels
    meanwhile, all or those of some modules; the environment's Python."""
    if sys.version_info < MINIMUM:
        found = ".".join(map(str, sys.version_info[:3]))
        sys.exit(f"Python {found} is too old; run this with Python {'.'.join(map(str, MINIMUM))} or later")
    python = VENV / "bin" / "python"
    if not python.exists():
        print(f"making {VENV.name} …", flush=True)
        venv.create(VENV, with_pip=True)
    print("installing tvm_flash and what builds its kernels …", flush=True)
    if status := _install(python, BUILD):
        sys.exit(status)
    print("building this machine's kernels, and installing what tests and compares them …", flush=True)
    with ThreadPoolExecutor() as meanwhile:  # pip keeps what is there, and does one thing after the other
        rest = meanwhile.submit(_install, python, ALL)
        run([python, "scripts/build_kernels.py", "--arch", "native", *(f"--module={name}" for name in modules)])
    if status := rest.result():
        sys.exit(status)
    return python


def _install(python: Path, extras: str) -> int:
    """Install the project with some of its extras, and compile what is imported; pip's exit status."""
    options = ("--quiet", "--disable-pip-version-check", "--no-compile")
    constraints = ROOT / "scripts" / "constraints.txt"
    command = [python, "-m", "pip", "install", *options, "--constraint", constraints, "--editable", f"{ROOT}[{extras}]"]
    status = _status(command)
    if not status:
        # pip would compile one file after the other, for more than a minute.  Some are no Python of this version.
        folders = (VENV / "lib", *(ROOT / name for name in OFTEN))
        _status([python, "-m", "compileall", "-qq", "-j", "0", "-x", SELDOM, *folders])
    return status


def run(command: list) -> None:
    """Run a command in the repository's root; its failure ends this script with its exit status."""
    if status := _status(command):
        sys.exit(status)


def _status(command: list) -> int:
    return subprocess.run([str(part) for part in command], cwd=ROOT).returncode

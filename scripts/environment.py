"""The virtual environment ``.venv`` of the README's commands: made on first use, brought up to date after.

Standard library only: it runs under the system's Python, before anything is installed.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
MINIMUM = (3, 10)
#: What of installed packages is compiled when it is imported, as little of it is: a third of all.
SELDOM = r"/(tests|transformers/models|diffusers/(models|pipelines)|ray/(air|data|rllib|serve|train|tune))/"
#: What of this clone processes of tests import hundreds of times: none would keep what it compiled where
#: PYTHONDONTWRITEBYTECODE is set.
OFTEN = ("schedules", "tvm_flash", "tests")


def prepare() -> Path:
    """Install the project with everything that building, testing and benchmarks need; the environment's Python."""
    if sys.version_info < MINIMUM:
        found = ".".join(map(str, sys.version_info[:3]))
        sys.exit(f"Python {found} is too old; run this with Python {'.'.join(map(str, MINIMUM))} or later")
    python = VENV / "bin" / "python"
    if not python.exists():
        print(f"making {VENV.name} …", flush=True)
        venv.create(VENV, with_pip=True)
    print("installing tvm_flash and what it builds, tests and compares itself with …", flush=True)
    run(
        [
            python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile",
            "--constraint", ROOT / "scripts" / "constraints.txt",
            "--editable", f"{ROOT}[build,volta,test,bench]",
        ]
    )  # fmt: skip
    # pip would compile one file after the other, for more than a minute.  Some are no Python of this version.
    folders = (VENV / "lib", *(ROOT / name for name in OFTEN))
    subprocess.run([str(python), "-m", "compileall", "-qq", "-j", "0", "-x", SELDOM, *map(str, folders)])
    return python


def run(command: list) -> None:
    """Run a command in the repository's root; its failure ends this script with its exit status."""
    status = subprocess.run([str(part) for part in command], cwd=ROOT).returncode
    if status:
        sys.exit(status)

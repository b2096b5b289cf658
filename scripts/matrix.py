"""The wheel in clean environments, from the oldest to the newest versions of what it lives beside; a table.

Each environment gets the wheel of this checkout's packs and what ENVIRONMENTS names, no compiler and no TVM, and runs
`python -m tvm_flash check` and the programs of tests/environments.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PROGRAMS = ROOT / "tests" / "environments"
PAGE = ROOT / "docs" / "environments.md"
BEGIN, END = "<!-- the table of scripts/matrix.py -->\n", "<!-- end of the table -->\n"

#: How far a program's numbers may be from what it compares with.
BOUND = 1e-5


@dataclass(frozen=True)
class Environment:
    """A Python and what is installed in it beside the wheel; ``programs`` of tests/environments are run in it."""

    name: str
    python: str
    requirements: tuple[str, ...]
    programs: tuple[str, ...]


ENVIRONMENTS = (
    Environment(
        "oldest torch",
        "3.10",
        ("apache-tvm-ffi==0.1.9", "numpy==1.23.5", "torch==1.11.0"),
        ("numpy", "torch"),
    ),
    Environment(
        "oldest tvm-ffi, diffusers, and torch that compiles",
        "3.12",
        ("apache-tvm-ffi==0.1.6", "numpy<2", "torch==2.4.1", "diffusers==0.32.0", "transformers<5", "setuptools"),
        ("numpy", "torch", "diffusers"),
    ),
    Environment(
        "tvm-ffi as vLLM and SGLang pin it, oldest transformers",
        "3.11",
        ("apache-tvm-ffi==0.1.11", "torch==2.13.0", "transformers==5.17.0"),
        ("numpy", "torch", "transformers"),
    ),
    Environment(
        "torch of spring 2026",
        "3.12",
        ("apache-tvm-ffi==0.1.14.post1", "torch==2.11.0", "transformers==5.24.0", "diffusers==0.42.1"),
        ("numpy", "torch", "transformers", "diffusers"),
    ),
    Environment(
        "of the tests, with the newest tvm-ffi",
        "3.11",
        (
            *("apache-tvm-ffi==0.1.15.post2", "torch==2.13.0", "transformers==5.24.0", "diffusers==0.42.1"),
            *("jax==0.10.2", "jax-tvm-ffi"),
        ),
        ("numpy", "torch", "transformers", "diffusers", "jax"),
    ),
    Environment(
        "newest",
        "3.13",
        ("apache-tvm-ffi", "torch", "transformers", "diffusers", "jax", "jax-tvm-ffi"),
        ("numpy", "torch", "transformers", "diffusers", "jax"),
    ),
)

#: Whose versions the table shows.
SHOWN = ("apache-tvm-ffi", "numpy", "torch", "transformers", "diffusers", "jax")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="a comma list of numbers, as --list shows them")
    parser.add_argument("--list", action="store_true", help="show the environments")
    parser.add_argument("--work", type=Path, help="where environments are made and kept (default: a folder that goes)")
    parser.add_argument(
        "--wheel", type=Path, help="a wheel that is there already (default: build one for this processor)"
    )
    parser.add_argument("--write", action="store_true", help=f"put the table into {PAGE.relative_to(ROOT)}")
    options = parser.parse_args()
    numbers = range(len(ENVIRONMENTS)) if options.only is None else [int(x) - 1 for x in options.only.split(",")]
    if options.list:
        for number, environment in enumerate(ENVIRONMENTS, 1):
            print(f"{number}. {environment.name}: Python {environment.python}, {', '.join(environment.requirements)}")
        return 0
    work = options.work or Path(tempfile.mkdtemp(prefix="tvm_flash_matrix."))
    try:
        wheel = options.wheel or _wheel(work)
        rows = [_try(ENVIRONMENTS[i], work / f"environment{i + 1}", wheel.absolute()) for i in numbers]
    finally:
        if options.work is None:
            shutil.rmtree(work, ignore_errors=True)
    table = _table(rows)
    print(table, end="")
    if options.write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + table + END + rest.partition(END)[2])
    return 0 if all(row["failed"] == [] for row in rows) else 1


def _wheel(work: Path) -> Path:
    from schedules.builder.wheel import build_wheel
    from schedules.commands.build import main as build_kernels

    if build_kernels(["--arch", "cpu"]):
        sys.exit("the kernels of this processor can't be built")
    return build_wheel(work / "wheel").path


def _try(environment: Environment, home: Path, wheel: Path) -> dict:
    """Make an environment and run its programs: versions by name, outcomes by program, and what failed."""
    row: dict = {"name": environment.name, "versions": {}, "outcomes": {}, "failed": []}
    interpreter = _interpreter(environment.python)
    if interpreter is None:
        return {**row, "failed": [f"there is no Python {environment.python} on this machine"]}
    begin = time.monotonic()
    print(f"{environment.name}: Python {environment.python} …", flush=True)
    python = home / "bin" / "python"
    if not python.exists():
        _run([interpreter, "-m", "venv", home])
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile"]
    for arguments in (environment.requirements, (f"{wheel}",), ("--force-reinstall", "--no-deps", f"{wheel}")):
        done = _run([*install, *arguments])
        if done.returncode:
            return {**row, "failed": [f"pip: {_last_line(done)}"]}
    listed = json.loads(_run([python, "-m", "pip", "list", "--format", "json"]).stdout)
    row["versions"] = {x["name"]: x["version"] for x in listed if x["name"] in SHOWN}
    row["versions"]["Python"] = _run([python, "-c", "import platform; print(platform.python_version())"]).stdout.strip()
    row["outcomes"]["check"] = _checked(_run([python, "-m", "tvm_flash", "check", "--json"]))
    for program in environment.programs:
        row["outcomes"][program] = _outcome(_run([python, PROGRAMS / f"with_{program}.py"]))
    row["failed"] = [f"{name}: {text}" for name, text in row["outcomes"].items() if not text.startswith("right")]
    print(f"  {time.monotonic() - begin:.0f} s; {'; '.join(row['failed']) or 'all right'}", flush=True)
    return row


def _interpreter(version: str) -> str | None:
    """A Python of a version: by its name, or one of pyenv's."""
    candidates = [shutil.which(f"python{version}")]
    home = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates += [str(x) for x in sorted(home.glob(f"{version}.*/bin/python"))]
    for candidate in filter(None, candidates):
        found = subprocess.run(
            [candidate, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"], capture_output=True, text=True
        )
        if found.stdout.strip() == version:
            return candidate
    return None


def _run(command: list) -> subprocess.CompletedProcess:
    """A command beside this checkout, not in it, so that only what is installed is found."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "TVM", "VIRTUAL_ENV"))}
    environment = {**kept, "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    command = [str(x) for x in command]
    return subprocess.run(command, cwd=tempfile.gettempdir(), env=environment, capture_output=True, text=True)


def _last_line(done: subprocess.CompletedProcess) -> str:
    return (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()[-1][:200]


def _checked(done: subprocess.CompletedProcess) -> str:
    if done.returncode:
        return _last_line(done)
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = [x["symbol"] for x in kernels if not x["ok"]]
    return f"{len(wrong)} wrong, such as {wrong[0]}" if wrong else f"right, {len(kernels)} kernels"


def _outcome(done: subprocess.CompletedProcess) -> str:
    if done.returncode:
        return _last_line(done)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    if not found["error"] < BOUND:
        return f"off by {found['error']:.1e}"
    notes = [name if value else f"no {name}" for name, value in found.items() if isinstance(value, bool)]
    return "right" + "".join(f", {note}" for note in notes)


def _table(rows: list[dict]) -> str:
    names = ("Python", *SHOWN)
    lines = ["| environment | " + " | ".join(names) + " | what ran |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        versions = [re.sub(r"\+.*", "", row["versions"].get(name, "–")) for name in names]
        ran = "; ".join(f"{name}: {text}" for name, text in row["outcomes"].items()) or "; ".join(row["failed"])
        lines.append(f"| {row['name']} | {' | '.join(versions)} | {ran} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())

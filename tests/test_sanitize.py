"""``scripts/sanitize.py`` with a stand-in for compute-sanitizer: what it takes for clean, and what it tells."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared import HANGS

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "sanitize.py"


@pytest.fixture
def sanitize(tmp_path):
    """A function that runs the script with a tool that is a shell program; its exit status and what it told."""

    def call(program: str, *options: str) -> tuple[int, str]:
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(f"#!/bin/sh\n{program}\n")
        tool.chmod(0o755)
        command = [sys.executable, SCRIPT, "--tool", "racecheck", "--logs", tmp_path / "logs", *options]
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=HANGS)
        assert not done.stderr
        return done.returncode, done.stdout

    return call


def test_clean(sanitize, tmp_path):
    status, told = sanitize('echo "$@"; echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"')
    assert status == 0 and told.startswith("✓ racecheck: RACECHECK SUMMARY: 0 hazards") and told.count("\n") == 1
    log = (tmp_path / "logs" / "sm_90a_racecheck.log").read_text()
    assert f"--tool racecheck --error-exitcode 9 {sys.executable} {SCRIPT} --run --arch sm_90a --symbol" in log


@pytest.mark.parametrize(
    ("program", "tells"),
    [
        (
            'echo "========= Warning: Race reported in v2_float16_d64_full_identity_kernel"; '
            'echo "========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)"',
            ("SUMMARY: 1 hazard", "1 lines name v2_float16_d64_full_identity\n"),
        ),
        ("echo 3 of 4: a kernel; exit 9", ("the tool gave no summary", "exit status 9; last: 3 of 4: a kernel")),
        ('echo "========= ERROR SUMMARY: 0 errors"; exit 1', ("exit status 1; last: nothing was printed",)),
    ],
    ids=["hazard", "crash", "wrong"],
)
def test_not_clean(sanitize, program, tells):
    status, told = sanitize(program)
    assert status == 1 and told.startswith("✗ racecheck")
    assert all(text in told for text in tells), told


def test_a_tool_that_takes_too_long_is_stopped_with_all_that_it_started(sanitize):
    status, told = sanitize("echo 1 of 4: a kernel; sleep 600 & wait", "--seconds", "1")
    assert status == 1 and "✗ racecheck: stopped after 1 s; the tool gave no summary" in told
    assert "last: 1 of 4: a kernel" in told

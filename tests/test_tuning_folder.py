"""A tuner's folder: one process at a time measures it, and what is not a tuner's is left alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from schedules.commands.tune import main
from schedules.tuning.folder import Folder, FolderBusyError


def test_one_process_at_a_time_measures_a_folder(tmp_path):
    folder = Folder(tmp_path).make()
    program = "import sys, time; from pathlib import Path; from schedules.tuning.folder import Folder\n"
    program += "with Folder(Path(sys.argv[1])).locked(): print('mine', flush=True); time.sleep(300)"
    other = subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "mine\n"
    with pytest.raises(FolderBusyError, match="wait until it has ended"), folder.locked():
        pass
    os.kill(other.pid, signal.SIGKILL)  # the lock goes with its process, however that ends
    other.communicate()
    with folder.locked():
        pass


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    problem = ["--arch", "cpu", "--problem", "b=1 h=1 s=16 d=8 fp32", "--budget", "2"]
    assert main([*problem, "--emit", str(tmp_path)]) == 2
    assert (tmp_path / "thesis.txt").exists() and "holds something else" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--engine", "ray", "--device", "cpu"], "--device: names devices of this host"),
        (["--address", "somewhere:6379"], "are for --engine ray"),
        (["--engine", "ray", "--resources", "big"], "expected NAME=AMOUNT"),
    ],
)
def test_engines_refuse_what_they_would_not_hear(words, expected, tmp_path, capsys):
    problem = ["--arch", "cpu", "--problem", "b=1 h=1 s=16 d=8 fp32", "--budget", "2", "--work", str(tmp_path)]
    assert main([*problem, *words]) == 2
    assert expected in capsys.readouterr().err

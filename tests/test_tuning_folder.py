"""A tuner's folder: several processes share its tasks, and what is not a tuner's is left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from schedules.commands.tune import main
from schedules.tuning.folder import Claims, Folder


def test_a_task_is_claimed_once_and_done_once(tmp_path):
    folder = Folder(tmp_path).make()
    with Claims(folder) as mine, Claims(folder) as other:
        assert mine.take("a") and not other.take("a")
        mine.release("a")
        assert other.take("a")
        other.finish("a")
        assert not mine.take("a") and folder.is_done("a")
        assert mine.take("b")
    assert not list((tmp_path / "claims").glob("[!.]*"))


def test_a_claim_that_nobody_keeps_alive_is_taken_over(tmp_path):
    folder = Folder(tmp_path).make()
    with Claims(folder, stale=30) as claims:
        path = tmp_path / "claims" / "a"
        path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "x", "started": "1"}))
        assert not claims.take("a")
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 31))
        assert claims.take("a")


def test_a_claim_of_a_process_of_this_host_that_is_gone_is_taken_at_once(tmp_path):
    program = "import sys; from pathlib import Path; from schedules.tuning.folder import *; import os\n"
    program += "claims = Claims(Folder(Path(sys.argv[1])).make()); assert claims.take('a'); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", program, tmp_path]).returncode == 9
    with Claims(Folder(tmp_path)) as claims:
        assert claims.take("a")


def test_claims_are_kept_alive(tmp_path):
    folder = Folder(tmp_path).make()
    with Claims(folder, stale=0.4) as claims, Claims(folder, stale=0.4) as other:
        claims.take("a")
        path = tmp_path / "claims" / "a"
        os.utime(path, (0, 0))
        for _ in range(100):
            if path.stat().st_mtime > 0:
                break
            claims.ended.wait(0.05)
        assert not other.take("a")


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    problem = ["--arch", "cpu", "--problem", "b=1 h=1 s=16 d=8 fp32", "--budget", "2"]
    assert main([*problem, "--emit", str(tmp_path)]) == 2
    assert (tmp_path / "thesis.txt").exists() and "holds something else" in capsys.readouterr().err

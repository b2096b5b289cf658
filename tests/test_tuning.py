"""The tuner on a family whose times are rigged: it finds the best, loses nothing, and survives what kernels do."""

from __future__ import annotations

import collections
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from schedules import families
from schedules.builder import records
from schedules.builder.build import build
from schedules.builder.plan import BuildRequest
from schedules.builder.suite import HeadDim, Selection
from schedules.commands.tune import main
from schedules.families.interface import Target
from schedules.tuning import emit, tables
from schedules.tuning.best import Tuning
from schedules.tuning.candidate import Batch
from schedules.tuning.emit import Proposal, tasks_for
from schedules.tuning.folder import Folder
from tests import rigged_family
from tests.rigged_family import BEST, CRASHES, WRONG
from tests.shared import HANGS
from tvm_flash.measure.workloads import Workload

torch = pytest.importorskip("torch")

PROGRAM = [sys.executable, str(Path(rigged_family.__file__))]
PROBLEM = "b=1 h=1 s=16 d=8 full float32"
#: Times are slept, and differ by far: other processes disturb them little, and no round has to be repeated for them.
QUICK = ("--effort", "rounds=5 block=0.004 warm_up=0.01 patience=0", "--jobs", "1")
TARGET = Target("cpu", "toy")


@pytest.fixture
def rigged(monkeypatch):
    monkeypatch.setitem(sys.modules, "schedules.families.rigged", rigged_family.module())
    monkeypatch.setitem(families.FAMILY, "cpu", "rigged")


def key(record) -> tuple[int, int]:
    return record.config["block_m"], record.config["num_stages"]


def wait_for(condition):
    end = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_variations_of_the_default_are_tried_first(tmp_path, rigged, capsys):
    log = tmp_path / "this.jsonl"
    command = ["--arch", "cpu", "--problem", PROBLEM, *QUICK, "--log", str(log), "--work", str(tmp_path / "w")]
    wanted = ["--variation", "block_m=48 num_stages=2", "--variation", "block_m=16"]  # the second is the default
    assert main([*command, *wanted]) == 0
    assert {key(r): r.search for r in records.read(log)} == {(16, 1): "default", (48, 2): "variation 0"}
    assert main([*command, "--variation", "block_k=3"]) == 2
    assert "--variation block_k: unknown; a forward configuration for cpu" in capsys.readouterr().err


def test_a_search_survives_everything_and_decides_what_is_built(tmp_path, rigged, capsys):
    log = tmp_path / "logs" / "this.jsonl"
    command = ["--arch", "cpu", "--problem", PROBLEM, "--strategy", "exhaustive", "--budget", "50", *QUICK]
    command += ["--log", str(log), "--work", str(tmp_path / "work")]

    # 1. A search that is killed in its first batch, after some records (here: before the configuration that hangs).
    search = subprocess.Popen([*PROGRAM, *command, "--step-limit", "60"], stdout=subprocess.DEVNULL)
    wait_for(lambda: log.exists() and log.read_bytes().count(b"\n") >= 2)
    os.kill(search.pid, signal.SIGKILL)
    search.wait()
    before = log.read_text()
    assert 2 <= before.count("\n") < 11

    # 2. It goes on where it was, and gives up on the configuration that hangs.
    assert main([*command, "--step-limit", "20", "--resume"]) == 0
    assert log.read_text().startswith(before)
    found = list(records.read(log))
    counts = collections.Counter(map(key, found))
    assert len(counts) == 11 and set(counts.values()) == {1}, "each configuration once, but the one that is refused"
    status = {key(r): r.status for r in found}
    assert {k: s for k, s in status.items() if s != "ok"} == {
        rigged_family.HANGS: "hung",
        CRASHES: "crashed",
        WRONG: "wrong",
    }

    # 3. The best is the one that was rigged to be, and the default is told apart.
    ok = [r for r in found if r.status == "ok"]
    best = min(ok, key=lambda r: r.microseconds)
    assert best.config == BEST and tables.best_of(ok) == best and best.gain > 1.5
    assert [key(r) for r in found if r.default] == [(16, 1)]
    assert "block_m=48 num_stages=2" in capsys.readouterr().out

    # 4. The builder takes it, says from where, and takes the default if told to, or if the kernel has changed.
    selection = Selection(("v1",), ("float32",), (HeadDim(64, 64),), ("full",), ("identity",))

    def built(name, folder, mode="auto"):
        tuning = Tuning(mode, folder)
        request = BuildRequest((TARGET,), selection, output=tmp_path / name, jobs=1, tuning=tuning)
        (report,) = build(request)
        (entry,) = report.manifest.kernels
        return entry, report.results[0].note

    tuned, note = built("tuned", log.parent)
    assert (tuned.config, tuned.config_source, note) == (BEST, best.name, "")
    assert [s.microseconds for s in tuned.speeds] == [best.microseconds]
    default, _ = built("default", log.parent, mode="default")
    assert (default.config, default.config_source) == ({"block_m": 16, "num_stages": 1}, "default")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    changed = [line | {"kernel_hash": "0" * 64} if line["config"] == BEST else line for line in lines]
    (tmp_path / "changed").mkdir()
    (tmp_path / "changed" / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
    stale, note = built("stale", tmp_path / "changed")
    assert stale.config == default.config and "has changed since it was measured" in note


@pytest.fixture
def emitted(tmp_path, rigged, monkeypatch):
    """A folder with two batches of three configurations, of which one crashes and one is wrong."""
    monkeypatch.setattr(emit, "BATCH", 3)
    folder = Folder(tmp_path / "folder").make()
    tasks = tasks_for([Workload.parse(PROBLEM)], ["v1"], TARGET)
    (spec,) = tasks
    configs = [rigged_family.Config(*key) for key in ((16, 1), (16, 2), (48, 1), (48, 2), CRASHES, WRONG)]
    emit.begin(folder, TARGET, tasks)
    made, not_made = emit.emit(folder, TARGET, tasks, [Proposal(spec, c, "test") for c in configs], "000", jobs=1)
    assert len(made) == 6 and not not_made and len(folder.batches()) == 2
    return folder


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_an_emitted_folder_is_measured_once(emitted, engine, capsys):
    command = ["--measure", str(emitted.path), *QUICK, "--engine", engine]
    if engine == "ray":  # its processes are those of a process of its own
        pytest.importorskip("ray")
        done = subprocess.run([*PROGRAM, *command], capture_output=True, text=True, timeout=HANGS)
        assert done.returncode == 0, done.stdout + done.stderr
        output = done.stdout
    else:
        assert main(command) == 0
        output = capsys.readouterr().out
    found = {key(r): r for r in emitted.records()}
    assert len(list(emitted.records())) == len(found) == 6 and not emitted.left()
    assert {k: r.status for k, r in found.items() if r.status != "ok"} == {CRASHES: "crashed", WRONG: "wrong"}
    assert tables.best_of([r for r in found.values() if r.status == "ok"]).config == BEST
    assert found[16, 1].default and found[48, 2].gain > 1.2
    assert "all batches are measured" in output and "block_m=48 num_stages=2" in output
    assert main(command) == 0 and len(list(emitted.records())) == 6


def test_a_configuration_that_a_family_fails_on_is_no_candidate(tmp_path, rigged, monkeypatch):
    monkeypatch.setattr(sys.modules["schedules.families.rigged"], "program", lambda *_: 1 / 0)
    folder = Folder(tmp_path / "folder").make()
    tasks = tasks_for([Workload.parse(PROBLEM)], ["v1"], TARGET)
    emit.begin(folder, TARGET, tasks)
    proposals = [Proposal(spec, rigged_family.Config(48, 2), "test") for spec in tasks]
    made, not_made = emit.emit(folder, TARGET, tasks, proposals, "000", jobs=1)
    assert not made and "ZeroDivisionError" in not_made[0].reason
    assert folder.batches() in ([], [Batch("000-000-0", (), (PROBLEM,), {"v1_float32_d64_full_identity": {}})])

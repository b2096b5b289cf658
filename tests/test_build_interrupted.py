"""The builder is atomic: killed at any moment it leaves the old pack or the new one; and two don't mix."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from schedules.builder import pack
from schedules.builder.build import build
from schedules.builder.compile import ChosenConfig
from schedules.builder.plan import BuildRequest, plan
from schedules.builder.suite import Selection
from tests import toy_family
from tests.shared import HANGS
from tests.toy_packs import CPU, D64, TWO_GROUPS, assert_whole
from tvm_flash.packs.manifest import MANIFEST_NAME

pytestmark = pytest.mark.usefixtures("toys")


def _build_and_die(request: BuildRequest, operation: int) -> bool:
    """Build in a child process that is killed before its n-th operation on files; whether it got to the end."""
    child = os.fork()
    if child == 0:
        count = 0

        def dying(original):
            def replacement(*args, **kwargs):
                nonlocal count
                count += 1
                if count == operation:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return replacement

        for owner, name in ((os, "replace"), (os, "fsync"), (pathlib.Path, "unlink"), (subprocess, "run")):
            setattr(owner, name, dying(getattr(owner, name)))
        build(request)
        os._exit(0)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("first_build", [False, True])
def test_kill_leaves_the_old_pack_or_the_new_one(request_, first_build):
    selection = dataclasses.replace(TWO_GROUPS, head_dims=(D64,), masks=("full",))
    request_ = dataclasses.replace(request_, selection=selection)
    folder = request_.output / CPU.folder
    config = {"v1_float32_d64_full_identity": ChosenConfig({"block_m": 48}, "record")}
    changed = dataclasses.replace(request_, configs=config)
    # The child finds every object compiled, so that it doesn't run TVM: only linking and publishing are left.
    (new,) = build(changed)
    for path in folder.iterdir():
        path.unlink()
    old = None if first_build else build(request_)[0]
    build(dataclasses.replace(changed, output=request_.output / "elsewhere"))
    records = request_.output / "elsewhere" / pack.WORK_FOLDER / CPU.folder
    seen = set()
    for operation in range(1, 100):
        for path in records.glob("v1_*"):
            (request_.output / pack.WORK_FOLDER / CPU.folder / path.name).write_bytes(path.read_bytes())
        finished = _build_and_die(changed, operation)
        manifest = pack.read_manifest(folder)
        if manifest is None:
            assert first_build and not (folder / MANIFEST_NAME).exists()
        else:
            assert_whole(folder)
            assert manifest.kernels[0].source_hash in {r.manifest.kernels[0].source_hash for r in (old, new) if r}
        seen.add(manifest and manifest.kernels[0].config["block_m"])
        if finished:
            break
    assert finished and operation > 5
    assert seen == {None if first_build else 16, 48}
    assert_whole(folder)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_end_of_a_parallel_build_ends_its_workers(tmp_path, how):
    command = [sys.executable, toy_family.__file__, "--arch=cpu", f"--output={tmp_path}", "--template=v1", "--jobs=2"]
    builder = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    work = tmp_path / pack.WORK_FOLDER / CPU.folder
    try:
        deadline = time.monotonic() + HANGS
        while not list(work.glob("*.record.json")):  # not rglob: compilers' folders vanish while it walks
            assert builder.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        workers = _descendants(builder.pid)
        assert workers
        if how == signal.SIGINT:  # as the terminal does it: to all of them
            os.killpg(builder.pid, how)
            assert "stopped" in builder.communicate(timeout=HANGS)[0]
            assert builder.returncode == 130
    finally:
        builder.kill()
        builder.wait()
    deadline = time.monotonic() + HANGS
    while any(_is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / CPU.folder).exists()
    # What was finished is not compiled again.
    finished = len(list(work.glob("*.record.json")))
    request = BuildRequest((CPU,), Selection(("v1",)), output=tmp_path, jobs=1)
    planned = plan(request, CPU)
    assert 0 < finished == len(planned.specs) - len(planned.jobs)


def _descendants(pid: int) -> list[int]:
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [p for c in children for p in (int(c), *_descendants(int(c)))]


def _is_running(pid: int) -> bool:
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_two_builders_of_one_pack_exclude_each_other(request_):
    with pack.locked(request_.output, CPU.folder), pytest.raises(pack.PackBusyError, match="another process"):
        build(request_)
    build(request_)

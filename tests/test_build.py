"""The builder: incremental, atomic, and clear about what it did; with families whose kernels compile in no time."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import tvm_ffi

from schedules import build_command, families, pack
from schedules.build import build
from schedules.compile import ChosenConfig, Failed, Refused, cuda_source
from schedules.definition_file import DefinitionFile
from schedules.pattern import DefinitionError
from schedules.plan import Request, parse_targets, plan
from schedules.suite import CORE_VARIANTS, HeadDim, KernelSpec, Selection
from schedules.template import Rejected, Target
from tests import toy_family
from tvm_flash.fast import STEM
from tvm_flash.manifest import MANIFEST_NAME

CPU = Target("cpu", "toy")
D64, D128 = HeadDim(64, 64), HeadDim(128, 128)
TWO_GROUPS = Selection(templates=("v1",), dtypes=("float32",), head_dims=(D64, D128), masks=("full", "causal"))


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    for module in toy_family.families_by_name().values():
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for arch, name in toy_family.FAMILY.items():
        monkeypatch.setitem(families.FAMILY, arch, name)


@pytest.fixture
def request_(tmp_path):
    return Request((CPU,), TWO_GROUPS, output=tmp_path / "packs", jobs=1)


def contents(folder: pathlib.Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder, with its inode: a rewritten file differs even if its bytes don't."""
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def added(first, second) -> list:
    """Kernels of the second report that the first doesn't have; all of the first must still be there."""
    assert all(e in second.manifest.kernels for e in first.manifest.kernels)
    return [e for e in second.manifest.kernels if e not in first.manifest.kernels]


def assert_whole(folder: pathlib.Path) -> None:
    """Every file that the manifest names has its hash, and every kernel is in its module."""
    manifest = pack.read_manifest(folder)
    assert manifest.kernels
    assert all(pack.is_intact(folder, f) for f in (*manifest.modules, *manifest.support_files))
    for entry in manifest.kernels:
        assert tvm_ffi.load_module(str(folder / entry.module))[entry.symbol] is not None


def test_builds_a_pack_that_loads(request_):
    (report,) = build(request_)
    folder = request_.output / CPU.folder
    assert_whole(folder)
    manifest = report.manifest
    assert manifest == pack.read_manifest(folder)
    assert [m.file.rsplit("-", 1)[0] for m in manifest.modules] == ["v1_float32_d64", "v1_float32_d128"]
    assert sorted(e.symbol for e in manifest.kernels) == [
        "v1_float32_d128_causal_identity",
        "v1_float32_d128_causal_identity_s4096",
        "v1_float32_d128_full_identity",
        "v1_float32_d128_full_identity_s4096",
        "v1_float32_d64_causal_identity",
        "v1_float32_d64_full_identity",
    ]
    assert {e.bucket for e in manifest.kernels} == {0, 4096}
    assert manifest.isa == "toy"
    assert set(manifest.versions) == {"tvm", "tvm_ffi"}
    assert all(e.config_source == "default" and len(e.source_hash) == 64 for e in manifest.kernels)


def test_second_build_does_nothing(request_):
    build(request_)
    before = contents(request_.output)
    compiled = []
    (report,) = build(request_, lambda job, _: compiled.append(job))
    assert not compiled and not report.linked
    assert contents(request_.output) == before


def test_sources_that_change_nothing_compile_nothing(request_):
    build(request_)
    for record in request_.output.rglob("*.record.json"):
        record.unlink()
    before = contents(request_.output / CPU.folder)
    (report,) = build(request_)
    assert len(report.results) == 6 and not report.linked
    assert contents(request_.output / CPU.folder) == before


def test_changed_config_rebuilds_one_group(request_):
    (first,) = build(request_)
    symbol = "v1_float32_d64_causal_identity"
    tuned = dataclasses.replace(request_, configs={symbol: ChosenConfig({"block_m": 48}, "record 7")})
    compiled = []
    (second,) = build(tuned, lambda job, _: compiled.append(job.spec.symbol))
    assert compiled == [symbol]
    assert [m.file.rsplit("-", 1)[0] for m in second.linked] == ["v1_float32_d64"]
    old, new = ({e.symbol: e for e in r.manifest.kernels} for r in (first, second))
    assert (new[symbol].config, new[symbol].config_source) == ({"block_m": 48}, "record 7")
    assert new[symbol].source_hash != old[symbol].source_hash
    assert all(new[s] == old[s] for s in old if "_d128_" in s)
    assert_whole(request_.output / CPU.folder)


def test_subset_keeps_other_kernels(request_):
    (first,) = build(request_)
    subset = Selection(("v1",), ("float32",), (D64,), ("window",), ("softcap",))
    (second,) = build(dataclasses.replace(request_, selection=subset))
    assert [e.symbol for e in added(first, second)] == ["v1_float32_d64_window_softcap"]
    assert_whole(request_.output / CPU.folder)


def test_files_of_the_replaced_manifest_outlive_it_once(request_):
    folder = request_.output / CPU.folder
    (first,) = build(request_)
    change = {e.symbol: ChosenConfig({"block_m": 48}, "record") for e in first.manifest.kernels}
    build(dataclasses.replace(request_, configs=change))
    assert all(pack.is_intact(folder, m) for m in first.manifest.modules)
    change = {symbol: ChosenConfig({"block_m": 64}, "record") for symbol in change}
    build(dataclasses.replace(request_, configs=change))
    assert not any((folder / m.file).exists() for m in first.manifest.modules)


def test_damaged_module_is_rebuilt(request_):
    (first,) = build(request_)
    path = request_.output / CPU.folder / first.manifest.modules[0].file
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    (second,) = build(request_)
    assert [m.file for m in second.linked] == [path.name]
    assert_whole(request_.output / CPU.folder)


def test_refused_kernels_are_reported_and_no_failure(request_):
    selection = Selection(("v1", "v2"), ("float32",), (D64, HeadDim(256, 256)), ("full",))
    (report,) = build(dataclasses.replace(request_, selection=selection))
    assert not report.failed
    refused = {r.symbol: r.reason for r in report.results if isinstance(r, Refused)}
    assert refused["v1_float32_d256_full_identity"] == "head_dim 256 is above 128"
    assert refused["v2_float32_d64_full_identity"] == "cpu (toy) has no v2 kernels; it has v1"
    assert [e.symbol for e in report.manifest.kernels] == ["v1_float32_d64_full_identity"]


def test_nothing_built_is_a_failure_and_leaves_the_pack(request_):
    build(request_)
    before = contents(request_.output / CPU.folder)
    selection = Selection(("v1",), ("float32",), (HeadDim(256, 256),), ("full",))
    (report,) = build(dataclasses.replace(request_, selection=selection))
    assert report.manifest is not None  # what was there
    assert contents(request_.output / CPU.folder) == before
    (report,) = build(dataclasses.replace(request_, selection=selection, output=request_.output / "new"))
    assert report.failed and not (request_.output / "new" / CPU.folder / MANIFEST_NAME).exists()


def test_failed_kernel_leaves_its_old_version(request_):
    (first,) = build(request_)
    symbol = "v1_float32_d64_causal_identity"
    broken = dataclasses.replace(request_, configs={symbol: ChosenConfig({"no_such_field": 1}, "record")})
    (second,) = build(broken)
    assert second.failed
    (failure,) = (r for r in second.results if isinstance(r, Failed))
    assert failure.symbol == symbol and "no_such_field" in failure.reason
    assert second.manifest.kernels == first.manifest.kernels
    assert_whole(request_.output / CPU.folder)


# ---------------------------------------------------------------- killed at any moment


def _build_and_die(request: Request, operation: int) -> bool:
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
    try:
        deadline = time.monotonic() + 300
        while not list(tmp_path.rglob("*.record.json")):
            assert builder.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        workers = _descendants(builder.pid)
        assert workers
        if how == signal.SIGINT:  # as the terminal does it: to all of them
            os.killpg(builder.pid, how)
            assert "stopped" in builder.communicate(timeout=60)[0]
            assert builder.returncode == 130
    finally:
        builder.kill()
        builder.wait()
    deadline = time.monotonic() + 60
    while any(_is_running(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / CPU.folder).exists()
    # What was finished is not compiled again.
    finished = len(list(tmp_path.rglob("*.record.json")))
    request = Request((CPU,), Selection(("v1",)), output=tmp_path, jobs=1)
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


# ---------------------------------------------------------------- definitions

DEFINITIONS = """
from tvm.script import tirx as T
from schedules.attention import Attention
from schedules.catalogue import MASKS, ScoreModification

squared = Attention(ScoreModification("square", lambda s, at: s * s, lambda s, at: s * s), MASKS["causal"])

def plain(head_dim, dtype, *, head_dim_v=None, index_dtype="int64"):
    return Attention()(head_dim, dtype, head_dim_v=head_dim_v, index_dtype=index_dtype)

def no_attention(head_dim, dtype, *, head_dim_v=None, index_dtype="int64"):
    @T.prim_func(s_tir=True)
    def f(x: T.handle):
        X = T.match_buffer(x, (4,), "float32")
        X[0] = T.float32(0)
    return f

number = 3
"""


@pytest.fixture
def definitions(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(DEFINITIONS)
    return path


@pytest.mark.parametrize(("name", "mask", "score"), [("squared", "causal", "square"), ("plain", "custom", "custom")])
def test_definition_is_added_to_the_pack(request_, definitions, name, mask, score):
    (first,) = build(request_)
    selection = dataclasses.replace(TWO_GROUPS, head_dims=(D64,), masks=())
    mine = dataclasses.replace(request_, selection=selection, definition=DefinitionFile(definitions, name))
    (second,) = build(mine)
    (entry,) = added(first, second)
    assert (entry.definition, entry.mask, entry.score) == (name, mask, score)
    assert entry.symbol == f"{name}_v1_float32_d64_{mask}_{score}"
    assert_whole(request_.output / CPU.folder)
    # Another text of the definition is another kernel.
    definitions.write_text(DEFINITIONS.replace("s * s,", "s * s + s,", 1).replace("Attention()(", "squared("))
    (third,) = build(mine)
    assert {e.source_hash for e in third.manifest.kernels} - {e.source_hash for e in second.manifest.kernels}
    assert len(third.manifest.kernels) == len(second.manifest.kernels)


def test_definition_errors_name_what_is_wrong(request_, definitions):
    for text, message in (
        ("mine.py", "expected file.py:name"),
        (f"{definitions}:not a name", "expected file.py:name"),
        (f"{definitions.with_name('none.py')}:squared", "there is no file"),
    ):
        with pytest.raises(ValueError, match=message):
            DefinitionFile.parse(text)
    for name, message in (
        ("absent", "defines no 'absent'; its definitions are squared"),
        ("number", "number is int; expected an Attention"),
    ):
        with pytest.raises(DefinitionError, match=message):
            DefinitionFile.parse(f"{definitions}:{name}").load()
    wrong = dataclasses.replace(request_, definition=DefinitionFile(definitions, "no_attention"))
    with pytest.raises(DefinitionError, match="arguments: expected"):
        build(wrong)
    definitions.write_text("import no_such_module")
    with pytest.raises(DefinitionError, match="can't be loaded: ModuleNotFoundError"):
        DefinitionFile(definitions, "squared").load()
    assert not (request_.output / CPU.folder).exists()


# ---------------------------------------------------------------- the command


def test_list_and_dry_run_write_nothing(tmp_path, capsys):
    arguments = ["--arch", "cpu", "--output", str(tmp_path / "packs"), "--template", "v1", "--head-dim", "64"]
    assert build_command.main([*arguments, "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 2 * len(CORE_VARIANTS)
    assert listed[0] == "cpu v1_float32_d64_full_identity"
    assert build_command.main([*arguments, "--dry-run"]) == 0
    assert f"{len(listed)} kernels selected, 0 up to date, {len(listed)} to compile" in capsys.readouterr().out
    assert not (tmp_path / "packs").exists()


def test_command_prints_a_table_and_refusals(tmp_path, capsys):
    arguments = [
        "--arch=cpu",
        f"--output={tmp_path}",
        "--template=v1",
        "--head-dim=64,256",
        "--dtype=float32",
        "--mask=full",
    ]
    assert build_command.main([*arguments, "--jobs=1"]) == 0
    out = capsys.readouterr().out
    assert "v1_float32_d64_full_identity" in out and "seconds" in out
    assert "refused: head_dim 256 is above 128" in out
    assert build_command.main([*arguments, "--jobs=1"]) == 0
    assert "1 up to date" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_10"], "--arch sm_10: unknown"),
        (["--isa", "mmx"], "--isa mmx: unknown"),
        (["--mask", "diagonal"], "--mask diagonal: unknown; expected one of full, causal"),
        (["--score", "x"], "--score x: unknown"),
        (["--dtype", "float8"], "--dtype float8: unknown"),
        (["--template", "v3"], "--template v3: unknown"),
        (["--head-dim", "65"], "multiples of 8"),
        (["--head-dim", "big"], "expected a number"),
        (["--jobs", "0"], "--jobs 0"),
        (["--definition", "x.py"], "expected file.py:name"),
    ],
)
def test_wrong_requests_name_the_option(tmp_path, capsys, arguments, message):
    assert build_command.main(["--output", str(tmp_path / "packs"), *(arguments)]) == 2
    assert message in capsys.readouterr().out
    assert not (tmp_path / "packs").exists()


def test_native_is_this_processor_and_its_gpus(monkeypatch):
    monkeypatch.setattr("schedules.toolchain.machine.gpu_capabilities", lambda: [(9, 0), (9, 0), (3, 5)])
    assert parse_targets(["native", "cpu"]) == (CPU, Target("sm_90a"))
    assert parse_targets(["cpu"], "all") == parse_targets(["cpu"], "toy") == (CPU,)


# ---------------------------------------------------------------- CUDA


def test_cuda_pack_names_its_resources(tmp_path):
    selection = Selection(("v1",), ("float32",), (D64,), ("full", "causal"))
    (report,) = build(Request((Target("sm_90"),), selection, output=tmp_path, jobs=1))
    assert not report.failed
    assert len(report.manifest.modules) == 1
    assert [f.file.rpartition("-")[0] for f in report.manifest.support_files] == [STEM]
    assert report.manifest.versions["cuda"].count(".") == 2
    for entry in report.manifest.kernels:
        assert 0 < entry.registers < 64 and entry.spills == 0 and entry.shared_memory == 0
    assert b"__global__ void" not in (tmp_path / "sm_90" / report.manifest.modules[0].file).read_bytes()


def test_cuda_source_is_what_the_source_hash_is_of(tmp_path):
    spec = KernelSpec("v1", "attention", "full", "identity", "float32", 64, 64)
    source = cuda_source(spec, toy_family.Config(), Target("sm_90"))
    assert f"{spec.symbol}_kernel" in source
    assert source == cuda_source(spec, toy_family.Config(), Target("sm_90"))
    assert isinstance(
        cuda_source(dataclasses.replace(spec, head_dim=256), toy_family.Config(), Target("sm_90")), Rejected
    )

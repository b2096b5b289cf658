"""The wheel, installed where there is nothing but its two dependencies."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from schedules.builder import records
from schedules.builder.wheel import build_wheel, check_verified
from schedules.toolchain.process import ToolchainError
from tvm_flash.packs.manifest import Argument, KernelEntry, Launch, Manifest

ROOT = Path(__file__).resolve().parent.parent

#: Runs in the clean environment: both layouts on strided numpy arrays, against float64.
PROGRAM = ROOT / "tests" / "environments" / "with_numpy.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory, cpu_pack):
    """A wheel of this checkout with the native pack in it."""
    return build_wheel(tmp_path_factory.mktemp("dist")).path


@pytest.fixture(scope="module", params=("oldest", "newest"))
def clean_python(request, tmp_path_factory, wheel):
    """Python of a new environment with the wheel and numpy, and the oldest tvm-ffi that will do or the newest."""
    home = tmp_path_factory.mktemp("clean")
    venv.create(home)
    requirement = re.search(r"apache-tvm-ffi>=([\w.]+)", (ROOT / "pyproject.toml").read_text())
    oldest = [f"apache-tvm-ffi=={requirement[1]}"] if request.param == "oldest" else []
    # By the pip of these tests: one of its own would take as long again.
    pip = ("-m", "pip", "install", "--quiet", "--ignore-installed", "--prefix", home)
    done = run_clean(sys.executable, *pip, wheel, *oldest, tmp_path=home)
    assert done.returncode == 0, done.stdout + done.stderr
    return home / "bin" / "python"


def run_clean(python, *arguments, tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TVM"))}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
    return subprocess.run([python, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_wheel_holds_machine_code_and_no_source(wheel, cpu_pack, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    home = "tvm_flash/packs/"
    manifest = Manifest.from_json(zipfile.ZipFile(wheel).read(f"{home}{cpu_pack.name}/manifest.json").decode())
    modules = {f"{cpu_pack.name}/{f.file}" for f in (*manifest.modules, *manifest.support_files)}
    data = {n.removeprefix(home) for n in names if n.startswith(home) and not n.endswith(".py")}
    assert data == {"archives.json", "cpu.tar.xz", f"{cpu_pack.name}/manifest.json"}
    with tarfile.open(zipfile.ZipFile(wheel).extract(f"{home}cpu.tar.xz", tmp_path)) as archive:
        assert set(archive.getnames()) == modules
    for name in names:
        assert name.startswith(("tvm_flash/", "tvm_flash-", "schedules/")), name
    assert re.fullmatch(r"tvm_flash-0\.1\.0-py3-none-manylinux_2_\d+_x86_64\.whl", wheel.name)
    tags = zipfile.ZipFile(wheel).read("tvm_flash-0.1.0.dist-info/WHEEL").decode()
    assert f"Tag: {wheel.stem.split('-', 2)[2]}" in tags


def test_attention_with_numpy_alone(clean_python, tmp_path):
    done = run_clean(clean_python, PROGRAM, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["error"] <= 2e-6 and result["fast path"] and not result["installed"]
    assert not {"tvm", "torch", "jax", "schedules"} & set(result["loaded"])


def test_commands_of_the_wheel(clean_python, tmp_path):
    info = run_clean(clean_python, "-m", "tvm_flash", "info", "--json", tmp_path=tmp_path)
    assert info.returncode == 0, info.stderr
    assert "cpu" in info.stdout
    json.loads(info.stdout)
    check = run_clean(clean_python, "-m", "tvm_flash", "check", "--json", tmp_path=tmp_path)
    assert check.returncode == 0, check.stdout + check.stderr


def test_kernels_that_no_gpu_has_run_do_not_ship(tmp_path):
    entry = KernelEntry(
        **dict.fromkeys(("module", "mask", "score", "config_source"), ""),
        symbol="new",
        template="v2",
        arch="sm_80",
        op="forward",
        kind="forward",
        launches=(Launch("new", (Argument("q", 4, "float16"),)),),
        head_dim=64,
        head_dim_v=64,
        definition="attention",
        params=(),
        bucket=0,
        alignment=16,
        index_bits=32,
        config={},
        source_hash="0" * 64,
    )
    (tmp_path / "manifest.json").write_text(Manifest("sm_80", {}, (), (entry,)).to_json())
    with pytest.raises(ToolchainError, match="1 kernels were never run on a GPU in this form"):
        check_verified(tmp_path)
    verified = dataclasses.replace(entry, source_hash=next(iter(records.verified())))
    (tmp_path / "manifest.json").write_text(Manifest("sm_80", {}, (), (verified,)).to_json())
    check_verified(tmp_path)

"""Packs in archives, as a wheel has them: unpacked once, compared, and never where they can't be."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from schedules.builder import pack
from schedules.builder.archives import pack_into_archives
from tests.conftest import ROOT
from tvm_flash import PackError, flash_attention
from tvm_flash.packs import archive
from tvm_flash.packs.manifest import MANIFEST_NAME, Manifest
from tvm_flash.packs.registry import refresh, registry


@pytest.fixture(scope="module")
def archived(cpu_pack, tmp_path_factory):
    """A folder with an archive of a part of the CPU pack, under two names as if for two machines."""
    packs = tmp_path_factory.mktemp("packs")
    whole = Manifest.from_json((cpu_pack / MANIFEST_NAME).read_text())
    modules = tuple(m for m in whole.modules if m.file.startswith("v1_float32_d64"))
    kernels = tuple(k for k in whole.kernels if k.module in {m.file for m in modules})
    for name in ("cpu-a", "cpu-b"):
        (packs / name).mkdir()
        (packs / name / MANIFEST_NAME).write_text(replace(whole, modules=modules, kernels=kernels).to_json())
        for file in files_of(packs / name):
            shutil.copy2(cpu_pack / file, packs / name)
    assert pack_into_archives(packs) == [packs / "cpu.tar.xz"]
    return packs


@pytest.fixture
def packs(archived, tmp_path, use_packs, monkeypatch):
    """The same, alone on the search path, with a cache of its own."""
    shutil.copytree(archived, tmp_path / "packs")
    use_packs(tmp_path / "packs")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "packs"


def attend():
    x = np.random.default_rng(0).standard_normal((1, 2, 9, 64), np.float32)
    return flash_attention(x, x, x)


def files_of(folder: Path) -> set[str]:
    manifest = Manifest.from_json((folder / MANIFEST_NAME).read_text())
    return {f.file for f in (*manifest.modules, *manifest.support_files)}


def unpacked(tmp_path) -> list[Path]:
    return sorted((tmp_path / "cache" / "tvm_flash" / "unpacked").glob("*"))


def test_like_packs_cost_nothing_in_an_archive(archived):
    assert not list(archived.rglob("*.so"))
    assert json.loads((archived / archive.INDEX).read_text()) == {"cpu.tar.xz": ["cpu-a", "cpu-b"]}
    manifest = pack.read_manifest(archived / "cpu-a")
    size = sum(f.size for f in (*manifest.modules, *manifest.support_files))
    assert (archived / "cpu.tar.xz").stat().st_size < size / 3


def test_what_is_unpacked_computes_the_same(packs, tmp_path, cpu_pack, use_packs):
    found = attend()
    assert registry().kernels("cpu")[0].pack.folder == packs / "cpu-a"
    (place,) = unpacked(tmp_path)
    assert {f.name for f in place.iterdir()} == files_of(packs / "cpu-a")
    before = {f: f.stat().st_mtime_ns for f in place.iterdir()}
    refresh()
    attend()
    assert {f: f.stat().st_mtime_ns for f in place.iterdir()} == before
    use_packs(cpu_pack)
    np.testing.assert_array_equal(found, attend())


def test_processes_that_unpack_at_once(packs, tmp_path):
    program = (
        "import numpy as np, tvm_flash; x = np.ones((1, 1, 8, 64), np.float32); tvm_flash.flash_attention(x, x, x)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TVM_FLASH_PACKS": str(packs)}
    processes = [subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(3)]
    assert [p.wait() for p in processes] == [0, 0, 0]
    (place,) = unpacked(tmp_path)
    assert {f.name for f in place.iterdir()} == files_of(packs / "cpu-a")


def test_a_cache_that_cannot_be_written(packs, tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    program = (
        "import numpy as np, tvm_flash\n"
        "from tvm_flash.packs.registry import refresh, registry\n"
        "x = np.ones((1, 1, 8, 64), np.float32); tvm_flash.flash_attention(x, x, x)\n"
        "place = registry().place_of(registry().packs[0])\n"
        "refresh(); assert registry().place_of(registry().packs[0]) == place\n"
        "print(place)"
    )
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "TVM_FLASH_PACKS": str(packs)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(done.stdout.strip()).parent == tmp_path / "temporary"
    assert not Path(done.stdout.strip()).exists()


def test_what_is_edited_after_it_was_unpacked_is_refused(packs, tmp_path):
    place = registry().place_of(registry().kernels("cpu")[0].pack)
    for file in place.glob("*.so"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    refresh()
    with pytest.raises(PackError, match=r"its sha256 differs.*remove that folder, and it is unpacked again") as error:
        attend()
    assert str(place) in str(error.value)
    shutil.rmtree(place)
    refresh()
    attend()


def test_what_was_cut_short_is_unpacked_again(packs, tmp_path):
    place = registry().place_of(registry().kernels("cpu")[0].pack)
    for file in place.glob("*.so"):
        os.truncate(file, 100)
    refresh()
    attend()
    assert unpacked(tmp_path) == [place]


@pytest.mark.parametrize("damage", ("cut", "text", "other", "gone"))
def test_a_damaged_archive(packs, tmp_path, damage):
    path = packs / "cpu.tar.xz"
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "text":
        path.write_text("nothing of the kind")
    elif damage == "gone":
        path.unlink()
    else:
        with tarfile.open(path, "w:xz") as tar:
            for name in files_of(packs / "cpu-a"):
                member = tarfile.TarInfo(f"cpu-a/{name}")
                tar.addfile(member)
    with pytest.raises(PackError, match=r"cpu\.tar\.xz: (is damaged.*install the package again|can't be)"):
        attend()
    assert not unpacked(tmp_path)


def test_a_folder_in_the_way_is_named(packs, tmp_path, monkeypatch):
    place = registry().place_of(registry().kernels("cpu")[0].pack)
    shutil.rmtree(place)
    place.write_text("a file")
    refresh()
    with pytest.raises(PackError, match="is in the way of what is unpacked there; remove it"):
        attend()


def test_a_build_goes_on_from_an_archive(packs):
    pack.restore(packs / "cpu-b")
    manifest = pack.read_manifest(packs / "cpu-b")
    assert all(pack.is_intact(packs / "cpu-b", f) for f in (*manifest.modules, *manifest.support_files))
    assert archive.place_of(packs / "cpu-b", manifest) == packs / "cpu-b"
    (packs / "cpu-b" / manifest.modules[0].file).unlink()
    pack.restore(packs / "cpu-b")
    assert pack.is_intact(packs / "cpu-b", manifest.modules[0])

"""The builder: incremental, and clear about what it did; with families whose kernels compile in no time."""

from __future__ import annotations

import dataclasses

import pytest

from schedules.builder import pack
from schedules.builder.build import build
from schedules.builder.compile import ChosenConfig, Failed, Refused
from schedules.builder.plan import BuildRequest, parse_targets
from schedules.builder.suite import HeadDim, Selection
from schedules.families.interface import Target
from tests.toy_packs import CPU, D64, TWO_GROUPS, added, assert_whole, contents
from tvm_flash.packs.manifest import CALL_STEM, MANIFEST_NAME

pytestmark = pytest.mark.usefixtures("toys")


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
    selection = Selection(("v1", "v2"), ("float32",), (D64, HeadDim(256, 256)), ("full",), ("identity",))
    (report,) = build(dataclasses.replace(request_, selection=selection))
    assert not report.failed
    refused = {r.symbol: r.reason for r in report.results if isinstance(r, Refused)}
    assert refused["v1_float32_d256_full_identity"] == "head_dim 256 is above 128"
    assert refused["v2_float32_d64_full_identity"] == "cpu (toy) has no v2 kernels; it has v1"
    assert [e.symbol for e in report.manifest.kernels] == ["v1_float32_d64_full_identity"]


def test_nothing_built_is_a_failure_and_leaves_the_pack(request_):
    build(request_)
    before = contents(request_.output / CPU.folder)
    selection = Selection(("v1",), ("float32",), (HeadDim(256, 256),), ("full",), ("identity",))
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


def test_a_kernel_that_waits_for_its_first_run_is_no_failure(request_, monkeypatch):
    symbol = "v1_float32_d64_causal_identity"
    monkeypatch.setattr("schedules.builder.records.awaiting", lambda: frozenset({("cpu", symbol)}))
    broken = dataclasses.replace(request_, configs={symbol: ChosenConfig({"no_such_field": 1}, "record")})
    (report,) = build(broken)
    assert not report.failed and symbol not in [e.symbol for e in report.manifest.kernels]
    (refused,) = (r for r in report.results if isinstance(r, Refused))
    assert refused.symbol == symbol and refused.reason.endswith(
        "no GPU has run this kernel yet, and packs do without it"
    )


def test_modules_follow_the_thread_pool(request_, monkeypatch):
    """A module is linked to the pool of its pack; one that nobody asked for keeps the pool that it was linked to."""
    folder = request_.output / CPU.folder
    pools = ("libtvm_flash_threads-11111111.so", "libtvm_flash_threads-22222222.so")
    monkeypatch.setattr("schedules.builder.support.runtime_name", lambda: pools[0])
    (first,) = build(request_)
    monkeypatch.setattr("schedules.builder.support.runtime_name", lambda: pools[1])
    some = dataclasses.replace(request_, selection=dataclasses.replace(TWO_GROUPS, head_dims=(D64,)))
    for _ in range(3):  # what two manifests don't name is removed
        (second,) = build(some)
        names = [f.file for f in second.manifest.support_files]
        assert names[0] == pools[1] and set(pools) <= set(names)
        assert_whole(folder)
    assert [e.symbol for e in second.manifest.kernels] == [e.symbol for e in first.manifest.kernels]
    (third,) = build(request_)
    assert (len(third.linked), len(third.manifest.modules)) == (1, 2)
    assert pools[0] not in [f.file for f in third.manifest.support_files]
    (fourth,) = build(request_)
    assert not fourth.linked
    build(dataclasses.replace(some, output=request_.output))
    assert_whole(folder)


def test_native_is_this_processor_and_its_gpus(monkeypatch):
    monkeypatch.setattr("schedules.toolchain.machine.gpu_capabilities", lambda: [(9, 0), (9, 0), (3, 5)])
    assert parse_targets(["native", "cpu"]) == (CPU, Target("sm_90a"))
    assert parse_targets(["cpu"], "all") == parse_targets(["cpu"], "toy") == (CPU,)


# ---------------------------------------------------------------- CUDA


def test_cuda_pack_names_its_resources(tmp_path):
    selection = Selection(("v1",), ("float32",), (D64,), ("full", "causal"))
    (report,) = build(BuildRequest((Target("sm_90"),), selection, output=tmp_path, jobs=1))
    assert not report.failed
    assert len(report.manifest.modules) == 1
    assert [f.file.rpartition("-")[0] for f in report.manifest.support_files] == [CALL_STEM]
    assert report.manifest.versions["cuda"].count(".") == 2
    for entry in report.manifest.kernels:
        assert 0 < entry.registers < 64 and entry.spills == 0 and entry.shared_memory == 0
    assert b"__global__ void" not in (tmp_path / "sm_90" / report.manifest.modules[0].file).read_bytes()

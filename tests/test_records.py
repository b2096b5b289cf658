"""The ledger: CUDA kernels ship only with a record of a run on hardware of exactly their source."""

import dataclasses
import itertools
import json

import pytest

from schedules import records
from schedules.compile import configs_of, lower, pattern_of
from schedules.families import family_of
from schedules.records import Record
from schedules.suite import Selection
from schedules.template import Target
from tvm_flash.registry import registry

RECORD = Record(
    kind="verified",
    device="NVIDIA Test",
    driver="13.0",
    arch="sm_80",
    run_as="native",
    symbol="v2_float16_d64_full_identity",
    template="v2",
    dtype="float16",
    head_dim=64,
    head_dim_v=64,
    mask="full",
    score="identity",
    bucket=0,
    config={"block_m": 128},
    source_hash="ab" * 32,
    cases=12,
    error=0.4,
    problem="b=4 h=32 s=4096 d=64",
    microseconds=100.0,
    spread=(99.0, 101.5),
    tflops=345.6,
    versions={"tvm": "0.27"},
    date="2026-01-01T00:00:00+00:00",
)


def test_records_come_back(tmp_path):
    path = tmp_path / "a.jsonl"
    newer = dataclasses.replace(RECORD, tflops=400.0)
    records.append(path, [RECORD])
    records.append(path, [newer, dataclasses.replace(RECORD, kind="other", source_hash="cd")])
    assert list(records.read(path))[:2] == [RECORD, newer]
    assert records.verified(tmp_path) == {RECORD.source_hash: newer}


def test_a_broken_last_line_is_skipped_with_a_warning(tmp_path):
    path = tmp_path / "a.jsonl"
    records.append(path, [RECORD])
    with open(path, "a") as log:
        log.write('{"kind": "verified", "dev')
    with pytest.warns(UserWarning, match="line 2"):
        assert list(records.read(path)) == [RECORD]


def test_log_of_a_device():
    assert records.log_of("NVIDIA GeForce RTX 4090").name == "nvidia_geforce_rtx_4090.jsonl"


@pytest.mark.parametrize("path", sorted(records.LOGS.glob("*.jsonl")), ids=lambda p: p.name)
def test_committed_logs_are_readable(path):
    lines = path.read_text().splitlines()
    found = list(records.read(path))
    assert len(found) == len(lines)
    for line, record in zip(lines, found, strict=True):
        assert json.loads(line)["source_hash"] == record.source_hash
        assert records.log_of(record.device).name == path.name
        assert record.cases > 0
        assert 0 <= record.error <= 1
        assert record.microseconds > 0


def core_groups():
    """Kernels of the core set that share a module, for each arch whose kernels were run on hardware."""
    for arch in ("sm_75", "sm_80", "sm_90a"):
        family = family_of(Target(arch))
        specs = [s for s in Selection().specs(family.DTYPES, between=True) if s.template in family.TEMPLATES]
        for group, members in itertools.groupby(specs, key=lambda s: s.group):
            yield pytest.param(Target(arch), tuple(members), id=f"{arch}-{group}")


@pytest.mark.parametrize(("target", "specs"), core_groups())
def test_core_kernels_were_verified_on_hardware(target, specs):
    known = records.verified()
    for spec in specs:
        pattern = pattern_of(spec, target)
        for bucket, (config, _) in configs_of(spec, pattern, target, {}).items():
            lowered = lower(spec.with_bucket(bucket), pattern, target, config)
            assert lowered.source_hash in known, (
                f"{target} {spec.with_bucket(bucket).symbol} was never run on a GPU in this form; build it and run "
                f"scripts/verify_kernels.py on one"
            )


def test_installed_cuda_kernels_were_verified_on_hardware():
    known = records.verified()
    kernels = [k for arch in registry().archs() if arch != "cpu" for k in registry().kernels(arch)]
    missing = [f"{k.entry.arch} {k.entry.symbol}" for k in kernels if k.entry.source_hash not in known]
    assert not missing, f"never run on a GPU in this form: {missing}; run scripts/verify_kernels.py on one"

"""The ledger: CUDA kernels ship only with a record of a run on hardware of exactly their source."""

import dataclasses
import hashlib
import json
import re

import pytest

from schedules.builder import core_set, records
from schedules.builder.records import Measurement, PeerMeasurement, Record, WavesRecord
from schedules.builder.suite import KernelSpec
from tvm_flash.packs.registry import registry

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
        written, known = json.loads(line), json.loads(json.dumps(dataclasses.asdict(record)))
        assert written == {name: known[name] for name in written}  # fields that came later have their defaults
        assert records.log_of(record.device).name == path.name
        if isinstance(record, WavesRecord):
            assert record.launch > 0 and all(step > 0 and start + step > 0 for start, step in record.tiles)
            continue
        if isinstance(record, Measurement) and record.status != "ok":
            assert record.reason
            continue
        assert record.microseconds > 0
        if not isinstance(record, PeerMeasurement):
            assert 0 <= record.error <= 1
        if isinstance(record, Record):
            assert record.cases > 0


GROUPS = list(core_set.groups())


@pytest.fixture(scope="session")
def known():
    """What is written of families whose sources are the present ones."""
    return core_set.known()


@pytest.fixture(scope="session")
def verified():
    """The sources that hardware has run, out of thousands of records."""
    return records.verified()


def is_sample(group: core_set.Group, spec: KernelSpec) -> bool:
    """One spec of 360, others after every change: that what is written was made of the present sources is tried."""
    return int(hashlib.sha256(f"{core_set.inputs(group.family)} {spec.symbol}".encode()).hexdigest(), 16) % 360 == 0


@pytest.mark.parametrize("group", GROUPS, ids=lambda g: g.name)
def test_core_kernels_were_verified_on_hardware_or_await_it(group, known, verified):
    lowered = known.get(group.name) or group.lowered()
    for spec in group.specs:
        if group.name in known and is_sample(group, spec):
            fresh = group.lowered_spec(spec)
            written = {name: lowered.get(name) for name in fresh}
            assert written == fresh, f"{core_set.PATH.name} is wrong; write it with scripts/lower_core_set.py"
    awaiting = records.awaiting()
    for spec in group.specs:
        for target in group.targets:
            assert any(name.startswith(f"{target.arch} {spec.symbol}") for name in lowered), f"{target} {spec.symbol}"
    for name, found in lowered.items():
        arch, symbol = name.split()
        awaits = (arch, symbol) in awaiting
        if found.startswith("refused"):
            assert not is_required(arch, next(s for s in group.specs if symbol.startswith(s.symbol))), (
                f"{name}: {found}"
            )
        elif found in verified:
            assert not awaits, f"{name} was verified: take it out of {records.AWAITING_NAME}"
        else:
            assert awaits, (
                f"{name} was never run on a GPU in this form; build it and run scripts/verify_kernels.py on one, and "
                f"until then name it in {records.AWAITING_NAME}"
            )


def test_what_is_written_is_believed_of_the_same_files_only(tmp_path, monkeypatch):
    group = min(GROUPS, key=lambda g: len(g.specs))
    monkeypatch.setattr(core_set, "groups", lambda: [group])
    path = tmp_path / "core_set.json"
    assert core_set.known(path) == {}
    assert list(core_set.write(1, path)) == [group.name]
    assert core_set.known(path) == {group.name: group.lowered()}
    assert list(core_set.write(1, path)) == []
    monkeypatch.setattr(core_set, "sources_digest", lambda arch: f"other files of {arch}")
    assert core_set.known(path) == {}
    assert list(core_set.write(1, path)) == [group.name]


def test_kernels_that_await_verification_are_of_the_core_set():
    core = {(target.arch, spec.symbol) for group in GROUPS for target in group.targets for spec in group.specs}
    unknown = {(arch, re.sub(r"_s\d+$", "", symbol)) for arch, symbol in records.awaiting()} - core
    assert not unknown, f"{records.AWAITING_NAME} names kernels that there are not: {sorted(unknown)}"


def is_required(arch: str, spec: KernelSpec) -> bool:
    """Whether an arch must have a kernel: all, but for the largest head_dim where shared memory is small, and the most
    parameters where registers are few."""
    if arch == "sm_70" and spec.mask == "positioned":
        return spec.head_dim <= 96
    return spec.head_dim <= 128 or arch not in ("sm_70", "sm_75")


def test_installed_cuda_kernels_were_verified_on_hardware():
    installed = [k.entry for arch in registry().archs() for k in registry().kernels(arch)]
    missing = [f"{k.arch} {k.symbol}" for k in records.unverified(installed)]
    assert not missing, f"never run on a GPU in this form: {missing}; run scripts/verify_kernels.py on one"

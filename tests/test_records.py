"""The ledger: CUDA kernels ship only with a record of a run on hardware of exactly their source."""

import dataclasses
import functools
import itertools
import json
import re

import pytest

from schedules.builder import records
from schedules.builder.compile import lower_for_each
from schedules.builder.records import Measurement, PeerMeasurement, Record
from schedules.builder.suite import KernelSpec, Selection
from schedules.families import FAMILY, core_kinds_of, family_of, has_core_kernels, is_verified_size
from schedules.families.interface import Rejected, Target
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
        if isinstance(record, Measurement) and record.status != "ok":
            assert record.reason
            continue
        assert record.microseconds > 0
        if not isinstance(record, PeerMeasurement):
            assert 0 <= record.error <= 1
        if isinstance(record, Record):
            assert record.cases > 0


def core_groups():
    """Kernels of the core set that share a module, with the archs of one family."""
    families: dict[str, list[Target]] = {}
    for arch, name in FAMILY.items():
        if arch != "cpu":
            families.setdefault(name, []).append(Target(arch))
    for name, targets in families.items():
        family = family_of(targets[0])
        specs = [
            s
            for s in Selection().specs(
                family.DTYPES,
                gpu=True,
                kinds=core_kinds_of(targets[0]),
                templates=family.TEMPLATES,
                has=functools.partial(has_core_kernels, targets[0]),
            )
            if s.template in family.TEMPLATES and is_verified_size(targets[0], s.kind, s.head_dim, s.head_dim_v)
        ]
        for group, members in itertools.groupby(specs, key=lambda s: s.group):
            yield pytest.param(tuple(targets), tuple(members), id=f"{name}-{group}")


@pytest.mark.parametrize(("targets", "specs"), core_groups())
def test_core_kernels_were_verified_on_hardware_or_await_it(targets, specs):
    known, awaiting = records.verified(), records.awaiting()
    for spec in specs:
        for one, target, _, lowered, _ in lower_for_each(spec, targets, {}):
            if isinstance(lowered, Rejected):
                assert not is_required(one, target), f"{target} {one.symbol}: {lowered.reason}"
                continue
            awaits = (target.arch, one.symbol) in awaiting
            if lowered.source_hash in known:
                assert not awaits, f"{target} {one.symbol} was verified: take it out of {records.AWAITING_NAME}"
            else:
                assert awaits, (
                    f"{target} {one.symbol} was never run on a GPU in this form; build it and run "
                    f"scripts/verify_kernels.py on one, and until then name it in {records.AWAITING_NAME}"
                )


def test_kernels_that_await_verification_are_of_the_core_set():
    core = {
        (target.arch, spec.symbol)
        for parameters in core_groups()
        for targets, specs in [parameters.values]
        for target in targets
        for spec in specs
    }
    unknown = {(arch, re.sub(r"_s\d+$", "", symbol)) for arch, symbol in records.awaiting()} - core
    assert not unknown, f"{records.AWAITING_NAME} names kernels that there are not: {sorted(unknown)}"


def is_required(spec: KernelSpec, target: Target) -> bool:
    """Whether an arch must have a kernel: all, but for the largest head_dim where shared memory is small, and the most
    parameters where registers are few."""
    if target.arch == "sm_70" and spec.mask == "positioned":
        return spec.head_dim <= 96
    return spec.head_dim <= 128 or target.arch not in ("sm_70", "sm_75")


def test_installed_cuda_kernels_were_verified_on_hardware():
    installed = [k.entry for arch in registry().archs() for k in registry().kernels(arch)]
    missing = [f"{k.arch} {k.symbol}" for k in records.unverified(installed)]
    assert not missing, f"never run on a GPU in this form: {missing}; run scripts/verify_kernels.py on one"

"""What was tuned before: logs are merged, decide what is built, and are told in tables and pictures."""

from __future__ import annotations

import dataclasses

import pytest

from schedules.builder import records
from schedules.builder.configs import NO_RECORDS, Proposal, with_proposals
from schedules.builder.records import Measurement, WavesRecord
from schedules.builder.suite import KernelSpec
from schedules.commands.tune import main
from schedules.families.interface import Target
from schedules.tuning import best, tables, waves
from tests.toy_family import Config
from tvm_flash.measure.workloads import Workload
from tvm_flash.packs.manifest import Waves

MEASURED = Measurement(
    kind="measured",
    device="NVIDIA Test",
    driver="13.0",
    arch="sm_80",
    isa="",
    threads=0,
    run_as="native",
    template="v2",
    dtype="float16",
    head_dim=128,
    head_dim_v=128,
    mask="full",
    score="identity",
    problem="b=4 h=16 s=4096 d=128 full float16",
    config={"block_m": 128},
    status="ok",
    reason="",
    microseconds=100.0,
    spread=(99.0, 101.5),
    tflops=345.6,
    percent_of_peak=50.0,
    gain=1.0,
    incumbent="d" * 64,
    default=False,
    rounds=7,
    error=0.4,
    kernel_hash="a" * 64,
    source_hash="b" * 64,
    search="random 3",
    versions={"tvm": "0.27"},
    date="2026-01-01T00:00:00+00:00",
)


def measured(block_m: int, seqlen: int, gain: float, *, default=False, **more) -> Measurement:
    problem = f"b=4 h=16 s={seqlen} d=128 full float16"
    hash_ = ("d" if default else format(block_m, "x").rjust(2, "0")[:2]) * 64
    fields = {
        "config": {"block_m": block_m},
        "problem": problem,
        "gain": gain,
        "kernel_hash": hash_[:64],
        "default": default,
    }
    fields["microseconds"] = 100.0 / gain
    return dataclasses.replace(MEASURED, **{**fields, **more})


# ---------------------------------------------------------------- logs


def test_merging_takes_each_record_once_and_leaves_broken_lines(tmp_path):
    first, second, target = (tmp_path / f"{name}.jsonl" for name in ("first", "second", "target"))
    a, b = (dataclasses.replace(MEASURED, date=f"2026-01-0{day}") for day in (1, 2))
    records.append(first, [b, a])
    records.append(second, [a])
    with open(second, "a") as log:
        log.write('{"kind": "measured", "dev')
    records.append(target, [a, a])
    with pytest.warns(UserWarning, match="line 2"):
        assert records.merge([first, second], target) == (2, 2)
    assert list(records.read(target)) == [a, b]


def test_a_record_after_a_cut_off_line_is_not_lost(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"kind": "measured", "dev')
    records.append(path, [MEASURED])
    with pytest.warns(UserWarning, match="line 1"):
        assert list(records.read(path)) == [MEASURED]


def test_merge_sorts_devices_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "LOGS", tmp_path / "logs")
    other = dataclasses.replace(MEASURED, device="NVIDIA Other")
    records.append(tmp_path / "both.jsonl", [MEASURED, other])
    assert main(["merge", str(tmp_path / "both.jsonl")]) == 0
    assert list(records.read(tmp_path / "logs" / "nvidia_test.jsonl")) == [MEASURED]
    assert list(records.read(tmp_path / "logs" / "nvidia_other.jsonl")) == [other]
    assert "0 records before, 1 after" in capsys.readouterr().out


# ---------------------------------------------------------------- what records decide


def test_what_was_measured_beside_an_older_default_does_not_count():
    """Neither for its own problem nor for another of the same length; at other lengths it does."""
    old, new = {"date": "2026-01-01", "incumbent": "e" * 64}, {"date": "2026-01-02"}
    other = "b=1 h=2 s=512 d=128 full float16"
    stale = [measured(32, 512, 1.5, **old), measured(32, 512, 1.5, problem=other, **old)]
    kept = [measured(96, 512, 1.1, **new), measured(32, 2048, 1.2, **old)]
    assert tables.of_newest_source([*stale, *kept]) == kept


def test_each_length_gets_its_best_and_the_default_stays_where_nothing_is_worth_it():
    found = best.proposals(
        [
            *(measured(64, s, 1.0, default=True) for s in (512, 2048, 8192)),
            *(measured(32, s, g) for s, g in ((512, 1.2), (2048, 1.02), (8192, 0.8))),
            *(measured(96, s, g) for s, g in ((512, 1.1), (2048, 1.015), (8192, 1.005))),
        ],
        exact=True,
    )
    assert [(p.bucket, p.config) for p in found] == [(0, {"block_m": 32}), (8192, None)]
    assert found[0].kernel_hash == "20" * 32 and found[0].source.startswith("nvidia_test.jsonl#")


def test_no_proposal_where_the_default_is_best_or_nothing_was_measured():
    assert best.proposals([], exact=True) == ()
    assert best.proposals([measured(64, 512, 1.0, default=True), measured(32, 512, 1.009)], exact=True) == ()


def test_records_of_an_older_source_are_not_compared_with_newer_ones():
    old = [measured(64, 512, 1.0, default=True), measured(32, 512, 2.0)]
    new = [
        dataclasses.replace(r, incumbent="e" * 64, date="2026-02-01")
        for r in (measured(64, 512, 1.0, default=True), measured(96, 512, 1.3))
    ]
    assert [p.config for p in best.proposals(old, exact=True)] == [{"block_m": 32}]
    assert [p.config for p in best.proposals([*old, *new], exact=True)] == [{"block_m": 96}]


def test_a_configuration_counts_only_if_it_was_measured_on_all_problems_of_a_length():
    other = "b=1 h=16 s=512 d=128 full float16"
    both = [measured(64, 512, 1.0, default=True), measured(64, 512, 1.0, default=True, problem=other)]
    half = [measured(32, 512, 1.5)]
    whole = [measured(96, 512, 1.1), measured(96, 512, 1.1, problem=other)]
    assert [p.config for p in best.proposals([*both, *half, *whole], exact=True)] == [{"block_m": 96}]


def test_buckets_of_proposals_and_defaults_fit_together():
    defaults = {0: Config(0), 4096: Config(4096)}
    proposals = (
        Proposal(0, {"block_m": 1}, "", "r#1"),
        Proposal(2048, None),
        Proposal(8192, {"block_m": 2}, "", "r#2"),
    )
    assert with_proposals(defaults, proposals, Config) == {
        0: (Config(1), "r#1"),
        2048: (Config(0), "default"),
        4096: (Config(4096), "default"),
        8192: (Config(2), "r#2"),
    }
    assert with_proposals(defaults, proposals[:1], Config, 4096) == {0: (Config(1), "r#1")}
    assert with_proposals(defaults, proposals[:1], Config, 4095) == {
        0: (Config(1), "r#1"),
        4096: (Config(4096), "default"),
    }
    with pytest.raises(TypeError):
        with_proposals(defaults, (Proposal(0, {"no_such_field": 1}),), Config)


@pytest.fixture
def tuning(tmp_path, monkeypatch):
    def make(*lines, mode="auto", here=()):
        for line in lines:
            records.append(tmp_path / records.log_of(line.device).name, [line])
        monkeypatch.setattr(best, "devices_here", lambda: frozenset(here))
        return best.Tuning(mode, tmp_path)

    return make


SPEC = KernelSpec("v2", "attention", "full", "identity", "float16", 128, 128)
TRIED = (measured(64, 512, 1.0, default=True), measured(32, 512, 1.5))


def test_a_cuda_kernel_must_be_verified_unless_its_device_is_here(tuning):
    made = tuning(*TRIED)
    assert made(SPEC, Target("sm_80")).verified == ()
    assert made(SPEC, Target("sm_80")).proposals[0].config == {"block_m": 32}
    assert tuning(here=["NVIDIA Test"])(SPEC, Target("sm_80")).verified is None
    assert tuning(mode="measured")(SPEC, Target("sm_80")).verified is None
    assert tuning(mode="default")(SPEC, Target("sm_80")) == NO_RECORDS


def test_the_nearest_arch_speaks_where_the_own_is_silent(tuning):
    made = tuning(*TRIED)
    near = made(SPEC, Target("sm_86"))
    assert near.proposals[0].config == {"block_m": 32} and near.proposals[0].kernel_hash == ""
    assert near.speeds == {}
    assert made(SPEC, Target("sm_90a")).proposals == ()
    own = [dataclasses.replace(r, arch="sm_86", device="NVIDIA Own") for r in (TRIED[0], measured(96, 512, 1.2))]
    assert tuning(*own)(SPEC, Target("sm_86")).proposals[0].config == {"block_m": 96}


def test_code_that_was_recompiled_for_another_gpu_counts_less_than_the_arch_itself(tuning):
    recompiled = [dataclasses.replace(r, run_as="recompiled for sm_90", device="NVIDIA New") for r in TRIED]
    made = tuning(*recompiled)
    assert made(SPEC, Target("sm_80")).proposals[0].config == {"block_m": 32}
    assert made(SPEC, Target("sm_80")).speeds == {}
    native = [TRIED[0], measured(96, 512, 1.2)]
    assert tuning(*native)(SPEC, Target("sm_80")).proposals[0].config == {"block_m": 96}


def test_speeds_are_the_newest_of_each_kernel_and_problem():
    newer = dataclasses.replace(TRIED[1], microseconds=50.0, date="2026-03-01")
    (speed,) = best.speeds([newer, TRIED[1]])[TRIED[1].kernel_hash]
    assert (speed.microseconds, speed.seqlen_kv, speed.record) == (50.0, 512, newer.name)


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--arch", "cpu"], "either --problem or --suite"),
        (["--arch", "sm_1"], "unknown"),
        (["--arch", "sm_75", "--problem", "b=1 h=1 s=16 d=8 bf16"], "has no kernel for any"),
        (["--arch", "cpu", "--problem", "b=1 h=1 s=16 d=8", "--template", "v3"], "v3: unknown"),
        (["--measure", "/nowhere/at/all"], "nowhere"),
        (
            ["--arch", "sm_90a", "--problem", "b=1 h=1 s=16 d=64", "--emit", "x", "--budget", "1min"],
            "in configurations",
        ),
    ],
)
def test_wrong_requests_are_answered(arguments, complaint, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert complaint in capsys.readouterr().err


# ---------------------------------------------------------------- tables and pictures


def test_the_table_of_gains():
    text = tables.gains([*TRIED, dataclasses.replace(TRIED[0], status="hung", reason="")])
    assert "100.0" in text and "66.7" in text and "1.500" in text and "block_m=32" in text
    assert "geometric mean of the gains over 1 cells: 1.5000" in text
    assert tables.gains([]) == "nothing was measured successfully"


def test_what_was_given_up_early_is_never_the_best():
    lucky = measured(16, 512, 9.9, given_up=True)
    assert tables.best_of([*TRIED, lucky]) == TRIED[1]
    assert [p.config for p in best.proposals([*TRIED, lucky], exact=True)] == [TRIED[1].config]


def test_the_difference_of_two_logs():
    newer = [dataclasses.replace(TRIED[1], microseconds=50.0), measured(32, 1024, 1.0)]
    text = tables.difference(TRIED, newer)
    assert "1.333" in text and "the same" in text
    assert "only in the new log: sm_80 v2 b=4 h=16 s=1024 d=128 full float16" in text


def test_the_report_draws_what_was_measured(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    log = tmp_path / "log.jsonl"
    peer = records.PeerMeasurement(
        "peer",
        "NVIDIA Test",
        "13.0",
        0,
        "cudnn",
        "torch",
        TRIED[0].problem,
        90.0,
        (89.0, 91.0),
        380.0,
        {},
        MEASURED.date,
    )
    records.append(log, [*TRIED, peer, dataclasses.replace(TRIED[1], status="hung", kernel_hash="f" * 64)])
    assert main(["report", str(log), "--output", str(tmp_path / "pictures")]) == 0
    for name in ("space", "search", "peers"):
        picture = (tmp_path / "pictures" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG") and len(picture) > 5000
    out = capsys.readouterr().out
    assert "3 kernels in 3 measurements: 1 hung, 2 ok" in out and "1.5000" in out
    assert main(["report", str(tmp_path / "none.jsonl")]) == 2


def test_a_peer_is_timed_in_its_own_surroundings(monkeypatch):
    torch = pytest.importorskip("torch")
    from contextlib import contextmanager

    from schedules.tuning import peers
    from tvm_flash.bench.results import Implementation
    from tvm_flash.measure.peers import Contestant
    from tvm_flash.measure.workloads import Workload

    inside = []

    @contextmanager
    def around():
        inside.append(True)
        yield
        inside.pop()

    def prepare(q, k, v, workload):
        return lambda: len(inside)

    peer = Contestant(Implementation("other", "Other", "a function", ours=False), "bshd", "bhsd", prepare, around)
    monkeypatch.setattr(peers, "contestants", lambda kind: [peer])
    workload = Workload.parse("b=1 h=2 s=8 d=16 fp32")
    found = peers.peers_of(workload, {role: torch.zeros(1, 2, 8, 16) for role in "qkv"}, "cpu")
    assert found["other"].call() == 1
    assert not inside


# ---------------------------------------------------------------- waves


def test_figures_of_waves_are_found_again_in_what_was_measured():
    known = Waves(64, 64, 1_500_000, ((900_000, 300_000), (1_100_000, 550_000)), "")
    points = [
        {"problem": f"b=1 h={tiles * waves} s=64 sk={n} d=64 fp16", "at_a_time": tiles, "waves": waves}
        for tiles, waves, n in ((1, 1, 128), (1, 1, 1000), (2, 1, 128), (2, 1, 1024), (2, 4, 128), (2, 4, 512))
    ]
    for p in points:
        p["microseconds"] = known.time(Workload.parse(p["problem"]).sizes, 1) / 1e6
    assert waves.fit(points, 64) == (known.launch, known.tiles)


def test_a_build_puts_recorded_waves_into_a_kernel_s_entry(tmp_path):
    figures = {"block_m": 64, "block_n": 64, "multiprocessors": 132, "points": (), "launch": 9, "tiles": ((1, 2),)}
    what = {"kind": "waves", "device": "NVIDIA Test", "driver": "13.0", "arch": "sm_90a", "run_as": "native"}
    line = WavesRecord(
        **what, symbol="v2_float16_d64_full_identity_m64", source_hash="ab", **figures, versions={}, date=""
    )
    newer = dataclasses.replace(line, launch=10, date="2026")
    records.append(tmp_path / "nvidia_test.jsonl", [newer, line])
    spec = KernelSpec("v2", "attention", "full", "identity", "float16", 64, 64)
    found = best.Tuning("auto", tmp_path)(spec, Target("sm_90a")).waves
    assert found == {"ab": newer.waves} and found["ab"].launch == 10 and found["ab"].record == newer.name
    assert not best.Tuning("auto", tmp_path)(spec, Target("sm_80")).waves

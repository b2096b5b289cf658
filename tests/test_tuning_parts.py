"""Parts of the tuner that need no kernel: workloads, spaces, strategies, claims, records, and what they decide."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
import subprocess
import sys

import pytest

from schedules import records
from schedules.attention import Attention
from schedules.catalogue import MASKS, SCORES
from schedules.configs import NO_RECORDS, Proposal, with_proposals
from schedules.families import FAMILY, family_of
from schedules.families.cpu.isa import ISAS
from schedules.pattern import match
from schedules.records import Measurement
from schedules.suite import KernelSpec
from schedules.template import Target
from schedules.tuning import best, tables
from schedules.tuning.budget import Budget
from schedules.tuning.folder import Claims, Folder
from schedules.tuning.space import Space
from schedules.tuning.strategy import STRATEGIES, Evolutionary, geometric_mean
from schedules.tuning.workload import Workload, standard_suite

# ---------------------------------------------------------------- workloads


@pytest.mark.parametrize(
    "text",
    [
        "b=4 h=16 s=4096 d=128 causal float16",
        "b=1 h=32 hk=8 s=1 sk=4096 d=128 full bfloat16",
        "b=2 h=4 s=512 d=192 dv=128 window=128 softcap=30 alibi float32",
    ],
)
def test_a_workload_comes_back_from_its_text(text):
    assert str(Workload.parse(text)) == text
    assert Workload.parse(str(Workload.parse(text))) == Workload.parse(text)


def test_a_workload_may_take_its_dtype_from_outside():
    assert Workload.parse("b=1 h=2 s=3 d=8", "float16") == Workload.parse("b=1 h=2 s=3 d=8 fp16")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("b=1 h=2 s=3 fp16", "lacks d=…"),
        ("b=1 h=2 s=3 d=8", "names no dtype"),
        ("b=1 h=2 s=3 d=8 fp16 causual", "'causual' isn't understood"),
        ("b=1 h=2 s=0 d=8 fp16", "'s=0' isn't understood"),
        ("b=1 h=3 hk=2 s=3 d=8 fp16", "hk=2 doesn't divide h=3"),
    ],
)
def test_a_wrong_workload_is_refused_with_the_reason(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        Workload.parse(text)


def test_operations_of_a_workload():
    assert Workload.parse("b=2 h=3 s=10 d=8 full fp16").flops == 4 * 2 * 3 * 10 * 10 * 8
    assert Workload.parse("b=2 h=3 s=10 d=8 causal fp16").flops == 2 * 2 * 3 * 10 * 10 * 8
    assert Workload.parse("b=1 h=1 s=10 sk=30 d=8 causal fp16").flops == 4 * (10 * 30 - 50) * 8


def test_the_standard_suite_has_the_grid():
    suite = standard_suite("sm_90a", ["float16"])
    assert len(suite) == 36 and len(set(suite)) == 36
    assert {w.batch * w.seqlen_q for w in suite} == {16384}
    assert {w.heads * w.head_dim for w in suite} == {2048}
    kept = standard_suite("sm_90a", ["float16"], head_dims=[64], seqlens=[512], masks=["causal"])
    assert [str(w) for w in kept] == ["b=32 h=32 s=512 d=64 causal float16"]


@pytest.mark.parametrize(
    ("text", "budget"), [("200", Budget(configs=200)), ("10min", Budget(seconds=600)), ("1.5s", Budget(seconds=1.5))]
)
def test_budgets(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["", "0", "-3", "10h", "min"])
def test_wrong_budgets(text):
    with pytest.raises(ValueError, match="expected configurations"):
        Budget.parse(text)


# ---------------------------------------------------------------- spaces and strategies


TARGETS = [Target(arch) for arch in FAMILY if arch != "cpu"] + [Target("cpu", isa) for isa in ISAS]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_family_declares_a_space_with_its_default_in_it(target):
    family = family_of(target)
    for template, dtype in itertools.product(family.TEMPLATES, {family.DTYPES[0], family.DTYPES[-1]}):
        pattern = match(Attention(SCORES["identity"], MASKS["causal"])(128, dtype, index_dtype=family.INDEX_DTYPE))
        space = Space.of(template, pattern, target)
        fields = {f.name for f in dataclasses.fields(family.Config)}
        assert set(space.axes) <= fields
        feasible = space.feasible()
        assert len(feasible) >= 4
        for config in family.default_configs(template, pattern, target).values():
            assert space.refusal(config) is None
            for name, values in space.axes.items():
                assert getattr(config, name) in values, f"the default {name} isn't in the space"
        refused = sum(space.rejections().values())
        assert refused + len(feasible) == len(list(space.combinations()))


@dataclasses.dataclass(frozen=True)
class Point:
    x: int = 0
    y: int = 0


class Grid:
    """A space of points with a known lowest one; x + y = 7 is refused."""

    size = 40

    def feasible(self):
        return [
            p for p in itertools.starmap(Point, itertools.product(range(self.size), repeat=2)) if not self.refusal(p)
        ]

    def refusal(self, config):
        return "seven" if config.x + config.y == 7 else None

    def mutated(self, config, rng):
        return Point((config.x + rng.choice((-1, 0, 1))) % self.size, (config.y + rng.choice((-1, 0, 1))) % self.size)

    def crossed(self, one, other, rng):
        return Point(rng.choice((one, other)).x, rng.choice((one, other)).y)

    def cost(self, p):
        return 1 + (p.x - 31) ** 2 + (p.y - 12) ** 2


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_gives_every_feasible_configuration_once(name):
    grid = Grid()
    grid.size = 8
    strategy = STRATEGIES[name](grid, seed=1, known={Point(0, 0): 1.0})
    given = []
    while more := strategy.next(7):
        given += more
        strategy.tell({p: float(grid.cost(p)) for p in more})
    assert len(given) == len(set(given))
    assert set(given) == set(grid.feasible()) - {Point(0, 0)}


def test_evolution_finds_the_best_of_a_rigged_cost_sooner_than_chance():
    grid = Grid()
    tried = {}
    for name in ("evolutionary", "random"):
        tried[name] = []
        for seed in range(5):
            strategy, given = STRATEGIES[name](grid, seed, {Point(0, 0): float(grid.cost(Point(0, 0)))}), 0
            while (more := strategy.next(8)) and Point(31, 12) not in more:
                given += len(more)
                strategy.tell({p: float(grid.cost(p)) for p in more})
            tried[name].append(given)
    assert max(tried["evolutionary"]) < 500
    assert sum(tried["evolutionary"]) * 2 < sum(tried["random"])


def test_evolution_leaves_failures_without_children():
    grid = Grid()
    strategy = Evolutionary(grid, 0, {Point(20, 20): float("inf"), Point(5, 5): 1.0})
    children = strategy.next(4)[:3]
    assert all(abs(p.x - 5) <= 1 and abs(p.y - 5) <= 1 for p in children)


def test_geometric_mean():
    assert geometric_mean([2, 8]) == pytest.approx(4)
    assert geometric_mean([]) == geometric_mean([1, float("inf")]) == float("inf")


# ---------------------------------------------------------------- claims


def test_a_task_is_claimed_once_and_done_once(tmp_path):
    folder = Folder(tmp_path).make()
    with Claims(folder) as mine, Claims(folder) as other:
        assert mine.take("a") and not other.take("a")
        mine.release("a")
        assert other.take("a")
        other.finish("a")
        assert not mine.take("a") and folder.is_done("a")
        assert mine.take("b")
    assert not list((tmp_path / "claims").glob("[!.]*"))


def test_a_claim_that_nobody_keeps_alive_is_taken_over(tmp_path):
    folder = Folder(tmp_path).make()
    with Claims(folder, stale=30) as claims:
        path = tmp_path / "claims" / "a"
        path.write_text(json.dumps({"host": "elsewhere", "pid": 1, "token": "x", "started": "1"}))
        assert not claims.take("a")
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 31))
        assert claims.take("a")


def test_a_claim_of_a_process_of_this_host_that_is_gone_is_taken_at_once(tmp_path):
    program = "import sys; from pathlib import Path; from schedules.tuning.folder import *; import os\n"
    program += "claims = Claims(Folder(Path(sys.argv[1])).make()); assert claims.take('a'); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", program, tmp_path]).returncode == 9
    with Claims(Folder(tmp_path)) as claims:
        assert claims.take("a")


def test_claims_are_kept_alive(tmp_path):
    folder = Folder(tmp_path).make()
    with Claims(folder, stale=0.4) as claims, Claims(folder, stale=0.4) as other:
        claims.take("a")
        path = tmp_path / "claims" / "a"
        os.utime(path, (0, 0))
        for _ in range(100):
            if path.stat().st_mtime > 0:
                break
            claims.ended.wait(0.05)
        assert not other.take("a")


# ---------------------------------------------------------------- records

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
    from schedules.tuning.command import main

    monkeypatch.setattr(records, "LOGS", tmp_path / "logs")
    other = dataclasses.replace(MEASURED, device="NVIDIA Other")
    records.append(tmp_path / "both.jsonl", [MEASURED, other])
    assert main(["merge", str(tmp_path / "both.jsonl")]) == 0
    assert list(records.read(tmp_path / "logs" / "nvidia_test.jsonl")) == [MEASURED]
    assert list(records.read(tmp_path / "logs" / "nvidia_other.jsonl")) == [other]
    assert "0 records before, 1 after" in capsys.readouterr().out


# ---------------------------------------------------------------- what records decide


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
    defaults = {0: Point(0), 4096: Point(4096)}
    proposals = (Proposal(0, {"x": 1}, "", "r#1"), Proposal(2048, None), Proposal(8192, {"x": 2}, "", "r#2"))
    assert with_proposals(defaults, proposals, Point) == {
        0: (Point(1), "r#1"),
        2048: (Point(0), "default"),
        4096: (Point(4096), "default"),
        8192: (Point(2), "r#2"),
    }
    with pytest.raises(TypeError):
        with_proposals(defaults, (Proposal(0, {"no_such_field": 1}),), Point)


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


# ---------------------------------------------------------------- tables


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


def test_random_numbers_of_a_space_are_repeatable():
    target = Target("cpu", "avx512")
    family = family_of(target)
    pattern = match(Attention(SCORES["identity"], MASKS["full"])(64, "float32", index_dtype="int64"))
    space = Space.of("v1", pattern, target)
    one, other = ([space.mutated(space.base, random.Random(seed)) for seed in range(9)] for _ in range(2))
    assert one == other and len(set(one)) > 1
    assert all(isinstance(c, family.Config) for c in one)


def test_a_folder_with_something_else_in_it_is_left_alone(tmp_path, capsys):
    from schedules.tuning.command import main

    (tmp_path / "thesis.txt").write_text("years of work")
    problem = ["--arch", "cpu", "--problem", "b=1 h=1 s=16 d=8 fp32", "--budget", "2"]
    assert main([*problem, "--emit", str(tmp_path)]) == 2
    assert (tmp_path / "thesis.txt").exists() and "holds something else" in capsys.readouterr().err


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
    from schedules.tuning.command import main

    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert complaint in capsys.readouterr().err


def test_the_report_draws_what_was_measured(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    from schedules.tuning.command import main

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

"""Kernels of every kind in the tuner: their problems, numbers, searches on the processor, emission for a GPU."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest

from schedules.builder import records
from schedules.builder.build import build
from schedules.builder.plan import BuildRequest, parse_targets
from schedules.builder.suite import HeadDim, Selection
from schedules.commands.tune import main
from schedules.families import maker_of
from schedules.families.interface import Target
from schedules.tuning import best, emit, kinds, tables
from schedules.tuning.check import WrongNumbersError, check_small
from schedules.tuning.compiler import compile_module
from schedules.tuning.emit import tasks_for
from schedules.tuning.folder import Folder
from tests.machine_code import needs_compiler
from tvm_flash.call.measured import tune_command
from tvm_flash.call.problem import Problem
from tvm_flash.measure.workloads import Workload
from tvm_flash.packs.registry import registry

torch = pytest.importorskip("torch")

SMALL = "b=2 h=4 hk=2 s=90 d=64 causal"
(TARGET,) = parse_targets(["cpu"])


# ---------------------------------------------------------------- problems


@pytest.mark.parametrize(
    ("words", "asked", "found"),
    [
        ("", (), ("forward",)),
        ("", ("decode", "backward"), ("decode",)),
        ("backward", (), ("backward",)),
        ("ragged", (), ("ragged",)),
        ("ragged backward", (), ("ragged_backward",)),
        ("paged", (), ("paged",)),
        ("paged", ("paged_decode",), ("paged_decode",)),
        ("ragged", ("backward",), ()),
    ],
)
def test_a_problem_says_which_kinds_are_for_it(words, asked, found):
    assert kinds.of(Workload.parse(f"{SMALL} {words} fp32"), asked) == found


@pytest.mark.parametrize(
    ("kind", "words", "arch", "mask", "score"),
    [
        ("forward", "full", "sm_80", "full", "identity"),
        ("forward", "causal softcap=3", "cpu", "window", "softcap"),
        ("decode", "causal", "sm_80", "window", "identity"),
        ("backward", "causal", "sm_80", "causal", "identity"),
        ("backward", "window=9 alibi", "sm_80", "positioned", "optional"),
        ("ragged", "causal", "sm_80", "causal", "identity"),
    ],
)
def test_the_kernel_is_the_one_that_a_pack_would_run(kind, words, arch, mask, score):
    workload = kinds.problem_of(kind, Workload.parse(f"b=1 h=2 s=9 d=40 {words} fp16"))
    spec = kinds.spec_for(kind, "v2", workload, Target(arch))
    assert (spec.kind, spec.mask, spec.score, spec.head_dim) == (kind, mask, score, 64)


@pytest.mark.parametrize(
    ("head_dim", "mask", "arch", "size"),
    [
        *((24, "full", "sm_90a", 32), (72, "full", "sm_90a", 80), (72, "causal", "sm_90a", 96)),
        *((24, "full", "sm_80", 64), (72, "full", "sm_80", 96)),
    ],
)
def test_sizes_of_one_arch_are_tuned_where_it_has_them(head_dim, mask, arch, size):
    workload = Workload.parse(f"b=1 h=2 s=9 d={head_dim} {mask} bf16")
    assert kinds.spec_for("forward", "v2", workload, Target(arch)).head_dim == size


def test_kernels_of_sequences_have_one_template():
    tasks = tasks_for([Workload.parse(f"{SMALL} {w} fp32") for w in ("backward", "ragged")], ("v1", "v2"), TARGET)
    assert sorted((s.kind, s.template) for s in tasks) == [("backward", "v1"), ("backward", "v2"), ("ragged", "v2")]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--kind", "sideways"], "--kind sideways: unknown; expected one of forward, decode, backward"),
        (["--kind", "decode"], "has no decode kernel for any of the problems"),
        (["--kind", "ragged", "--problem", f"{SMALL} backward fp32"], "is one of backward; leave out one of both"),
        (["--kind", "backward", "--variation", "block_k=3"], "a backward configuration for cpu"),
    ],
)
def test_wrong_kinds_are_answered(arguments, complaint, capsys, tmp_path):
    problem = ["--arch", "cpu", "--problem", f"{SMALL} fp32", "--work", str(tmp_path / "w")]
    assert main([*problem, *arguments]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--suite", "standard", "--mask", "diagonal"], "--mask diagonal: unknown; expected one of full, causal"),
        (["--suite", "standard", "--dtype", "float8"], "--dtype float8: cpu"),
        (["--suite", "standard", "--budget", "much"], "much"),
        (
            ["--problem", f"{SMALL} fp32", "--seqlen", "64", "--mask", "full"],
            "--seqlen, --mask: keep some of a --suite",
        ),
        (["--problem", f"{SMALL} fp32", "--dtype", "float16"], "--dtype float16: the problem"),
        (["--arch", "sm_80", "--isa", "avx2", "--suite", "standard"], "--isa avx2: is of CPU kernels"),
    ],
)
def test_options_without_meaning_are_answered(arguments, complaint, capsys):
    assert main(["--arch", "cpu", *arguments, "--dry-run"]) == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("op", "sizes", "words"),
    [
        ("forward", (2, 8, 2, 30, 90), "b=2 h=8 s=30 d=64 hk=2 sk=90 causal float32"),
        ("backward", (2, 8, 8, 30, 30), "b=2 h=8 s=30 d=64 causal backward float32"),
        ("ragged_backward", (5, 8, 2, 500, 500), "b=5 h=8 s=100 d=64 hk=2 causal ragged backward float32"),
        ("paged", (5, 8, 2, 5, 640), "b=5 h=8 s=1 d=64 hk=2 sk=640 causal paged float32"),
    ],
)
def test_explain_names_a_command_that_tunes_the_kernel(op, sizes, words):
    """And the tuner understands it."""
    problem = Problem(*sizes, 64, 64, "float32", "bshd", "causal", op=op)
    for kind, most, option in ((kinds.of(Workload.parse(words))[0], None, ""), ("decode", 4, " --kind decode")):
        entry = SimpleNamespace(kind=kind, max_rows=most)
        device = SimpleNamespace(native_arch="sm_80")
        assert tune_command(entry, problem, device) == f'scripts/tune.py --arch sm_80{option} --problem "{words}"'


# ---------------------------------------------------------------- numbers first


@pytest.fixture
def kernel_for(cpu_pack):
    """A function that gives the pack's kernel of a problem, its module, and the problem: a candidate with the family's
    own configuration is the same."""

    def find(words: str):
        workload = Workload.parse(f"{SMALL} {words}")
        (spec,) = tasks_for([workload], ["v2"], TARGET)
        (found,) = (k for k in registry().kernels("cpu") if k.entry.symbol == spec.symbol)
        return found.entry, found.pack.folder / found.entry.module, workload

    return find


@pytest.mark.parametrize(
    "words",
    ["softcap=8 alibi backward bf16", "ragged bf16", "alibi ragged backward fp32", "sk=150 paged fp32"],
)
def test_each_result_is_compared(words, kernel_for):
    """On the small problem and on the timed one: right, unwritten, and a little wrong."""
    import tvm_ffi

    from schedules.tuning.problem import Problem

    entry, module, workload = kernel_for(words)
    assert 0 < check_small(entry, module, "cpu") <= 1
    loaded, problem = tvm_ffi.load_module(str(module)), Problem(workload, "cpu")
    call = problem.call(entry, [loaded[launch.symbol] for launch in entry.launches])
    assert 0 < problem.check(entry, call) <= 1
    for role in problem.results:
        with pytest.raises(WrongNumbersError, match="the error of"):
            problem.check(entry, lambda: None)

        def spoilt(role=role):
            call()
            problem.form.last(workload, role, in_heads(problem, role, entry))[-1, -1] *= 1.2

        with pytest.raises(WrongNumbersError, match=f"the error of {role} is"):
            problem.check(entry, spoilt)


def in_heads(problem, role, entry):
    x = problem._laid_out(entry.layout)[role]
    return x.transpose(1, 2) if entry.form == "dense" and entry.layout == "bshd" else x


def test_a_kernel_with_other_bits_in_each_run_is_wrong(kernel_for, monkeypatch):
    from tvm_flash.measure import small_case

    entry, module, _ = kernel_for("alibi ragged backward fp32")
    right, runs = small_case.run, []

    def run(*arguments):
        found = right(*arguments)
        runs.append(found)
        found["dk"][0, 0, 0] += 1e-7 * len(runs)
        return found

    monkeypatch.setattr(small_case, "run", run)
    with pytest.raises(WrongNumbersError, match="two runs differ"):
        check_small(entry, module, "cpu")


# ---------------------------------------------------------------- searches


def test_a_search_on_the_processor_decides_what_is_built(tmp_path, monkeypatch, capsys):
    """The family's default is worsened for it: the family's own is a variation, and must be found to be faster."""
    kind = "ragged"
    maker, problem = maker_of(TARGET, kind), "b=2 h=2 s=200 d=64 full fp32"
    (spec,) = tasks_for([kinds.problem_of(kind, Workload.parse(problem))], ["v2"], TARGET)
    better = emit.defaults_of(spec, TARGET)[0]
    slow = dataclasses.replace(better, row_vectors=1, tile_rows=1)  # half as fast: more than others disturb it
    monkeypatch.setattr(maker, "default_configs", lambda *what: {0: slow})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    log = tmp_path / "logs" / "this.jsonl"
    words = " ".join(f"{name}={value}" for name, value in dataclasses.asdict(better).items())
    command = ["--arch", "cpu", "--kind", kind, "--template", "v2", "--problem", problem, "--jobs", "1", "--peers"]
    # Many short rounds, after none of which a candidate is given up: other processes may disturb a few of them.
    effort = "rounds=41 trial=41 block=0.01 warm_up=0.01 patience=0"
    command += ["--variation", words, "--effort", effort, "--log", str(log)]
    assert main([*command, "--work", str(tmp_path / "w")]) == 0
    assert f"cpu v2 {kind}" in capsys.readouterr().out
    found = list(records.read(log))
    tried = [r for r in found if isinstance(r, records.Measurement)]
    assert {(r.kernel_kind, r.status, r.default) for r in tried} == {(kind, "ok", True), (kind, "ok", False)}
    (winner,) = (r for r in tried if not r.default)
    assert winner.config == dataclasses.asdict(better) and winner.gain > 1.1
    workload = Workload.parse(winner.problem)
    assert winner.tflops == pytest.approx(workload.flops / winner.microseconds / 1e6, rel=1e-2)
    assert [r.problem for r in found if isinstance(r, records.PeerMeasurement)] == [winner.problem]

    selection = Selection(("v2",), ("float32",), (HeadDim(64, 64),), (winner.mask,), (winner.score,), (kind,))
    tuning = best.Tuning("auto", log.parent)
    (report,) = build(BuildRequest((TARGET,), selection, output=tmp_path / "packs", jobs=1, tuning=tuning))
    assert report.manifest, report.results
    (entry,) = report.manifest.kernels
    assert (entry.kind, entry.config, entry.config_source) == (kind, winner.config, winner.name), report.results[0].note
    assert [s.seqlen_q for s in entry.speeds] == [workload.totals[0]]


# ---------------------------------------------------------------- a GPU's


def test_backward_candidates_of_a_gpu_are_emitted(tmp_path):
    arguments = ["--arch", "sm_80", "--kind", "backward", "--problem", "b=1 h=2 s=512 d=64 full fp16"]
    arguments += ["--template", "v2", "--variation", "num_stages=3", "--budget", "1", "--jobs", "1"]
    assert main([*arguments, "--emit", str(tmp_path)]) == 0
    folder = Folder(tmp_path)
    found = {id: folder.candidate(id) for batch in folder.batches() for id in batch.candidates}
    assert len(found) == 4, "the defaults for few keys and for many, the variation, and one of the strategy"
    for id, candidate in found.items():
        assert (candidate.entry.op, candidate.entry.kind) == ("backward", "backward")
        assert all(launch.symbol in folder.source(id).read_text() for launch in candidate.entry.launches)
    (batch,) = folder.batches()
    assert batch.incumbents == {"v2_float16_d64_full_identity_backward": {batch.workloads[0]: batch.candidates[0]}}
    needs_compiler("sm_80")
    reason = compile_module(folder.source(id), folder.module(id), folder.emission())
    assert reason is None and folder.module(id).exists()


# ---------------------------------------------------------------- records


def test_kinds_are_apart_and_old_records_are_of_the_usual_one(tmp_path):
    from tests.test_tuning_records import MEASURED, SPEC, TRIED

    fields = json.loads(json.dumps(dataclasses.asdict(MEASURED)))
    del fields["kernel_kind"]
    (tmp_path / "old.jsonl").write_text(json.dumps(fields) + "\n")
    assert list(records.read(tmp_path / "old.jsonl")) == [MEASURED]
    backward = [
        dataclasses.replace(r, kernel_kind="backward", problem=r.problem.replace("full", "full backward"))
        for r in TRIED
    ]
    records.append(tmp_path / "new.jsonl", backward)
    tuning = best.Tuning("auto", tmp_path)
    assert not tuning(SPEC, Target("sm_80")).proposals
    found = tuning(dataclasses.replace(SPEC, kind="backward"), Target("sm_80"))
    assert [p.config for p in found.proposals] == [TRIED[1].config]
    text = tables.gains([*TRIED, *backward])
    assert "sm_80 v2 backward  b=4" in text and "over 2 cells" in text


def test_kernels_of_sequences_get_one_configuration_for_all_lengths():
    from tests.test_tuning_records import measured

    tried = [measured(64, s, 1.0, default=True) for s in (512, 8192)]
    tried += [measured(32, s, g) for s, g in ((512, 1.3), (8192, 0.9))]
    tried += [measured(96, s, 1.05) for s in (512, 8192)]
    assert [(p.bucket, p.config["block_m"]) for p in best.proposals(tried, exact=True, by_length=False)] == [(0, 32)]
    assert [(p.bucket, p.config["block_m"]) for p in best.proposals(tried, exact=True)] == [(0, 32), (8192, 96)]
    assert [k for k in kinds.KINDS if not kinds.has_buckets(k)] == [
        "ragged",
        "ragged_backward",
        "paged",
        "paged_decode",
        "paged_decode_any",
    ]

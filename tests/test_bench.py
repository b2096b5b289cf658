"""The benchmark: what it measures, and how, on a small grid of the processor or of a GPU."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

from tests.bench_runs import bench
from tvm_flash.bench import ratios, results
from tvm_flash.bench.results import Run
from tvm_flash.commands import demo
from tvm_flash.commands.cli import main
from tvm_flash.machine import cuda
from tvm_flash.measure import accuracy, others, peaks, timing, workloads
from tvm_flash.measure.workloads import Workload

SMALL = ["--device", "cpu", "--rounds", "1", "--seconds", "0.01"]


# ---------------------------------------------------------------- what is computed


def test_the_gpu_grid_has_the_cells_of_the_paper():
    grid = workloads.gpu_grid()
    assert len(grid) == len(set(grid)) == 2 * 3 * 2 * 6
    assert {w.batch * w.seqlen_q for w in grid} == {16384} and {w.heads * w.head_dim for w in grid} == {2048}


def test_operations():
    square = Workload(2, 3, 128, 64, "float16", "full")
    assert square.flops == 4 * 2 * 3 * 128 * 128 * 64
    assert dataclasses.replace(square, mask="causal").flops == square.flops / 2
    one_query = Workload(1, 1, 1, 64, "float16", "causal", seqlen_kv=4096)
    assert one_query.flops == pytest.approx(4 * 4096 * 64, rel=1e-3)  # it sees all keys, causal or not


def test_exact_rows_are_attention_in_float64():
    import torch

    w = Workload(1, 2, 5, 8, "float32", "causal", seqlen_kv=9)
    q, k, v = (torch.randn(1, s, 2, 8, generator=torch.Generator().manual_seed(s)) for s in (5, 9, 9))
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    bhsd = (x.transpose(1, 2).double() for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(*bhsd, mask)[0, 0]
    got = accuracy.exact_rows(q, k, v, w)
    assert accuracy.relative_error(got, want) < 1e-14
    leaves = [x.transpose(1, 2).double().requires_grad_() for x in (q, k, v)]
    out = torch.nn.functional.scaled_dot_product_attention(*leaves, mask)
    dout = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(1))
    want_dq = torch.autograd.grad(out, leaves, dout.transpose(1, 2).double())[0][0, 0]
    got = accuracy.exact_rows(q, k, v, dataclasses.replace(w, backward=True), dout)
    assert accuracy.relative_error(got, want_dq) < 1e-14
    assert not accuracy.relative_error(torch.full_like(want, float("nan")), want) < 1


# ---------------------------------------------------------------- how it is timed


def test_blocks_do_not_count_the_first_call_and_turns_do(monkeypatch):
    now = 0.0
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(others, "busy_seconds", lambda: None)

    def slow_at_first():
        """Slow whenever another function was called since."""
        nonlocal now
        last.append("a")
        now += 0.02 if last[-2:] != ["a", "a"] else 0.001

    def other():
        nonlocal now
        last.append("b")
        now += 1e-6

    last = []
    rounds = timing.on_cpu({"a": slow_at_first, "b": other}, timing.Effort(rounds=3, seconds=0.05))
    assert timing.figure("blocks", rounds["blocks"]["a"]) < 0.01 < timing.figure("turns", rounds["turns"]["a"])


def test_a_round_that_others_disturb_is_repeated(monkeypatch):
    taken = iter((0.0, 1.0, 1.0, 1.0))  # processor seconds when a round begins and ends: the first is disturbed
    monkeypatch.setattr(others, "busy_seconds", lambda: next(taken))
    monkeypatch.setattr(others, "REST", 0.0)
    monkeypatch.setattr(others, "_spent", 0.0)
    rounds = iter(("disturbed", "calm"))
    assert others.undisturbed(lambda: next(rounds)) == "calm"


def test_patience_with_others_ends(monkeypatch):
    monkeypatch.setattr(others, "busy_seconds", iter(range(0, 10**6, 10**3)).__next__)
    monkeypatch.setattr(others, "_spent", others.PATIENCE + 1)
    assert others.undisturbed(lambda: "disturbed") == "disturbed"


def test_without_figures_of_the_system_nobody_disturbs(monkeypatch):
    monkeypatch.setattr(others, "busy_seconds", lambda: None)
    assert others.Watch().share() == 0


def test_figures():
    assert timing.figure("burst", [3, 1, 2]) == 1 and timing.figure("steady", [3, 1, 2]) == 2


# ---------------------------------------------------------------- a run on this machine's processor


@pytest.fixture(scope="module")
def measured(cpu_pack, tmp_path_factory):
    """Results of a small run: its file, and what was printed."""
    import contextlib
    import io

    file = tmp_path_factory.mktemp("bench") / "cpu.json"
    shapes = ["--shape", "1,2,64,64", "--shape", "1,2,1,32,100", "--dtype", "float32,bfloat16", "--json", str(file)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(pytest.MonkeyPatch.context()).setitem(peaks.SIZES, "cpu", (128,))
        out = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        err = stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        status = main(["bench", *SMALL, *shapes])
    assert status == 0, err.getvalue()
    return file, out.getvalue(), err.getvalue()


def test_a_run_measures_every_cell(measured):
    import torch

    run = results.read(measured[0])
    assert run.command.endswith("--dtype float32,bfloat16") and "--json" not in run.command
    assert [i.key for i in run.implementations] == ["v1", "v2", "torch"] and run.modes == ("blocks", "turns")
    assert len(run.cells) == 8 and len(run.calls) == 2 and {p.dtype for p in run.peaks} == {"float32", "bfloat16"}
    for cell in run.cells:
        usual = cell.of("torch").error
        for template in ("v1", "v2"):
            m = cell.of(template)
            assert all(0 < m.seconds[mode] < 1 and m.spread[mode][0] <= m.seconds[mode] for mode in run.modes)
            assert m.kernel.startswith(f"{template}_{cell.workload.dtype}_d64") and len(m.source_hash) == 64
            assert m.error <= accuracy.allowed_error(usual, getattr(torch, cell.workload.dtype))


def test_what_a_run_prints(measured):
    _, out, err = measured
    for part in ("device:", "torch:", "V1 ×", "turns", "1, 2, 1 → 100, 32", "causal", "geometric mean of 4", "again:"):
        assert part in out
    assert "b=1 h=2 s=64 d=64 full float32" in err and "…" not in out


def test_gradients_are_timed_and_compared(cpu_pack, tmp_path, capsys, monkeypatch):
    import torch

    monkeypatch.setitem(peaks.SIZES, "cpu", (128,))
    file = tmp_path / "backward.json"
    shape = ["--shape", "1,2,64,64", "--dtype", "float32", "--causal", "yes", "--json", file]
    status, out, err = bench(capsys, *SMALL, "--backward", *shape)
    assert status == 0, err
    run = results.read(file)
    assert run.backward and "backward, float32" in out and "small call (backward, " in out
    assert "--backward" in run.command and Run.from_json(run.to_json()) == run
    (cell,) = run.cells
    assert cell.workload.flops == 10 * 2 * 64 * 64 * 64 / 2
    for template in ("v1", "v2"):
        m = cell.of(template)
        assert m.kernel.startswith(f"{template}_float32_d64") and m.kernel.endswith("_backward")
        assert m.error <= accuracy.allowed_error(cell.of("torch").error, torch.float32)


def test_results_survive_json(measured):
    run = results.read(measured[0])
    assert Run.from_json(run.to_json()) == run


def test_the_tables_can_be_made_from_the_file(measured, capsys):
    file, out, _ = measured
    status, again, err = bench(capsys, "--from", file)
    assert status == 0 and again == out and err == ""


def test_a_kernel_that_is_missing_is_a_failure_with_its_reason(cpu_pack, capsys, monkeypatch):
    monkeypatch.setitem(peaks.SIZES, "cpu", (128,))
    status, out, _ = bench(capsys, *SMALL, "--shape", "1,1,8,320", "--dtype", "float32", "--causal", "no")
    assert status == 1 and "V1 has no figure in 1 cells: KernelNotFoundError" in out and "--head-dim 320" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--device", "cpu", "--dims", "72"], "leave nothing of the grid"),
        (["--device", "cpu", "--peers", "cudnn"], "expected torch"),
        (["--device", "cuda:77"], "CUDA devices"),
        (["--from", "nowhere.json"], "nowhere.json: can't be read"),
        (["--device", "cpu", "--rounds", "-1"], "expected more than 0"),
        (["--ragged", "--processor"], "--ragged: stands beside --processor"),
        (["--shape", "1,1,8,64", "--dims", "64", "--seqs", "512"], "--dims, --seqs: stand beside --shape"),
        (["--from", "nowhere.json", "--quick", "--causal", "yes"], "--quick, --causal: --from shows what was measured"),
        (
            ["--device", "cpu", "--json", "no_such_folder/results.json"],
            "no_such_folder isn't there; name a file that can",
        ),
        (["--device", "cpu", "--plot", "."], "--plot .: . is a folder; name a file that can"),
    ],
)
def test_wrong_options_are_one_line(arguments, says, capsys):
    status, out, err = bench(capsys, *arguments)
    assert status == 2 and out == "" and says in err and err.startswith("tvm_flash: ") and err.count("\n") == 1


def test_a_demonstration_on_a_gpu_that_is_not_there(capsys, monkeypatch):
    monkeypatch.setattr(demo, "require", lambda *_: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["demo", "--device", "cuda"]) == 2
    assert "--device cuda: torch" in (err := capsys.readouterr().err) and "use cpu" in err


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_without_torch(command, cpu_pack, python):
    program = f"""
import sys
sys.modules["torch"] = None
from tvm_flash.commands.cli import main
from tvm_flash.display import Entry
sys.stderr = sys.stdout
print(main([{command!r}, "--device", "cpu"]))
"""
    says = f'tvm_flash: {command}: needs torch; pip install "tvm-flash[bench]"'
    assert python(program) == f"{says}\n2\n"


def test_the_demonstration_compares_errors_and_times(cpu_pack, capsys, monkeypatch):
    import torch

    small = tuple(torch.randn(1, 40, 2, 32, generator=torch.Generator().manual_seed(i)) for i in range(3))
    monkeypatch.setattr(demo, "project_text", lambda: "")
    monkeypatch.setattr(demo, "minilm_qkv", lambda _: small)
    monkeypatch.setattr(demo, "_random_qkv", lambda: small)
    monkeypatch.setattr(demo, "EFFORT", timing.Effort(1, 0.001))
    assert demo.run("cpu")
    out = capsys.readouterr().out
    assert (
        out.count("✓") == 16 and out.count("flash_attention_v2    v2") == 8 and "batch 1, 2 heads, 40 positions" in out
    )
    monkeypatch.setattr(demo, "flash_attention", lambda q, k, v, **_: v)
    assert not demo.run("cpu")
    assert capsys.readouterr().out.count("✗") == 8


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not cuda.device_count(), reason="there is no CUDA device")
def test_a_run_on_a_gpu(tmp_path, capsys):
    import torch

    file = tmp_path / "gpu.json"
    short = ("--dims", "64", "--seqs", "512", "--rounds", "1", "--seconds", "0.01")
    status, _, err = bench(capsys, "--device", "cuda", *short, "--json", file)
    run = results.read(file)
    assert status == 0, err
    assert run.modes == ("steady", "burst") and len(run.cells) == 4
    for cell in run.cells:
        usual = max(m.error for m in map(cell.of, ratios.peers(run)) if m)
        assert all(
            cell.of(t).error <= accuracy.allowed_error(usual, getattr(torch, cell.workload.dtype)) for t in ("v1", "v2")
        )

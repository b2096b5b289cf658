"""The benchmark: what it measures on a small CPU grid, and what it makes of results."""

from __future__ import annotations

import dataclasses
import json

import pytest

pytest.importorskip("torch")

from tests.conftest import ROOT
from tvm_flash import cuda, demo
from tvm_flash.bench import accuracy, measure, others, plots, ratios, recorded, results, tables, timing, workloads
from tvm_flash.bench.results import Cell, Implementation, Measurement, Peak, Run
from tvm_flash.bench.workloads import Workload
from tvm_flash.cli import main
from tvm_flash.display import Entry
from tvm_flash.errors import InvalidArgumentError

SMALL = ["--device", "cpu", "--rounds", "1", "--seconds", "0.01"]


def bench(capsys, *arguments):
    status = main(["bench", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def implementation(key, ours=False):
    return Implementation(key, key.upper(), f"about {key}", ours)


def run_of(cells, modes=("steady",), arch="sm_90a"):
    """A run with these times: ``[(workload, {implementation: seconds})]``."""
    return Run(
        created="2026-01-02T03:04:05+00:00",
        command="python -m tvm_flash bench",
        machine={"device": "A device", "arch": arch, "torch": "2.0"},
        method={mode: f"how {mode} is taken" for mode in modes},
        implementations=(implementation("v2", ours=True), implementation("cudnn"), implementation("flash")),
        peaks=(Peak("float16", 8192, dict.fromkeys(modes, 800e12)),),
        cells=tuple(
            Cell(w, tuple(Measurement(k, dict.fromkeys(modes, t), {}, 1e-4) for k, t in times.items()))
            for w, times in cells
        ),
    )


def grid_run(**options):
    """Every cell of the GPU grid: twice as fast as its peers, but for the shortest, where cuDNN takes 0.8 as long."""
    return run_of(
        [
            (w, {"v2": 1e-3, "cudnn": 0.8e-3 if w.seqlen_q == 512 else 2e-3, "flash": 2e-3})
            for w in workloads.gpu_grid(dtypes=["float16"])
        ],
        **options,
    )


# ---------------------------------------------------------------- what is computed


def test_the_gpu_grid_has_the_cells_of_the_paper():
    grid = workloads.gpu_grid()
    assert len(grid) == len(set(grid)) == 2 * 3 * 2 * 6
    assert {w.batch * w.seqlen_q for w in grid} == {16384} and {w.heads * w.head_dim for w in grid} == {2048}


def test_operations():
    square = Workload(2, 3, 128, 128, 64, "float16", False)
    assert square.flops == 4 * 2 * 3 * 128 * 128 * 64
    assert dataclasses.replace(square, causal=True).flops == square.flops / 2
    one_query = Workload(1, 1, 1, 4096, 64, "float16", True)
    assert one_query.flops == pytest.approx(4 * 4096 * 64, rel=1e-3)  # it sees all keys, causal or not


def test_exact_rows_are_attention_in_float64():
    import torch

    w = Workload(1, 2, 5, 9, 8, "float32", True)
    q, k, v = (torch.randn(1, s, 2, 8, generator=torch.Generator().manual_seed(s)) for s in (5, 9, 9))
    mask = torch.ones(5, 9, dtype=torch.bool).tril(4)
    bhsd = (x.transpose(1, 2).double() for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(*bhsd, mask)[0, 0]
    got = accuracy.exact_rows(q, k, v, w)
    assert accuracy.relative_error(got, want) < 1e-14
    assert not accuracy.relative_error(torch.full_like(want, float("nan")), want) < 1


# ---------------------------------------------------------------- how it is timed


def test_blocks_do_not_count_the_first_call_and_turns_do():
    import time

    def slow_at_first():
        """Slow whenever another function was called since."""
        last.append("a")
        time.sleep(0.02 if last[-2:] != ["a", "a"] else 0.001)

    def other():
        last.append("b")

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
        stack.enter_context(pytest.MonkeyPatch.context()).setitem(measure.PEAK_SIZES, "cpu", (128,))
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
    assert "(1, 2, 64, 64) full float32" in err and "…" not in out


def test_results_survive_json(measured):
    run = results.read(measured[0])
    assert Run.from_json(run.to_json()) == run


def test_the_tables_can_be_made_from_the_file(measured, capsys):
    file, out, _ = measured
    status, again, err = bench(capsys, "--from", file)
    assert status == 0 and again == out and err == ""


def test_a_kernel_that_is_missing_is_a_failure_with_its_reason(cpu_pack, capsys, monkeypatch):
    monkeypatch.setitem(measure.PEAK_SIZES, "cpu", (128,))
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
    ],
)
def test_wrong_options_are_one_line(arguments, says, capsys):
    status, out, err = bench(capsys, *arguments)
    assert status == 2 and out == "" and says in err and err.startswith("tvm_flash: ") and err.count("\n") == 1


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_without_torch(command, cpu_pack, python):
    program = f"""
import sys
sys.modules["torch"] = None
from tvm_flash.cli import main
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


# ---------------------------------------------------------------- what is made of results


def test_ratios():
    run = grid_run()
    best = ratios.summary(run, "v2", "", "float16", "steady")
    assert len(best.ratios) == 36 and best.worst.value == pytest.approx(0.8) and len(best.lost) == 6
    assert best.mean == pytest.approx((0.8**6 * 2**30) ** (1 / 36))
    assert ratios.summary(run, "v2", "flash", "float16", "steady").mean == pytest.approx(2)
    assert ratios.summary(run, "v2", "", "bfloat16", "steady") is None


@pytest.mark.parametrize(
    ("value", "shown"), [(1.0, "1.00"), (1.0049, "1.00"), (0.9996, "▼0.999"), (0.991, "▼0.991"), (0.989, "▼0.98")]
)
def test_a_loss_never_looks_like_a_tie(value, shown):
    assert tables.times(value) == shown


def test_table_shows_losses_and_the_fastest():
    table = tables.speeds(grid_run(), "float16", "steady")
    short, longer = table.rows[0], table.rows[1]
    heads = list(table.heads)
    assert [e.text for e in short[:3]] == ["64", "full", "512"]
    assert short[heads.index("V2 ×")] == Entry("▼0.80", "bad")
    assert [short[heads.index(x)].style for x in ("V2", "CUDNN")] == ["", "best"] and longer[heads.index("V2")].style
    flops = 4 * 16384 * 512 * 2048
    assert short[heads.index("V2")].text == f"{flops / 1e-3 / 1e12:.0f}"
    assert short[heads.index("peak")].text == f"{flops / 1e-3 / 800e12:.0%}"


def test_cells_without_figures_are_dashes():
    w = Workload(1, 1, 8, 8, 64, "float16", False)
    run = run_of([(w, {"v2": 1e-3})])
    run = dataclasses.replace(run, peaks=())
    row = tables.speeds(run, "float16", "steady").rows[0]
    assert [e.text for e in row[4:8]] == ["–", "–", "–", "–"]


def reference_file(tmp_path, **changes):
    w = workloads.gpu_grid(dtypes=["float16"])[1]
    figure = {**dataclasses.asdict(w), "tflops": 300.0, "bridge_tflops": 200.0, "error": 1e-4}
    entry = {"schema": 1, "key": "fa4", "name": "FA4", "about": "A peer", "bridge": "cudnn", "device": "B", "date": "D"}
    file = tmp_path / "reference.json"
    file.write_text(json.dumps({**entry, "versions": {"peer": "1"}, "method": "m", "figures": [figure], **changes}))
    return file, w


def test_cells_in_which_the_device_slowed_down_are_marked_and_not_counted():
    run = grid_run(modes=("steady", "burst"))
    first = run.cells[0]
    ours = first.measurements[0]
    ours = dataclasses.replace(ours, seconds={"steady": ours.seconds["steady"], "burst": ours.seconds["steady"] / 2})
    slow = dataclasses.replace(first, measurements=(ours, *first.measurements[1:]))
    run = dataclasses.replace(run, cells=(slow, *run.cells[1:]))
    assert slow.disturbed and not first.disturbed
    best = ratios.summary(run, "v2", "", "float16", "steady")
    assert len(best.ratios) == 35 and len(best.lost) == 5
    row = [e.text for e in tables.speeds(run, "float16", "steady").rows[0]]
    assert row[3].startswith("~") and row[6] == row[7] == "–"
    assert any("d64 full 512 float16" in line for line in tables.failures(run))


def test_recorded_figures_are_scaled_by_the_bridge(tmp_path):
    file, w = reference_file(tmp_path)
    other = dataclasses.replace(grid_run(), implementations=())
    run, same = recorded.read(file).beside_all([grid_run(modes=("steady", "burst")), other])
    assert same == other
    cells = {cell.workload: cell.of("fa4") for cell in run.cells}
    assert cells.pop(w).seconds == {"steady": pytest.approx(2e-3 * 200 / 300)} and not any(cells.values())
    assert ratios.summary(run, "v2", "fa4", "float16", "steady").mean == pytest.approx(2 * 200 / 300)
    assert run.implementations[-1].recorded and "recorded on one B" in run.implementations[-1].about


@pytest.mark.parametrize("changes", [{"schema": 2}, {"figures": [{}]}, {"bridge": "nobody"}, {"versions": 3}])
def test_a_wrong_reference_is_refused(changes, tmp_path):
    file, _ = reference_file(tmp_path, **changes)
    with pytest.raises(InvalidArgumentError, match="--reference"):
        recorded.read(file).beside_all([grid_run()])


def test_runs_of_one_machine_are_joined():
    run = grid_run()
    other = dataclasses.replace(run, command="another", cells=run.cells[:1])
    joined = results.join([dataclasses.replace(run, cells=run.cells[1:]), other])
    assert len(joined) == 1 and len(joined[0].cells) == 36 and joined[0].command.endswith("\nanother")
    assert len(results.join([run, dataclasses.replace(run, machine={"device": "B", "arch": "cpu"})])) == 2


def test_results_can_be_joined_in_a_file(tmp_path, capsys):
    run = grid_run()
    for name, cells in (("a", run.cells[:20]), ("b", run.cells[20:])):
        results.write(dataclasses.replace(run, cells=cells), tmp_path / f"{name}.json")
    status, _, _ = bench(capsys, "--from", tmp_path / "a.json", tmp_path / "b.json", "--json", tmp_path / "both.json")
    assert status == 0 and results.read(tmp_path / "both.json") == run


def test_peers_can_be_left_out(tmp_path, capsys):
    file = tmp_path / "run.json"
    results.write(grid_run(), file)
    status, out, _ = bench(capsys, "--from", file, "--peers", "flash")
    assert status == 0 and "FLASH" in out and "CUDNN" not in out and "2.000 × the best peer" in out and "0 lost" in out
    status, out, _ = bench(capsys, "--from", file, "--dtype", "bfloat16")
    assert status == 1 and "float16, steady" not in out
    status, _, err = bench(capsys, "--from", file, "--peers", "flash,fa4")
    assert status == 2 and "--peers: has fa4, expected cudnn, flash" in err


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99}', '{"schema": 1, "peaks": 3}'])
def test_a_file_that_is_no_result_is_refused(text, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(text)
    with pytest.raises(InvalidArgumentError, match=r"x\.json"):
        results.read(file)


@pytest.mark.parametrize("arch", ["sm_90a", "cpu"])
def test_pictures(arch, tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib import image

    light, dark = plots.write([grid_run(arch=arch)], tmp_path / "fast.png")
    assert [p.name for p in (light, dark)] == ["fast.png", "fast_dark.png"]
    pixels = [image.imread(p) for p in (light, dark)]
    assert all(x.shape[1] == plots.WIDTH * plots.DPI for x in pixels)
    assert pixels[0][0, 0, :3].min() == 1 and pixels[1][0, 0, :3].max() < 0.1
    assert all(x.std() > 0.05 for x in pixels)


def test_a_picture_of_nothing_is_refused(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(InvalidArgumentError, match="--plot"):
        plots.write([dataclasses.replace(grid_run(), cells=())], tmp_path / "x.png")


def test_the_committed_page_is_that_of_the_committed_results(tmp_path, capsys):
    page = ROOT / "docs" / "benchmarks.md"
    (line,) = (line for line in page.read_text().splitlines() if line.startswith("python -m tvm_flash bench --from"))
    arguments = [ROOT / word if word.endswith(".json") else word for word in line.split()[4:]]
    status, _, _ = bench(capsys, *arguments[:-1], tmp_path / "page.md")
    made = (tmp_path / "page.md").read_text().splitlines()
    committed = page.read_text().splitlines()
    where = committed.index(line)  # this line has other paths
    assert status == 0 and made[:where] + made[where + 1 :] == committed[:where] + committed[where + 1 :]


def test_a_page_has_every_cell(tmp_path, capsys):
    file = tmp_path / "run.json"
    results.write(grid_run(modes=("steady", "burst")), file)
    status, _, _ = bench(capsys, "--from", file, "--page", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert status == 0 and text.count("▼0.80") == 24 + 2 and text.count("| 256 | causal |") == 12
    assert "Measured 2026-01-02" in text and "how burst is taken" in text


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

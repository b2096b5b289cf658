"""The benchmark's results: ratios, tables, pictures, pages and files, of runs that were made up."""

from __future__ import annotations

import dataclasses
import json

import pytest

pytest.importorskip("torch")

from tests.bench_runs import bench, grid_run, run_of
from tests.conftest import ROOT
from tvm_flash.bench import plots, ratios, recorded, results, tables
from tvm_flash.display import Entry
from tvm_flash.errors import InvalidArgumentError
from tvm_flash.measure import workloads
from tvm_flash.measure.workloads import Workload


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
    w = Workload(1, 1, 8, 64, "float16", "full")
    run = run_of([(w, {"v2": 1e-3})])
    run = dataclasses.replace(run, peaks=())
    row = tables.speeds(run, "float16", "steady").rows[0]
    assert [e.text for e in row[4:8]] == ["–", "–", "–", "–"]


def reference_file(tmp_path, **changes):
    w = workloads.gpu_grid(dtypes=["float16"])[1]
    figure = {"workload": str(w), "tflops": 300.0, "bridge_tflops": 200.0, "error": 1e-4}
    entry = {"schema": 2, "key": "fa4", "name": "FA4", "about": "A peer", "bridge": "cudnn", "device": "B", "date": "D"}
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


@pytest.mark.parametrize("changes", [{"schema": 1}, {"figures": [{}]}, {"bridge": "nobody"}, {"versions": 3}])
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


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99}', '{"schema": 2, "peaks": 3}'])
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

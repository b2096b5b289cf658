"""``bench --processor``: what it measures, shows and writes."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("torch")

import torch

from tvm_flash.bench import processor
from tvm_flash.commands.cli import main
from tvm_flash.measure.workloads import CPU_DTYPES, Workload

pytestmark = pytest.mark.usefixtures("trains")


def test_the_grid_has_each_shape_full_and_causal_in_each_dtype_and_one_query():
    cells = processor.cells((), ())
    assert len(cells) == len(set(cells)) == 3 * (10 * 2 + 1) and {w.dtype for w in cells} == set(CPU_DTYPES)
    many = [w for w in cells if w.seqlen_q > 1]
    assert {64, 128} <= {w.head_dim for w in many} and {384, 2048} == {f(w.seqlen_q for w in many) for f in (min, max)}


def test_torch_has_the_memory_of_each_template_and_the_same_result():
    calls = processor.calls_of(Workload(2, 3, 40, 16, "float32", "causal"))
    results = {key: call() for key, call in calls.items()}
    results["v2", "ours"] = results["v2", "ours"].transpose(1, 2)
    assert len(results) == 4
    for result in results.values():
        torch.testing.assert_close(result, results["v1", "torch"], rtol=0, atol=2e-6)


def test_table_and_files(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(processor, "SHAPES", ((1, 2, 20, 64),))
    monkeypatch.setattr(processor, "ONE_QUERY", (1, 2, 1, 64, 50))
    monkeypatch.setattr(processor, "matmul_peak", lambda *_: (0, {"": 5e9}))
    before = torch.get_num_threads()
    words = ["--dtype", "float32", "--rounds", "1", "--seconds", "0.001"]
    words += ["--json", str(tmp_path / "x.json"), "--page", str(tmp_path / "x.md")]
    assert main(["bench", "--processor", *words]) == 0
    assert torch.get_num_threads() == before
    shown, page = capsys.readouterr().out, (tmp_path / "x.md").read_text()
    for text in (shown, page):
        assert "1, 2, 1, 64 with 50 keys" in text and ("1, 2, 20, 64 causal" in text or "1, 2, 20, 64 full" in text)
    assert "bench --processor --dtype float32 --rounds 1 --seconds 0.001\n" in page
    found = json.loads((tmp_path / "x.json").read_text())
    threads = {r["threads"] for r in found["results"]}
    assert threads == {p["threads"] for p in found["products"]} and 1 in threads
    assert len(found["results"]) == 3 * len(threads)
    for r in found["results"]:
        assert set(r["ratio"]) == {"v1", "v2"} and min(*r["ratio"].values(), *r["ours"].values()) > 0


def test_a_run_that_was_stopped_is_shown_with_gaps():
    """As a page is made of a JSON file that lacks the last cells of the last dtype."""
    found = []
    for dtype, lengths in (("float32", (20, 30)), ("bfloat16", (20,))):
        found.append(processor.Product(dtype, 1, 5e9))
        for n in lengths:
            numbers = [{"v1": x, "v2": 2 * x} for x in (1e-3, 1.5e-3, 1.5)]
            found.append(processor.Result(Workload(1, 2, n, 64, dtype, "full"), 1, *numbers))
    page = processor.markdown({"device": "A processor"}, "2026-01-01", "bench", found)
    rows = [line.split("|")[3:-1] for line in page.splitlines() if line.startswith("| 1, 2, ")]
    assert [[x.strip() == "–" for x in row] for row in rows] == [[False] * 8, [False] * 4 + [True] * 4]


def test_options_that_say_nothing_of_it_are_refused(capsys):
    assert main(["bench", "--processor", "--dims", "64", "--backward"]) != 0
    assert "--dims, --backward: --processor has batches of its own" in capsys.readouterr().err
    assert main(["bench", "--processor", "--device", "cuda"]) != 0

"""``bench --ragged``: what it measures, shows and writes."""

from __future__ import annotations

import json

import pytest

from tvm_flash.bench import ragged
from tvm_flash.commands.cli import main

pytestmark = pytest.mark.usefixtures("trains")


@pytest.mark.parametrize("backward", (False, True))
def test_table_and_file(backward, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(ragged, "CPU_BATCHES", ((3, 20, 2, 1, 64, True),))
    words = ["--dtype", "float32", "--rounds", "1", "--seconds", "0.001", "--json", str(tmp_path / "x.json")]
    words += ["--backward"] if backward else []
    assert main(["bench", "--ragged", "--device", "cpu", *words]) == 0
    shown = capsys.readouterr().out
    assert "torch, one at a time / ours" in shown and "3 × 20, heads 2/1, d64 causal" in shown
    spread, equal = json.loads((tmp_path / "x.json").read_text())["results"]
    assert set(spread["seconds"]) == {"ours", "torch, one at a time"}
    assert set(equal["seconds"]) == {*spread["seconds"], "ours, dense"}
    assert len(set(spread["batch"]["lengths"])) == 3 and not spread["failures"] and not equal["failures"]
    assert max(spread["difference"], equal["difference"]) < 1e-5


def test_options_that_say_nothing_of_it_are_refused(capsys):
    assert main(["bench", "--ragged", "--device", "cpu", "--dims", "64"]) != 0
    assert "--dims: --ragged has batches of its own" in capsys.readouterr().err

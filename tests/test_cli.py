"""The commands."""

import argparse
import contextlib
import dataclasses
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests import entries
from tests.conftest import ROOT
from tests.shared import HANGS
from tvm_flash.catalogue import MASKS
from tvm_flash.commands import check as selfcheck
from tvm_flash.commands import cli
from tvm_flash.commands.cli import main
from tvm_flash.machine.device import Device
from tvm_flash.measure import small_case
from tvm_flash.measure.sample import BATCH, HEADS, KV_HEADS, params_of
from tvm_flash.operators import ACCUMULATE, BACKWARD, FORWARD
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, MANIFEST_NAME, Manifest
from tvm_flash.packs.registry import own_packs, registry


@pytest.fixture
def small_pack(cpu_pack, tmp_path, use_packs):
    """The pack with three of its smallest kernels only; a function to rewrite their entries."""
    folder = tmp_path / "packs" / "cpu"
    shutil.copytree(cpu_pack, folder)
    manifest = Manifest.from_json((folder / MANIFEST_NAME).read_text())
    chosen = [k for k in manifest.kernels if (k.template, k.dtype, k.head_dim, k.bucket) == ("v1", "float32", 64, 0)]
    chosen = [
        k for k in chosen if k.op == "forward" and k.score == "identity" and k.mask in ("full", "causal", "window")
    ]

    def write(change=lambda k: k):
        entries = tuple(change(k) for k in chosen)
        (folder / MANIFEST_NAME).write_text(dataclasses.replace(manifest, kernels=entries).to_json())
        use_packs(folder.parent)
        return entries

    write()
    return write


def run(capsys, *arguments):
    status = main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_info(small_pack, capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0
    isa = registry().packs[0].manifest.isa
    assert isa
    for part in ("tvm_flash 0.1.0", "apache-tvm-ffi", "threads", "✓ cpu", isa, "causal, full, window"):
        assert part in out


def test_info_as_json(small_pack, capsys):
    status, out, _ = run(capsys, "info", "--json")
    found = json.loads(out)
    assert status == 0 and found["packs"][0]["arch"] == "cpu" and len(found["packs"][0]["kernels"]) == 3
    assert "cpu" not in [gap["arch"] for gap in found["missing"]] and found["broken"] == []


def test_info_without_packs_says_what_makes_them(use_packs, tmp_path, capsys):
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / MANIFEST_NAME).write_text("{")
    use_packs(broken)
    status, out, _ = run(capsys, "info")
    assert status == 0 and "missing: cpu; run `python -m tvm_flash build --arch cpu`" in out
    assert "packs: none" in out and f"✗ {broken}" in out


def test_check(small_pack, capsys):
    status, out, _ = run(capsys, "check", "--arch", "cpu")
    assert status == 0 and out.count("✓ cpu v1_float32_d64_") == 3 and "3 kernels ✓" in out


def test_check_leaves_out_no_kernel(cpu_pack):
    assert selfcheck.count("cpu") == len(registry().kernels("cpu"))


def test_check_names_an_arch_that_there_is_none_of(small_pack, capsys):
    status, _, err = run(capsys, "check", "--arch", "ampere")
    assert status == 2 and "--arch: is 'ampere', expected cpu or a CUDA arch such as sm_80" in err


def test_check_knows_every_kind_of_kernel(cpu_pack):
    """Those that add to what is there, or read an 8-bit cache, too."""
    of_kind = {k.entry.kind: k for k in registry().kernels("cpu") if k.entry.definition == BUILTIN_DEFINITION}
    assert {FORWARD, BACKWARD, ACCUMULATE} <= of_kind.keys()
    results = {kind: selfcheck.check_kernel(kernel, Device("cpu")) for kind, kernel in of_kind.items()}
    assert not [x for x in results.items() if not x[1].ok]


class Terminal(io.StringIO):
    """A terminal of 100 columns that keeps what is written to it."""

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")

    def run(*arguments):
        with contextlib.redirect_stdout(Terminal()) as out, contextlib.redirect_stderr(Terminal()) as err:
            status = main(arguments)
        return status, out.getvalue(), err.getvalue()

    return run


def test_commands_on_a_terminal(small_pack, terminal):
    status, out, _ = terminal("info")
    assert status == 0 and "\x1b[" in out and "causal, full, window" in out and "…" not in out
    status, out, err = terminal("check")
    assert status == 0 and "3 kernels ✓" in out and "✓ cpu v1" not in out
    assert "v1_float32" in err  # in the bar
    status, out, _ = terminal("check", "--all")
    assert status == 0 and out.count("✓ cpu v1") == 3
    status, out, _ = terminal("explain", "--shape", "2,8,512,64", "--device", "cpu")
    assert status == 0 and "v1_float32_d64_window_identity" in out and "…" not in out


def test_check_on_a_terminal_shows_what_failed(small_pack, terminal):
    small_pack(lambda k: dataclasses.replace(k, mask="full") if k.mask == "causal" else k)
    status, out, _ = terminal("check")
    assert status == 1 and out.count("✗ cpu v1_float32_d64_causal_identity") == 1


def test_the_reader_of_a_pipe_may_leave(cpu_pack, tmp_path):
    command = f"{sys.executable} -m tvm_flash explain --shape 1,1,1,64 --device cpu; echo status $? >&2"
    done = subprocess.run(
        ["bash", "-c", f"({command}) | true"], capture_output=True, text=True, cwd=ROOT, timeout=HANGS
    )
    assert "Traceback" not in done.stderr and "status" in done.stderr


def test_without_rich_torch_and_matplotlib(cpu_pack, python):
    program = """
import sys
for name in ("rich", "torch", "matplotlib", "tvm"):
    sys.modules[name] = None
from tvm_flash.commands.cli import main
assert main(["info"]) == main(["check"]) == main(["explain", "--shape", "2,8,512,64", "--device", "cpu"]) == 0
"""
    assert "kernels ✓" in python(program)


def test_the_commands_are_light(cpu_pack, python):
    program = (
        "import sys; from tvm_flash.commands import cli; cli._parser(); print([m for m in sys.modules if '.' not in m])"
    )
    assert not {"rich", "torch", "matplotlib", "tvm", "transformers"} & set(eval(python(program)))


def test_check_as_json(small_pack, capsys):
    status, out, _ = run(capsys, "check", "--json")
    results = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and len(results) == 3
    for r in results:
        assert r["ok"] and 0 < r["error"] <= r["bound"] < 1e-5 and r["lse_error"] <= r["lse_bound"]


def test_check_finds_a_kernel_that_computes_something_else(small_pack, capsys):
    small_pack(lambda k: dataclasses.replace(k, mask="full") if k.mask == "causal" else k)
    status, out, _ = run(capsys, "check")
    assert status == 1 and out.count("✗ cpu v1_float32_d64_causal_identity") == 1 and "2 kernels ✓, 1 ✗" in out


def test_check_finds_a_kernel_that_is_not_there(small_pack, capsys):
    small_pack(
        lambda k: (
            dataclasses.replace(k, symbol="gone", launches=(entries.launch("gone", "float32"),))
            if k.mask == "causal"
            else k
        )
    )
    status, out, _ = run(capsys, "check")
    assert status == 1 and "✗ cpu gone" in out and "has no function gone" in out


def test_check_says_which_kernels_it_cannot_judge(small_pack, capsys):
    small_pack(lambda k: dataclasses.replace(k, definition="mine"))
    status, out, _ = run(capsys, "check")
    assert status == 0 and out.count("not checked: a definition of the user's own") == 3


def test_check_without_packs(use_packs, tmp_path, capsys):
    use_packs(tmp_path)
    status, out, err = run(capsys, "check")
    assert status == 2 and out == "" and "no usable pack" in err and "tvm_flash build" in err


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("lengths", [(33, 70), (33, 70 + selfcheck.LONGER_BY), selfcheck.THOROUGH_LENGTHS], ids=str)
def test_the_cases_of_a_check_see_keys(mask, lengths):
    """A kernel for long sequences must have something to get wrong: most rows see keys, and masks hide some."""
    params = tuple(p.name for p in MASKS[mask].params)
    found, full = (
        small_case._expected(
            "forward", "float32", 8, 8, name, "identity", given, (), "float32", False, lengths, *lengths
        ).exact["o"][0]
        for name, given in ((mask, params), ("full", ()))
    )
    assert found.any(axis=-1).mean() > 0.8
    assert np.array_equal(found, full) == (mask == "full")


def test_every_installed_kernel_is_right(cpu_pack):
    kernels = [k for k in registry().kernels("cpu") if k.entry.op == "forward"]
    results = [selfcheck.check_kernel(k, Device("cpu")) for k in kernels]
    assert results and not [r for r in results if not r.ok]


def test_parameters_of_other_lengths_than_the_problems_are_refused(cpu_pack):
    """A kernel would read outside of them: sanitize.py told of faults that were its own."""
    kernel = next(k for k in registry().kernels("cpu") if k.entry.op == "forward" and k.entry.score == "biased")
    e, lengths = kernel.entry, (20, 30)
    head_dims = (e.head_dim, e.head_dim_v)
    q, k, v = small_case.random_inputs(e.dtype, *head_dims, (BATCH, HEADS, KV_HEADS), lengths)
    call = (e, registry().load(kernel), Device("cpu"), {"q": q, "k": k, "v": v}, 0.1, head_dims)
    with pytest.raises(ValueError, match="bias has shape"):
        small_case.run(*call)
    assert np.isfinite(small_case.run(*call, params_of(*lengths))["o"]).all()


def test_explain(small_pack, capsys):
    status, out, _ = run(capsys, "explain", "--shape", "2,8,512,64", "--causal", "--device", "cpu")
    assert (
        status == 0
        and "✓ v1_float32_d64_causal_identity [cpu]" in out
        and "fits, but the mask causal is cheaper" in out
    )


def test_explain_names_what_is_behind_a_kernel_and_each_that_was_not_chosen(small_pack, capsys):
    entries = small_pack()
    _, out, _ = run(capsys, "explain", "--shape", "2,8,512,64", "--causal", "--device", "cpu")
    chosen = next(e for e in entries if e.mask == "causal")
    assert all(f"{name} " in out for name in chosen.config) and chosen.source_hash in out
    assert all(out.count(e.symbol) == 1 for e in entries)


def test_explain_as_json(small_pack, capsys):
    status, out, _ = run(capsys, "explain", "--shape", "2,8,512,64", "--device", "cpu", "--json")
    found = json.loads(out)
    assert status == 0 and found["chosen"]["symbol"] == "v1_float32_d64_full_identity" and found["chosen"]["config"]
    assert {r["symbol"] for r in found["rejected"]} == {
        "v1_float32_d64_causal_identity",
        "v1_float32_d64_window_identity",
    }
    assert all(r["reason"] for r in found["rejected"]) and found["problem"]["head_dim"] == 64


def test_explain_an_arch_that_is_not_there(small_pack, capsys, tmp_path, use_packs):
    entry = small_pack()[0]
    gpu = [
        dataclasses.replace(
            entry,
            arch="sm_80",
            launches=(entries.launch(f"{t}_gpu", "float16"),),
            template=t,
            symbol=f"{t}_gpu",
            registers=168,
            shared_memory=1024,
            spills=0,
        )
        for t in ("v1", "v2")
    ]
    (tmp_path / "gpu").mkdir()
    (tmp_path / "gpu" / MANIFEST_NAME).write_text(Manifest("sm_80", {}, (), tuple(gpu)).to_json())
    use_packs(tmp_path / "gpu")
    where = ("explain", "--shape", "2,8,512,64", *(("--causal",) if entry.mask == "causal" else ()), "--arch")
    status, out, _ = run(capsys, *where, "sm_89")
    assert status == 0 and "✓ v2_gpu [sm_80]: V2 is made for Ampere" in out and "168 registers" in out
    status, out, err = run(capsys, *where, "sm_90a")
    assert status == 2 and out == "" and "no usable pack for sm_90a" in err
    status, out, err = run(capsys, *where, "sparc")
    assert status == 2 and "expected cpu or a CUDA arch" in err


def test_explain_of_what_is_not_there(small_pack, capsys):
    status, out, _ = run(capsys, "explain", "--shape", "2,8,512,160", "--device", "cpu")
    assert status == 1 and "--head-dim 160" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["explain", "--shape", "2,8,512"], "expected four numbers"),
        (["explain", "--shape", "2,8,5,x"], "expected four numbers"),
        (["fly"], "invalid choice"),
        ([], "required"),
    ],
)
def test_wrong_arguments(arguments, says, capsys):
    with pytest.raises(SystemExit) as e:
        main(arguments)
    assert e.value.code == 2 and says in capsys.readouterr().err


def test_an_error_is_one_line(capsys):
    status, out, err = run(capsys, "explain", "--shape", "2,8,512,60", "--device", "cpu")
    assert status == 2 and out == "" and err.startswith("tvm_flash: head_dim: is 60") and err.count("\n") == 1


@pytest.mark.parametrize("given", (["--output=there"], ["--output", "there"], ["--out", "there"]), ids=" ".join)
def test_a_build_goes_where_it_is_asked_to_where_the_package_cannot_be_written(given, monkeypatch):
    pytest.importorskip("tvm")
    commands = []
    monkeypatch.setattr(cli.os, "access", lambda *_: False)
    monkeypatch.setattr(cli.subprocess, "run", lambda c: commands.append(c) or subprocess.CompletedProcess(c, 0))
    for words in ([], given):
        assert main(["build", *words]) == 0
    parser = argparse.ArgumentParser()
    parser.add_argument("--output")
    own, asked = (parser.parse_args(command[3:]).output for command in commands)
    assert own == str(own_packs()) and asked == "there"

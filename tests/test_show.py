"""A kernel at each stage of its making, without a GPU."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm")

from schedules.builder.plan import BuildRequest
from schedules.builder.suite import KernelSpec
from schedules.commands import show
from schedules.definition.derive import OPERATORS
from schedules.families.interface import Target
from schedules.toolchain.nvcc import find_toolkit
from schedules.toolchain.process import ToolchainError
from tests.conftest import ROOT

SPEC = KernelSpec("v2", "attention", "causal", "identity", "float16", 64, 64)
SM_80, CPU = BuildRequest((Target("sm_80"),)), BuildRequest((Target("cpu", "baseline"),))


def test_definition_and_schedule_are_before_and_after():
    before = show.listing(SPEC, SM_80, "definition").text
    after = show.listing(SPEC, SM_80, "tir").text
    assert 'T.sblock("qk")' in before and "T.thread_id" not in before
    assert "T.thread_id" in after and 'T.sblock("qk")' not in after


def test_the_kernel_of_an_operator(capsys):
    assert show.main(["V1", "--arch", "cpu", "--head-dim", "64", "--mask", "causal", "--op", "backward"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# v1_float32_d64_causal_identity_backward for cpu")
    assert "dk_sum" in text


@pytest.mark.parametrize("op", OPERATORS)
def test_each_operator_as_mathematics(op, capsys):
    assert (
        show.main(["--arch", "cpu", "--head-dim", "64", "--mask", "causal", "--op", op, "--stage", "definition"]) == 0
    )
    text = capsys.readouterr().out
    assert text.startswith(f"# definition of {op}: head_dim 64, float32, causal, identity\n")
    assert all(f'T.sblock("{block}")' in text for block in OPERATORS[op].blocks)


def test_the_derivative_of_a_score(capsys):
    options = ["--arch", "cpu", "--mask", "window", "--score", "softcap_alibi", "--stage", "gradient"]
    assert show.main(options) == 0
    lines = dict(line.split(" = ") for line in capsys.readouterr().out.splitlines() if " = " in line)
    assert lines["d_score_d_s"] == "1 - tanh(s / softcap)²"
    assert lines["score"] == "softcap * tanh(s / softcap) - alibi_slopes[b, h] * |i + seqlen_kv - seqlen_q - j|"
    assert lines["d_score_d_alibi_slopes[b, h]"] == "-|i + seqlen_kv - seqlen_q - j|"
    assert set(lines) == {"# s", "score", "d_score_d_s", "d_score_d_softcap", "d_score_d_alibi_slopes[b, h]"}


def test_a_score_without_a_derivative_is_one_line(tmp_path, capsys):
    file = tmp_path / "odd.py"
    file.write_text(
        "from tvm.script import tirx as T\n"
        "from schedules.definition.attention import Attention\n"
        "from schedules.definition.catalogue import ScoreModification\n"
        "odd = Attention(ScoreModification('odd', lambda s, at: T.copysign(s, s), None))\n"
    )
    assert show.main(["--arch", "cpu", "--definition", f"{file}:odd", "--stage", "gradient"]) == 2
    assert "no derivative with respect to s is known of T.copysign(s, s)" in capsys.readouterr().err


def test_cuda_is_the_kernel_alone():
    text = show.listing(SPEC, SM_80, "cuda").text
    assert text.startswith('extern "C" __global__') and "mma_sync" in text and "TVMFFI" not in text


@pytest.mark.parametrize(("stage", "has"), [("ptx", "mma.sync.aligned.m16n8k16"), ("sass", "HMMA.16816.F32")])
def test_code(stage, has):
    try:
        find_toolkit()
        if stage == "sass":
            show.find_disassembler()
    except ToolchainError as missing:
        pytest.skip(str(missing))
    assert has in show.listing(SPEC, SM_80, stage).text


def test_one_result_of_a_backward(capsys):
    """Of the launches for delta, for dk and dv, and for dq, the last."""
    assert show.main(["V2", "--arch", "sm_80", "--head-dim", "64", "--op", "dq", "--stage", "cuda"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# dq of v2_float16_d64_full_identity_backward for sm_80")
    assert text.count("__global__") == 1 and "backward_dq_kernel(" in text


def test_code_of_a_processor():
    spec = KernelSpec("v1", "attention", "full", "identity", "float32", 64, 64)
    assert "define" in show.listing(spec, CPU, "llvm").text
    assert ".text" in show.listing(spec, CPU, "asm").text


def test_without_a_disassembler(monkeypatch, tmp_path):
    monkeypatch.setattr(show, "find_toolkit", lambda: type("Kit", (), {"compiler": tmp_path / "nvcc"}))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolchainError, match="pip install nvidia-cuda-nvdisasm"):
        show.find_disassembler()


def test_two_templates_in_a_pipe(capsys):
    status = show.main(["V1", "V2", "--arch", "sm_80", "--head-dim", "64", "--stage", "tir"])
    out = capsys.readouterr().out
    first, second = out.index("# v1_float16_d64_full_identity for sm_80"), out.index("# v2_float16_d64_full_identity")
    assert status == 0 and 0 == first < second and "block_m=" in out and "\x1b" not in out


def test_two_templates_on_a_wide_terminal(monkeypatch):
    import io

    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "160")
    stream = io.StringIO()
    stream.isatty = lambda: True
    listings = [show.Listing(name, "x = 1\n", "python") for name in ("left", "right")]
    show.show(listings, show.Screen(stream))
    lines = stream.getvalue().splitlines()
    assert "left" in lines[0] and "right" in lines[0] and len(lines) == 2


PREFIX = ROOT / "tests/definitions/prefix_attention.py"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["V3"], "expected V1 or V2"),
        (["V2", "--arch", "sm_75", "--head-dim", "64"], "sm_75 has no v2 kernels"),
        (["V1", "--arch", "cpu", "--stage", "sass"], "cpu has definition, gradient, mask, tir, llvm, asm"),
        (["--arch", "cpu", "--op", "delta", "--stage", "tir"], "delta has definition"),
        (["--arch", "sm_99"], "unknown"),
        (["--arch", "sm_80", "--mask", "wrong"], "wrong"),
        (["--arch", "sm_80", "--dtype", "float64"], "float64"),
        (["--arch", "sm_80", "--bucket", "7"], "--bucket 7"),
        (["--head-dim", "12x"], "head_dim"),
        (["--arch", "sm_80", "--isa", "avx2"], "--isa avx2: is of processors, and --arch is sm_80"),
        (["--lengths", "64"], "--lengths 64: is for --stage mask, and --stage is tir"),
        (["--picture", "x.png"], "--picture x.png: is for --stage mask"),
        (["--stage", "mask", "--picture", "no_folder/x.png"], "no_folder isn't there; name a file that can be written"),
        (["--stage", "mask", "--picture", "."], "--picture .: . is a folder"),
        (["--definition", f"{PREFIX}:prefix_attention", "--mask", "full"], "--mask full: stands beside --definition"),
        (["--definition", f"{PREFIX}:prefix_attention", "--score", "alibi"], "which has a score of its own"),
    ],
)
def test_wrong_requests_are_one_line(arguments, says, capsys):
    status = show.main(arguments)
    captured = capsys.readouterr()
    assert status == 2 and captured.out == "" and says in captured.err and captured.err.count("\n") == 1

"""The builder's command: what it prints, refuses and leaves alone; and definitions of one's own, which it takes."""

from __future__ import annotations

import dataclasses

import pytest

from schedules.builder.build import build
from schedules.builder.suite import CPU_VARIANTS
from schedules.commands import build as build_command
from schedules.definition.definition_file import DefinitionFile
from schedules.definition.pattern import DefinitionError
from tests.toy_packs import CPU, D64, D128, TWO_GROUPS, added, assert_whole
from tvm_flash.catalogue import OF_16_BITS

pytestmark = pytest.mark.usefixtures("toys")


def test_list_and_dry_run_write_nothing(tmp_path, capsys):
    arguments = ["--arch", "cpu", "--output", str(tmp_path / "packs"), "--template", "v1", "--head-dim", "64"]
    assert build_command.main([*arguments, "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 2 * len(CPU_VARIANTS) - len(OF_16_BITS)  # of two dtypes, one of them float32
    assert listed[0] == "cpu v1_float32_d64_full_identity"
    assert build_command.main([*arguments, "--dry-run"]) == 0
    assert f"{len(listed)} kernels selected, 0 up to date, {len(listed)} to compile" in capsys.readouterr().out
    assert not (tmp_path / "packs").exists()


def test_command_prints_a_table_and_refusals(tmp_path, capsys):
    arguments = [
        "--arch=cpu",
        f"--output={tmp_path}",
        "--template=v1",
        "--head-dim=64,256",
        "--dtype=float32",
        "--mask=full",
        "--score=identity",
    ]
    assert build_command.main([*arguments, "--jobs=1"]) == 0
    out = capsys.readouterr().out
    assert "v1_float32_d64_full_identity" in out and "seconds" in out
    assert "refused: head_dim 256 is above 128" in out
    assert build_command.main([*arguments, "--jobs=1"]) == 0
    assert "1 up to date" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "sm_10"], "--arch sm_10: unknown"),
        (["--isa", "mmx"], "--isa mmx: unknown"),
        (["--mask", "diagonal"], "--mask diagonal: unknown; expected one of full, causal"),
        (["--score", "x"], "--score x: unknown"),
        (["--dtype", "float8"], "--dtype float8: unknown"),
        (["--template", "v3"], "--template v3: unknown"),
        (["--head-dim", "65"], "multiples of 8"),
        (["--head-dim", "big"], "expected a number"),
        (["--jobs", "0"], "--jobs 0"),
        (["--definition", "x.py"], "expected file.py:name"),
        (["--run-on", "sm_90a"], "--run-on sm_90a: is for CUDA packs, and --arch is cpu; leave it out"),
        (["--arch", "sm_80", "--run-on", "ampere"], "--run-on ampere: is no CUDA arch"),
        (["--arch", "sm_80", "--isa", "toy"], "--isa toy: is for CPU packs, and --arch is sm_80; leave it out"),
        (["--kind", "forward,decode"], "--kind decode: cpu has none; it has forward"),
        (["--emit", __file__], f"--emit {__file__}: {__file__} is no folder"),
        (["--output", __file__], f"--output {__file__}: {__file__} is no folder"),
        (["--output", f"{__file__}/packs"], f"--output {__file__}/packs: {__file__} is no folder"),
    ],
)
def test_wrong_requests_name_the_option(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(build_command, "_WIDTH", 1000)
    arch = [] if "--arch" in arguments else ["--arch", "cpu"]
    assert build_command.main(["--output", str(tmp_path / "packs"), *arch, *arguments]) == 2
    assert message in capsys.readouterr().out
    assert not (tmp_path / "packs").exists()


@pytest.mark.parametrize(
    "option", ["--arch", "--head-dim", "--dtype", "--template", "--mask", "--score", "--kind", "--module"]
)
def test_an_empty_value_is_not_all(capsys, option):
    """As a variable of the shell gives it that isn't set."""
    with pytest.raises(SystemExit) as e:
        build_command.main([option, "", "--list"])
    assert e.value.code == 2 and f"argument {option}: is ''" in capsys.readouterr().err


def test_a_selection_of_nothing_is_an_error(capsys):
    arguments = ["--arch", "sm_80", "--kind", "ragged", "--template", "v1", "--list"]
    assert build_command.main(arguments) == 2
    assert "--template v1 --kind ragged: no kernel of sm_80 is all of it; leave one out" in capsys.readouterr().out
    assert build_command.main([*arguments[:2], "--module", "v3_*", "--list"]) == 2
    assert "--module v3_*: no kernel of sm_80 is all of it" in capsys.readouterr().out


# ---------------------------------------------------------------- definitions

DEFINITIONS = """
from tvm.script import tirx as T
from schedules.definition.attention import Attention
from schedules.definition.catalogue import MASKS, ScoreModification

squared = Attention(ScoreModification("square", lambda s, at: s * s, lambda s, at: s * s), MASKS["causal"])

def plain(head_dim, dtype, *, head_dim_v=None, index_dtype="int64"):
    return Attention()(head_dim, dtype, head_dim_v=head_dim_v, index_dtype=index_dtype)

def no_attention(head_dim, dtype, *, head_dim_v=None, index_dtype="int64"):
    @T.prim_func(s_tir=True)
    def f(x: T.handle):
        X = T.match_buffer(x, (4,), "float32")
        X[0] = T.float32(0)
    return f

number = 3
"""


@pytest.fixture
def definitions(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(DEFINITIONS)
    return path


@pytest.mark.parametrize(("name", "mask", "score"), [("squared", "causal", "square"), ("plain", "custom", "custom")])
def test_definition_is_added_to_the_pack(request_, definitions, name, mask, score):
    (first,) = build(request_)
    selection = dataclasses.replace(TWO_GROUPS, head_dims=(D64,), masks=(), scores=())
    mine = dataclasses.replace(request_, selection=selection, definition=DefinitionFile(definitions, name))
    (second,) = build(mine)
    (entry,) = added(first, second)
    assert (entry.definition, entry.mask, entry.score) == (name, mask, score)
    assert entry.symbol == f"{name}_v1_float32_d64_{mask}_{score}"
    assert_whole(request_.output / CPU.folder)
    # Another text of the definition is another kernel.
    definitions.write_text(DEFINITIONS.replace("s * s,", "s * s + s,", 1).replace("Attention()(", "squared("))
    (third,) = build(mine)
    assert {e.source_hash for e in third.manifest.kernels} - {e.source_hash for e in second.manifest.kernels}
    assert len(third.manifest.kernels) == len(second.manifest.kernels)


def test_kernels_of_an_earlier_text_of_a_definition_go(request_, definitions):
    """A pack has one definition of a name: nobody could tell kernels of two apart that are called by it."""

    def build_mine(*head_dims):
        chosen = dataclasses.replace(TWO_GROUPS, head_dims=head_dims, masks=(), scores=())
        (report,) = build(
            dataclasses.replace(request_, selection=chosen, definition=DefinitionFile(definitions, "squared"))
        )
        assert_whole(request_.output / CPU.folder)
        return report

    def sizes(report):
        return {(e.head_dim, e.score) for e in report.manifest.kernels if e.definition == "squared"}

    (first,) = build(request_)
    build_mine(D64, D128)
    definitions.write_text(DEFINITIONS + "# The same.\n")
    assert sizes(build_mine(D64)) == {(64, "square"), (128, "square")}
    definitions.write_text(DEFINITIONS.replace("s * s,", "s * s + s,", 1))
    third = build_mine(D64)
    assert sizes(third) == {(64, "square")} and {e.head_dim for e in third.outdated} == {128}
    definitions.write_text(DEFINITIONS.replace('"square"', '"more"'))
    assert sizes(build_mine(D128)) == {(128, "more")}
    added(first, third)  # those of the package stayed
    for record in request_.output.rglob("*.record.json"):
        record.unlink()
    assert sizes(build_mine(D64)) == {(64, "more")}


def test_a_definition_that_reads_a_file_is_built_anew_when_that_changes(request_, definitions, tmp_path):
    constant = tmp_path / "constant.txt"
    text = f"factor = float(open({str(constant)!r}).read())\n" + DEFINITIONS
    definitions.write_text(text.replace("s * s,", "s * T.float32(factor),", 1))
    selection = dataclasses.replace(TWO_GROUPS, head_dims=(D64,), masks=(), scores=())
    mine = dataclasses.replace(request_, selection=selection, definition=DefinitionFile(definitions, "squared"))
    hashes = []
    for value in ("2", "2", "3"):
        constant.write_text(value)
        (report,) = build(mine)
        hashes += [e.source_hash for e in report.manifest.kernels]
    assert hashes[0] == hashes[1] != hashes[2]


def test_a_definition_has_a_name_and_a_mask_of_its_own(tmp_path, definitions, capsys):
    definitions.write_text(DEFINITIONS + "attention = squared")
    for name, option, message in (
        ("attention", [], ":attention: has the name of the package's own definition"),
        ("squared", ["--mask", "full"], "--mask full: stands beside --definition, which has a mask of its own"),
        ("squared", ["--score", "alibi"], "--score alibi: stands beside --definition, which has a score of its own"),
    ):
        arguments = ["--arch", "cpu", "--output", str(tmp_path), "--definition", f"{definitions}:{name}", *option]
        assert build_command.main([*arguments, "--list"]) == 2
        assert message in capsys.readouterr().out


def test_definition_errors_name_what_is_wrong(request_, definitions):
    for text, message in (
        ("mine.py", "expected file.py:name"),
        (f"{definitions}:not a name", "expected file.py:name"),
        (f"{definitions.with_name('none.py')}:squared", "there is no file"),
    ):
        with pytest.raises(ValueError, match=message):
            DefinitionFile.parse(text)
    for name, message in (
        ("absent", "defines no 'absent'; its definitions are squared"),
        ("number", "number is int; expected an Attention"),
    ):
        with pytest.raises(DefinitionError, match=message):
            DefinitionFile.parse(f"{definitions}:{name}").load()
    wrong = dataclasses.replace(request_, definition=DefinitionFile(definitions, "no_attention"))
    with pytest.raises(DefinitionError, match="block 'qk': missing"):
        build(wrong)
    definitions.write_text("import no_such_module")
    with pytest.raises(DefinitionError, match="can't be loaded: ModuleNotFoundError"):
        DefinitionFile(definitions, "squared").load()
    assert not (request_.output / CPU.folder).exists()

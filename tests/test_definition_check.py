"""A definition is compared with its twins when it is built: what disagrees is told with its place and its values."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tvm.script import tirx as T

from schedules.commands import build
from schedules.definition.attention import Attention
from schedules.definition.catalogue import IDENTITY, MASKS, SCORES, Mask, ScoreModification
from schedules.definition.check import check
from schedules.definition.errors import DefinitionError
from schedules.definition.sample import parameters_of
from tests.definitions.prefix_attention import prefix_attention
from tests.definitions.with_tensors import documents, relative
from tvm_flash.packs.manifest import Param


@pytest.mark.parametrize("definition", (documents, relative, prefix_attention), ids=("documents", "relative", "prefix"))
def test_definitions_that_agree_with_their_twins(definition):
    check(definition)


def test_a_sink_is_compared_too():
    sinks = SCORES["optional_sinks"]
    example = lambda *_: {"has_sinks": 1, "has_alibi_slopes": 0, "softcap": 0.0}  # noqa: E731
    check(Attention(sinks, example=example))
    wrong = dataclasses.replace(sinks, sink=lambda at: at.param["sinks"] + T.float32(1))
    with pytest.raises(DefinitionError, match="the output by the operator and by the twins disagree at"):
        check(Attention(wrong, example=example))


def test_a_mask_that_its_twin_contradicts():
    """Off by one at the border of a document that a tensor says."""
    wrong = dataclasses.replace(documents.mask, twin=lambda at: documents.mask.twin(at) & (at.j < at.diagonal))
    message = (
        r"attention: the mask 'same_document' and its twin disagree at b=0, h=0, i=\d+, j=\d+ of 2 x 4 heads, 96 "
        r"queries and 160 keys, where q_document is (\d), k_document is \1: the expression shows the key, the twin "
        r"hides it; \d+ of \d+ differ"
    )
    with pytest.raises(DefinitionError, match=message):
        check(Attention(mask=wrong))


def test_a_score_that_its_twin_contradicts():
    other = dataclasses.replace(relative.score, twin=lambda s, at: relative.score.twin(s, at) + 0.001 * (at.j == 3))
    with pytest.raises(
        DefinitionError, match=r"the score 'relative' and the twin disagree at b=0, h=0, i=0, j=3 .*product"
    ):
        check(Attention(other))


def test_a_twin_of_a_table_that_reads_elsewhere():
    shifted = ScoreModification(
        "shifted",
        relative.score.expr,
        lambda s, at: s + np.asarray(at.params["positions"])[at.h, at.j - at.i + 255],
        relative.score.params,
    )
    with pytest.raises(DefinitionError, match="the score 'shifted' and the twin disagree"):
        check(Attention(shifted))


def test_a_twin_that_differs_in_its_derivative_only():
    """A step whose value is right wherever it is asked, and whose slope isn't."""

    def twin(s, at):
        return np.floor(s * 2.0**14) / 2.0**14

    with pytest.raises(
        DefinitionError, match="the derivative of the score by the scaled product and the twin's differ"
    ):
        check(Attention(ScoreModification("steps", lambda s, at: s, twin)))


@pytest.mark.parametrize("bound", (0.0, 0.5, -1.3, 2.0))
def test_scores_that_are_clipped(bound):
    """Some score lies so near to the kink that the differences of the twin are those of neither side."""
    expr = lambda s, at: T.max(s, T.float32(bound)) + T.abs(s - T.float32(bound))  # noqa: E731
    twin = lambda s, at: np.maximum(s, bound) + np.abs(s - bound)  # noqa: E731
    check(Attention(ScoreModification("clipped", expr, twin)))
    other = lambda s, at: np.maximum(s, bound) + 1.01 * np.abs(s - bound)  # noqa: E731
    with pytest.raises(DefinitionError, match="the score 'clipped' and the twin disagree"):
        check(Attention(ScoreModification("clipped", expr, other)))


def test_scores_with_jumps_and_learnt_bounds():
    bound = Param("bound", "float32", axes="hj", gradient=True)
    check(Attention(ScoreModification("floor", lambda s, at: s + T.floor(s), lambda s, at: s + np.floor(s))))
    learnt = ScoreModification(
        "bounded",
        lambda s, at: T.min(s, at.param["bound"]),
        lambda s, at: np.minimum(s, at.params["bound"]),
        (bound,),
    )
    check(Attention(learnt))


def test_a_twin_that_fails_and_one_that_is_missing():
    failing = Mask("failing", lambda at: at.j < at.param["limit"], lambda at: at.nothing, (Param("limit", "int32"),))
    with pytest.raises(DefinitionError, match=r"the twin of its mask 'failing' fails .* AttributeError: .*limit \d+"):
        check(Attention(mask=failing))
    with pytest.raises(DefinitionError, match="need a twin each"):
        check(Attention(dataclasses.replace(IDENTITY, twin=None)))


def test_examples_that_make_no_sense():
    def attention(example):
        return Attention(mask=MASKS["window"], example=example)

    assert parameters_of(attention(lambda *n: {"window_left": n[3]}), 1, 2, 30, 40)["window_left"] == 40
    for example, text in (
        (lambda *n: {"width": 3}, "'width', which is no parameter"),
        (lambda *n: n[7], "its example fails: IndexError"),
    ):
        with pytest.raises(DefinitionError, match=text):
            parameters_of(attention(example), 1, 2, 30, 40)


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_is_not_as_meant_is_never_built(tmp_path, capsys, jobs):
    """Kernels are compiled beside the check; nothing that passes for a checked one is left of them."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from schedules.definition.attention import Attention\n"
        "from schedules.definition.catalogue import Mask\n"
        "mine = Attention(mask=Mask('even', lambda at: at.j % 2 == 0, lambda at: at.j % 2 == 1))\n"
    )
    command = ["--arch", "cpu", "--isa", "avx2", "--head-dim", "32", "--dtype", "float32", "--output", str(tmp_path)]
    for _ in range(2):
        assert build.main([*command, "--definition", f"{file}:mine", "--jobs", str(jobs)]) == 2
        assert "the mask 'even' and its twin disagree at b=0, h=0, i=0, j=0" in capsys.readouterr().out
        assert not list(tmp_path.glob("cpu*")) and not list(tmp_path.glob(".build/*/*.record.json"))

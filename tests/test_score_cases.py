"""What is left of a score in each of its cases, and its derivative there."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm")

from tvm import tirx
from tvm.script import tirx as T

from schedules.definition.cases import Cases
from tests.test_sm90_compile import pattern_of


def cases_of(score):
    """The cases of ``score(s, i, capped, cap)``, and those variables."""
    s, cap = (tirx.Var(name, "float32") for name in ("s", "cap"))
    i, capped = (tirx.Var(name, "int32") for name in ("i", "capped"))
    return Cases(score(s, i, capped, cap), (i, s)), (s, i, capped, cap)


def text(expr) -> str:
    return str(expr).replace("T.float32", "").replace(" ", "")


def test_what_no_query_changes_is_known():
    found, (s, *_) = cases_of(
        lambda s, i, capped, cap: T.Select(T.And(capped != 0, T.Not(cap == T.float32(0))), T.tanh(s / cap), s)
    )
    assert len(found.conditions) == 2
    assert found.score((False, True)).same_as(s) and found.score((True, True)).same_as(s)
    assert "tanh" in text(found.score((True, False))) and "Select" not in text(found.score((True, False)))


def test_what_a_query_changes_is_asked_for_each():
    found, _ = cases_of(lambda s, i, capped, cap: T.Select(i > 3, T.Select(capped != 0, s, s + s), cap))
    assert len(found.conditions) == 1
    for answer in (True, False):
        assert text(found.score((answer,))).count("Select") == 1


def test_a_divisor_that_does_not_vary_is_inverted():
    found, (s, _, _, cap) = cases_of(lambda s, i, capped, cap: s / cap + cap / s)
    assert not found.conditions
    assert text(found.score(())) == text(s * (T.float32(1) / cap) + cap / s)


def test_the_cases_of_soft_cap_and_slopes():
    pattern = pattern_of("positioned", "optional", "bfloat16", 64)
    assert pattern.conditions == 3  # soft cap, slopes, and whether it is given where the first query stands
    plain, capped, biased, both = (pattern._known_score((*x, False)) for x in ((0, 0), (1, 0), (0, 1), (1, 1)))
    assert [("tanh" in text(x), "alibi" in text(x)) for x in (plain, capped, biased, both)] == [
        (False, False),
        (True, False),
        (False, True),
        (True, True),
    ]
    assert not any("Select" in text(x) or "if_then_else" in text(x) for x in (plain, capped, biased, both))

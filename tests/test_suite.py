"""Which kernels a build makes of the kinds that a family has."""

from __future__ import annotations

import pytest

from schedules.builder.plan import BuildRequest, select
from schedules.builder.suite import CORE_VARIANTS, HEAD_DIMS, HEAD_DIMS_BETWEEN, SCOPES, HeadDim, Selection
from schedules.families import FAMILY, kinds_of
from schedules.families.interface import (
    BACKWARD,
    DECODE,
    FORWARD,
    PAGED,
    PAGED_DECODE,
    PAGED_DECODE_ANY,
    RAGGED,
    RAGGED_BACKWARD,
    Target,
)

BOTH = (FORWARD, DECODE)


def chosen(selection=None, kinds=BOTH, **more):
    return (selection or Selection()).specs(("float16",), gpu=True, kinds=kinds, **more)


def pairs(specs, kind):
    return {(s.mask, s.score) for s in specs if s.kind == kind}


def test_of_a_further_kind_the_core_set_has_its_share():
    specs = chosen()
    assert pairs(specs, FORWARD) == set(CORE_VARIANTS)
    assert pairs(specs, DECODE) == {("window", "identity")}
    sizes = {kind: {HeadDim(s.head_dim, s.head_dim_v) for s in specs if s.kind == kind} for kind in BOTH}
    assert sizes == {FORWARD: {*HEAD_DIMS, *HEAD_DIMS_BETWEEN}, DECODE: set(HEAD_DIMS)}
    assert [s for s in specs if s.kind == FORWARD] == chosen(kinds=(FORWARD,))
    assert len({s.symbol for s in specs}) == len(specs)


def test_a_kind_alone():
    specs = chosen(Selection(kinds=(DECODE,)))
    assert specs == [s for s in chosen() if s.kind == DECODE]
    assert not chosen(Selection(kinds=(DECODE,)), kinds=(FORWARD,))


def test_filters_hold_for_all_kinds():
    assert {s.kind for s in chosen(Selection(masks=("causal",)))} == {FORWARD}
    specs = chosen(Selection(masks=("window",), head_dims=(HeadDim(96, 96),)))
    assert {(s.head_dim, s.kind) for s in specs} == {(96, FORWARD), (96, DECODE)}
    assert pairs(specs, DECODE) == {("window", "identity")}


def test_what_is_asked_for_by_name_is_more_than_the_core_set():
    specs = chosen(Selection(masks=("full",), scores=("softcap",), kinds=(DECODE,)))
    assert {(s.mask, s.score, s.kind) for s in specs} == {("full", "softcap", DECODE)}
    own = {"definition": "mine", "variants": [("mine", "mine")]}
    assert {s.kind for s in chosen(**own)} == {FORWARD}
    assert {s.kind for s in chosen(Selection(kinds=(DECODE,)), **own)} == {DECODE}


def test_of_a_definition_of_ones_own_what_most_calls_need_is_built_unless_more_is_named():
    own = {"definition": "mine", "variants": [("mine", "mine")], "kinds": (FORWARD, BACKWARD)}
    specs = chosen(**own)
    assert {(s.template, s.head_dim) for s in specs} == {("v2", 64), ("v2", 128)} and len(specs) == 4
    assert {s.template for s in chosen(**own, templates=("v1",))} == {"v1"}  # as of sm_75
    named = Selection(templates=("v1", "v2"), head_dims=(HeadDim(256, 256),))
    assert {(s.template, s.head_dim) for s in chosen(named, **own)} == {("v1", 256), ("v2", 256)}


def test_a_definition_of_ones_own_is_built_for_the_forms_that_are_named():
    kinds, own = kinds_of(Target("sm_90a")), {"definition": "mine", "variants": [("mine", "mine")]}
    found = {
        forms: {s.kind for s in chosen(Selection(forms=forms), kinds=kinds, **own)}
        for forms in ((), ("dense",), ("ragged",), ("paged",), ("dense", "ragged", "paged"))
    }
    assert found[()] == found["dense",] == {FORWARD, BACKWARD}
    assert found["ragged",] == {RAGGED, RAGGED_BACKWARD}
    assert found["paged",] == {PAGED, PAGED_DECODE, PAGED_DECODE_ANY}
    assert found["dense", "ragged", "paged"] == found["dense",] | found["ragged",] | found["paged",]
    assert {s.kind for s in chosen(Selection(kinds=("paged_int8",)), kinds=kinds, **own)} == {"paged_int8"}


def test_forms_of_the_core_set():
    kinds = kinds_of(Target("sm_90a"))
    whole = chosen(kinds=kinds)
    parts = [chosen(Selection(forms=(form,)), kinds=kinds) for form in ("dense", "ragged", "paged")]
    assert sorted(s.symbol for s in whole) == sorted(s.symbol for part in parts for s in part)
    assert {s.kind for s in chosen(Selection(kinds=(RAGGED, PAGED), forms=("paged",)), kinds=kinds)} == {PAGED}


@pytest.mark.parametrize("arch", FAMILY)
def test_every_kind_of_a_family_has_its_share(arch):
    assert set(kinds_of(Target(arch, "avx2" if arch == "cpu" else ""))) <= set(SCOPES)


def test_a_family_has_kernels_of_its_own_sizes():
    own = {FORWARD: {("full", "identity"): ((32, 32),)}}
    more = set(chosen(further=own)) - set(chosen())
    assert {(s.template, s.mask, s.score, s.head_dim, s.kind) for s in more} == {
        (template, "full", "identity", 32, FORWARD) for template in ("v1", "v2")
    }
    one = Selection(head_dims=(HeadDim(64, 64),))
    assert chosen(one, further=own) == chosen(one)


def test_modules_can_be_named():
    target, names = Target("cpu", "avx2"), ("v1_*_d64", "v2_bfloat16_d128")
    every = select(BuildRequest((target,)), target)
    named = select(BuildRequest((target,), modules=names), target)
    assert {s.group for s in named} == {*(f"v1_{dtype}_d64" for dtype in ("float32", "float16", "bfloat16")), names[1]}
    assert named == tuple(s for s in every if s.group in {n.group for n in named})


def test_kinds_that_a_target_has_not_are_refused():
    target = Target("cpu", "avx2")
    request = BuildRequest((target,), Selection(kinds=(DECODE,)))
    with pytest.raises(ValueError, match=r"--kind decode: cpu \(avx2\) has none; it has forward, backward, "):
        select(request, target)
    with pytest.raises(ValueError, match="--kind sideways: unknown; expected one of forward, decode"):
        select(BuildRequest((target,), Selection(kinds=("sideways",))), target)
    with pytest.raises(ValueError, match="--form folded: unknown; expected one of dense, ragged, paged"):
        select(BuildRequest((target,), Selection(forms=("folded",))), target)

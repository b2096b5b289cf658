"""One table of masks, scores and options: what repeats a part of it says the same."""

from __future__ import annotations

import inspect

import pytest
import torch

from schedules.builder.suite import CORE_VARIANTS, CPU_VARIANTS
from schedules.definition import catalogue as expressions
from tests.cases import CASES
from tvm_flash import (
    catalogue,
    flash_attention,
    flash_attention_v2,
    flash_attention_varlen,
    padded_attention,
    reference,
)
from tvm_flash.call.signature import Options, signature
from tvm_flash.nn.attend import attend
from tvm_flash.operators import OPERATORS
from tvm_flash.selector import SelectedKernel

#: What a function takes beside the options that all have.
_OWN = {
    flash_attention_v2: (),
    padded_attention: ("key_range", "query_start", "layout"),
    SelectedKernel.__call__: ("self",),
    attend: ("layout",),
    flash_attention_varlen: ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"),
}

#: Options of all functions that some fix.
_FIXED = {SelectedKernel.__call__: ("variant",), attend: ("variant",), flash_attention_varlen: ("variant",)}


@pytest.mark.parametrize("function", _OWN, ids=lambda f: f.__qualname__)
def test_public_functions_take_the_same_arguments(function):
    ours, model = (inspect.signature(f).parameters for f in (function, flash_attention))
    assert set(ours) - set(model) == set(_OWN[function])
    assert set(model) - set(ours) == set(_FIXED.get(function, ()))
    for name in set(ours) & set(model) - {"variant"}:
        assert ours[name].kind == model[name].kind, name
        assert ours[name].default == model[name].default, name
        assert ours[name].annotation == model[name].annotation, name
    shared = [name for name in ours if name in model]
    assert shared == [name for name in model if name in ours]


def test_calls_and_programs_take_the_options_of_the_functions():
    arguments = inspect.signature(flash_attention).parameters
    fields = set(Options._fields) - {
        "layout",
        "definition",
        "params",
        "accept",
        "layout_known",
        "op",
        "gradients",
        "longest",
        "head_dim_v",
        "split_length",
        "flag",
    }
    fields |= {OPERATORS["forward"].flag}
    tensors = set(signature("bhsd", parameters=("alibi_slopes", "sinks")).tensors)
    assert set(arguments) == fields | tensors
    assert all(
        arguments[name].default == Options._field_defaults[name] for name in fields & set(Options._field_defaults)
    )

    from tvm_flash.tracing import torch_ops  # noqa: F401  registers the operator

    schema = torch.ops.tvm_flash.attention.default._schema.arguments
    taken = {a.name for a in schema}
    assert taken == set(arguments) - {"window_size", "out"} | {"layout", "window_left", "window_right"} | set(
        catalogue.TENSORS
    )


def test_the_operator_of_sequences_takes_the_options_of_the_function():
    from tvm_flash.tracing import torch_ragged  # noqa: F401  registers the operator

    arguments = set(inspect.signature(flash_attention_varlen).parameters)
    taken = {a.name for a in torch.ops.tvm_flash.attention_varlen.default._schema.arguments}
    assert taken == arguments - {"window_size", "out", "max_seqlen_q", "max_seqlen_k"} | {"window_left", "window_right"}
    assert set(signature("shd", op="ragged").tensors) <= arguments


def test_every_mask_and_score_has_its_expression_and_its_twin():
    for table, expressed, twins in (
        (catalogue.MASKS, expressions.MASKS, reference.MASKS),
        (catalogue.SCORES, expressions.SCORES, reference.SCORES),
    ):
        assert list(table) == list(expressed) == list(twins)
        for name, kind in table.items():
            assert expressed[name].params == kind.params and expressed[name].twin is twins[name]
            assert kind.stand_ins[0] == name and set(kind.stand_ins) <= set(table)


def test_what_functions_can_ask_for_is_built():
    """Each mask with each score, as the functions ask for them, has a kernel in the core set."""
    for mask in ("full", "causal", "window", "padded", "positioned"):
        for softcap in (False, True):
            for slopes in (False, True):
                score = catalogue.score_of(softcap, slopes)
                wanted = {(m, s) for m in catalogue.MASKS[mask].stand_ins for s in catalogue.SCORES[score].stand_ins}
                assert wanted & set(CORE_VARIANTS), (mask, score)
                assert wanted & set(CPU_VARIANTS), (mask, score)


def test_scores_by_option():
    found = [catalogue.score_of(softcap, slopes) for softcap in (False, True) for slopes in (False, True)]
    assert found == ["identity", "alibi", "softcap", "softcap_alibi"]
    assert catalogue.OPTIONAL == ("alibi_slopes", "sinks", "query_start")


def test_the_cases_cover_the_catalogue():
    assert {c.mask for c in CASES} >= set(catalogue.MASKS) - {"sink_window", "given"}
    assert {c.score for c in CASES} >= {"identity", "softcap_alibi", "optional", "optional_sinks"}

"""Kernels of the mma.sync families compile here as they will run there: the instructions meant, and nothing spilled."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

pytest.importorskip("tvm")

from schedules.definition.attention import Attention
from schedules.definition.catalogue import MASKS, SCORES
from schedules.definition.pattern import match
from schedules.families import family_of
from schedules.families.interface import Program, Rejected, Target
from schedules.families.mma import sm70, sm75, sm80
from schedules.templates import v1, v2
from tests.machine_code import compiled

TEMPLATES = {"v1": v1, "v2": v2}


@functools.cache
def pattern_of(head_dim=128, mask="full", score="identity", dtype="float16", head_dim_v=None):
    definition = Attention(SCORES[score], MASKS[mask])
    return match(definition(head_dim, dtype, head_dim_v=head_dim_v, index_dtype=sm80.INDEX_DTYPE))


@pytest.mark.parametrize(
    ("arch", "template", "pattern"),
    [
        ("sm_80", "v2", {"mask": "causal"}),
        ("sm_80", "v1", {"head_dim": 256, "mask": "window", "score": "alibi", "dtype": "bfloat16"}),
        ("sm_86", "v2", {"head_dim": 128}),
        ("sm_89", "v2", {"head_dim": 64, "mask": "window", "score": "alibi"}),
        ("sm_120", "v1", {"head_dim": 96, "mask": "sink_window", "head_dim_v": 64}),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else x,
)
def test_ampere_and_later(arch, template, pattern, tmp_path):
    pattern = pattern_of(**pattern)
    program = TEMPLATES[template].apply(pattern, Target(arch), "kernel")
    assert isinstance(program, Program), program
    text, report, count = compiled(program, arch, tmp_path)
    (kernel,) = report.kernels
    assert kernel.stack == count["LDL"] == count["STL"] == 0  # ptxas reports spills, and not a stack that is indexed
    assert "mma.sync.aligned.m16n8k16" in text
    # One step at least: products of both kinds, an ldmatrix for two of them at most, copies of Q, K and V.
    assert count["HMMA"] >= (pattern.head_dim + pattern.head_dim_v) // 16 * 4
    assert count["LDSM"] >= count["HMMA"] // 4
    assert count["LDGSTS"] >= 3


@pytest.mark.parametrize(
    "pattern",
    [
        {"mask": "padded"},
        {"head_dim": 256, "mask": "window", "score": "softcap_alibi"},
        {"head_dim": 64, "score": "softcap_alibi"},
    ],
)
def test_turing(pattern, tmp_path):
    pattern = pattern_of(**pattern)
    program = v1.apply(pattern, Target("sm_75"), "kernel")
    assert isinstance(program, Program), program
    text, _, count = compiled(program, "sm_75", tmp_path)
    assert "mma.sync.aligned.m16n8k8" in text
    assert count["HMMA"] >= (pattern.head_dim + pattern.head_dim_v) // 8 * 4
    assert count["LDSM"] > 0
    assert count["LDGSTS"] == 0


def test_volta(tmp_path):
    program = v1.apply(pattern_of(mask="causal"), Target("sm_70"), "kernel")
    assert isinstance(program, Program), program
    text, _, count = compiled(program, "sm_70", tmp_path)
    assert "mma.sync.aligned.m8n8k4" in text
    # One step at least: four instructions for each 16 columns of a product.  Nothing in local memory, and no copies
    # that Volta lacks.
    assert count["HMMA.884"] >= (128 + 128) // 16 * 4
    assert count["LDL"] == count["STL"] == count["LDSM"] == count["LDGSTS"] == 0


@pytest.mark.parametrize(
    ("arch", "kind", "mask", "score"),
    [
        ("sm_86", "paged_decode_e4m3", "window", "identity"),
        ("sm_90a", "paged_decode_e4m3", "positioned", "optional_sinks"),
        ("sm_120", "paged_int8", "positioned", "optional_sinks"),
        ("sm_75", "paged_e4m3", "positioned", "optional_sinks"),
    ],
)
def test_caches_of_8_bits(arch, kind, mask, score, tmp_path):
    template = TEMPLATES[family_of(Target(arch)).TEMPLATES[-1]]
    program = template.apply(pattern_of(mask=mask, score=score), Target(arch), "kernel", kind=kind)
    assert isinstance(program, Program), program
    text, report, count = compiled(program, arch, tmp_path)
    assert all(k.stack == 0 for k in report.kernels)
    assert count["LDL"] == count["STL"] == 0  # elements are widened by instructions, and not by a table
    assert count["HMMA"] >= (128 + 128) // 16 * 4
    assert ("e4m3x2" in text) == (kind.endswith("e4m3") and arch == "sm_90a")
    if kind.startswith("paged_decode"):
        # Bytes of 32 keys and of 128 columns of K and V, 512 of them an instruction: no tile of 16 bits is read but Q,
        # whose fragments are on the right of products on Hopper, and loaded without ldmatrix.
        assert count["LDSM"] == 2 * 32 * 128 // 512 + (0 if arch == "sm_90a" else 8)
        assert count["LDGSTS"] > 0
        assert (count["UTMALDG"] > 0) == (arch == "sm_90a")  # boxes of keys, where pages have them


@pytest.mark.parametrize(
    ("arch", "template", "pattern", "reason"),
    [
        ("sm_75", v1, {"dtype": "bfloat16"}, "bfloat16"),
        ("sm_70", v1, {"dtype": "bfloat16"}, "bfloat16"),
        ("sm_75", v2, {}, "v2"),
        ("sm_80", v1, {"dtype": "float32"}, "float32"),
        ("sm_70", v1, {"head_dim": 192}, "registers"),
        ("sm_70", v1, {"head_dim": 256}, "shared memory"),
        ("sm_80", v2, {"head_dim": 72}, "multiples of 32"),
        ("sm_80", v2, {"head_dim": 64, "head_dim_v": 128}, "head_dim_v 128 exceeds"),
        ("sm_86", v1, {"head_dim": 512}, "shared memory"),
    ],
)
def test_refusals_carry_their_reason(arch, template, pattern, reason):
    refused = template.apply(pattern_of(**pattern), Target(arch), "kernel")
    assert isinstance(refused, Rejected)
    assert reason in refused.reason


@pytest.mark.parametrize("arch", ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120"))
@pytest.mark.parametrize("head_dim", (32, 64, 96, 128, 192, 256))
def test_every_head_dim_has_a_configuration(arch, head_dim):
    target, pattern = Target(arch), pattern_of(head_dim)
    family = family_of(target)
    for config in family.default_configs("v1", pattern, target).values():
        assert family.feasible(pattern, config, target) is None


def test_configurations_that_do_not_fit_are_refused():
    target, pattern = Target("sm_80"), pattern_of()
    config = sm80.default_configs("v2", pattern, target)[0]
    for change, reason in (
        ({"block_m": 96}, "32 rows"),
        ({"block_n": 40}, "multiple of 16"),
        ({"num_stages": 0}, "num_stages"),
        ({"num_stages": 9}, "shared memory"),
        ({"block_n": 128}, "registers"),
        ({"warps_per_tile": 3}, "warps_per_tile"),
        ({"warps_per_tile": 2, "block_m": 64}, "block_n of 32 or 64"),
    ):
        refused = sm80.feasible(pattern, replace(config, **change), target)
        assert isinstance(refused, Rejected)
        assert reason in refused.reason


def test_what_pairs_of_warps_exchange_must_fit_the_memory_of_k():
    target, pattern = Target("sm_75"), pattern_of()
    config = sm75.Config(128, 32, 8, 1, warps_per_tile=2)
    refused = sm75.feasible(pattern, config, target)
    assert isinstance(refused, Rejected)
    assert "too small" in refused.reason
    assert sm75.feasible(pattern, replace(config, block_m=64, num_warps=4), target) is None


def test_families_share_what_an_arch_does_not_decide():
    assert {family_of(Target(arch)) for arch in ("sm_80", "sm_86", "sm_89", "sm_120")} == {sm80}
    assert (family_of(Target("sm_75")), family_of(Target("sm_70"))) == (sm75, sm70)

"""Hopper kernels compile without a GPU: TMA and wgmma in the machine code, nothing spilled or serialised."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("tvm")

from schedules.definition.attention import Attention
from schedules.definition.catalogue import MASKS, SCORES
from schedules.definition.pattern import match
from schedules.families import sm90
from schedules.families.interface import Program, Rejected, Target
from schedules.templates import v1, v2
from tests.machine_code import compiled, needs_compiler

TARGET = Target("sm_90a")


def pattern_of(mask="full", score="identity", dtype="float16", head_dim=128, head_dim_v=None):
    definition = Attention(SCORES[score], MASKS[mask])
    return match(definition(head_dim, dtype, head_dim_v=head_dim_v, index_dtype=sm90.INDEX_DTYPE))


@pytest.fixture(scope="module", autouse=True)
def compiler():
    needs_compiler(TARGET.arch)


@pytest.mark.parametrize(
    ("template", "bucket", "pattern"),
    [
        (v2, 0, {"mask": "causal", "head_dim": 64}),
        (v2, 0, {"mask": "window", "score": "softcap_alibi", "head_dim": 64, "dtype": "bfloat16"}),
        (v1, 0, {"head_dim": 256}),
        (v1, 4096, {"mask": "causal", "head_dim": 256}),
        (v2, 0, {"mask": "sink_window", "head_dim": 192, "head_dim_v": 128}),
    ],
    ids=lambda x: (
        "-".join(map(str, x.values())) if isinstance(x, dict) else str(getattr(x, "__name__", x)).split(".")[-1]
    ),
)
def test_machine_code(template, bucket, pattern, tmp_path):
    pattern = pattern_of(**pattern)
    config = sm90.default_configs(template.__name__.rpartition(".")[2], pattern, TARGET)[bucket]
    program = template.apply(pattern, TARGET, "kernel", config)
    assert isinstance(program, Program), program
    _, report, count = compiled(program, TARGET.arch, tmp_path)
    (kernel,) = report.kernels
    assert kernel.stack == count["LDL"] == count["STL"] == 0  # ptxas reports spills, and not a stack that is indexed
    assert kernel.registers * config.threads * config.blocks_per_sm <= 65536
    # Twice a step: head_dim / 16 products for the scores; each of the tensors has a load, the output a store.
    assert count["HGMMA"] >= pattern.head_dim // 16 + 2
    assert count["UTMALDG"] >= 3
    assert count["UTMASTG"] >= 1


@pytest.mark.parametrize("template", ["v1", "v2"])
@pytest.mark.parametrize("head_dims", [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)])
@pytest.mark.parametrize(
    ("mask", "score"),
    [
        ("full", "identity"),
        ("causal", "identity"),
        ("padded", "identity"),
        ("sink_window", "identity"),
        ("window", "softcap_alibi"),
    ],
)
def test_defaults_are_feasible(template, head_dims, mask, score):
    for dtype in sm90.DTYPES:
        pattern = pattern_of(mask, score, dtype, *head_dims)
        configs = sm90.default_configs(template, pattern, TARGET)
        assert 0 in configs
        for config in configs.values():
            assert sm90.feasible(pattern, config, TARGET) is None


@pytest.mark.parametrize(
    ("pattern", "change", "reason"),
    [
        ({}, {"block_n": 100}, "block_n 100"),
        ({}, {"num_consumer_warpgroups": 5}, "num_consumer_warpgroups 5"),
        ({}, {"blocks_per_sm": 3}, "blocks_per_sm 3"),
        ({}, {"num_consumer_warpgroups": 1, "blocks_per_sm": 2}, "pingpong"),
        ({"head_dim": 64}, {"num_consumer_warpgroups": 4, "pingpong": False}, "registers"),
        ({}, {"overlap_tiles": True}, "overlap_tiles"),
        ({"head_dim": 256}, {"block_n": 64, "waves": 1, "overlap_tiles": True}, "overlap_tiles"),
        ({}, {"separate_output": True}, "separate_output"),
        ({}, {"num_stages": 3}, "num_stages 3"),
        ({}, {"num_stages": 4}, "bytes of shared memory"),
        ({}, {"tiles_per_cta": 3}, "tiles_per_cta 3"),
        ({}, {"num_consumer_warpgroups": 3}, "registers"),
        ({"mask": "sink_window"}, {"tiles_per_cta": 2}, "gaps"),
        ({"mask": "padded"}, {"waves": 1}, "waves 0"),
        ({"score": "alibi"}, {"pack_heads": True}, "from head to head"),
        ({"head_dim": 72}, {}, "head_dim 72"),
        ({"head_dim": 64, "head_dim_v": 128}, {}, "head_dim_v 128 exceeds"),
    ],
)
def test_refusals_say_why(pattern, change, reason):
    refusal = sm90.feasible(pattern_of(**pattern), replace(sm90.Config(tiles_per_cta=1), **change), TARGET)
    assert isinstance(refusal, Rejected)
    assert reason in refusal.reason


@pytest.mark.parametrize(
    ("mask", "score", "depends"),
    [
        ("full", "identity", False),
        ("window", "softcap", False),
        ("causal", "alibi", True),
        ("padded", "identity", True),
    ],
)
def test_heads_can_share_a_tile_unless_they_are_told_apart(mask, score, depends):
    assert pattern_of(mask, score).depends_on_head is depends

"""The backward of the mma.sync families compiles as it will run: the instructions meant, and nothing spilled."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("tvm")

from schedules.builder.plan import BuildRequest, select
from schedules.builder.suite import HEAD_DIMS as HEAD_DIMS_OF_ALL
from schedules.builder.suite import HEAD_DIMS_BETWEEN
from schedules.families import core_kinds_of, family_of, is_verified_size, maker_of
from schedules.families.interface import BACKWARD, BACKWARD_ACCUMULATE, RAGGED_BACKWARD, Program, Rejected, Target
from schedules.templates import v1, v2
from tests.machine_code import compiled
from tests.test_gpu_compile import pattern_of
from tvm_flash.packs import sizes

TEMPLATES = {"v1": v1, "v2": v2}


@pytest.mark.parametrize(
    ("arch", "template", "pattern"),
    [
        ("sm_86", "v2", {"mask": "positioned", "score": "optional", "head_dim": 64, "dtype": "bfloat16"}),
        ("sm_75", "v1", {"mask": "causal", "head_dim": 64}),
        ("sm_80", "v2", {"score": "biased_16", "head_dim": 128, "dtype": "bfloat16"}),
    ],
    ids=["86-64-positioned-optional", "75-64-causal", "80-128-biased_16"],
)
def test_machine_code(arch, template, pattern, tmp_path):
    pattern, target = pattern_of(**pattern), Target(arch)
    program = TEMPLATES[template].apply(pattern, target, "kernel", kind=BACKWARD)
    assert isinstance(program, Program), program
    _, report, count = compiled(program, arch, tmp_path)
    assert len(report.kernels) == len(program.launches) == 3 + any(p.gradient and p.is_summed for p in pattern.params)
    assert count["LDL"] == count["STL"] == 0
    # Four products of 16 keys and 16 queries at least in one launch, three in the other.
    assert count["HMMA"] >= 7 * pattern.head_dim // 16 * 2
    assert (count["LDGSTS"] == 0) == (arch == "sm_75")


@pytest.mark.parametrize(
    ("head_dim", "mask", "keys"), [(128, "full", 0), (128, "causal", 0), (64, "causal", 0), (64, "full", 2048)]
)
def test_one_launch_makes_all_gradients(head_dim, mask, keys, tmp_path):
    """Five products in place of seven, and nothing spilled."""
    pattern, target = pattern_of(head_dim, mask), Target("sm_80")
    config = maker_of(target, BACKWARD).default_configs("v1", pattern, target)[keys]
    program = v1.apply(pattern, target, "kernel", config, BACKWARD)
    assert isinstance(program, Program), program
    _, report, count = compiled(program, "sm_80", tmp_path)
    assert len(report.kernels) == len(program.launches) == 2
    assert count["LDL"] == count["STL"] == 0


def test_where_the_one_launch_is_meant_for():
    """Where heads and keys are few, blocks of three launches don't wait for one another; grouped heads have more."""
    target = Target("sm_80")

    def meant_for(head_dim, mask, keys, heads, kv_heads, batch=1):
        pattern = pattern_of(head_dim, mask)
        config = maker_of(target, BACKWARD).default_configs("v1", pattern, target)[2048 if head_dim == 64 else 0]
        program = v1.apply(pattern, target, "kernel", config, BACKWARD)
        if program.meant_for is None:
            return None
        return sizes.evaluate(program.meant_for, sizes.of(batch, heads, keys, kv_heads, keys, head_dim, head_dim))

    assert [meant_for(64, "full", keys, 16, 16) for keys in (2048, 4095, 4096)] == [0, 0, 1]
    assert [meant_for(64, "full", 4096, heads, heads, 64) for heads in (4, 15, 16)] == [0, 0, 1]
    assert [meant_for(64, "full", 3000, 12, kv_heads) for kv_heads in (2, 6, 12)] == [1, 1, 0]
    assert meant_for(128, "full", 4096, 4, 4) is None


@pytest.mark.parametrize(
    ("arch", "head_dim", "mask"), [("sm_80", 128, "window"), ("sm_80", 64, "full"), ("sm_86", 128, "causal")]
)
def test_others_have_launches_apart(arch, head_dim, mask):
    program = v1.apply(pattern_of(head_dim, mask), Target(arch), "kernel", kind=BACKWARD)
    assert isinstance(program, Program), program
    assert len(program.launches) == 3


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_gradients_that_are_added_dont_spill(arch, tmp_path):
    """Both a launch that has a block's sums in registers and, on Hopper, one that has those of dq in memory."""
    program = v2.apply(pattern_of(128, "causal", dtype="bfloat16"), Target(arch), "kernel", kind=BACKWARD_ACCUMULATE)
    assert isinstance(program, Program), program
    _, _, count = compiled(program, arch, tmp_path)
    assert count["LDL"] == count["STL"] == 0


#: Head_dims that an arch's backward has, from 32 on.
HEAD_DIMS = {"sm_70": (32, 64, 96, 128), "sm_75": (32, 64, 96, 128)}


@pytest.mark.parametrize("arch", ["sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_120"])
@pytest.mark.parametrize("score", ["identity", "optional"])
@pytest.mark.parametrize("kind", [BACKWARD, RAGGED_BACKWARD])
def test_every_head_dim_has_a_configuration(arch, score, kind):
    target = Target(arch)
    maker, template = maker_of(target, kind), family_of(target).TEMPLATES[-1]
    for head_dim in HEAD_DIMS.get(arch, (32, 64, 96, 128, 192, 256)):
        pattern = pattern_of(head_dim, "positioned" if score == "optional" else "causal", score)
        for config in maker.default_configs(template, pattern, target).values():
            assert maker.feasible(pattern, config, target) is None


def test_ragged_gradients_dont_spill_where_dense_tiles_would(tmp_path):
    pattern, target = pattern_of(96, "full", dtype="bfloat16"), Target("sm_120")
    program = v2.apply(pattern, target, "kernel", kind=RAGGED_BACKWARD)
    assert isinstance(program, Program), program
    _, report, count = compiled(program, "sm_120", tmp_path)
    assert len(report.kernels) == 3 and count["LDL"] == count["STL"] == 0


@pytest.mark.parametrize(
    ("pattern", "change", "reason"),
    [
        ({"head_dim": 72}, {}, "head_dim 72"),
        ({}, {"num_warps": 6}, "dkdv: 128 rows"),
        ({}, {"block_m": 24}, "dkdv: 24 rows a step"),
        ({}, {"block_m": 144}, "dkdv: 144 rows a step"),
        ({}, {"num_stages": 1}, "num_stages 1"),
        ({}, {"num_stages": 4}, "dkdv: needs 215040 bytes"),
        ({}, {"block_n_dq": 64}, "dq: needs 19"),
        ({}, {"warps_per_tile": 3}, "warps_per_tile 3"),
        ({}, {"block_n": 256}, "dkdv: 256 rows"),
        ({}, {"block_m": 128}, "dkdv: needs"),
        ({"mask": "window", "score": "alibi"}, {"early": True}, "dkdv: early is for scores without gradients"),
        ({"mask": "window"}, {"joint": True}, "joint: it serves plain scores"),
        ({}, {"joint": True, "num_stages": 3}, "joint: needs "),
        ({}, {"joint": True, "told_tiles": 0}, "joint: told_tiles 0 must be at least 1"),
        ({"head_dim": 64}, {"joint": True, "num_warps": 8}, "joint: 8 warps can't share tiles of 32 rows"),
    ],
)
def test_what_does_not_fit_is_refused(pattern, change, reason):
    pattern, target = pattern_of(**{"dtype": "bfloat16", **pattern}), Target("sm_80")
    maker = maker_of(target, BACKWARD)
    usual = replace(maker.default_configs("v1", pattern, target)[0], joint=False)
    refused = maker.feasible(pattern, replace(usual, **change), target)
    assert isinstance(refused, Rejected)
    assert reason in refused.reason


def test_operands_ahead_come_by_ldmatrix():
    pattern, target = pattern_of(64, "full"), Target("sm_70")
    maker = maker_of(target, BACKWARD)
    config = replace(maker.default_configs("v1", pattern, target)[0], ahead_dq=True)
    assert maker.feasible(pattern, config, target).reason == "dq: ahead is for operands that come by ldmatrix"


def test_the_core_set_has_it_at_every_size():
    for target in map(Target, ("sm_70", "sm_75", "sm_80", "sm_86", "sm_89", "sm_120")):
        assert BACKWARD in core_kinds_of(target)
        assert all(is_verified_size(target, BACKWARD, d.qk, d.v) for d in (*HEAD_DIMS_OF_ALL, *HEAD_DIMS_BETWEEN))
    specs = select(BuildRequest((Target("sm_80"),)), Target("sm_80"))
    assert {s.head_dim for s in specs if s.kind == BACKWARD} == {64, 96, 128, 192, 256}

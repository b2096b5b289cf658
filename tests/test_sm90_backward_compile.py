"""The backward of Hopper kernels compiles without a GPU: nothing spilled, no product serialised."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("tvm")

from schedules.definition.pattern import match
from schedules.families import core_kinds_of
from schedules.families.interface import BACKWARD, Program, Rejected, Target
from schedules.families.sm90 import backward
from schedules.families.sm90.backward.config import section_heads
from schedules.templates import v1, v2
from tests.machine_code import compiled
from tests.mask_launches import of_gallery
from tests.test_sm90_compile import pattern_of
from tvm_flash.packs import sizes

TARGET = Target("sm_90a")


@pytest.mark.parametrize(
    ("template", "pattern"),
    [
        (v2, {"mask": "causal", "head_dim": 128, "dtype": "bfloat16"}),
        (v1, {"mask": "window", "score": "softcap_alibi", "head_dim": 64}),
    ],
    ids=["128-causal", "64-window-softcap_alibi"],
)
def test_machine_code(template, pattern, tmp_path):
    pattern = pattern_of(**pattern)
    (config,) = backward.default_configs("v2", pattern, TARGET).values()
    program = template.apply(pattern, TARGET, "kernel", config, BACKWARD)
    assert isinstance(program, Program), program
    _, report, count = compiled(program, TARGET.arch, tmp_path)
    assert len(report.kernels) == len(program.launches) == (2 if config.joint else 3)
    assert not any(kernel.spills or kernel.stack for kernel in report.kernels)
    # S, dP, dV and dK, twice; S and dP thrice, dQ four times, or in the joint launch in 8 chunks of 64 x 64.
    D, M, N = pattern.head_dim // 16, config.block_m // 16, config.block_n // 16
    of_dq = D * M // 2 if config.joint else 3 * 2 * D + 3 * N
    assert count["HGMMA"] >= 2 * (2 * D + 2 * M) + of_dq
    assert count["UTMALDG"] >= (6 if config.joint else 8)
    assert count["UTMASTG"] >= (2 if config.joint else 3)


def test_masks_that_read_ids(tmp_path):
    """Of a step that needs a mask nothing is kept but a bit for each score: three ids fit."""
    head_dim = 128
    pattern = match(of_gallery("speculative_tree")(head_dim, "bfloat16", index_dtype="int32"))
    (config,) = backward.default_configs("v1", pattern, TARGET).values()
    program = v1.apply(pattern, TARGET, "kernel", config, BACKWARD)
    _, report, count = compiled(program, TARGET.arch, tmp_path)
    own = {"kernel", "kernel_ranges_of_queries", "kernel_ranges_of_keys", "kernel_joint"}
    assert {kernel.name.removesuffix("_kernel") for kernel in report.kernels} == own
    assert not any(kernel.spills or kernel.stack for kernel in report.kernels)
    # those of the joint launch of other masks; both texts of a step, with a mask and without
    assert count["HGMMA"] >= 2 * (2 * head_dim // 16 + 2 * config.block_m // 16) + head_dim // 16 * config.block_m // 32


@pytest.mark.parametrize("mask", ["causal", "window"])
def test_which_axes_of_the_grids_are_short(mask):
    """Both arrangements say what the selector has to know before a launch."""
    pattern = pattern_of(mask=mask, head_dim=64, dtype="bfloat16")
    (config,) = backward.default_configs("v2", pattern, TARGET).values()
    axes = v2.apply(pattern, TARGET, "kernel", config, BACKWARD).narrow_axes

    def most(**changes):
        problem = {
            "batch": 1,
            "heads": 2,
            "kv_heads": 1,
            "seqlen_q": 1,
            "seqlen_kv": 1,
            "head_dim": 64,
            "head_dim_v": 64,
        }
        return max(sizes.evaluate(axis, sizes.of(**problem | changes)) for axis in axes)

    assert config.joint == (mask == "causal")
    # heads of all batches that are one step along an axis
    share = sizes.evaluate(section_heads(pattern, ragged=False), {"seqlen_kv": 1}) if config.joint else 1
    assert most(batch=share * 65535 // (2 if config.joint else 1)) == 65535
    assert most(batch=share * 65536) > 65535 and most(heads=share * 65536) > 65535
    assert most(seqlen_q=2**20, seqlen_kv=2**20) <= 65535


@pytest.mark.parametrize("score", ["identity", "softcap", "alibi"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 192, 256])
def test_defaults_are_feasible(head_dim, score):
    pattern = pattern_of("window", score, "bfloat16", head_dim)
    for config in backward.default_configs("v2", pattern, TARGET).values():
        assert backward.feasible(pattern, config, TARGET) is None


@pytest.mark.parametrize(
    ("pattern", "change", "reason"),
    [
        ({}, {"block_m": 72}, "block_m 72"),
        ({}, {"num_stages": 3}, "num_stages 3"),
        ({}, {"block_m": 96, "num_stages": 2}, "dkdv: needs about"),
        ({}, {"block_n": 128, "num_stages_dq": 2}, "dq: needs about"),
        ({}, {"num_stages": 8}, "dkdv: needs 3"),
        ({"head_dim": 256}, {}, "bytes of shared memory"),
        ({"head_dim": 72}, {}, "head_dim 72"),
        ({"score": "alibi"}, {}, "overlaps: the gradient of alibi_slopes"),
        ({"mask": "window"}, {"joint": True}, "joint: it serves plain scores"),
        ({}, {"joint": True, "block_m": 96}, "block_m 96 is not 64 or 128"),
        ({}, {"joint": True, "num_stages": 2}, "num_stages 2 is not 3 or 4"),
        ({}, {"joint": True, "block_m": 128, "num_stages": 3}, "joint: needs 3"),
        ({"head_dim": 144}, {"joint": True, "num_stages": 3}, "joint: needs "),
    ],
)
def test_refusals_say_why(pattern, change, reason):
    refusal = backward.feasible(pattern_of(**pattern), replace(backward.Config(), **change), TARGET)
    assert isinstance(refusal, Rejected)
    assert reason in refusal.reason


def test_packs_have_the_backward():
    assert BACKWARD in core_kinds_of(TARGET)

"""Hopper kernels compile without a GPU: TMA and wgmma in the machine code, nothing spilled or serialised."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest

pytest.importorskip("tvm")

from schedules.definition.attention import Attention
from schedules.definition.catalogue import MASKS, SCORES
from schedules.definition.pattern import match
from schedules.families import sm90
from schedules.families.interface import Program, Rejected, Target
from schedules.families.sm90 import decode, latent
from schedules.templates import v1, v2
from schedules.toolchain.host import compile_host, embed, split
from tests.machine_code import compiled
from tvm_flash.packs.sizes import evaluate, of_pages
from tvm_flash.packs.sizes import of as sizes_of

TARGET = Target("sm_90a")


@functools.cache
def pattern_of(mask="full", score="identity", dtype="float16", head_dim=128, head_dim_v=None):
    definition = Attention(SCORES[score], MASKS[mask])
    return match(definition(head_dim, dtype, head_dim_v=head_dim_v, index_dtype=sm90.INDEX_DTYPE))


@pytest.mark.parametrize(
    ("template", "bucket", "pattern"),
    [
        (v2, 0, {"mask": "window", "score": "softcap_alibi", "head_dim": 64, "dtype": "bfloat16"}),
        (v1, 0, {"head_dim": 256}),
        (v1, 8192, {"mask": "causal", "head_dim": 192}),
        (v2, 0, {"mask": "sink_window", "head_dim": 192, "head_dim_v": 128}),
        (v2, 0, {"score": "biased_16", "head_dim": 128}),
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
    assert len(report.kernels) == len(program.launches) == (2 if pattern.has_gaps else 1)  # lists of tiles come first
    assert all(kernel.spills == kernel.stack == 0 for kernel in report.kernels)
    assert max(k.registers for k in report.kernels) * config.threads * config.blocks_per_sm <= 65536
    # Twice a step: head_dim / 16 products for the scores; each of the tensors has a load, the output a store.
    assert count["HGMMA"] >= pattern.head_dim // 16 + 2
    assert count["UTMALDG"] >= 3
    assert count["UTMASTG"] >= 1


def test_values_in_keys_are_fetched_once(tmp_path):
    pattern = pattern_of("window", dtype="bfloat16", head_dim=576, head_dim_v=512)
    (config,) = latent.default_configs("v2", pattern, TARGET).values()
    assert latent.feasible(pattern, config, TARGET) is None
    program = latent.program(pattern, config, TARGET, v2.TRAVERSAL, "kernel")
    assert program.launches[0].roles[:2] == ("q", "k") and "v" not in program.launches[0].roles
    sizes = of_pages(2, 128, 4, 1, 400, 64, 100, 576, 512, 2)
    numbers = {x.name: evaluate(x.value, sizes) for x in program.scalars}
    assert numbers == {"row_tiles": 4, "split_bits": 0}  # 2 queries of 128 heads; splits as the keys say
    text, report, count = compiled(program, TARGET.arch, tmp_path)
    assert len(report.kernels) == 2
    assert all(kernel.spills == kernel.stack == 0 for kernel in report.kernels)
    assert max(kernel.registers for kernel in report.kernels) * config.threads <= 65536
    # Of either warpgroup: scores of a tile, and both tiles' products with 256 columns; and of the second one the
    # product with a tile that is the last.
    assert count["HGMMA"] == 2 * (576 // 16 + 2 * 64 // 16) + 64 // 16
    assert count["UTMALDG"] == 2 * (576 // 64)  # a lane has up to two boxes of a tile, each in 9 panels
    assert "griddepcontrol.wait" in text


@pytest.mark.parametrize(
    ("pattern", "config", "reason"),
    [
        ({"head_dim": 576, "head_dim_v": 512}, {"block_n": 32}, "block_n 32 is not 64"),
        ({"head_dim": 704, "head_dim_v": 640}, {}, "head_dim_v 640 is not a multiple of 128 up to 512"),
        ({"head_dim": 576, "head_dim_v": 448}, {}, "head_dim_v 448 is not a multiple of 128"),
        ({"head_dim": 128}, {}, "no columns beside the 128 of values"),
        ({"head_dim": 584, "head_dim_v": 512}, {}, "not a multiple of 16"),
        ({"head_dim": 768, "head_dim_v": 512}, {}, "bytes of shared memory"),
        ({"head_dim": 576, "head_dim_v": 512, "mask": "sink_window"}, {}, "gaps"),
        ({"head_dim": 576, "head_dim_v": 512, "score": "alibi"}, {}, "differs from head to head"),
    ],
    ids=str,
)
def test_refusals_of_values_in_keys(pattern, config, reason):
    refused = latent.feasible(pattern_of(**{"mask": "window"} | pattern), latent.Config(**config), TARGET)
    assert isinstance(refused, Rejected) and reason in refused.reason


def test_decoding_compiles_to_clusters_blocks_of_several_sequences_and_a_launch_that_begins_early(tmp_path):
    pattern = pattern_of("window", dtype="bfloat16")
    (config,) = decode.default_configs("v2", pattern, TARGET).values()
    program = decode.program(pattern, config, TARGET, v2.TRAVERSAL, "kernel")
    sizes = sizes_of(2, 32, 3, 8, 5000, 128, 128)
    for scalar in program.scalars:
        sizes[scalar.name] = evaluate(scalar.value, sizes)
    shapes = [tuple(evaluate(size, sizes) for size in workspace.shape) for workspace in program.workspaces]
    assert shapes == [(192, 20, 128), (192, 20, 2)]  # 5000 keys in splits of 256
    text, report, count = compiled(program, TARGET.arch, tmp_path)
    assert len(report.kernels) == 4
    assert all(kernel.spills == kernel.stack == 0 for kernel in report.kernels)
    assert max(kernel.registers for kernel in report.kernels) <= config.registers
    assert count["HGMMA"] >= 3 * (pattern.head_dim // 16 + config.block_n // 16)
    assert count["UTMALDG"] >= 3 * 3
    assert "griddepcontrol.wait" in text
    assert text.count("cudaLaunchAttributeClusterDimension") == 2
    device, host = split(text, "kernel.cu")
    embedded = embed(device, host, tmp_path / "kernel.image")
    assert 'kernel(image_library(), "kernel_kernel", false)' in embedded
    for name in ("few", "several"):
        assert f'kernel(image_library(), "kernel_{name}_kernel", false)' in embedded
    assert 'kernel(image_library(), "kernel_combine_kernel", true)' in embedded
    compile_host(embedded, tmp_path / "kernel.cpp", tmp_path / "kernel.o")  # with descriptions of tensors for TMA


@pytest.mark.parametrize("dtype", sm90.DTYPES)
@pytest.mark.parametrize("head_dims", [(64, 64), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)])
@pytest.mark.parametrize(
    ("mask", "score"), [("window", "identity"), ("padded", "identity"), ("window", "softcap_alibi")]
)
def test_decoding_is_feasible(head_dims, dtype, mask, score):
    pattern = pattern_of(mask, score, dtype, *head_dims)
    for config in decode.default_configs("v2", pattern, TARGET).values():
        assert decode.feasible(pattern, config, TARGET) is None


@pytest.mark.parametrize(
    ("pattern", "change", "reason"),
    [
        ({}, {"block_n": 48}, "doesn't divide every split"),
        ({}, {"num_stages": 9}, "num_stages 9"),
        ({}, {"num_stages": 4}, "bytes of shared memory"),
        ({"head_dim": 64}, {"block_n": 32, "num_stages": 2, "blocks_per_sm": 5}, "registers"),
        ({"score": "alibi"}, {}, "from head to head"),
    ],
)
def test_refusals_of_decoding_say_why(pattern, change, reason):
    refusal = decode.feasible(pattern_of(**pattern), replace(decode.Config(), **change), TARGET)
    assert isinstance(refusal, Rejected)
    assert reason in refusal.reason


@pytest.mark.parametrize("template", ["v1", "v2"])
@pytest.mark.parametrize(
    "head_dims", [(32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
)
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
        ({}, {"num_stages": 9}, "num_stages 9"),
        ({}, {"num_stages": 4}, "bytes of shared memory"),
        ({}, {"tiles_per_cta": 3}, "tiles_per_cta 3"),
        ({}, {"num_consumer_warpgroups": 3}, "registers"),
        ({"mask": "sink_window"}, {"tiles_per_cta": 2}, "gaps"),
        ({"mask": "positioned", "score": "optional_sinks"}, {"waves": 1, "overlap_tiles": True}, "a sink"),
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

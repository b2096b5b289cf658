"""Where the keys of a sequence on pages are split: what the device computes fits what the host makes room for."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm")

from tvm import tirx
from tvm.sym import Analyzer

from schedules.builder.compile import pattern_of
from schedules.builder.suite import KernelSpec, Selection
from schedules.families import split_keys
from schedules.families.interface import Target
from schedules.families.sm90 import decode, paged_decode
from schedules.templates import v2
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import BUILTIN_DEFINITION
from tvm_flash.packs.sizes import evaluate


def on_device(keys: int, function) -> int:
    """The value of an expression of the number of keys."""
    return int(Analyzer().simplify(function(tirx.IntImm("int32", keys))))


#: Those of mma.sync, and of Hopper.
LENGTHS = (split_keys.PAGED_SPLIT_LENGTHS, paged_decode.SPLIT_LENGTHS)


@pytest.mark.parametrize("split_lengths", LENGTHS)
def test_a_table_has_room_for_the_splits_of_every_sequence_that_fits_it(split_lengths):
    borders = [begin for begin, _ in split_lengths if begin]
    lengths = sorted({0, 1, 63, 64, 65, 100_000, *(b + d for b in borders for d in (-1, 0, 1, 77))})
    splits = {keys: on_device(keys, lambda n: split_keys.paged_split_count(n, split_lengths)) for keys in lengths}
    most = split_keys._most_paged_splits(split_lengths)
    for table in lengths[1:]:
        room = evaluate(most, {"seqlen_kv": table})
        assert max(n for keys, n in splits.items() if keys <= table) <= room
    assert splits[0] == 0
    assert splits[65] == 2


@pytest.mark.parametrize("split_lengths", LENGTHS)
def test_splits_are_whole_tiles_and_cover_the_keys(split_lengths):
    def count(keys):
        return split_keys.paged_split_count(keys, split_lengths)

    for keys in (1, 64, 2047, 2048, 5000, 32768, 131072):
        length = on_device(keys, lambda n: split_keys.paged_split_length(n, split_lengths))
        assert length % 64 == 0
        assert (on_device(keys, count) - 1) * length < keys
        assert on_device(keys, count) * length >= keys


@pytest.mark.parametrize("page_size", [0, 1, 8, 15, 16, 17, 24, 48, 1500, 8192])
def test_boxes_are_chosen_for_pages_that_are_whole_ones(page_size):
    target = Target("sm_90a")
    spec = KernelSpec("v2", BUILTIN_DEFINITION, "window", "identity", "float16", 128, 128, kind="paged_decode")
    pattern = pattern_of(spec, target)
    (config,) = paged_decode.default_configs("v2", pattern, target).values()
    program = paged_decode.program(pattern, config, target, v2.TRAVERSAL, "kernel")
    sizes = {"page_size": page_size, "seqlen_kv": 4096}
    assert evaluate(program.max_rows, sizes) == (0 if page_size % 16 else 64)
    (config,) = paged_decode.ANY_PAGES.default_configs("v2", pattern, target).values()
    any_pages = paged_decode.ANY_PAGES.program(pattern, config, target, v2.TRAVERSAL, "kernel")
    assert evaluate(any_pages.max_rows, sizes) == 64


def test_kernels_for_pages_of_any_size_are_beside_those_that_go_by_boxes():
    target = Target("sm_90a")
    for head_dim, mask, score in ((64, "window", "identity"), (128, "positioned", "optional")):
        spec = KernelSpec("v2", BUILTIN_DEFINITION, mask, score, "float16", head_dim, head_dim, kind="paged_decode_any")
        pattern = pattern_of(spec, target)
        (config,) = paged_decode.ANY_PAGES.default_configs("v2", pattern, target).values()
        assert "of any size" in paged_decode.ANY_PAGES.feasible(pattern, config, target).reason
    specs = Selection().specs(("float16",), gpu=True, kinds=("paged_decode_any",), templates=("v1", "v2"))
    assert [s.symbol for s in specs] == ["v2_float16_d128_window_identity_paged_decode_any"]


@pytest.mark.parametrize(("kind", "splits", "seqlen_q"), [("packed", 16, 1), ("apart", 9, 1), ("packed", 5, 3)])
def test_shares_are_the_shortest_that_the_machine_has_places_for(kind, splits, seqlen_q):
    resident, packs = 264, kind == "packed"
    target = Target("sm_90a")
    score = "identity" if packs else "alibi"
    spec = KernelSpec("v2", BUILTIN_DEFINITION, "window", score, "float16", 128, 128, kind="decode")
    config = decode.default_configs("v2", pattern_of(spec, target), target)[0]
    assert config.pack_heads == packs
    program = decode.program(pattern_of(spec, target), config, target, v2.TRAVERSAL, "kernel")
    scalars = {x.name: x.value for x in program.scalars}
    for heads, kv_heads in ((32, 8), (8, 1), (20, 20), (300, 300), (128, 1)):
        group = heads // kv_heads
        rows = seqlen_q if seqlen_q < 3 else 4  # of a head, padded to a power of two
        shared = group if packs and group * rows <= 64 else 1
        places = max(1, resident // (heads // shared))  # for the row tile of a head, or of heads that share one
        for batch in (1, 2, 5, 8, 24, 32, 33, 34, 40, 64, 70, 200, 3000):
            problem = sizes.of(batch, heads, seqlen_q, kv_heads, splits * 256, 128, 128) | {"split_length": 256}
            share = evaluate(scalars["share_length"], problem)
            assert share * places >= batch * splits > (share - 1) * places
            kept = evaluate(scalars["run_length"], problem)
            assert kept == max(1, 64 // (rows * shared))

"""Where the keys of a sequence on pages are split: what the device computes fits what the host makes room for."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

pytest.importorskip("tvm")

from tvm import tirx
from tvm.sym import Analyzer

from schedules.builder.compile import pattern_of
from schedules.builder.suite import KernelSpec, Selection
from schedules.families import split_keys
from schedules.families.interface import Target
from schedules.families.sm90 import decode, latent, paged_decode, run_program, scaled_decode
from schedules.families.sm90.parts import _ONE, PartScheduler
from schedules.templates import v2
from schedules.tile import division
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import BUILTIN_DEFINITION
from tvm_flash.packs.sizes import evaluate


def on_device(keys: int, function) -> int:
    """The value of an expression of the number of keys."""
    return int(Analyzer().simplify(function(tirx.IntImm("int32", keys))))


SCALED = "paged_decode_e4m3"

#: Those of mma.sync, and of Hopper.
LENGTHS = (split_keys.PAGED_SPLIT_LENGTHS, paged_decode.SPLIT_LENGTHS)


@pytest.mark.parametrize("split_lengths", LENGTHS)
def test_a_table_has_room_for_the_splits_of_every_sequence_that_fits_it(split_lengths):
    borders = [begin for begin, _ in split_lengths if begin]
    lengths = sorted({0, 1, 63, 64, 65, 100_000, *(b + d for b in borders for d in (-1, 0, 1, 77))})
    splits = {keys: on_device(keys, lambda n: split_keys.paged_split_count(n, split_lengths)) for keys in lengths}
    most = split_keys.most_paged_splits(split_lengths)
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


@pytest.mark.parametrize("split_length", (0, 64, 1024, 1 << 20))
def test_splits_that_a_call_asks_for(split_length):
    """There is room for those of every sequence that fits a table, and they cover its keys."""
    target = Target("sm_90a")
    spec = KernelSpec("v2", BUILTIN_DEFINITION, "window", "identity", "bfloat16", 576, 512, kind="paged_latent")
    pattern = pattern_of(spec, target)
    program = latent.program(pattern, latent.Config(), target, v2.TRAVERSAL, "kernel")
    found = 0
    for keys in (0, 1, 64, 65, 1023, 1024, 5000, 16383, 16384, 131072):
        extents = sizes.of_pages(1, 128, 2, 1, 10, 64, -(-keys // 64), 576, 512, 2, split_length)
        asked = {x.name: evaluate(x.value, extents) for x in program.scalars}["split_bits"]
        bits = on_device(
            keys,
            lambda n, asked=asked: split_keys.asked_split_bits(
                tirx.IntImm("int32", asked), n, 64, latent.SPLIT_LENGTHS
            ),
        )
        assert not split_length or 64 << bits == split_length
        splits = -(-keys // (64 << bits))
        room = evaluate(program.workspaces[0].shape[1], extents)
        assert max(found if not split_length else 0, splits) <= room
        found = max(found, splits)


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
    for head_dim, mask, score in ((256, "window", "identity"), (128, "positioned", "optional")):
        spec = KernelSpec("v2", BUILTIN_DEFINITION, mask, score, "float16", head_dim, head_dim, kind="paged_decode_any")
        pattern = pattern_of(spec, target)
        (config,) = paged_decode.ANY_PAGES.default_configs("v2", pattern, target).values()
        assert "of any size" in paged_decode.ANY_PAGES.feasible(pattern, config, target).reason
    specs = Selection().specs(("float16",), gpu=True, kinds=("paged_decode_any",), templates=("v1", "v2"))
    assert [s.symbol for s in specs] == [f"v2_float16_d{d}_window_identity_paged_decode_any" for d in (64, 128)]


@pytest.mark.parametrize(
    ("head_dim", "mask", "score"), [(128, "window", "identity"), (64, "window", "softcap"), (256, "window", "identity")]
)
def test_of_a_cache_of_8_bits_few_rows_have_a_kernel_of_their_own_where_it_has_the_same_bits(head_dim, mask, score):
    target = Target("sm_90a")
    spec = KernelSpec("v2", BUILTIN_DEFINITION, mask, score, "bfloat16", head_dim, head_dim, kind="paged_decode_e4m3")
    pattern, kernels = pattern_of(spec, target), scaled_decode.KINDS["paged_decode_e4m3"]
    (config,) = kernels.default_configs("v2", pattern, target).values()
    assert kernels.feasible(pattern, config, target) is None
    program = kernels.program(pattern, config, target, v2.TRAVERSAL, "kernel")
    has_all = head_dim <= 128 and score == "identity"
    if head_dim > 128:
        assert [x.when for x in program.launches] == ["", ""] and not program.scalars
        return
    assert [x.when for x in program.launches] == ["more", *(["few", "wide"] if has_all else []), "short", "long"]
    for batch, rows in ((1, 1), (1, 8), (64, 8), (1, 9), (64, 64)):
        numbers = with_scalars(program, sizes.of(batch, 8 * rows, 1, 8, 8192, head_dim, head_dim))
        is_few = has_all and rows <= 8
        assert [numbers[n] for n in ("more", "few", "wide")] == [
            not is_few,
            is_few and batch > 1,
            is_few and batch == 1,
        ]


def with_scalars(program, extents: dict[str, int]) -> dict[str, int]:
    """Sizes, and the numbers that the run time gives a program's launches."""
    found = dict(extents)
    for scalar in program.scalars:
        found[scalar.name] = evaluate(scalar.value, found)
    return found


@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("tokens", (1, 3))
def test_warps_over_a_cache_of_8_bits_fill_the_machine_once_where_no_sequence_can_hold_it_up(head_dim, tokens):
    target = Target("sm_90a")
    spec = KernelSpec("v2", BUILTIN_DEFINITION, "window", "identity", "float16", head_dim, head_dim, kind=SCALED)
    pattern = pattern_of(spec, target)
    kernels = scaled_decode.KINDS[SCALED]
    (config,) = kernels.default_configs("v2", pattern, target).values()
    program = kernels.program(pattern, config, target, v2.TRAVERSAL, "kernel")
    resident = 132 * config.few_blocks_per_sm
    found = set()
    for batch in (0, *BATCHES):
        for room in (16, 512, 1024, 2048, 4096, 8192, 32768, 131072):
            numbers = with_scalars(program, sizes.of(batch, 32, tokens, 8, room, head_dim, head_dim))
            units, blocks = batch * 8, numbers["blocks"]
            splits = evaluate(split_keys.most_paged_splits(split_keys.PAGED_SPLIT_LENGTHS), {"seqlen_kv": room})
            assert sum(numbers[n] for n in ("more", "few", "wide")) == sum(numbers[n] for n in ("short", "long")) == 1
            assert numbers["more"] == (tokens == 3)
            assert 1 <= blocks <= splits
            assert (units * splits <= 264 and tokens == 1) == numbers["wide"]
            if blocks < min(splits, -(-8192 // max(1, units))):
                assert resident - units < units * blocks <= resident
                assert room <= 256 * blocks
                found.add(batch)
            found.add((numbers["wide"], numbers["long"]))
    assert {(0, 0), (0, 1)} <= found
    assert 64 in found


BATCHES = (1, 2, 4, 5, 8, 12, 13, 20, 24, 32, 33, 34, 38, 40, 64, 70, 200, 3000)


@pytest.mark.parametrize("score", ["identity", "alibi"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), [(1, 1024), (1, 4096), (1, 6000), (1, 32768), (16, 16384)])
def test_runs_fill_the_machine_and_cover_all_splits(score, seqlen_q, seqlen_kv):
    """In clusters that are likely to find places, and hold their states, or with a block in as many places as go."""
    resident, target = 264, Target("sm_90a")
    spec = KernelSpec("v2", BUILTIN_DEFINITION, "window", score, "float16", 128, 128, kind="decode")
    config = decode.default_configs("v2", pattern_of(spec, target), target)[0]
    assert config.pack_heads == (score == "identity")
    program = decode.program(pattern_of(spec, target), config, target, v2.TRAVERSAL, "kernel")
    found = set()
    for batch in BATCHES:
        extents = sizes.of(batch, 32, seqlen_q, 8, seqlen_kv, 128, 128)
        for scalar in program.scalars:
            extents[scalar.name] = evaluate(scalar.value, extents)
        splits = -(-seqlen_kv // extents["split_length"])
        run, spread = extents["run"], extents["spread"]
        units, runs = batch * (8 if config.pack_heads else 32), -(-splits // run)
        assert 1 <= run <= splits
        assert spread in (0, 1)
        rows = seqlen_q * (4 if config.pack_heads else 1)
        fits = units * runs <= resident * (13 / 16 if runs > 2 and not spread else 1)
        assert fits or units > resident or runs == -(-splits * rows // 64)
        assert run * rows <= 64
        assert spread or runs <= 8
        found.add((spread, runs == 1))
        if several := extents.get("several", 0):
            assert (spread, runs) == (0, 1)
            assert units <= several * resident
            assert rows <= 8
        assert [extents["few"], extents["more"]] == [int(not several and rows <= 8), int(rows > 8)]
        room = evaluate(program.workspaces[0].shape[0], extents)
        assert room == (batch * 32 * seqlen_q if spread else 1)
    assert len(found) > 1 or seqlen_q == 16
    several = ["several"] if config.pack_heads else []
    assert [launch.when for launch in program.launches] == ["more", "few", *several, "spread"]


def _decoding(score, head_dim=128):
    """The configuration of a decoding kernel of Hopper, and the numbers of its calls by name."""
    target = Target("sm_90a")
    spec = KernelSpec("v2", BUILTIN_DEFINITION, "window", score, "float16", head_dim, head_dim, kind="decode")
    config = decode.default_configs("v2", pattern_of(spec, target), target)[0]
    program = decode.program(pattern_of(spec, target), config, target, v2.TRAVERSAL, "kernel")
    return config, {x.name: x.value for x in program.scalars}


@pytest.mark.parametrize("score", ["identity", "alibi"])
def test_keys_that_the_cache_has_no_room_for_go_first_from_it(score):
    """Not those that a later call may find there, and not those that several heads' blocks read."""
    config, scalars = _decoding(score)
    for batch, keys, is_read_once in ((1, 8192, 0), (6, 2048, 0), (10, 1500, 1), (32, 4096, 1)):
        extents = sizes.of(batch, 32, 1, 8, keys, 128, 128)
        assert evaluate(scalars["read_once"], extents) == (is_read_once if config.pack_heads else 0)


@pytest.mark.parametrize(
    ("batch", "room", "rows", "runs"),
    [
        *((1, 1024, 4, 8), (4, 1024, 4, 6), (8, 1024, 4, 3), (12, 1024, 4, 2), (16, 2048, 4, 2), (16, 2048, 8, 2)),
        *((17, 1024, 4, 0), (16, 2064, 4, 0), (16, 2048, 16, 0), (6, 3072, 4, 4), (8, 3072, 4, 0), (64, 1024, 4, 1)),
    ],
)
def test_clusters_have_sequences_of_short_tables(batch, room, rows, runs):
    """Of eight heads of keys, with places for 264 blocks; 0: blocks share the tiles of all."""
    lengths = paged_decode.split_lengths(paged_decode.Config())
    splits = split_keys.most_paged_splits(lengths)
    found = split_keys._runs_of_sequences(("*", "batch", "kv_heads"), splits, "rows", 264, 64)
    assert evaluate(found, {"batch": batch, "kv_heads": 8, "seqlen_kv": room, "rows": rows}) == runs


@pytest.mark.parametrize("score", ["identity", "alibi"])
def test_a_call_has_the_kernel_of_its_rows(score):
    """Of packed heads those of a group are rows that share a key, of others the queries alone."""
    config, scalars = _decoding(score)
    for seqlen_q, group in ((1, 1), (1, 8), (1, 9), (2, 4), (3, 4), (8, 1), (9, 1), (8, 8)):
        extents = sizes.of(2, 2 * group, seqlen_q, 2, 4096, 128, 128)
        rows = seqlen_q * group if config.pack_heads else seqlen_q
        for name, value in scalars.items():
            extents[name] = evaluate(value, extents)
        assert (extents["few"], extents["more"]) == (rows <= 8, rows > 8)


@pytest.mark.parametrize(
    ("units", "seqlen_kv", "resident", "blocks"),
    [
        *((512, 1024, 396, 2), (768, 1024, 396, 1), (1600, 1024, 396, 1), (416, 4096, 396, 4), (1024, 512, 396, 1)),
        *((384, 1024, 264, 2), (320, 2048, 264, 2), (304, 4096, 264, 4), (272, 8192, 264, 4), (512, 1024, 264, 1)),
    ],
)
def test_clusters_that_are_more_than_the_places_are_as_measured(units, seqlen_kv, resident, blocks):
    assert evaluate(run_program._in_rounds("batch", resident), {"batch": units, "seqlen_kv": seqlen_kv}) == blocks


@pytest.mark.parametrize(
    ("head_dim", "batch", "seqlen_kv", "several"),
    [
        *((64, 64, 1024, 2), (64, 128, 1024, 4), (64, 160, 1024, 5), (64, 300, 1024, 10), (64, 256, 512, 8)),
        *((64, 56, 1024, 2), (64, 64, 4096, 2), (64, 52, 4096, 2), (64, 32, 2048, 1), (64, 40, 1024, 0)),
        *((64, 45, 2048, 0), (64, 38, 4096, 0), (64, 34, 8192, 0), (64, 16, 4096, 0), (64, 1, 16384, 0)),
        *((128, 64, 1024, 2), (128, 48, 1024, 2), (128, 40, 2048, 2), (128, 38, 4096, 2), (128, 80, 1024, 3)),
        *((128, 32, 4096, 1), (128, 33, 1024, 1), (128, 200, 1024, 0), (128, 34, 8192, 0), (128, 60, 8192, 2)),
    ],
)
def test_blocks_have_several_sequences_where_that_was_faster(head_dim, batch, seqlen_kv, several):
    """Heads of keys of sequences, of which each has eight."""
    scalars = _decoding("identity", head_dim)[1]
    extents = sizes.of(batch, 32, 1, 8, seqlen_kv, head_dim, head_dim)
    for name, value in scalars.items():
        extents[name] = evaluate(value, extents)
    assert extents["several"] == several
    assert extents["few"] == (several == 0)


def test_splits_of_long_sequences_are_as_long_as_heads_of_keys_allow():
    target = Target("sm_90a")
    spec = KernelSpec("v2", BUILTIN_DEFINITION, "window", "identity", "float16", 128, 128, kind="decode")
    config = decode.default_configs("v2", pattern_of(spec, target), target)[0]
    program = decode.program(pattern_of(spec, target), config, target, v2.TRAVERSAL, "kernel")

    def length(kv_heads: int, seqlen_kv: int) -> int:
        return evaluate(program.scalars[0].value, sizes.of(1, 8, 1, kv_heads, seqlen_kv, 128, 128))

    assert [length(1, n) for n in (100, 1024, 2048, 16384, 32768, 131072)] == [64, 128, 256, 512, 512, 2048]
    assert [length(4, n) for n in (100, 1024, 2048, 16384, 32768, 131072)] == [64, 128, 256, 512, 1024, 4096]


#: What an expression of numbers from 0 on is made of, for Python: no number of theirs is too large for its type.
NUMBERS = SimpleNamespace(
    Cast=lambda _, x: x,
    Select=lambda which, one, other: one if which else other,
    Div=lambda x, y: x // y,
    int32=int,
    uint32=int,
    uint64=int,
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 24, 1000, (1 << 16) + 1, (1 << 31) - 1])
def test_a_product_is_the_exact_quotient(size):
    last = (1 << 31) - 1
    x, divisor = tirx.Var("x", "int32"), tirx.IntImm("int32", size)
    text = str(division.quotient(x, divisor, division.reciprocal(divisor))).splitlines()[-1]
    wholes = {n * size for n in (0, 1, 2, 3, 1000, last // size - 1, last // size)}
    for value in {whole + by for whole, by in itertools.product(wholes, (-1, 0, 1))} | {last - 1, last}:
        if 0 <= value <= last:
            assert eval(text, {"T": NUMBERS, "x": value}) == value // size, value


def test_blocks_of_a_cluster_have_as_many_splits_as_divided():
    for runs in range(1, split_keys.MOST_OF_A_CLUSTER + 1):
        of_one = tirx.IntImm("int32", -(-_ONE // runs))
        scheduler = SimpleNamespace(runs=tirx.IntImm("int32", runs), of_one_block=of_one)
        for splits in (*range(70), 511, 512, 513, 8190, 8191):
            found = on_device(splits, lambda x, own=scheduler: PartScheduler.of_each_block(own, x))
            assert found == -(-splits // runs), (splits, runs)


def test_splits_are_as_many_tiles_as_their_length_says():
    for fewest, _ in paged_decode.SPLIT_LENGTHS:
        for keys in {max(fewest - 1, 0), fewest, fewest + 1}:
            length = on_device(keys, lambda x: split_keys.paged_split_length(x, paged_decode.SPLIT_LENGTHS))
            bits = on_device(keys, lambda x: split_keys.paged_split_bits(x, 64, paged_decode.SPLIT_LENGTHS))
            assert 64 << bits == length

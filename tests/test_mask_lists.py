"""What the launch before a GPU kernel lists of masks with gaps, its source run on the processor (tests/simt)."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import IDENTITY, MASKS, Mask
from schedules.definition.pattern import match
from schedules.families.ranged import with_tiles
from schedules.tile import mask_lists
from schedules.tile.mask_lists import LEFTWARDS, PARTS, RIGHTWARDS, Listed
from tests.mask_launches import BATCH, HEADS, computed, heads_that_differ, of_gallery
from tvm_flash.packs.manifest import Param

OWN = 64

#: Some of each 300 keys before the query, how many differs from head to head, and for half of the queries none.
own_gaps = Mask(
    "own_gaps",
    lambda at: T.And(
        T.And(at.j <= at.i, T.floormod(at.i, 200) < 100),
        T.floormod(at.i - at.j, 300) < at.param["shift"],
    ),
    lambda at: (at.j <= at.i) & (at.i % 200 < 100) & ((at.i - at.j) % 300 < at.params["shift"]),
    (Param("shift", "int32", axes="bh"),),
)


def shifts(batch, heads, seqlen_q, seqlen_kv):
    return {"shift": 40 + 30 * np.arange(batch * heads).reshape(batch, heads)}


def table_of(definition, lengths, axis, others, order, folder):
    """The table, ``(batch, heads, own tiles, width)``, and of each pair of tiles whether some see, and all."""
    pattern = match(definition(16, "float16", index_dtype="int32"))
    known = Listed(pattern, axis, OWN, others, order)
    table, seen = computed(mask_lists, known, definition, lengths, folder)
    seen = seen if axis == "i" else seen.swapaxes(2, 3)
    shape = heads_that_differ(pattern)
    own, width = -(-seen.shape[2] // OWN), table.shape[1]
    table = np.broadcast_to(table.reshape(*shape, own, width), (BATCH, HEADS, own, width))
    count = -(-seen.shape[3] // others)
    some, every = np.zeros((2, BATCH, HEADS, own, count), bool)
    for m, n in np.ndindex(own, count):
        tile = seen[:, :, m * OWN : (m + 1) * OWN, n * others : (n + 1) * others]
        some[:, :, m, n], every[:, :, m, n] = tile.any((2, 3)), tile.all((2, 3))
    if axis == "i":  # keys that there aren't need a mask
        every[..., -1] &= seen.shape[3] % others == 0
    return table, some, every


def listed(row, order, count):
    """The tiles of a row that need a mask, and those that don't, in the order of a walk."""
    if order == PARTS:
        masked, steps = row[:2]
        return row[2 : 2 + masked].tolist(), row[::-1][: steps - masked].tolist()
    kinds, tile = ([], []), row[0]
    while 0 <= tile < count:
        kinds[row[1 + tile] & 1].append(tile)
        tile = row[1 + tile] >> 1
    assert tile == (-1 if order == LEFTWARDS else count)
    return kinds


def check(definition, lengths, axis, others, order, folder, exact=True):
    """That what is listed is what is seen, and in order; how many tiles there are that nothing is seen of."""
    table, some, every = table_of(definition, lengths, axis, others, order, folder)
    for place in np.ndindex(some.shape[:3]):
        masked, whole = listed(table[place], order, some.shape[3])
        if order == PARTS and axis == "i" and not some[place].any():
            assert (masked, whole) == ([0], [])
            continue
        assert sorted([*masked, *whole]) == np.flatnonzero(some[place]).tolist()
        assert every[place][whole].all() and (not exact or not every[place][masked].any())
        for tiles in (masked, whole):
            assert tiles == sorted(tiles, reverse=order != RIGHTWARDS)
    return (~some).sum()


@pytest.mark.parametrize("axis", "ij")
@pytest.mark.parametrize("order", [PARTS, LEFTWARDS, RIGHTWARDS])
def test_a_mask_of_each_head(order, axis, tmp_path):
    definition = Attention(IDENTITY, own_gaps, example=shifts)
    assert check(definition, (410, 450), axis, 32, order, tmp_path) > 0


@pytest.mark.parametrize("name", ["dilated", "neighbourhood_2d", "block_causal_video", "chunked", "sink_window"])
def test_masks_of_the_gallery(name, tmp_path):
    for axis in "ij":
        exact = name != "sink_window"  # unions of intervals are known by position alone
        assert check(of_gallery(name), (500, 640), axis, 48, PARTS, tmp_path, exact) > 0


@pytest.mark.parametrize("order", [PARTS, LEFTWARDS, RIGHTWARDS])
def test_more_tiles_than_threads(order, tmp_path):
    definition = Attention(IDENTITY, own_gaps & MASKS["causal"], example=shifts)
    assert check(definition, (70, 4500), "i", 16, order, tmp_path) > 0


def test_intervals_are_left_alone():
    causal_or_prefix = Mask("p", lambda at: T.Or(at.j < 7, at.j <= at.diagonal), lambda at: None)
    for mask in (MASKS["causal"], MASKS["window"], causal_or_prefix):
        pattern = match(Attention(IDENTITY, mask)(16, "float16", index_dtype="int32"))
        assert with_tiles(pattern, "i", 64, 32) is pattern

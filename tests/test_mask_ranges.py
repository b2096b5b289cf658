"""What the launch before a GPU kernel finds of masks that read ids, its source run on the processor (tests/simt)."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import IDENTITY, MASKS, Mask
from schedules.definition.pattern import match
from schedules.tile import mask_ranges
from tests.mask_launches import BATCH, HEADS, computed, heads_that_differ, of_gallery
from tvm_flash.packs.manifest import Param

KEYS_OF_A_TILE = 32


def heads_apart(batch, heads, seqlen_q, seqlen_kv):
    """Ids of each head, which are in no order."""
    rng = np.random.default_rng(3)
    return {"q_id": rng.integers(0, 3, (heads, seqlen_q)), "k_id": np.sort(rng.integers(0, 5, (heads, seqlen_kv)))}


not_mine = Mask(
    "not_mine",
    lambda at: T.Or(at.param["q_id"] < at.param["k_id"], at.j < 3),
    lambda at: (at.params["q_id"] < at.params["k_id"]) | (at.j < 3),
    (Param("q_id", "int32", axes="hi"), Param("k_id", "int32", axes="hj")),
)


def found(definition, lengths, axis, block, folder):
    """What was found, ``(batch, heads, tiles, 4)``, and what is seen, ``(batch, heads, seqlen_q, seqlen_kv)``."""
    pattern = match(definition(16, "float16", index_dtype="int32"))
    known = mask_ranges.ranged(pattern, axis, block)
    numbers, seen = computed(mask_ranges, known, definition, lengths, folder)
    tiles = -(-lengths["ij".index(axis)] // block)
    shape = heads_that_differ(pattern)
    return np.broadcast_to(numbers.reshape(*shape, tiles, 4), (BATCH, HEADS, tiles, 4)), seen


def each_tile(numbers, seen, axis, block):
    """Of each tile of each head what was found, and of each key, or query, how many of the tile's own see it."""
    for b, h, tile in np.ndindex(numbers.shape[:3]):
        own = seen[b, h] if axis == "i" else seen[b, h].T
        own = own[tile * block : (tile + 1) * block]
        yield numbers[b, h, tile], own.any(axis=0), own.all(axis=0)


@pytest.mark.parametrize("axis", "ij")
def test_nothing_that_is_seen_is_left_out(axis, tmp_path):
    definition = Attention(IDENTITY, not_mine & MASKS["causal"], example=heads_apart)
    numbers, seen = found(definition, (150, 333), axis, 64, tmp_path)
    for (lo, hi, full_lo, full_hi), some, every in each_tile(numbers, seen, axis, 64):
        assert 0 <= lo <= hi <= len(some) and 0 <= full_lo <= full_hi <= len(some)
        assert not some[:lo].any() and not some[hi:].any() and every[full_lo:full_hi].all()


@pytest.mark.parametrize("axis", "ij")
def test_of_documents_nothing_else_is_visited(axis, tmp_path):
    numbers, seen = found(of_gallery("documents"), (1024, 1024), axis, 64, tmp_path)
    visited = whole = live = 0
    for (lo, hi, full_lo, full_hi), some, every in each_tile(numbers, seen, axis, 64):
        assert some[lo] and some[hi - 1] and full_hi - full_lo == every.sum()
        visited += -(-hi // KEYS_OF_A_TILE) - lo // KEYS_OF_A_TILE
        whole += max(0, full_hi // KEYS_OF_A_TILE + -full_lo // KEYS_OF_A_TILE)
        live += some.reshape(-1, KEYS_OF_A_TILE).any(axis=1).sum()
    assert visited == live < 0.25 * BATCH * HEADS * (1024 // 64) * (1024 // KEYS_OF_A_TILE) and whole > 0


def test_what_both_ends_of_a_tile_see_whole(tmp_path):
    """Of the two the longer is kept: here keys at the left of a gap that one query has."""
    ids = Mask("ids", lambda at: at.param["a"] != at.param["b"], lambda at: at.params["a"] != at.params["b"],
               (Param("a", "int32", axes="i"), Param("b", "int32", axes="j")))  # fmt: skip
    b = np.zeros(300, np.int32)
    b[180:200], b[290] = 1, 1

    def example(*sizes):
        return {"a": np.ones(64), "b": b}

    numbers, _ = found(Attention(IDENTITY, ids, example=example), (64, 300), "i", 64, tmp_path)
    assert numbers[0, 0, 0].tolist() == [0, 300, 0, 180]

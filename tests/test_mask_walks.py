"""Gradients of masks that read ids in one launch on Hopper, where blocks add to tiles of dq in turn: what each of them
visits, and its CUDA source run on the processor (tests/simt)."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

from schedules.definition.attention import Attention
from schedules.definition.catalogue import IDENTITY, MASKS, Mask
from schedules.definition.pattern import match
from schedules.definition.sample import parameters_of
from schedules.families.interface import BACKWARD, Rejected, Target
from schedules.families.sm90 import backward
from schedules.families.sm90.backward import ragged
from schedules.tile import mask_ranges, mask_walks
from tests import tensor_trials
from tests.mask_launches import BATCH, computed
from tests.test_tensors_simulated import check, made
from tvm_flash.packs.manifest import Param

KEYS, QUERIES = 128, 64


def same_ids(ids, causal=True):
    """An attention to the keys of one's own id; ``ids(length)`` gives those of keys, the last ones of which queries
    have too."""
    params = Param("q_id", "int32", axes="bi"), Param("k_id", "int32", axes="bj")
    mask = Mask(
        "same_id",
        lambda at: at.param["q_id"] == at.param["k_id"],
        lambda at: at.params["q_id"] == at.params["k_id"],
        params,
    )

    def example(batch, heads, seqlen_q, seqlen_kv):
        of_keys = ids(seqlen_kv)
        return {"q_id": of_keys[np.maximum(np.arange(seqlen_kv - seqlen_q, seqlen_kv), 0)], "k_id": of_keys}

    return Attention(IDENTITY, mask & MASKS["causal"] if causal else mask, "same_id", example=example)


def of_lengths(*lengths):
    """Ids of documents of some lengths, one after another, of which the last one goes on to the end."""
    return lambda n: np.searchsorted(np.cumsum(lengths), np.arange(n), side="right").astype(np.int32)


def mixed(n):
    """Ids in no order."""
    return np.random.default_rng(n).integers(0, 3, n).astype(np.int32)


def apart(n):
    """Two documents, each in many pieces, and between them keys that nobody else sees."""
    return (np.arange(n) // 90 % 3).astype(np.int32) * np.int32(5)


LAYOUTS = {
    "one": of_lengths(),
    "of one and two tokens": lambda n: (np.arange(n) * 2 // 3).astype(np.int32),
    "127, 128, 129": of_lengths(127, 128, 129),
    "an empty one, and a short tail": of_lengths(200, 0, 137),
    "falling": lambda n: of_lengths(100, 130)(n)[::-1].copy(),
    "mixed": mixed,
    "apart": apart,
}


# ---------------------------------------------------------------- what blocks of keys visit


@pytest.mark.parametrize("layout", LAYOUTS)
def test_who_adds_to_a_tile_visits_it_and_whatever_is_seen_is_visited(layout, tmp_path):
    """And a tile that is said to see all keys of a block does."""
    lengths = (450, 530)
    definition = same_ids(LAYOUTS[layout])
    known = mask_walks.Walked(match(definition(16, "float16", index_dtype="int32")), KEYS, QUERIES)
    of_queries, seen = computed(mask_ranges, known.of_queries, definition, lengths, tmp_path)
    of_keys, _ = computed(mask_walks, known, definition, lengths, tmp_path, {known.of_queries.role: of_queries})
    tiles, blocks = -(-lengths[0] // QUERIES), -(-lengths[1] // KEYS)
    of_queries, of_keys = of_queries.reshape(BATCH, tiles, 4), of_keys.reshape(BATCH, blocks, 4)
    for b, block, tile in np.ndindex(BATCH, blocks, tiles):
        part = seen[b, :, tile * QUERIES : (tile + 1) * QUERIES, block * KEYS : (block + 1) * KEYS]
        lo, hi = of_queries[b, tile, :2]
        adds = lo // KEYS <= block < -(-hi // KEYS)
        begin, end, full_begin, full_end = of_keys[b, block]
        visits = begin // QUERIES <= tile < -(-end // QUERIES)
        whole = full_begin <= tile * QUERIES and min((tile + 1) * QUERIES, lengths[0]) <= full_end
        assert adds >= part.any() and visits >= adds
        assert part.all() or not whole


# ---------------------------------------------------------------- gradients

#: Template, head_dim, dtype, whether it is causal too, and layouts.
KERNELS = (
    ("v1", 128, "bfloat16", True, ("127, 128, 129",)),
    ("v2", 64, "float16", True, ("of one and two tokens",)),
    ("v2", 64, "bfloat16", False, ("mixed", "apart", "an empty one, and a short tail")),
)
#: Tiles that no length divides, a group of heads, more and less queries than keys.
TRIALS = (((2, 1, 450, 450), "whole"), ((2, 2, 150, 300), "apart"), ((1, 1, 300, 150), "whole"))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: "-".join(map(str, k[:4])))
def test_gradients(kernel, tmp_path):
    template, head_dim, dtype, causal, layouts = kernel
    definitions = [same_ids(LAYOUTS[layout], causal) for layout in layouts]
    found = made(definitions[0], "sm_90a", template, BACKWARD, head_dim, dtype, tmp_path)
    assert any(launch.symbol.endswith("_joint") for launch in found.simulated.program.launches)
    for definition in definitions:
        own = dataclasses.replace(found.kernel, sample=functools.partial(parameters_of, definition))
        check(found, tensor_trials.backward(own, TRIALS))


def test_masks_of_heads_and_ragged_sequences_stay_with_the_launches_apart():
    target, joint = Target("sm_90a"), backward.Config(block_m=128, num_stages=3, joint=True)
    ids_of_heads = Mask(
        "ids_of_heads",
        lambda at: at.param["q_id"] == at.param["k_id"],
        lambda at: at.params["q_id"] == at.params["k_id"],
        (Param("q_id", "int32", axes="hi"), Param("k_id", "int32", axes="hj")),
    )
    later = Mask("later", lambda at: at.j <= at.i + at.h, lambda at: at.j <= at.i + at.h)
    for mask, maker, serves in (
        (ids_of_heads, backward, False),
        (later, backward, False),
        (same_ids(mixed).mask, backward, True),
        (same_ids(mixed).mask, ragged, False),
    ):
        pattern = match(Attention(IDENTITY, mask)(64, "bfloat16", index_dtype="int32"))
        (config,) = maker.default_configs("v1", pattern, target).values()
        assert config.joint == serves and maker.feasible(pattern, config, target) is None
        refusal = maker.feasible(pattern, joint, target)
        assert refusal is None if serves else isinstance(refusal, Rejected) and "joint: " in refusal.reason

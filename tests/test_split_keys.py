"""Where the keys of a sequence on pages are split: what the device computes fits what the host makes room for."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm")

from tvm import tirx
from tvm.sym import Analyzer

from schedules.families import split_keys
from schedules.families.sm90 import paged_decode
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

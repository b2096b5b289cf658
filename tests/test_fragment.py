"""Accumulator layouts: each element has one register of one lane, and rows reduce within their lanes; shared tiles."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("tvm")

from schedules.families.mma.mma import panel_columns
from schedules.tile.fragment import M16N8, VOLTA

FRAGMENTS = {"m16n8": M16N8, "volta": VOLTA}
COLUMNS = 64


def elements(fragment):
    """(lane, register, row, column of a score tile, column of the output) of one m-tile."""
    for lane, g, r, e in itertools.product(range(32), range(COLUMNS // fragment.group), range(2), range(2)):
        row = fragment.row(lane) + r * fragment.row_step
        score = g * fragment.group + fragment.column(lane) + e
        yield lane, g * 4 + r * 2 + e, row, score, fragment.output_column(g) + fragment.column(lane) + e


@pytest.mark.parametrize("fragment", FRAGMENTS.values(), ids=FRAGMENTS)
def test_every_element_has_one_place(fragment):
    found = list(elements(fragment))
    tile = sorted(itertools.product(range(fragment.tile_rows), range(COLUMNS)))
    assert sorted((row, column) for _, _, row, column, _ in found) == tile
    assert sorted((row, column) for _, _, row, _, column in found) == tile
    assert max(register for _, register, *_ in found) + 1 == fragment.registers(COLUMNS)


@pytest.mark.parametrize("fragment", FRAGMENTS.values(), ids=FRAGMENTS)
def test_lanes_that_share_a_row_are_those_of_the_masks(fragment):
    for lane in range(32):
        sharing = {other for other in range(32) if fragment.row(other) == fragment.row(lane)}
        reached = {lane}
        for mask in fragment.row_lanes:
            reached |= {other ^ mask for other in reached}
        assert sharing == reached


@pytest.mark.parametrize("columns", (32, 64, 96, 128, 192, 256))
def test_a_swizzled_panel_has_no_bank_conflicts(columns):
    chunks = panel_columns(columns) // 8
    for first, chunk in itertools.product(range(0, 64, 8), range(chunks)):
        banks = set()
        for row in range(first, first + 8):
            at = row * chunks + (chunk ^ (row // (8 // chunks) % chunks))
            banks.add(at % 8)
        assert len(banks) == 8

"""Accumulator layouts: each element has one register of one lane, and rows reduce within their lanes; shared tiles."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("tvm")

from schedules.tile.dtypes import CHUNK_BYTES, ELEMENT_TYPES
from schedules.tile.fragment import M16N8, VOLTA
from schedules.tile.smem import PANEL_BYTES, padded_columns, panel_columns, swizzled

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


@pytest.mark.parametrize("element", ELEMENT_TYPES.values(), ids=ELEMENT_TYPES)
@pytest.mark.parametrize("columns", (64, 96, 128, 192, 256))
def test_a_swizzled_panel_has_no_bank_conflicts(columns, element):
    chunks = panel_columns(columns, element) // element.chunk
    assert columns % panel_columns(columns, element) == 0
    for first, chunk in itertools.product(range(0, 64, 8), range(chunks)):
        banks = {(row * chunks + swizzled(row, chunk, chunks)) % 8 for row in range(first, first + 8)}
        assert len(banks) == 8


@pytest.mark.parametrize("chunks", (4, 8))
def test_a_swizzled_row_holds_each_chunk_once(chunks):
    for row in range(16):
        assert sorted(swizzled(row, chunk, chunks) for chunk in range(chunks)) == list(range(chunks))


@pytest.mark.parametrize("element", ELEMENT_TYPES.values(), ids=ELEMENT_TYPES)
def test_sizes_of_an_element_type(element):
    assert element.chunk * element.bytes == CHUNK_BYTES
    for columns in range(8, 257, 8):
        padded = padded_columns(columns, element)
        assert columns <= padded < columns + PANEL_BYTES // element.bytes
        assert padded * element.bytes % PANEL_BYTES == 0

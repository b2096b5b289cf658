"""Accumulator layouts: each element has one register of one lane, and rows reduce within their lanes; shared tiles."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("tvm")

from tvm import tirx
from tvm.script import tirx as T
from tvm.sym import Analyzer

from schedules.families.mma.mma import SharedTile, panel_columns
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


class Pool:
    """Shared memory that nobody needs."""

    def alloc(self, shape, dtype, align):
        return tirx.decl_buffer(shape, dtype)


def number(expr) -> int:
    """The value of an expression without variables."""
    return int(Analyzer().simplify(expr))


@pytest.mark.parametrize("columns", (32, 64, 96, 128, 192, 256))
def test_a_swizzled_panel_has_no_bank_conflicts(columns):
    tile = SharedTile(Pool(), 1, 64, columns, "float16")
    chunks = tile.panel_chunks
    assert chunks * 8 == panel_columns(columns)
    places = {
        (row, chunk): row * chunks + number(tile.swizzled(T.int32(row), T.int32(chunk)))
        for row, chunk in itertools.product(range(64), range(chunks))
    }
    assert sorted(places.values()) == list(range(64 * chunks)), "two chunks in one place"
    for first, chunk in itertools.product(range(0, 64, 8), range(chunks)):
        assert len({places[row, chunk] % 8 for row in range(first, first + 8)}) == 8

"""The tiles that a block visits, from the first to the last: partly visible, fully visible, partly visible ones."""

from __future__ import annotations

from typing import NamedTuple

from tvm.ir import Expr

from schedules.tile.key_range import KeyTiles
from schedules.tile.query_range import QueryTiles


class Parts(NamedTuple):
    """Tiles ``begin .. end``, of which ``full_begin .. full_end`` need no mask (ends are exclusive).

    ``has_left``, ``has_full`` and ``has_right`` say whether there can be any before these, of these, and after them.
    """

    begin: Expr
    full_begin: Expr
    full_end: Expr
    end: Expr
    has_left: bool
    has_full: bool
    has_right: bool


def of_queries(tiles: QueryTiles) -> Parts:
    """Those of queries that see a block's keys."""
    places = (tiles.begin + x for x in (0, tiles.left, tiles.right, tiles.steps))
    return Parts(*places, tiles.has_masked, tiles.has_full, tiles.has_right)


def of_keys(tiles: KeyTiles) -> Parts:
    """Those of keys that a block's queries see."""
    places = (tiles.begin, tiles.full_begin, tiles.full_end, tiles.end)
    return Parts(*places, tiles.has_left or not tiles.has_full, tiles.has_full, tiles.has_full)

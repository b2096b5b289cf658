"""Descriptors of the rows that a warpgroup keeps throughout its steps."""

from __future__ import annotations

from schedules.families.mma.registers import anew
from schedules.families.sm90.pipeline import Pipeline
from schedules.families.sm90.wgmma import k_major, rows_offset

#: Panels up to which ptxas may keep the descriptors of all columns of such rows: at head_dim 256 they are 64 registers.
KEPT_PANELS = 2


def own_rows(pipeline: Pipeline, first, kept: bool):
    """Of 64 rows from row ``first`` on of a pipeline's first tile, contracted along the rows.

    If they aren't ``kept``, they are computed again wherever they are used.
    """
    return k_major(pipeline.tiles.ptr_to([0, 0, 0, 0])) + rows_offset(first if kept else anew(first), 1)

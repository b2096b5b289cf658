"""Programs of a backward with the launches around it that the gradients of tables need."""

from __future__ import annotations

from dataclasses import replace

from schedules.definition.parameters import gradient_name
from schedules.definition.pattern import Pattern
from schedules.families.interface import Program, ScheduledLaunch
from schedules.tile import table_gradients
from schedules.tile.table_gradients import TableSums


def with_tables(program: Program, pattern: Pattern, name: str) -> Program:
    """The program with memory for the sums of learnt tables, one launch after its first that clears them, and one at
    the end for each table; the same if there are none."""
    params = table_gradients.learnt_tables(pattern)
    if not params:
        return program
    first, *others = program.launches
    clear = ScheduledLaunch(table_gradients.clear(params, f"{name}_clear"), TableSums(params).roles)
    ends = (
        ScheduledLaunch(
            table_gradients.finish(p, f"{name}_{gradient_name(p)}"), (*TableSums((p,)).roles, gradient_name(p))
        )
        for p in params
    )
    workspaces = (*program.workspaces, *map(table_gradients.workspace, params))
    return replace(program, launches=(first, clear, *others, *ends), workspaces=workspaces)

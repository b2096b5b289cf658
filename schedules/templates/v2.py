"""Template V2, seq-outer: layout ``(batch, seq, heads, head_dim)``, tensor cores, from Ampere on (and the CPU).

A position's rows of all heads lie one after the other in memory, so an m-block of all heads is one stretch of it: the
same rows of every head of a section are taken before the next rows.  A section is as many heads as the second-level
cache has room for with their keys and values, which are read again for each m-block.  M-blocks go from the last to the
first: under a causal mask a launch starts with the longest of all heads and ends with the shortest, so that no
processor is left with a long one at the end.
"""

from __future__ import annotations

from functools import partial

from schedules.families import schedule
from schedules.tile.tile_scheduler import SeqOuter, Traversal

TRAVERSAL = Traversal("v2", layout="bshd", order=lambda work, section: SeqOuter(work, section()))

#: ``apply(pattern, target, name, config=None, kind=FORWARD)``: see :func:`schedules.families.schedule`.
apply = partial(schedule, TRAVERSAL)

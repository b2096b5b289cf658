"""Template V1, heads-outer: layout ``(batch, heads, seq, head_dim)``, for every arch.

A head's rows lie one after the other in memory, so a head is the natural unit of work: all m-blocks of one are taken
before those of the next.  They read the same keys and values, which stay in the cache that the blocks (or threads)
share, whatever a head's size is, and of many heads only as many as run at a time need room there.  The price is that
blocks of a causal mask, which differ in length, follow each other head by head: the longest of each head comes first,
and a family may pair a long one with a short one.
"""

from __future__ import annotations

from functools import partial

from schedules.families import schedule
from schedules.tile.tile_scheduler import HeadsOuter, Traversal

TRAVERSAL = Traversal("v1", layout="bhsd", order=lambda work, section: HeadsOuter(work))

#: ``apply(pattern, target, name, config=None, kind=FORWARD)``: see :func:`schedules.families.schedule`.
apply = partial(schedule, TRAVERSAL)

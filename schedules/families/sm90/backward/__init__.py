"""The backward of the Hopper family, a kind of its kernels: two or three launches, and the same bits on every run.

Scores and their gradients of plain attention, full or causal, are computed once, up to head_dim 128:

1. ``delta`` of each row (:mod:`schedules.tile.delta`).
2. ``dk``, ``dv`` and ``dq``: a block owns 128 keys and walks over the queries that see them, and adds its part of
   ``dq`` to a sum in memory after the block with the keys before, or writes ``dq`` if none comes after (``joint.py``).
   Where there are few blocks, they share the query heads of a group, and add their ``dk`` and ``dv`` in the same way.
3. Gradients of sinks, if there are any (``sinks.py``).

All others are computed without sums between blocks:

1. ``delta`` of each row (:mod:`schedules.tile.delta`).
2. ``dq``: a block owns 128 queries and walks over the keys that they see (``queries.py``); so do the gradients of
   parameters, of which each warp leaves its share.
3. ``dk`` and ``dv``: a block owns 128 keys and walks over the queries that see them (``keys.py``); some add the shares.

These compute scores and their gradients twice, seven products in place of five.  In return a block has room for
modified scores, for other masks and for head_dim 256, and a call needs no memory but delta.

The interface of a kind is described in :mod:`schedules.families.interface`.
"""

from schedules.families.sm90.backward.config import Config, default_configs, feasible, space
from schedules.families.sm90.backward.program import program

__all__ = ["Config", "default_configs", "feasible", "program", "space"]

"""The backward of the Hopper family, a kind of its kernels: three launches, no sums between blocks.

1. ``delta`` of each row (:mod:`schedules.tile.delta`).
2. ``dq``: a block owns 128 queries and walks over the keys that they see (``queries.py``); so do the gradients of
   parameters, of which each warp leaves its share.
3. ``dk`` and ``dv``: a block owns 128 keys and walks over the queries that see them (``keys.py``); some add the shares.

Scores and their gradients are computed twice, seven products in place of five.  In return nothing is summed outside of
a block's own registers, so that the same call has the same bits on every run, and needs no memory but delta.

The interface of a kind is described in :mod:`schedules.families.interface`.
"""

from schedules.families.sm90.backward.config import Config, default_configs, feasible, space
from schedules.families.sm90.backward.program import program

__all__ = ["Config", "default_configs", "feasible", "program", "space"]

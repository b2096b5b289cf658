"""Partial results: what one launch leaves of each split of the keys, and another one combines."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T


@T.meta_class
class PartialResults:
    """Normalised outputs ``o (rows, splits, columns)`` and log-sum-exps ``lse (rows, splits)`` of the splits, float32.

    ``rows`` are those of the whole output in the order (batch, heads, seqlen_q).  An ``lse`` of −inf says that a split
    sees nothing, and then its ``o`` may be anything.  Made before ``T.device_entry()`` of the handles of the two.
    """

    def __init__(self, handles, columns: int):
        o, lse = handles
        self.rows, self.splits = tirx.Var("partial_rows", "int32"), tirx.Var("splits", "int32")
        self.columns = columns
        self.o = T.match_buffer(o, (self.rows, self.splits, columns), "float32", align=16)
        self.lse = T.match_buffer(lse, (self.rows, self.splits), "float32", align=4)

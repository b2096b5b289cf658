"""Decoding over keys on pages on Hopper: few query rows for each head of keys, so that the keys are split among blocks.

The kernel of :mod:`schedules.families.sm90.split_kernel` on ragged sequences, whose tiles of keys are several boxes of
TMA (:class:`schedules.families.sm90.boxes.PagedBoxes`).  How long the splits of a sequence are follows from its own
number of keys, which the device reads; blocks are as many as the machine runs at a time.

The second launch knows by itself which splits a row has: what the first one doesn't write of the partial results is
never read.
"""

from __future__ import annotations

from tvm.ir import Expr
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families import split_keys
from schedules.families.interface import Program, Rejected, Target
from schedules.families.sm90 import decode
from schedules.families.sm90.boxes import PagedBoxes
from schedules.families.sm90.decode import ALIGNMENT, Config, default_configs, space
from schedules.families.sm90.parts import PartScheduler
from schedules.families.sm90.split_kernel import compute_parts
from schedules.tile.geometry import PagedGeometry, parameterised
from schedules.tile.partial import PartialResults
from schedules.tile.tile_scheduler import Traversal

__all__ = ["Config", "default_configs", "feasible", "program", "space"]


#: Keys of a split, by the sequence's own number of keys.
SPLIT_LENGTHS = decode.SPLIT_LENGTHS


def feasible(pattern: Pattern, config: Config, target: Target) -> Rejected | None:
    """Whether the configuration can be compiled for the pattern."""
    if config.block_n & (config.block_n - 1):
        return Rejected(f"block_n {config.block_n} is no power of two, of which a box is a part")
    return decode.feasible(pattern, config, target)


def _split_length(keys: Expr) -> Expr:
    return split_keys.paged_split_length(keys, SPLIT_LENGTHS)


def _partial(pattern: Pattern, config: Config, name: str) -> PrimFunc:
    """``(q, k, v, o_partial, lse_partial, cu_seqlens_q, seqlens_k, page_table, softmax_scale, *params)``."""

    def make(parameters):
        @T.prim_func(check_well_formed=False)
        def attention(
            q: T.handle,
            k: T.handle,
            v: T.handle,
            o_partial: T.handle,
            lse_partial: T.handle,
            cu_seqlens_q: T.handle,
            seqlens_k: T.handle,
            page_table: T.handle,
            softmax_scale: T.float32,
        ):
            handles = T.meta_var(((q, k, v), (cu_seqlens_q, seqlens_k, page_table)))
            geometry = PagedGeometry(pattern, *handles, softmax_scale, parameters, ALIGNMENT)
            results = PartialResults((o_partial, lse_partial), pattern.head_dim_v)
            scheduler = PartScheduler(pattern, geometry, config, _split_length, results.splits)
            compute_parts(pattern, geometry, scheduler, PagedBoxes(geometry, config.block_n), results)

        return attention

    return parameterised(pattern, make).with_attr("global_symbol", name)


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The two launches; ``config`` must be feasible."""
    func = _partial(pattern, config, name)
    return split_keys.paged_program(pattern, func, name, alignment=ALIGNMENT, waits=True, lengths=SPLIT_LENGTHS)

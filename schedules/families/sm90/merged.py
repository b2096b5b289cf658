"""Results that are put into those of other keys, on Hopper: the forward kernel with another end, a kind of its kernels.

The interface of a kind is described in :mod:`schedules.families.interface`.
"""

from __future__ import annotations

from dataclasses import replace

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families.interface import Program, Rejected, Target, forward_program
from schedules.families.sm90 import config as forward
from schedules.families.sm90 import defaults
from schedules.families.sm90.config import Config, narrow_axes
from schedules.families.sm90.consumer import Consumer
from schedules.families.sm90.kernel import ALIGNMENT, build
from schedules.families.sm90.space import space
from schedules.tile.geometry import MergedGeometry, flat
from schedules.tile.merge import merge_rows
from schedules.tile.tile_scheduler import Traversal

__all__ = ["Config", "default_configs", "feasible", "program", "space"]


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """Those of the forward: nothing is staged, and few queries, which would be packed, aren't what these are for."""
    configs = defaults.default_configs(template, pattern, target)
    return {bucket: replace(c, pack_heads=False, separate_output=False) for bucket, c in configs.items()}


def feasible(pattern: Pattern, config: Config, target: Target) -> Rejected | None:
    """Whether the configuration can be compiled for the pattern."""
    if config.pack_heads or config.separate_output:
        return Rejected("results are merged where they belong: pack_heads and separate_output don't apply")
    return forward.feasible(pattern, config, target)


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The scheduled kernel; ``config`` must be feasible."""
    func = build(pattern, config, traversal, name, MergedGeometry, MergingConsumer)
    return forward_program(
        func, pattern.params, "tirx", alignment=ALIGNMENT, index_bits=32, narrow_axes=narrow_axes(config)
    )


@T.meta_class
class MergingConsumer(Consumer):
    """The forward's, which merges its rows with what there is."""

    @T.inline
    def write(self, tile):
        """Put the output of work tile number ``tile`` into that of other keys."""
        block = T.meta_var(self.block)
        g = T.meta_var(block.geometry)
        fragment = T.meta_var(self.softmax.fragment)
        where = T.meta_var(block.scheduler.work_tile(block.at, tile))
        first: T.int32 = block.scheduler.first_row(where[0], tile) + self.row + fragment.row(self.lane)
        head: T.int32 = where[1]
        batch: T.int32 = where[2]
        column: T.int32 = fragment.column(self.lane)
        merge_rows(
            self.finished, self.acc_o, self.outputs, g.head_dim_v, flat(g.o.buffer), flat(g.lse), column,
            fragment.output_column, lambda t, r: first + r * fragment.row_step, g.seqlen_q,
            lambda row: g.lse_offset(batch, head, row), lambda row: g.o.offset(batch, head, row, column),
            T.cuda.warp_sync,
        )  # fmt: skip

"""The same where values are the first elements of keys: the rows of keys are read for both."""

from __future__ import annotations

from dataclasses import replace

from tvm.script import tirx as T

from schedules.definition.attention import append_arguments
from schedules.definition.pattern import Pattern
from schedules.families.cpu import config as usual
from schedules.families.cpu.config import Config, feasible
from schedules.families.cpu.isa import ISAS, Isa
from schedules.families.cpu.kernel import functions_of
from schedules.families.cpu.paged.kernel import called
from schedules.families.cpu.pages import MALFORMED
from schedules.families.cpu.pipeline import PIPELINE
from schedules.families.cpu.ragged import sequences
from schedules.families.cpu.ragged.sequences import make_sense
from schedules.families.cpu.ragged.work import attend_macro
from schedules.families.cpu.space import space
from schedules.families.interface import Program, Target, paged_program
from schedules.tile.dtypes import element_type
from schedules.tile.tile_scheduler import Traversal

__all__ = ["Config", "default_configs", "feasible", "program", "space"]


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """The usual configuration, with as few query rows a work item as leave room for rows that are wider than any."""
    (config,) = usual.default_configs(template, pattern, target).values()
    group = config.row_vectors * ISAS[target.isa].lanes
    while config.block_m >= 2 * group and feasible(pattern, config, target):
        config = replace(config, block_m=config.block_m // 2 // group * group)
    return {0: config}


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The kernel of one pattern, in the order of a template (see :mod:`schedules.families.interface`)."""
    arguments, values = pattern.parameter_symbols()
    func = _kernel(pattern, config, ISAS[target.isa], traversal, values, name)
    func = append_arguments(func, arguments)
    itemsize = element_type(pattern.dtype).bytes
    return paged_program(func, pattern.params, PIPELINE, alignment=itemsize, index_bits=64, in_keys=True)


def _kernel(pattern: Pattern, config: Config, isa: Isa, traversal: Traversal, params, name: str):
    attend = attend_macro(pattern, config, isa, traversal)

    @T.prim_func(s_tir=True, check_well_formed=False)
    def attention(
        q: T.handle,
        k: T.handle,
        o: T.handle,
        lse: T.handle,
        cu_seqlens_q: T.handle,
        seqlens_k: T.handle,
        page_table: T.handle,
        softmax_scale: T.float32,
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": name})
        handles = T.meta_var((q, k, None, o, lse, cu_seqlens_q, seqlens_k, page_table))
        parts = T.meta_var(called(pattern, params, handles, softmax_scale))
        T.attr(0, "pragma_import_llvm", functions_of(isa, pattern.dtype))
        assert make_sense(parts[1]), sequences.MALFORMED
        assert parts[2].make_sense(), MALFORMED
        attend(*parts)

    return attention

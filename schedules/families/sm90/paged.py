"""Keys on pages on Hopper: the kernel of ragged sequences, in which a tile of keys is several boxes of TMA.

A box ends where its page or its sequence does (:func:`schedules.families.sm90.tma.encode_paged`), and one that no key
is in reads nothing, so that a kernel serves pages of any size: of 8 and less slowly, as a box has few rows then.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families.interface import Program, Rejected, Target, paged_program
from schedules.families.sm90 import ragged
from schedules.families.sm90.boxes import PagedBoxes
from schedules.families.sm90.kernel import ALIGNMENT, attend
from schedules.families.sm90.ragged import Config, RaggedRows, RaggedScheduler
from schedules.tile.geometry import PagedGeometry, parameterised
from schedules.tile.tile_scheduler import Traversal

__all__ = ["Config", "default_configs", "feasible", "program", "space"]


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """That of ragged sequences, with as many keys a tile as a power of two allows."""
    (config,) = ragged.default_configs(template, pattern, target).values()
    return {0: replace(config, block_n=1 << (config.block_n.bit_length() - 1))}


def space(template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
    """Values of each field that are worth trying."""
    return {**ragged.space(template, pattern, target), "block_n": (32, 64, 128)}


def feasible(pattern: Pattern, config: Config, target: Target) -> Rejected | None:
    """Whether the configuration can be compiled for the pattern."""
    if config.block_n & (config.block_n - 1):
        return Rejected(f"block_n {config.block_n} is no power of two, of which a box is a part")
    return ragged.feasible(pattern, config, target)


def _build(pattern: Pattern, config: Config, name: str) -> PrimFunc:
    def make(parameters):
        @T.prim_func(check_well_formed=False)
        def attention(
            q: T.handle,
            k: T.handle,
            v: T.handle,
            o: T.handle,
            lse: T.handle,
            cu_seqlens_q: T.handle,
            seqlens_k: T.handle,
            page_table: T.handle,
            softmax_scale: T.float32,
        ):
            handles = T.meta_var(((q, k, v, o, lse), (cu_seqlens_q, seqlens_k, page_table)))
            geometry = PagedGeometry(pattern, *handles, softmax_scale, parameters, ALIGNMENT)
            rows = RaggedRows(geometry, T.bind(T.truncdiv(geometry.heads, geometry.kv_heads)))
            scheduler = RaggedScheduler(pattern, geometry, config)
            attend(pattern, config, geometry, rows, scheduler, PagedBoxes(geometry, config.block_n))

        return attention

    return parameterised(pattern, make).with_attr("global_symbol", name)


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The kernel; ``config`` must be feasible."""
    func = _build(pattern, config, name)
    return paged_program(func, pattern.params, "tirx", alignment=ALIGNMENT, index_bits=32)

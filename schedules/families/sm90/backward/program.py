"""The launches of a backward, and the memory between them."""

from __future__ import annotations

from schedules.definition.pattern import Pattern
from schedules.families import row_terms
from schedules.families.interface import Program, Target
from schedules.families.ranged import with_ranges, with_tiles
from schedules.families.sm90 import config as forward
from schedules.families.sm90.backward import joint, keys, parameters, queries, sinks
from schedules.families.sm90.backward.config import BLOCK, CONSUMERS, Config, section_heads
from schedules.families.with_tables import with_tables
from schedules.tile.gradients import ALIGNMENT, Starts
from schedules.tile.mask_lists import Listed
from schedules.tile.mask_ranges import Ranged
from schedules.tile.mask_walks import Walked
from schedules.tile.tile_scheduler import Traversal
from tvm_flash.packs import sizes


def program(
    pattern: Pattern,
    config: Config,
    target: Target,
    traversal: Traversal,
    name: str,
    *,
    ragged: bool = False,
    adds: bool = False,
) -> Program:
    """The launches; ``config`` must be feasible.  ``ragged``: of sequences of different lengths; ``adds``: results to
    what is there."""

    def starts():
        return Starts() if ragged else None

    counters = joint.counters(ragged) if config.joint else ()
    plain = pattern.without_sink() if config.joint else pattern
    first = row_terms.build(plain, traversal, name, config.block_m, ragged=ragged, counters=counters, adds=adds)
    workspaces = (*row_terms.workspaces(config.block_m, ragged), *counters)
    scalars = ()
    if config.joint:
        known = Walked(plain, BLOCK, config.block_m) if plain.atoms else plain
        kinds = (known.of_queries, known) if plain.atoms else ()
        launches = (first, joint.build(known, config, traversal, f"{name}_joint", starts(), adds))
        if pattern.has_sink:
            launches = (*launches, sinks.build(pattern, traversal, f"{name}_sinks", config.block_m, adds))
        workspaces, scalars = (
            (*workspaces, *joint.workspaces(pattern, config, ragged)),
            joint.scalars(pattern, config, ragged),
        )
    else:
        kinds = keyed, queried = (pattern, pattern) if ragged else _with_tiles(pattern, config)
        launches = (
            first,
            queries.build(queried, config, traversal, f"{name}_dq", starts(), adds),
            keys.build(keyed, config, traversal, f"{name}_dkdv", starts(), adds),
        )
        workspaces = (*workspaces, *parameters.workspaces(pattern, ragged))
    memory = {"workspaces": workspaces, "scalars": scalars, "narrow_axes": _narrow_axes(pattern, config, ragged)}
    found = Program("backward", launches, "tirx", alignment=ALIGNMENT, index_bits=32, **memory)
    return with_ranges(with_tables(found, pattern, name), traversal, name, *kinds)


def _with_tiles(pattern: Pattern, config: Config) -> tuple[Pattern | Ranged | Listed, Pattern | Ranged | Listed]:
    """The pattern as the launches for dk and dv, and for dq, see it, whose warpgroups have rows of their own."""
    of_keys = with_tiles(pattern, "j", config.block_keys, config.block_m)
    return of_keys, with_tiles(pattern, "i", BLOCK, config.block_n, CONSUMERS)


def _narrow_axes(pattern: Pattern, config: Config, ragged: bool) -> tuple[sizes.Expression, ...]:
    """What the launches have along the second and the third axis of their grids."""
    blocks = ("+", ("ceildiv", "total_k", BLOCK), "batch", 1) if ragged else ("ceildiv", "seqlen_kv", config.block_keys)
    if config.joint:  # each head may be several pairs
        heads = "heads" if ragged else ("*", "batch", "heads")
        return blocks, ("ceildiv", heads, config.head_section or section_heads(pattern, ragged))
    if ragged:
        return ("heads",)
    of_keys = ("batch", blocks) if config.heads_first else ("kv_heads", "batch")
    return tuple(dict.fromkeys((*forward.narrow_axes(config.for_queries), *of_keys)))

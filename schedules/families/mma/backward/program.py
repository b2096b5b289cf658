"""The launches of a backward, and the memory between them."""

from __future__ import annotations

from schedules.definition.parameters import gradient_name
from schedules.definition.pattern import Pattern
from schedules.families import row_terms
from schedules.families.interface import Program, ScheduledLaunch
from schedules.families.mma.backward import joint, keys, queries
from schedules.families.mma.backward.config import Config
from schedules.families.mma.mma import ALIGNMENT, INDEX_BITS
from schedules.families.ranged import with_ranges, with_tiles
from schedules.families.with_tables import with_tables
from schedules.tile.delta import delta
from schedules.tile.gradients import Starts, tiles_of
from schedules.tile.mask_lists import RIGHTWARDS, Listed
from schedules.tile.mask_ranges import Ranged
from schedules.tile.parameter_sums import parameter_sums, ragged_parameter_sums
from schedules.tile.place_gradients import Targets
from schedules.tile.table_gradients import TableSums, learnt_tables
from schedules.tile.tile_scheduler import Traversal
from schedules.tile.weights import summed
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import Workspace


def program(
    pattern: Pattern,
    config: Config,
    traversal: Traversal,
    name: str,
    machines,
    *,
    ragged: bool = False,
    adds: bool = False,
) -> Program:
    """The launches; ``config`` must be feasible, and ``machines`` are those for dk and dv, and for dq.

    ``ragged``: of sequences of different lengths.  ``adds``: results to what is there.
    """

    if config.joint:
        return _joint(pattern, config, traversal, name, machines[-1])

    def names(known):
        return tuple(p.name for p in known.params)

    asked = summed(pattern)
    keyed, queried = (pattern, pattern) if ragged else _with_tiles(pattern, config)
    of_keys, of_queries = (Targets(pattern, transposed).roles for transposed in (True, False))
    tables = TableSums(learnt_tables(pattern))
    sums, starts = (("parameter_sums",) if asked else ()), (Starts.roles if ragged else ())
    of_delta = delta(pattern, traversal, name, ALIGNMENT, ragged=ragged)
    of_dkdv = keys.build(keyed, config, traversal, f"{name}_dkdv", machines[0], Starts() if ragged else None, adds)
    of_dq = queries.build(queried, config, traversal, f"{name}_dq", machines[1], Starts() if ragged else None, adds)
    launches = [
        ScheduledLaunch(of_delta, ("o", "do", "dlse", "delta")),
        ScheduledLaunch(of_dkdv, (*keys.ROLES, *names(keyed), *of_keys, *starts)),
        ScheduledLaunch(of_dq, (*queries.ROLES, *names(queried), *sums, *of_queries, *tables.roles, *starts)),
    ]
    rows = ("*", "heads", "total_q") if ragged else ("*", "batch", "heads", "seqlen_q")
    workspaces = [Workspace("delta", "float32", (rows,))]
    if asked:
        size = ("*", len(asked), *tiles_of(config.block_m_dq, ragged)[1:])
        workspaces.append(Workspace("parameter_sums", "float32", (size,)))
        launches.append(_sums(pattern, config, asked, f"{name}_parameters", ragged, adds))
    found = Program(
        "backward",
        tuple(launches),
        "tirx",
        alignment=ALIGNMENT,
        index_bits=INDEX_BITS,
        workspaces=tuple(workspaces),
        narrow_axes=() if ragged else _narrow_axes(config, traversal),
    )
    return with_ranges(with_tables(found, pattern, name), traversal, name, keyed, queried)


def _joint(pattern: Pattern, config: Config, traversal: Traversal, name: str, machine) -> Program:
    """The launches where one makes all gradients."""
    counters = joint.counters(config)
    first = row_terms.build(pattern, traversal, name, config.block_m, counters=counters)
    return Program(
        "backward",
        (first, joint.build(pattern, config, traversal, f"{name}_joint", machine)),
        "tirx",
        alignment=ALIGNMENT,
        index_bits=INDEX_BITS,
        workspaces=(
            *row_terms.workspaces(config.block_m, ragged=False),
            *counters,
            *joint.workspaces(pattern, config),
        ),
        scalars=joint.scalars(),
        meant_for=joint.meant_for(pattern),
        narrow_axes=joint.narrow_axes(config),
    )


def _with_tiles(pattern: Pattern, config: Config) -> tuple[Pattern | Ranged | Listed, Pattern | Ranged | Listed]:
    """The pattern as the launches for dk and dv, and for dq, see it."""
    launches = ("j", config.keys), ("i", config.queries)
    return tuple(with_tiles(pattern, axis, x.own_rows, x.step_rows, order=RIGHTWARDS) for axis, x in launches)


def _sums(pattern: Pattern, config: Config, asked, name: str, ragged: bool, adds: bool) -> ScheduledLaunch:
    """The launch that adds what the blocks have left for gradients of parameters."""
    gradients = tuple(gradient_name(p) for p in asked)
    if not ragged:
        return ScheduledLaunch(parameter_sums(asked, name, adds), ("parameter_sums", *gradients))
    func = ragged_parameter_sums(asked, name, config.block_m_dq, pattern.dtype, Starts())
    return ScheduledLaunch(func, ("parameter_sums", "q", *gradients, Starts.roles[0]))


def _narrow_axes(config: Config, traversal: Traversal) -> tuple[sizes.Expression, ...]:
    """What either launch has along the second and the third axis of its grid, where that may be a large number."""
    if traversal.layout == "bhsd":
        return "heads", "batch"
    return ("ceildiv", "seqlen_q", config.block_m_dq), ("ceildiv", "seqlen_kv", config.block_n)

"""The launches of decoding in runs on Hopper: how many splits a block has, and who folds a row's states."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.tirx import PrimFunc

from schedules.definition.pattern import Pattern
from schedules.families import split_keys
from schedules.families.interface import Program, ScheduledLaunch
from schedules.families.limits import by_head_dim
from schedules.tile.combine import Sinks
from schedules.tile.fold import fold_states
from schedules.tile.tile_scheduler import Traversal
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import Scalar, Workspace

#: Places to spread blocks over: two on a multiprocessor.  Of three, the third makes shares uneven: the first launch of
#: 4 x 16k keys, 64 heads on 8, took 38.9 us in 352 blocks of three splits and 35.1 in 256 of four.
_MOST_SPREAD = 264

#: Elements of 16 bits of which the L2 cache keeps most from one call to the next, 56 MiB: us under the usual policy and
#: where keys go first, of 48 MiB (6 x 2k keys of 8 heads at 128) 13.6 and 14.9, of 59 (10 x 1500) 20.7 and 20.1.
_CACHED_ELEMENTS = 28 << 20

#: What a cluster of so many blocks costs, by the fewest keys: thousandths of what reading takes.
_COST_OF_CLUSTERS = {
    1: ((0, 0),),
    2: ((0, 100), (1537, 20), (3000, 0)),
    4: ((0, 220), (1537, 100), (3000, 50), (6000, 0)),
}
#: Of the time of a round of blocks, in thousandths, what places that are empty cost; blocks beside them read faster.
_EMPTY, _FULL = 350, 650
#: Work tiles of a block from which on it is dear that some blocks have one less: blocks of one each even out then.
#: 200 x 1k keys of 8 heads at head_dim 128, seven each in 229 of 264 places, took 202.9 us in place of 192.4; but 300 x
#: 1k at 64, ten each in 240, 147.3 in place of 149.4 (H200).
_MANY, _COST_OF_MANY = 5, 500


@dataclass(frozen=True)
class Several:
    """A kernel whose blocks have several work tiles each.

    Attributes
    ----------
    runs: as ``few`` of :func:`run_program`, but for the last argument, which is how many work tiles a block has.
    places: for its blocks, on the whole machine.
    cost: of the time of all places, in thousandths, what empty ones cost.
    """

    runs: PrimFunc
    places: int
    cost: int

    @property
    def costs(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """What places cost, of few work tiles each and of many, and what work tiles do."""
        return (self.cost, _COST_OF_MANY), (1000 - self.cost, 1000 - _COST_OF_MANY)


def run_program(
    pattern: Pattern,
    runs: PrimFunc,
    few: tuple[PrimFunc, int],
    several: Several | None,
    traversal: Traversal,
    name: str,
    split_length: sizes.Expression,
    *,
    resident: int,
    packs: bool,
    most_rows: int,
    alignment: int,
) -> Program:
    """The launches where a block computes a run of splits, and the blocks of a row's runs are a cluster or *spread*.

    Of a row there are as many runs as a cluster has blocks, and no second launch, or as many as fill ``resident``
    places for blocks (:func:`_clusters`).  A block keeps the states of ``most_rows`` rows at most.

    Parameters
    ----------
    runs: ``(q, k, v, o_partial, sums_partial, o, lse, softmax_scale, split_length, run, spread, read_once, more,
        *params)``, with the name ``name``; where runs are spread, it lets the second launch begin early.
    few: a kernel with the same bits for so many rows a key, which a call that has no more launches in its place.
    several: the same of blocks that have all splits of several work tiles each; None if there is none.
    split_length: keys of a split at least, by the sizes.
    """
    rows = ("max", 1, ("*", "spread", "batch", "heads", "seqlen_q"))
    splits = ("ceildiv", "seqlen_kv", "split_length")
    for_rows = ("*", split_keys.GRAIN, ("ceildiv", ("*", split_keys.KEYS_OF_A_ROW, "rows"), split_keys.GRAIN))
    units = ("*", "batch", "kv_heads" if packs else "heads")
    doublings = tuple((1 + (1 << n >> 1), 1 << n) for n in range(1, most_rows.bit_length()))
    of_tile = ("*", ("ceildiv", "heads", "kv_heads") if packs else 1, ("steps", "seqlen_q", (0, 1), *doublings))
    fewest = ("ceildiv", splits, ("max", 1, ("//", most_rows, of_tile)))
    blocks, is_spread = _clusters(units, splits, fewest, resident)
    spread_over = ("*", "spread", ("max", 1, ("//", min(resident, _MOST_SPREAD), units)))
    together = ("*", ("steps", "spread", (0, 1), (1, 0)), blocks)
    results = ("o_partial", "sums_partial")
    run = ("ceildiv", splits, ("min", splits, ("max", fewest, ("+", spread_over, together))))
    params = tuple(p.name for p in pattern.params)
    folding = fold_states(pattern, traversal, f"{name}_combine", alignment)
    of_run = ("q", "k", "v", *results, "o", "lse", "softmax_scale", "split_length", "run", "spread", "read_once")
    few_runs, few_rows = few
    of_several, number_of_several = (), ()
    if several is not None:
        own = _several(several, units, (fewest, blocks, is_spread), resident)
        number_of_several = (Scalar("several", ("*", _is_few("rows", few_rows), own)),)
        of_several = (ScheduledLaunch(several.runs, (*of_run, "several", *params), when="several"),)
        run = ("max", run, ("*", ("min", "several", 1), splits))
    return Program(
        "forward",
        (
            ScheduledLaunch(runs, (*of_run, "more", *params), when="more"),
            ScheduledLaunch(few_runs, (*of_run, "few", *params), when="few"),
            *of_several,
            ScheduledLaunch(folding, (*results, "o", "lse", *Sinks(pattern).roles), when="spread"),
        ),
        "tirx",
        alignment=alignment,
        index_bits=32,
        workspaces=(
            Workspace("o_partial", "float32", (rows, splits, pattern.head_dim_v)),
            Workspace("sums_partial", "float32", (rows, splits, 2)),
        ),
        scalars=(
            Scalar("split_length", ("max", split_length, for_rows)),
            Scalar("spread", is_spread),
            *number_of_several,
            Scalar("run", run),
            Scalar("read_once", _read_once(packs)),
            *_few_or_more("rows" if packs else "seqlen_q", few_rows, several is not None),
        ),
        max_rows=("steps", "seqlen_kv", *by_head_dim(split_keys.MAX_ROWS, pattern)),
    )


def _read_once(packs: bool) -> sizes.Expression:
    """Whether keys and values go first from the L2 cache (1, or 0).

    Not if it has room for all of them, and a call after this one may find them there: then 1 x 8k keys of 8 heads at
    head_dim 128 took 10.9 us in place of 10.3 (H200, replayed).  What more of them leave there in the place of queries
    and states cost 0.5 to 1.5% (32 x 4k 124.1 and 123.5, 8 x 8k 68.1 and 67.2, 16 x 4k at 64 35.8 and 35.3).  Heads
    that aren't packed read the same keys.
    """
    if not packs:
        return 0
    elements = ("*", "batch", "kv_heads", "seqlen_kv", ("+", "head_dim", "head_dim_v"))
    return ("steps", elements, (0, 0), (_CACHED_ELEMENTS, 1))


def _is_few(rows: sizes.Expression, few: int) -> sizes.Expression:
    return ("steps", rows, (0, 1), (few + 1, 0))


def _few_or_more(rows: sizes.Expression, few: int, may_be_several: bool) -> tuple[Scalar, Scalar]:
    """Which of two kernels a call launches: that of up to ``few`` rows, or that of more; of a call whose blocks have
    ``several`` work tiles neither."""
    is_few = _is_few(rows, few)
    return (
        Scalar("few", ("*", is_few, ("steps", "several", (0, 1), (1, 0))) if may_be_several else is_few),
        Scalar("more", ("steps", rows, (0, 0), (few + 1, 1))),
    )


def _several(several: Several, units: sizes.Expression, others: tuple, resident: int) -> sizes.Expression:
    """How many of ``units`` work tiles a block has, with all of their splits; 0 if it should have none.

    ``others`` are how many blocks a work tile has else, at least and as it is, and whether these are spread.

    Where a block would have one of them anyway, it has; where they are more than the places, as many as fill these
    once, if that is expected to take less time than clusters (docs/hopper.md, "Decoding").
    """
    fewest, blocks, is_spread = others
    each = ("ceildiv", units, several.places)
    cost, rest = (("steps", each, (0, of_few), (_MANY, of_many)) for of_few, of_many in several.costs)
    own = ("+", ("*", cost, each, several.places), ("*", rest, units))
    of_one_round = ("+", _EMPTY * resident, ("*", _FULL, units))
    of_rounds = ("steps", units, (0, 0), (resident + 1, 1))
    found = (
        "+",
        ("*", of_rounds, _least_in_rounds(units, resident)),
        ("*", ("steps", units, (0, 1), (resident + 1, 0)), of_one_round),
    )
    is_faster = ("min", 1, ("//", found, ("max", 1, own)))
    is_one = ("*", ("steps", each, (0, 1), (2, 0)), ("steps", blocks, (0, 1), (2, 0)))
    is_more = ("*", ("steps", each, (0, 0), (2, 1)), is_faster)
    fit = ("*", ("steps", fewest, (0, 1), (2, 0)), ("steps", is_spread, (0, 1), (1, 0)))
    return ("*", fit, ("max", is_one, is_more), each)


def _clusters(units: sizes.Expression, splits: sizes.Expression, fewest: sizes.Expression, resident: int) -> tuple:
    """How many blocks a cluster has, of ``units`` clusters, and whether (1, or 0) blocks should rather be spread.

    Measured on an H200, 32 heads on 8 and so on (docs/hopper.md, "Decoding"), with two blocks a multiprocessor, which
    makes 264 places:

    * Clusters don't fill the places: the 40 of 5 x 6000 keys take 36.1 us with five blocks each and 47.4 with six.
      Pairs do.
    * Where they are more than the places, one, two or four blocks each, whichever is expected to take the least time
      (:func:`_in_rounds`).
    * Where they leave more than a quarter of the places empty, and a head has room for four blocks or more, what
      reading gains by blocks that are spread is more than the second launch costs, unless splits are so few that a
      cluster has a block for each.
    """
    most = split_keys.MOST_OF_A_CLUSTER
    pairs = ("min", 2, ("//", resident, units))
    fitting = ("max", 1, pairs, ("min", most, ("//", resident * 13 // 16, units)))
    rounds = ("*", ("steps", units, (0, 0), (resident + 1, 1)), _in_rounds(units, resident))
    are_empty = ("steps", ("*", units, fitting), (0, 1), (resident * 3 // 4, 0))
    are_few = ("steps", units, (0, 1), (resident // 4 + 1, 0))
    are_many = ("steps", splits, (0, 0), (most + 1, 1))
    too_many = ("steps", fewest, (0, 0), (most + 1, 1))
    return ("max", fitting, rounds), ("max", too_many, ("*", are_empty, are_few, are_many))


def _in_rounds(units: sizes.Expression, resident: int) -> sizes.Expression:
    """Of how many blocks ``units`` clusters should be, which are more than the ``resident`` places for blocks.

    Fewer places are empty in the last round the smaller a block is, but each has to start and end.  With the two tables
    above, of measurements on an H200, this is the best of 1, 2 and 4, or within 1% of it, in the 14 cells that were
    measured: 64 x 1k keys of 8 heads at head_dim 64 (396 places) 41.8, 39.9 and 45.9 us, 200 x 1k 102.9, 105.4 and
    124.7, 52 x 4k 132.6, 116.8 and 113.9; at 128 (264 places) 48 x 1k 54.1, 53.8 and 58.1, 40 x 2k 98.7, 89.0 and 91.6,
    38 x 4k 183, 159 and 157, 34 x 8k 345, 301 and 273.
    """
    costs = _costs_in_rounds(units, resident)
    least = _least_in_rounds(units, resident)
    return ("max", *(("*", blocks, ("//", least, cost)) for blocks, cost in costs.items()))


def _costs_in_rounds(units: sizes.Expression, resident: int) -> dict[int, sizes.Expression]:
    """What clusters of so many blocks are expected to take, for ``units`` of them."""
    costs = {}
    for blocks, cost in _COST_OF_CLUSTERS.items():
        places = ("//", ("*", ("ceildiv", ("*", blocks, units), resident), resident), blocks)  # of whole units
        costs[blocks] = ("+", ("*", _EMPTY, places), ("*", ("+", _FULL, ("steps", "seqlen_kv", *cost)), units))
    return costs


def _least_in_rounds(units: sizes.Expression, resident: int) -> sizes.Expression:
    """The least of these."""
    return ("min", *_costs_in_rounds(units, resident).values())

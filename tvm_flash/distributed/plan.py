"""What each rank computes, and which keys it fetches for that: decided from sizes, without a tensor.

A plan is a list of steps, of which every rank has the same number.  In a step a rank receives rows of keys and values
straight from the ranks that hold them, and makes some calls of kernels with these.  ``gather`` has one step with all
rows that are needed, in the order of their positions, so that a query meets all its keys in one call; ``ring`` has one
for each rank, its own first, then that of the rank before it, and so on, and holds the keys of two ranks at most.

Rows of ``gather`` come in two parts, those of the ranks' first chunks before those of their second ones.  Under a
causal mask queries of first chunks, and all of the last rank's, see keys of first chunks only, of which every rank gets
and sends as many.

Every rank works out what the others need of it in the same way: nothing but keys and values is sent.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from tvm_flash.distributed.placement import Interval, Placement, common, joined, size
from tvm_flash.distributed.sight import Block, Sight

EXCHANGES = ("gather", "ring")


class Call(NamedTuple):
    """One call of a kernel.

    Attributes
    ----------
    rows: of the rank's queries.
    keys: rows of the step's keys.
    left, right: the window, the last query standing on the last key; None is unbounded.
    offset: position of the first query less that of the first key.
    starts: of documents of which all queries and keys are here, in the rows and the keys alike; else empty.
    """

    rows: Interval
    keys: Interval
    left: int | None
    right: int | None
    offset: int
    starts: tuple[int, ...] = ()


class Move(NamedTuple):
    """Rows that go from one rank to another: where the owner has them, and where they come in the step's keys, with
    which part of a step's; and where the owner has them among its own keys, if all ranks have all their rows there."""

    source: int
    target: int
    rows: int
    part: int = 0
    laid: int = 0


@dataclass(frozen=True)
class Step:
    """What a rank does in a step.

    Attributes
    ----------
    keys: how many rows of keys there are.
    receives, sends: the moves from and to each other rank, in an order that both sides know.
    own: the rank's own rows among the keys; None if the step's keys are those that it holds, as they lie.
    calls: in order.
    laid: the rank's own rows among the keys part by part, if all ranks have all of theirs there; else None.
    """

    keys: int
    receives: tuple[tuple[int, tuple[Move, ...]], ...]
    sends: tuple[tuple[int, tuple[Move, ...]], ...]
    own: tuple[Move, ...] | None
    calls: tuple[Call, ...]
    laid: tuple[Move, ...] | None = None

    def parts(self, call: Call) -> int:
        """How many parts of the messages a call waits for: 0 if no key of it comes from another rank."""
        first, end = call.keys
        moves = (move for _, moves in self.receives for move in moves)
        return max((x.part + 1 for x in moves if x.target < end and first < x.target + x.rows), default=0)


@dataclass(frozen=True)
class Plan:
    """The steps of a rank.

    ``merges`` says that some row is in several calls, so that their results must be put together; ``covers`` that every
    row is in one.  All ranks have the same ``positions``, those of the whole sequence, and ``most_keys``, that a rank
    holds or has in a step.
    """

    rows: int
    steps: tuple[Step, ...]
    merges: bool
    covers: bool
    positions: int
    most_keys: int


@functools.lru_cache(maxsize=256)
def plan(placement: Placement, sight: Sight, exchange: str, rank: int, keep_positions: bool = False) -> Plan:
    """The plan of an outer rank; with ``keep_positions`` each call has keys that follow each other in the sequence."""
    make = {"gather": _gathering, "ring": _in_turns}[exchange]
    steps = make(placement, sight, rank, keep_positions)
    rows = size(placement.segments(rank))
    ranks = range(placement.outer)
    most = max(size(placement.segments(r)) for r in ranks)
    most_keys = max(most, *(size(_needed(placement, sight, r)) for r in ranks)) if exchange == "gather" else most
    covered = sorted(call.rows for step in steps for call in step.calls)
    merges = any(a[1] > b[0] for a, b in itertools.pairwise(covered))
    covers = joined_sorted(covered) == joined([(0, rows)])
    return Plan(rows, steps, merges, covers, placement.length, most_keys)


def _gathering(placement: Placement, sight: Sight, rank: int, keep_positions: bool) -> tuple[Step, ...]:
    ranks = range(placement.outer)
    needed = {r: _needed(placement, sight, r) for r in ranks}
    order = [(rank - t) % placement.outer for t in ranks[1:]]
    is_laid = all(joined_sorted((*needed[r], *placement.segments(r))) == needed[r] for r in ranks)
    lies = needed if is_laid else None
    receives = _present((s, _moves_by_chunk(placement, s, needed[rank], lies)) for s in order)
    sends = _present((d, _moves_by_chunk(placement, rank, needed[d], lies)) for d in order[::-1])
    own = None
    if receives or needed[rank] != joined_sorted(placement.segments(rank)):
        own = _moves(placement.segments(rank), needed[rank])
    places = needed[rank] if own is not None else placement.segments(rank)
    calls = _calls(sight, _wanted(placement, sight, rank), placement.segments(rank), places, keep_positions)
    laid = _moves_by_chunk(placement, rank, needed[rank], lies) if is_laid else None
    return (Step(size(places), receives, sends, own, calls, laid),)


@functools.lru_cache(maxsize=256)
def _needed(placement: Placement, sight: Sight, rank: int) -> tuple[Interval, ...]:
    """The keys that a rank's queries see, in the order of the sequence."""
    return joined_sorted(block.keys for block in _wanted(placement, sight, rank))


def _wanted(placement: Placement, sight: Sight, rank: int) -> list[Block]:
    """What a rank's queries compute, over all keys."""
    return [b for queries in placement.segments(rank) for b in sight.blocks(queries, (0, placement.length))]


def _in_turns(placement: Placement, sight: Sight, rank: int, keep_positions: bool) -> tuple[Step, ...]:
    steps, segments = [], placement.segments(rank)
    for t in range(placement.outer):
        source, target = (rank - t) % placement.outer, (rank + t) % placement.outer
        if t == 0:
            blocks = _between(placement, sight, rank, rank)
            calls = _calls(sight, blocks, segments, segments, keep_positions)
            steps.append(Step(size(segments), (), (), None, calls))
            continue
        blocks, places = _between(placement, sight, rank, source), _visited(placement, sight, rank, source)
        steps.append(
            Step(
                size(places),
                _present([(source, _moves(placement.segments(source), places))]),
                _present([(target, _moves(segments, _visited(placement, sight, target, rank)))]),
                (),
                _calls(sight, blocks, segments, places, keep_positions),
            )
        )
    return tuple(steps)


def _between(placement: Placement, sight: Sight, reader: int, owner: int) -> list[Block]:
    """What a rank's queries compute with another's keys."""
    return [
        block
        for queries in placement.segments(reader)
        for keys in placement.segments(owner)
        for block in sight.blocks(queries, keys)
    ]


def _visited(placement: Placement, sight: Sight, reader: int, owner: int) -> tuple[Interval, ...]:
    """The keys of a rank that another's queries see, in the order in which the owner has them."""
    found = []
    for keys in placement.segments(owner):
        blocks = [b for queries in placement.segments(reader) for b in sight.blocks(queries, keys)]
        found += joined_sorted(b.keys for b in blocks)
    return tuple(found)


def _present(moves: Iterable[tuple[int, tuple[Move, ...]]]) -> tuple[tuple[int, tuple[Move, ...]], ...]:
    return tuple((rank, m) for rank, m in moves if m)


def _moves(segments: tuple[Interval, ...], places: tuple[Interval, ...]) -> tuple[Move, ...]:
    """How rows of ``segments`` that are in ``places`` come there; those that follow each other in both go at once."""
    found: list[Move] = []
    target = 0
    for place in places:
        source = 0
        for segment in segments:
            first, end = common(place, segment)
            if first < end:
                move = Move(source + first - segment[0], target + first - place[0], end - first)
                last = found[-1] if found else None
                if last and (last.source + last.rows, last.target + last.rows) == (move.source, move.target):
                    found[-1] = last._replace(rows=last.rows + move.rows)
                else:
                    found.append(move)
            source += segment[1] - segment[0]
        target += place[1] - place[0]
    return tuple(found)


def _moves_by_chunk(
    placement: Placement,
    owner: int,
    places: tuple[Interval, ...],
    lies: Mapping[int, tuple[Interval, ...]] | None,
) -> tuple[Move, ...]:
    """The same of the rows of an outer rank, a part for each chunk; ``lies`` are the keys of each rank, if all of its
    own are among them."""
    found: list[Move] = []
    first = 0
    for part, chunk in enumerate(placement.chunks(owner)):
        for move in _moves((chunk,), places):
            position = chunk[0] + move.source
            laid = 0 if lies is None else _at((position, position + move.rows), lies[owner])[0]
            found.append(move._replace(source=first + move.source, part=part, laid=laid))
        first += chunk[1] - chunk[0]
    return tuple(found)


def joined_sorted(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """The union of intervals, in order."""
    found: list[Interval] = []
    for first, end in sorted(intervals):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((first, end))
    return joined(found)


def _at(interval: Interval, places: tuple[Interval, ...]) -> Interval:
    """Where positions are, of which ``places`` has all, in a row of these places."""
    at = 0
    for first, end in places:
        if first <= interval[0] and interval[1] <= end:
            return at + interval[0] - first, at + interval[1] - first
        at += end - first
    raise ValueError(f"{interval} isn't in one of {places}")


def _calls(
    sight: Sight,
    blocks: list[Block],
    segments: tuple[Interval, ...],
    places: tuple[Interval, ...],
    keep_positions: bool,
) -> tuple[Call, ...]:
    """The calls for blocks, with as few as can be: whole documents at once, and what has the same rows or keys."""
    calls = list(_each(sight, blocks, segments, places))
    return tuple(calls if keep_positions else _merged(_merged(calls, _by_keys), _by_rows))


def _each(sight: Sight, blocks: list[Block], segments, places) -> Iterator[Call]:
    i = 0
    while i < len(blocks):
        queries, keys, whole = blocks[i]
        n = i + 1
        while whole and n < len(blocks) and blocks[n].whole and blocks[n].queries[0] == blocks[n - 1].queries[1]:
            n += 1
        if n - i > 1 and _is_one(queries[0], blocks[n - 1].queries[1], segments, places):
            first, end = queries[0], blocks[n - 1].queries[1]
            starts = (*(b.queries[0] - first for b in blocks[i:n]), end - first)
            rows, seen = _at((first, end), segments), _at((first, end), places)
            yield Call(rows, seen, sight.left, sight.right, 0, starts)
            i = n
            continue
        left, right = sight.edges(queries, keys)
        yield Call(_at(queries, segments), _at(keys, places), left, right, queries[0] - keys[0])
        i += 1


def _is_one(first: int, end: int, *rows: tuple[Interval, ...]) -> bool:
    """Whether positions lie one after the other in each of some places."""
    return all(any(a <= first and end <= b for a, b in places) for places in rows)


def _merged(calls: Iterable[Call], merge) -> list[Call]:
    found: list[Call] = []
    for call in calls:
        one = merge(found[-1], call) if found else None
        if one is None:
            found.append(call)
        else:
            found[-1] = one
    return found


def _by_rows(a: Call, b: Call) -> Call | None:
    """A call for the rows of two with the same keys, all of which each row sees."""
    if a.starts or b.starts or a.keys != b.keys or a.rows[1] != b.rows[0] or _is_masked(a) or _is_masked(b):
        return None
    return a._replace(rows=(a.rows[0], b.rows[1]))


def _by_keys(a: Call, b: Call) -> Call | None:
    """A call for the keys of two with the same rows, which see all keys of the first."""
    if a.starts or b.starts or a.rows != b.rows or a.keys[1] != b.keys[0] or _is_masked(a) or b.left is not None:
        return None
    return b._replace(keys=(a.keys[0], b.keys[1]))


def _is_masked(call: Call) -> bool:
    return call.left is not None or call.right is not None

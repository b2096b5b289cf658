"""Who computes what, and who sends what to whom, without a tensor: every pair of a query and its key once."""

from __future__ import annotations

import itertools
import random

import pytest

from tvm_flash.distributed.launches import Heads, Work
from tvm_flash.distributed.placement import BALANCES, Placement, size
from tvm_flash.distributed.plan import Plan, plan
from tvm_flash.distributed.sight import Sight


def positions(intervals):
    return [p for first, end in intervals for p in range(first, end)]


def seen(sight: Sight, length: int) -> set[tuple[int, int]]:
    """Pairs of a query and a key that it sees, by the definition."""
    document = [sum(end <= i for end in sight.ends) for i in range(length)]
    return {
        (i, j)
        for i in range(min(length, sight.ends[-1]))
        for j in range(length)
        if document[i] == document[j]
        if sight.left is None or j >= i - sight.left
        if sight.right is None or j <= i + sight.right
    }


def computed(placement: Placement, sight: Sight, exchange: str, keep_positions: bool) -> list[tuple[int, int]]:
    """Pairs that the calls of all ranks compute, with the keys that come to each; checks what is sent on the way."""
    ranks = range(placement.outer)
    plans = [plan(placement, sight, exchange, r, keep_positions) for r in ranks]
    held = [positions(placement.segments(r)) for r in ranks]
    found, laid = [], {}
    for rank, mine in enumerate(plans):
        for number, step in enumerate(mine.steps):
            keys = list(held[rank]) if step.own is None else [None] * step.keys
            for move in step.own or ():
                keys[move.target : move.target + move.rows] = held[rank][move.source : move.source + move.rows]
            for owner, moves in step.receives:
                assert moves == dict(plans[owner].steps[number].sends)[rank]
                for move in moves:
                    keys[move.target : move.target + move.rows] = held[owner][move.source : move.source + move.rows]
            assert len(keys) == step.keys <= mine.most_keys and None not in keys
            laid[rank] = keys
            assert all(rank in dict(plans[to].steps[number].receives) for to, _ in step.sends)
            for call in step.calls:
                found += pairs(call, held[rank], keys, sight, keep_positions)
    check_laid(plans, held, laid)
    return found


def check_laid(plans: list[Plan], held, keys) -> None:
    """Where all ranks have their own rows among their keys, what others read is there; of the only step."""
    steps = [mine.steps[0] for mine in plans]
    assert len({step.laid is None for step in steps}) == len({mine.most_keys for mine in plans}) == 1
    if steps[0].laid is not None:
        for rank, step in enumerate(steps):
            assert [p for m in step.laid for p in keys[rank][m.target : m.target + m.rows]] == held[rank]
            for owner, moves in step.receives:
                for m in moves:
                    theirs = keys[owner][m.laid : m.laid + m.rows]
                    assert theirs == held[owner][m.source : m.source + m.rows]


def pairs(call, rows, keys, sight, keep_positions):
    starts = call.starts or (0, call.rows[1] - call.rows[0])
    edges = list(itertools.pairwise(starts))
    for first, end in edges:
        mine = rows[call.rows[0] + first : call.rows[0] + end]
        theirs = keys[slice(*call.keys)] if not call.starts else keys[call.keys[0] + first : call.keys[0] + end]
        assert mine and theirs
        assert min(x for x in (call.left, call.right, 0) if x is not None) == 0
        for (a, i), (b, j) in itertools.product(enumerate(mine), enumerate(theirs)):
            at = a + len(theirs) - len(mine)
            if keep_positions and not call.starts:
                assert i - j == a + call.offset - b
            if (call.left is None or b >= at - call.left) and (call.right is None or b <= at + call.right):
                yield i, j


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("keep_positions", [False, True])
def test_every_pair_is_computed_once(exchange, keep_positions):
    draw = random.Random(0)
    for _ in range(150):
        length = draw.choice([1, 5, 16, 23, 40, 61])
        placement = Placement(length, draw.choice([1, 2, 3, 4, 8]), draw.choice([1, 2, 3]), draw.choice(BALANCES))
        ends = sorted({draw.randint(1, length) for _ in range(draw.choice([1, 3, 12]))})
        ends = draw.choice([(length,), tuple(ends)])
        sight = Sight(draw.choice([None, 0, 1, 5, 30]), draw.choice([None, 0, 0, 3, 20]), ends)
        held = [positions(x) for x in placement.order()]
        assert sorted(itertools.chain(*held)) == list(range(length))
        found = computed(placement, sight, exchange, keep_positions)
        assert len(found) == len(set(found)) and set(found) == seen(sight, length), (placement, sight)


def of(placement, sight, exchange) -> list[Plan]:
    return [plan(placement, sight, exchange, r) for r in range(placement.outer)]


def test_a_causal_ring_has_one_call_a_step_and_balances():
    """Half of the rows with all keys, or all rows with half of the keys; the last rank's two chunks are one."""
    placement, sight = Placement(64, 4), Sight(None, 0, (64,))
    for rank, mine in enumerate(of(placement, sight, "ring")):
        assert [len(step.calls) for step in mine.steps] == [1 if rank == 3 else 2, 1, 1, 1]
        work = [(c.rows[1] - c.rows[0]) * (c.keys[1] - c.keys[0]) for step in mine.steps[1:] for c in step.calls]
        assert work == [8 * 16] * 3


def test_where_all_ranks_see_their_own_rows_these_lie_among_the_keys():
    for sight in (Sight(None, 0, (64,)), Sight(None, None, (64,)), Sight(9, 3, (20, 64))):
        assert all(step.laid is not None for mine in of(Placement(64, 4), sight, "gather") for step in mine.steps)
    for mine in (*of(Placement(64, 4), Sight(None, 0, (50,)), "gather"), *of(Placement(64, 4), sight, "ring")):
        assert all(step.laid is None for step in mine.steps)


def test_gathered_keys_need_no_merging():
    for sight in (Sight(None, 0, (64,)), Sight(None, None, (64,)), Sight(9, 3, (20, 64))):
        assert all(not mine.merges and mine.covers for mine in of(Placement(64, 4), sight, "gather"))
    (mine,) = of(Placement(64, 1), Sight(None, 0, (64,)), "gather")
    (step,) = mine.steps
    assert step.own is None and step.calls == ((step.calls[0]),) and not step.receives


@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_a_window_visits_the_ranks_that_it_reaches(exchange):
    placement = Placement(800, 8, balance="contiguous")
    for rank, mine in enumerate(of(placement, Sight(20, 0, (800,)), exchange)):
        fetched = [(owner, sum(m.rows for m in moves)) for step in mine.steps for owner, moves in step.receives]
        assert fetched == ([(rank - 1, 20)] if rank else [])
    placement = Placement(800, 8)
    for mine in of(placement, Sight(20, 0, (800,)), exchange):
        assert sum(m.rows for step in mine.steps for _, moves in step.receives for m in moves) <= 40


def test_documents_within_a_rank_are_one_call_and_send_nothing():
    placement = Placement(80, 2, balance="contiguous")
    for mine in of(placement, Sight(None, 0, (10, 15, 40, 60, 61, 80)), "ring"):
        (call,) = [c for step in mine.steps for c in step.calls]
        assert len(call.starts) == 4 and not any(step.receives for step in mine.steps)


def test_chunks_differ_by_a_position():
    for length, ranks, inner in ((101, 3, 2), (7, 8, 1), (1000, 4, 3)):
        sizes = [size(x) for x in Placement(length, ranks, inner).order()]
        assert sum(sizes) == length and max(sizes) - min(sizes) <= 2


def test_into_how_many_parts_heads_are_split():
    """Two where keys are fetched, and more of many heads of long ones."""

    def parts(positions, causal, kv_heads=8, fetches=True, left=None, reads=False):
        return Work(1, kv_heads, positions, left, 0 if causal else None, fetches, reads).in_backward

    assert parts(1 << 16, True, kv_heads=32) == 4 and parts(1 << 15, True, kv_heads=32) == 2
    assert parts(1 << 20, True, kv_heads=32, left=1000) == 2
    assert parts(1 << 16, True) == parts(1 << 20, False) == parts(1 << 10, False) == 2
    assert parts(1 << 20, False, kv_heads=12) == 2 and parts(1 << 20, False, kv_heads=21) == 3
    assert parts(1 << 20, False, kv_heads=3) == parts(1 << 20, False, kv_heads=1) == 1
    assert parts(1 << 18, True, kv_heads=32, fetches=False) == 1
    assert parts(1 << 16, True, reads=True) == 2 and parts(1 << 16, True, kv_heads=32, reads=True) == 4

    def in_forward(causal, kv_heads=8, fetches=True, left=None, reads=True, positions=1 << 16):
        return Work(1, kv_heads, positions, left, 0 if causal else None, fetches, reads).in_forward

    assert in_forward(False) == 4 and in_forward(False, kv_heads=6) == 3
    assert in_forward(False, positions=1 << 15) == 1
    assert in_forward(True) == in_forward(False, left=9) == in_forward(False, fetches=False) == 1
    assert in_forward(False, reads=False) == 1
    halves = Heads((8, 16), (2, 4)).parts(2)
    assert halves == [Heads((8, 12), (2, 3)), Heads((12, 16), (3, 4))]


def test_calls_wait_for_no_more_than_their_keys():
    """Of two ranks under a causal mask the first has a chunk that sees nothing else, and one that sees both of the
    other rank's; those of the second see the first one's first."""
    first, second = of(Placement(64, 2), Sight(None, 0, (64,)), "gather")
    (step,) = first.steps
    assert [step.parts(c) for c in step.calls] == [0, 2]
    (step,) = second.steps
    assert [step.parts(c) for c in step.calls] == [1]
    for mine in of(Placement(64, 2), Sight(None, 0, (64,)), "ring"):
        own, other = mine.steps
        assert not any(own.parts(c) for c in own.calls) and all(other.parts(c) == 1 for c in other.calls)


def test_of_first_chunks_each_rank_gets_and_sends_as_many():
    plans = of(Placement(64, 4), Sight(None, 0, (64,)), "gather")
    for moves_of in (lambda step: step.receives, lambda step: step.sends):
        parts = [[m.part for _, moves in moves_of(p.steps[0]) for m in moves] for p in plans]
        assert [x.count(0) for x in parts] == [3] * 4
    assert [p.steps[0].parts(p.steps[0].calls[0]) for p in plans] == [0, 1, 1, 1]

"""What the tuner searches: problems, budgets, spaces of configurations, and the strategies that go through them."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest

from schedules.definition.attention import Attention
from schedules.definition.catalogue import MASKS, SCORES
from schedules.definition.pattern import match
from schedules.families import FAMILY, family_of, kinds_of
from schedules.families.cpu.isa import ISAS
from schedules.families.interface import APPEND, BACKWARD_ACCUMULATE, MERGED, PAGED_LATENT, PARTIAL, Target
from schedules.tuning import emit, kinds
from schedules.tuning.budget import Budget
from schedules.tuning.space import Space
from schedules.tuning.strategy import STRATEGIES, Evolutionary, geometric_mean
from tvm_flash.measure.workloads import Workload, standard_suite
from tvm_flash.packs.manifest import CACHE_OF_KIND

# ---------------------------------------------------------------- problems and budgets


@pytest.mark.parametrize(
    "text",
    [
        "b=4 h=16 s=4096 d=128 causal float16",
        "b=1 h=32 hk=8 s=1 sk=4096 d=128 full bfloat16",
        "b=2 h=4 s=512 d=192 dv=128 window=128 softcap=30 alibi float32",
        "b=8 h=4 hk=2 s=512 d=64 causal ragged backward float32",
        "b=8 h=4 s=2 sk=512 d=64 causal paged float32",
    ],
)
def test_a_workload_comes_back_from_its_text(text):
    assert str(Workload.parse(text)) == text
    assert Workload.parse(str(Workload.parse(text))) == Workload.parse(text)


def test_a_workload_may_take_its_dtype_from_outside():
    assert Workload.parse("b=1 h=2 s=3 d=8", "float16") == Workload.parse("b=1 h=2 s=3 d=8 fp16")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("b=1 h=2 s=3 fp16", "lacks d=…"),
        ("b=1 h=2 s=3 d=8", "names no dtype"),
        ("b=1 h=2 s=3 d=8 fp16 causual", "'causual' isn't understood"),
        ("b=1 h=2 s=0 d=8 fp16", "'s=0' isn't understood"),
        ("b=1 h=3 hk=2 s=3 d=8 fp16", "hk=2 doesn't divide h=3"),
        ("b=1 h=3 s=3 d=8 paged backward fp16", "leave out paged or backward"),
    ],
)
def test_a_wrong_workload_is_refused_with_the_reason(text, complaint):
    with pytest.raises(ValueError, match=complaint):
        Workload.parse(text)


def test_operations_of_a_workload():
    assert Workload.parse("b=2 h=3 s=10 d=8 full fp16").flops == 4 * 2 * 3 * 10 * 10 * 8
    assert Workload.parse("b=2 h=3 s=10 d=8 causal fp16").flops == 2 * 2 * 3 * 10 * 10 * 8
    assert Workload.parse("b=1 h=1 s=10 sk=30 d=8 causal fp16").flops == 4 * (10 * 30 - 50) * 8
    assert Workload.parse("b=2 h=3 s=10 d=8 causal backward fp16").flops == 5 * 2 * 3 * 10 * 10 * 8
    ragged = Workload.parse("b=3 h=2 s=10 sk=40 d=8 full ragged backward fp16")
    assert ragged.flops == 10 * 2 * sum(q * k for q, k in ragged.lengths) * 8
    assert len(set(ragged.lengths)) == 3 and ragged.totals == tuple(map(sum, zip(*ragged.lengths, strict=True)))


def test_the_standard_suite_has_the_grid():
    suite = standard_suite("cuda", ["float16"])
    assert len(suite) == 36 and len(set(suite)) == 36
    assert {w.batch * w.seqlen_q for w in suite} == {16384}
    assert {w.heads * w.head_dim for w in suite} == {2048}
    kept = standard_suite("cuda", ["float16"], head_dims=[64], seqlens=[512], masks=["causal"])
    assert [str(w) for w in kept] == ["b=32 h=32 s=512 d=64 causal float16"]


@pytest.mark.parametrize(
    ("text", "budget"), [("200", Budget(configs=200)), ("10min", Budget(seconds=600)), ("1.5s", Budget(seconds=1.5))]
)
def test_budgets(text, budget):
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["", "0", "-3", "10h", "min"])
def test_wrong_budgets(text):
    with pytest.raises(ValueError, match="expected configurations"):
        Budget.parse(text)


# ---------------------------------------------------------------- spaces


TARGETS = [Target(arch) for arch in FAMILY if arch != "cpu"] + [Target("cpu", isa) for isa in ISAS]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_family_declares_a_space_with_its_default_in_it(target):
    family = family_of(target)
    for template, dtype in itertools.product(family.TEMPLATES, {family.DTYPES[0], family.DTYPES[-1]}):
        pattern = match(Attention(SCORES["identity"], MASKS["causal"])(128, dtype, index_dtype=family.INDEX_DTYPE))
        space = Space.of(template, pattern, target)
        fields = {f.name for f in dataclasses.fields(family.Config)}
        assert set(space.axes) <= fields
        feasible = space.feasible()
        assert len(feasible) >= 4
        for config in family.default_configs(template, pattern, target).values():
            assert space.refusal(config) is None
            for name, values in space.axes.items():
                assert getattr(config, name) in values, f"the default {name} isn't in the space"
        refused = sum(space.rejections().values())
        assert refused + len(feasible) == len(list(space.combinations()))


@pytest.mark.parametrize("target", [Target("cpu", "avx2"), *map(Target, ("sm_75", "sm_86", "sm_90a"))], ids=str)
def test_every_kind_declares_a_space_with_its_default_in_it(target):
    family = family_of(target)
    for kind in kinds_of(target)[1:]:
        if kind not in kinds.KINDS:
            assert kind in (APPEND, PARTIAL, MERGED, BACKWARD_ACCUMULATE, PAGED_LATENT, *CACHE_OF_KIND)
            continue
        for head_dim in (64, 256):
            problem = Workload.parse(f"b=1 h=2 s=512 d={head_dim} causal", family.DTYPES[-1])
            spec = kinds.spec_for(kind, family.TEMPLATES[-1], kinds.problem_of(kind, problem), target)
            space = emit.space_of(spec, target)
            assert set(space.axes) <= {f.name for f in dataclasses.fields(space.base)}
            if space.refusal(space.base) is None:
                assert sum(len(values) > 1 for values in space.axes.values()) >= 2
                for config in emit.defaults_of(spec, target).values():
                    for name, values in space.axes.items():
                        assert getattr(config, name) in values, f"{spec.symbol}: the default {name} isn't in the space"


def test_random_numbers_of_a_space_are_repeatable():
    target = Target("cpu", "avx512")
    family = family_of(target)
    pattern = match(Attention(SCORES["identity"], MASKS["full"])(64, "float32", index_dtype="int64"))
    space = Space.of("v1", pattern, target)
    one, other = ([space.mutated(space.base, random.Random(seed)) for seed in range(9)] for _ in range(2))
    assert one == other and len(set(one)) > 1
    assert all(isinstance(c, family.Config) for c in one)


# ---------------------------------------------------------------- strategies


@dataclasses.dataclass(frozen=True)
class Point:
    x: int = 0
    y: int = 0


class Grid:
    """A space of points with a known lowest one; x + y = 7 is refused."""

    size = 40

    def feasible(self):
        return [
            p for p in itertools.starmap(Point, itertools.product(range(self.size), repeat=2)) if not self.refusal(p)
        ]

    def refusal(self, config):
        return "seven" if config.x + config.y == 7 else None

    def mutated(self, config, rng):
        return Point((config.x + rng.choice((-1, 0, 1))) % self.size, (config.y + rng.choice((-1, 0, 1))) % self.size)

    def crossed(self, one, other, rng):
        return Point(rng.choice((one, other)).x, rng.choice((one, other)).y)

    def cost(self, p):
        return 1 + (p.x - 31) ** 2 + (p.y - 12) ** 2


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_gives_every_feasible_configuration_once(name):
    grid = Grid()
    grid.size = 8
    strategy = STRATEGIES[name](grid, seed=1, known={Point(0, 0): 1.0})
    given = []
    while more := strategy.next(7):
        given += more
        strategy.tell({p: float(grid.cost(p)) for p in more})
    assert len(given) == len(set(given))
    assert set(given) == set(grid.feasible()) - {Point(0, 0)}


def test_evolution_finds_the_best_of_a_rigged_cost_sooner_than_chance():
    grid = Grid()
    tried = {}
    for name in ("evolutionary", "random"):
        tried[name] = []
        for seed in range(5):
            strategy, given = STRATEGIES[name](grid, seed, {Point(0, 0): float(grid.cost(Point(0, 0)))}), 0
            while (more := strategy.next(8)) and Point(31, 12) not in more:
                given += len(more)
                strategy.tell({p: float(grid.cost(p)) for p in more})
            tried[name].append(given)
    assert max(tried["evolutionary"]) < 500
    assert sum(tried["evolutionary"]) * 2 < sum(tried["random"])


def test_evolution_leaves_failures_without_children():
    grid = Grid()
    strategy = Evolutionary(grid, 0, {Point(20, 20): float("inf"), Point(5, 5): 1.0})
    children = strategy.next(4)[:3]
    assert all(abs(p.x - 5) <= 1 and abs(p.y - 5) <= 1 for p in children)


def test_geometric_mean():
    assert geometric_mean([2, 8]) == pytest.approx(4)
    assert geometric_mean([]) == geometric_mean([1, float("inf")]) == float("inf")

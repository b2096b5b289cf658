"""In which order the configurations of a space are tried.

A strategy is asked for the next few configurations, and told the costs of those that were measured: seconds of a
configuration over those of the incumbent (geometric mean over the problems), infinite if it failed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from typing import Any, Protocol


class SearchSpace(Protocol):
    """What strategies need of :class:`schedules.tuning.space.Space`."""

    def feasible(self) -> list[Any]: ...
    def refusal(self, config) -> object | None: ...
    def mutated(self, config, rng: random.Random) -> Any: ...
    def crossed(self, one, other, rng: random.Random) -> Any: ...


class Exhaustive:
    """All of them, in the order of the declaration."""

    def __init__(self, space: SearchSpace, seed: int, known: Mapping[Any, float]):
        self.left = [config for config in space.feasible() if config not in known]

    def next(self, count: int) -> list[Any]:
        """At most ``count`` configurations that weren't given yet; none when there are no more."""
        taken, self.left = self.left[:count], self.left[count:]
        return taken

    def tell(self, costs: Mapping[Any, float]) -> None:
        """Costs of configurations that were given."""


class Random(Exhaustive):
    """All of them, shuffled."""

    def __init__(self, space: SearchSpace, seed: int, known: Mapping[Any, float]):
        super().__init__(space, seed, known)
        random.Random(seed).shuffle(self.left)


class Evolutionary:
    """The best measured so far have children: neighbours, and mixtures of two.

    A (μ + λ) evolution strategy (Beyer and Schwefel, 2002) on the declared values.  A quarter of each generation is
    random, so that a search that has settled still looks elsewhere.
    """

    PARENTS = 6
    FRESH = 0.25
    TRIES = 40

    def __init__(self, space: SearchSpace, seed: int, known: Mapping[Any, float]):
        self.space, self.rng = space, random.Random(seed)
        self.costs = dict(known)
        self.given = set(known)
        self.fresh = Random(space, seed, known)

    def tell(self, costs: Mapping[Any, float]) -> None:
        """Costs of configurations that were given."""
        self.costs |= costs

    def next(self, count: int) -> list[Any]:
        """At most ``count`` configurations that weren't given yet; none when there are no more."""
        parents = sorted((c for c, cost in self.costs.items() if math.isfinite(cost)), key=self.costs.get)
        parents = parents[: self.PARENTS]
        children: list[Any] = []
        wanted = count - math.ceil(count * self.FRESH) if parents else 0
        for _ in range(self.TRIES * wanted):
            if len(children) == wanted:
                break
            child = self._child(parents)
            if child not in self.given and self.space.refusal(child) is None:
                self.given.add(child)
                children.append(child)
        return children + self._fresh(count - len(children))

    def _child(self, parents: list[Any]) -> Any:
        """The better a parent, the more often it is taken."""
        one, other = (parents[min(self.rng.randrange(len(parents)) for _ in range(2))] for _ in range(2))
        if self.rng.random() < 0.5:
            one = self.space.crossed(one, other, self.rng)
        return self.space.mutated(one, self.rng)

    def _fresh(self, count: int) -> list[Any]:
        taken: list[Any] = []
        while len(taken) < count and (more := self.fresh.next(1)):
            taken += [config for config in more if config not in self.given]
            self.given.update(more)
        return taken


STRATEGIES = {"exhaustive": Exhaustive, "random": Random, "evolutionary": Evolutionary}


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers; infinite if one is, or if there are none."""
    values = list(values)
    return (
        math.exp(sum(map(math.log, values)) / len(values)) if values and all(map(math.isfinite, values)) else math.inf
    )

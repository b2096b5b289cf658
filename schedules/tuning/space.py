"""The configurations of one kernel: what its family declares, and what of it the machine can do."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from schedules.definition.pattern import Pattern
from schedules.families import maker_of
from schedules.families.interface import FORWARD, Rejected, Target


@dataclass(frozen=True)
class Space:
    """Values for fields of a ``Config``, that of a kind of a family's kernels; others keep those of ``base``.

    ``base`` is the family's default for any length.
    """

    template: str
    pattern: Pattern
    target: Target
    base: Any
    axes: Mapping[str, tuple]
    kind: str = FORWARD

    @staticmethod
    def of(template: str, pattern: Pattern, target: Target, kind: str = FORWARD) -> Space:
        """The space that the target's family declares for a kind.

        Raises
        ------
        KeyError: the family makes no such kernels.
        """
        maker = maker_of(target, kind)
        base = maker.default_configs(template, pattern, target)[0]
        return Space(template, pattern, target, base, maker.space(template, pattern, target), kind)

    def refusal(self, config) -> Rejected | None:
        """Why a configuration can't be compiled; None if it can."""
        return maker_of(self.target, self.kind).feasible(self.pattern, config, self.target)

    def combinations(self) -> Iterator[Any]:
        """Every combination of values, feasible or not, in the order of the declaration."""
        for values in itertools.product(*self.axes.values()):
            yield dataclasses.replace(self.base, **dict(zip(self.axes, values, strict=True)))

    def feasible(self) -> list[Any]:
        """The combinations that can be compiled."""
        return [config for config in self.combinations() if self.refusal(config) is None]

    def rejections(self) -> Counter[str]:
        """How many combinations are refused, by the reason (without its numbers)."""
        refusals = (self.refusal(config) for config in self.combinations())
        return Counter(_kind(refusal.reason) for refusal in refusals if refusal)

    # ---------------------------------------------------------------- for strategies

    def mutated(self, config, rng: random.Random) -> Any:
        """A neighbour: one field moves to the next value up or down, or rarely to any."""
        name = rng.choice([axis for axis, values in self.axes.items() if len(values) > 1])
        values = self.axes[name]
        now = getattr(config, name)
        if now not in values or rng.random() < 0.2:
            return dataclasses.replace(config, **{name: rng.choice(values)})
        at = values.index(now) + rng.choice((-1, 1))
        return dataclasses.replace(config, **{name: values[at % len(values)]})

    def crossed(self, one, other, rng: random.Random) -> Any:
        """A child of two: each field from one of them."""
        return dataclasses.replace(one, **{a: getattr(rng.choice((one, other)), a) for a in self.axes})


def _kind(reason: str) -> str:
    """A reason with its numbers taken out, so that alike refusals count as one."""
    return " ".join("…" if word.strip(",;:()").isdigit() else word for word in reason.split())

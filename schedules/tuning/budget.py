"""How long a search may take."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """When a search ends: after so many configurations, or so many seconds."""

    configs: float = math.inf
    seconds: float = math.inf

    @staticmethod
    def parse(text: str) -> Budget:
        """Read ``"200"`` (configurations), ``"10min"`` or ``"90s"``.

        Raises
        ------
        ValueError: it is none of these, or not positive.
        """
        for suffix, unit in (("min", 60.0), ("s", 1.0), ("", 0.0)):
            number = text.removesuffix(suffix)
            if suffix and number == text:
                continue
            try:
                value = float(number) if unit else int(number)
            except ValueError:
                break
            if value > 0:
                return Budget(seconds=value * unit) if unit else Budget(configs=value)
        raise ValueError(f"--budget {text!r}: expected configurations, as 200, or a time, as 10min or 90s")

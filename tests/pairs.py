"""Which of all pairs a test tries: enough of them, or each where there is time for that.

``TVM_FLASH_ALL_PAIRS=1`` in the environment of pytest asks for all.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

ALL_PAIRS = os.environ.get("TVM_FLASH_ALL_PAIRS", "") not in ("", "0")


def some_pairs(first: Iterable, second: Iterable, whole: Iterable = ()) -> list[tuple]:
    """One of three pairs, so that each value meets a third of the others; with ``whole`` values, all of their pairs.

    Parameters
    ----------
    first, second: the values of two axes.
    whole: those values of either axis that do what all others do, and so meet every one of the other axis.
    """
    whole = set(whole)
    return [
        (a, b)
        for i, a in enumerate(first)
        for j, b in enumerate(second)
        if ALL_PAIRS or (i + j) % 3 == 0 or a in whole or b in whole
    ]

"""One file of tests of another project: where it lies, what stands in for what it imports, and which cases are run."""

from __future__ import annotations

import ast
import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class Calls:
    """What became of the calls of attention in the case that is being run: how many were computed here, and why not."""

    def __init__(self):
        self.ours = 0
        self.left: dict[str, int] = {}

    def leave(self, reason: str) -> None:
        """Count a call that torch's own kernel computes."""
        self.left[reason] = self.left.get(reason, 0) + 1

    def clear(self) -> None:
        """Begin a case."""
        self.ours, self.left = 0, {}


@dataclass(frozen=True)
class Suite:
    """``source`` is a file of the checkout; ``text`` its text as it is run on ``device``.

    ``stand_in`` is a context in which the project's functions are this package's, and counts ``calls``.  ``why_not``
    says of a case, by the name of its test and its parameters, why it isn't run, or None.  A ``baseline`` is the
    project as it is: what fails there fails without this package.  ``counted`` says that ``calls`` are.
    """

    name: str
    source: Path
    text: str
    stand_in: Callable[[], contextlib.AbstractContextManager]
    why_not: Callable[[str, dict[str, Any]], str | None]
    calls: Calls = field(default_factory=Calls)
    baseline: bool = False
    counted: bool = False

    @functools.cached_property
    def tests(self) -> tuple[str, ...]:
        """The names of functions and methods that are tests, as they stand in the text."""
        functions = (x for x in ast.walk(ast.parse(self.text)) if isinstance(x, ast.FunctionDef))
        return tuple(x.name for x in functions if x.name.startswith("test"))

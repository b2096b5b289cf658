"""A plugin of pytest that takes a sample of each test, the same every time, and counts what came of it and why."""

from __future__ import annotations

import collections
import random
import re

import pytest

from tests.peer_suites.suite import Suite
from tvm_flash.errors import NotSupportedError

#: How a case can end.  It passes with all calls of attention computed here, with some or all of them left to torch's
#: kernels, or, elsewhere, without one that came here: another backend was asked for, or a module's fast path taken.
#: "refused" is a typed error that names what isn't here, and what is "broken" fails without this package too.
OUTCOMES = (
    *("passed", "in part", "by torch", "elsewhere", "refused", "failed", "broken"),
    *("skipped", "not run", "left out"),
)


class Tally:
    """Counts by test, and reasons; give it to ``pytest.main`` among the plugins.

    ``broken`` names cases that fail without this package too; ``failed`` names those that failed.
    """

    def __init__(self, suite: Suite, sample: int, seed: int, broken: frozenset[str] = frozenset()):
        self._suite, self._sample, self._seed, self._broken = suite, sample, seed, broken
        self.failed: list[str] = []
        self.counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.reasons: dict[str, collections.Counter] = {x: collections.Counter() for x in OUTCOMES[1:-1]}
        self.failures: list[str] = []
        self.collected = 0

    # ---------------------------------------------------------------- pytest's hooks

    def pytest_collection_modifyitems(self, items):
        """Keep a sample of each test, of the cases that are about something that is here."""
        self.collected += len(items)
        by_test = collections.defaultdict(list)
        for item in items:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            if why := self._suite.why_not(item.name, parameters):
                self._count(item, "not run", why)
            else:
                by_test[self._name(item)].append(item)
        items[:] = []
        for name, found in by_test.items():
            # A generator for each test, so that a test which comes or goes changes no other's sample.
            taken = random.Random(f"{self._seed} {name}").sample(found, min(self._sample, len(found)))
            self.counts[name]["left out"] += len(found) - len(taken)
            items += taken

    def pytest_collectreport(self, report):
        """A file that can't be read is a failure, and not a suite without cases."""
        if report.failed:
            self.failures.append(f"{report.nodeid or 'collecting'}: {str(report.longrepr).strip().splitlines()[-1]}")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        """Count a case by how it ended."""
        report = yield
        if call.when == "setup" and report.passed:
            self._suite.calls.clear()
        elif call.when == "call" or not report.passed:
            self._end(item, call, report)
        return report

    def _end(self, item, call, report):
        calls, reason = self._suite.calls, None
        if report.skipped:
            outcome = "skipped"
            reason = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
            reason = reason.removeprefix("Skipped: ")
        elif report.passed:
            outcome = "in part" if calls.ours else "by torch"
            if not calls.left:
                outcome = "passed" if calls.ours or not self._suite.counted else "elsewhere"
            for why in calls.left:
                self.reasons[outcome][general(why)] += 1
        elif isinstance(call.excinfo.value, NotSupportedError):
            outcome, reason = "refused", str(call.excinfo.value)
        else:
            case = item.nodeid.partition("::")[2]
            outcome = "broken" if case in self._broken else "failed"
            reason = f"{type(call.excinfo.value).__name__}: {call.excinfo.value}"
            self.failed.append(case)
            if outcome == "failed":
                self.failures.append(f"{case}: {' '.join(reason.split())[:300]}")
        self._count(item, outcome, reason)

    # ---------------------------------------------------------------- results

    def _name(self, item) -> str:
        return name_of(item, self._suite.tests)

    def _count(self, item, outcome: str, reason: str | None) -> None:
        self.counts[self._name(item)][outcome] += 1
        if reason is not None:
            self.reasons[outcome][general(reason)] += 1

    def table(self) -> list[str]:
        """Lines of Markdown: a row a test, a total, and the reasons by how often they occurred."""
        total = collections.Counter()
        lines = [f"| {self._suite.name} | {' | '.join(OUTCOMES)} |", f"|---|{'---|' * len(OUTCOMES)}"]
        for name, counts in sorted(self.counts.items()):
            total.update(counts)
            lines.append(f"| `{name}` | {' | '.join(str(counts[x]) for x in OUTCOMES)} |")
        lines.append(f"| **all** | {' | '.join(str(total[x]) for x in OUTCOMES)} |")
        for outcome, reasons in self.reasons.items():
            if reasons and outcome != "failed":
                lines += ["", f"{outcome[0].upper()}{outcome[1:]}, by reason:", ""]
                lines += [f"* {count} × {reason}" for reason, count in reasons.most_common()]
        return lines

    @property
    def status(self) -> int:
        """An exit status: 1 if something failed, 2 if there are no cases."""
        return 1 if self.failures else 2 if not self.collected else 0


def name_of(item, tests: tuple[str, ...]) -> str:
    """The test that a case is one of: PyTorch's and unittest's cases have their parameters in their names."""
    test = max((x for x in tests if item.name.startswith(x)), key=len, default=item.name)
    return test if item.cls is None else f"{item.cls.__name__}.{test}"


def general(reason: str) -> str:
    """A reason without the numbers of the case, so that reasons can be counted."""
    return re.sub(r"\d+(\.\d+)?", "N", reason.strip().split("\n")[0])[:200]

"""Which tests may be skipped where: with ``--strict-skips`` a skip for any other reason fails the run.

A skip that nobody expects is a test that nobody runs: a compiler that is gone, a pack without a kernel.
"""

from __future__ import annotations

import os
import re

import pytest

from tvm_flash.machine import cuda

_DEVICES = cuda.device_count()

#: The reason of a skip, as a regular expression, and whether it may occur on this machine.
EXPECTED: tuple[tuple[str, bool], ...] = (
    # No GPU, or one too few.
    (r"there is no CUDA device", _DEVICES == 0),
    (r"there is no GPU that JAX sees|this JAX has no GPU", True),  # JAX may have been installed for the processor
    (r"needs two GPUs", _DEVICES < 2),
    (r"could not import 'cupy'", _DEVICES == 0),
    # What the test is about doesn't exist for one of its parameters.
    (r"modified scores are bounded, or grow with the distance", True),
    (r"nothing but a tanh is in danger", True),
    (r"needs rows that don't see a key", True),
    (r"isn't wrong any more once it is copied to a GPU", True),
    (r"a bidirectional layer has no cache", True),
    (r"they are found the same way", True),
    (r"the grids are the same", True),
    # The disassembler is no part of what building and testing need.
    (r"needs nvdisasm", True),
    # Root may read everything.
    (r"nothing is unreadable to root", os.geteuid() == 0),
)


def is_expected(reason: str) -> bool:
    """Whether a skip for this reason may occur here."""
    return any(allowed and re.search(pattern, reason) for pattern, allowed in EXPECTED)


class StrictSkips:
    """A plugin that collects skips which aren't expected, and fails the run that has any."""

    def __init__(self):
        self.unexpected: dict[str, list[str]] = {}

    def pytest_runtest_logreport(self, report):
        self._note(report)

    def pytest_collectreport(self, report):
        self._note(report)

    def _note(self, report):
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            if not is_expected(reason):
                self.unexpected.setdefault(reason, []).append(report.nodeid)

    def pytest_terminal_summary(self, terminalreporter):
        if self.unexpected:
            terminalreporter.section("skips that nobody expects (tests/expected_skips.py)")
            for reason, tests in self.unexpected.items():
                terminalreporter.line(f"{reason}: {len(tests)}, such as {tests[0]}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        if self.unexpected and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

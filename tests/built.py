"""Packs that tests build with the command's own options, in the process of the test: TVM is there already, and each
process that ``scripts/build_kernels.py`` would start imports it first."""

from __future__ import annotations

import contextlib
import io

from schedules.commands import build


def build_kernels(*options: object) -> None:
    """What ``scripts/build_kernels.py`` does with these options."""
    with contextlib.redirect_stdout(io.StringIO()) as output:
        status = build.main([*map(str, options), "--jobs", "1"])
    assert status == 0, output.getvalue()

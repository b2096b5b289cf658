"""The warning that heads and sequence may be swapped."""

from __future__ import annotations

import sys
import warnings

from tvm_flash.errors import LayoutWarning

#: (file, line, layout) of calls that were warned about.
_warned: set[tuple[str, int, str]] = set()
_PACKAGE = __name__.partition(".")[0]


def warn_of_layout(text: str, layout: str) -> None:
    """Warn with a text, once for each line of a program that calls."""
    level, caller = 1, sys._getframe()
    while caller.f_back and caller.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        level, caller = level + 1, caller.f_back
    place = (caller.f_code.co_filename, caller.f_lineno, layout)
    if place not in _warned:
        _warned.add(place)
        warnings.warn(text, LayoutWarning, stacklevel=level)

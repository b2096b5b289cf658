"""A faster search of TVM's script parser for itself.

Every call of a macro, and every value that is given a name, makes TVM 0.27 look through the Python stack for the
parser at work.  It does so with ``inspect.stack``, which opens the source file of each frame; a kernel of a few
thousand macro calls spends five sixths of its time there (sm_90a, head_dim 128: 8.3 s, of which 1.4 s remain).  Here
the same frames are walked without their sources.
"""

from __future__ import annotations

import inspect
import sys
from types import FrameType, ModuleType

from tvm.script.parser.core.parser import ScriptMacro
from tvm.tirx.script.builder import ir as builder


def _frames(frame: FrameType | None):
    while frame is not None:
        yield frame
        frame = frame.f_back


def _find_parser(self: ScriptMacro):
    """The parser that this macro is called from; stands in for ``ScriptMacro._find_parser_def``."""
    for frame in _frames(sys._getframe(1)):
        parser = frame.f_globals.get(ScriptMacro.parser_object_name)
        if parser is not None:
            return parser
    raise RuntimeError(f"{ScriptMacro.parser_object_name} not available")


class _InspectWithoutSources(ModuleType):
    """The module ``inspect`` with a ``stack`` that knows where a frame is, and not what is written there."""

    def __getattr__(self, name: str):
        return getattr(inspect, name)

    @staticmethod
    def stack(context: int = 1) -> list[inspect.FrameInfo]:
        return [
            inspect.FrameInfo(frame, frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, None, None)
            for frame in _frames(sys._getframe(1))
        ]


def install() -> None:
    """Make TVM's parser use the faster search, in this process."""
    ScriptMacro._find_parser_def = _find_parser
    builder.inspect = _InspectWithoutSources("inspect")

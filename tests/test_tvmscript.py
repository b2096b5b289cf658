"""The faster parser of TVMScript leaves what TVM's own callers want of it as it was."""

from __future__ import annotations

import inspect

from tvm.script import ir as I
from tvm.script import tirx as T
from tvm.script.parser.core.diagnostics import Source
from tvm.tirx import PrimFunc
from tvm.tirx.script.parser import entry

from schedules.definition import tvmscript  # makes the parser the faster one


def test_the_quick_stack_has_the_frames_and_lines_of_pythons():
    quick, pythons = entry.inspect.stack(), inspect.stack()
    assert [found.frame for found in quick] == [found.frame for found in pythons]
    assert "entry.inspect.stack()" in quick[0].code_context[0]  # and so was its line's number kept
    for found, expected in zip(quick[1:], pythons[1:], strict=True):
        assert (found.filename, found.lineno) == (expected.filename, expected.lineno)
        assert found.code_context == expected.code_context


def test_functions_in_a_class_are_left_to_the_class():
    @I.ir_module
    class Module:
        @T.prim_func
        def nothing(a: T.handle):
            A = T.match_buffer(a, (4,), "float32")
            for i in T.serial(4):
                A[i] = T.float32(0)

    assert isinstance(Module["nothing"], PrimFunc)


def test_a_source_that_is_known_is_the_one_that_was_found():
    def one(a: T.int32):
        b: T.int32 = a
        T.evaluate(b)

    found = Source.__new__(Source)
    tvmscript._look_for_source(found, one)
    assert vars(Source(one)) == vars(Source(one)) == vars(found) and "b: T.int32 = a" in found.source

"""A faster parser of TVMScript: TVM 0.27's own, without what its callers here have no use for.

A kernel is a few thousand calls of macros and some ten thousand expressions, and most of the time that TVM's parser
takes for them is saved here: a kernel of sm_90a at head_dim 128 took 8.3 s to parse and takes 1.4 s without the search
for the parser alone, and the mma.sync kernels of head_dim 64 took 2.5 times as long without the rest.  The functions
that come out are the same, but for the places in source files that TVM notes in them.

* It looks for itself in the stack, and asks for the stack at each function: ``inspect.stack`` opens the source file of
  each frame, and looks for its module among all that are loaded, which took a third of the time of deriving an operator
  where torch and JAX are loaded.  Here the parser is kept in a list, and frames come without their sources.
* It looks for a macro's source in its file whenever it is defined, and reads it again at each call.  Here a function is
  looked for once, and a text read once.
* It compiles and evaluates each node of an expression as a program of its own.  Here names, constants, attributes,
  subscripts, tuples and calls, of operands that it has evaluated, are what they are in Python; names and constants have
  nothing in them to be visited; and a value that is given a name is not first a program that gives it.
* It notes in each node of the function where in a source file it came from.  Here it doesn't.
"""

from __future__ import annotations

import contextlib
import inspect
import linecache
import sys
from dataclasses import dataclass
from functools import cache
from types import CodeType, FrameType, ModuleType

from tvm.script.parser.core import doc, evaluator
from tvm.script.parser.core.diagnostics import Source
from tvm.script.parser.core.evaluator import ExprEvaluator
from tvm.script.parser.core.parser import Parser, ScriptMacro
from tvm.tirx.script.builder import ir as builder
from tvm.tirx.script.parser import entry

#: The parsers at work in this process, one within another; the last is the one that evaluates an expression.
_parsers: list[Parser] = []

_eval_expr_of_parser, _eval_by_python = Parser.eval_expr, evaluator._eval_expr
_assign_by_python, _look_for_source = evaluator._eval_assign, Source.__init__


def _eval_expr(self: Parser, node, extra_vars=None):
    """``Parser.eval_expr``, which can be asked meanwhile who is at work."""
    _parsers.append(self)
    try:
        return _eval_expr_of_parser(self, node, extra_vars)
    finally:
        _parsers.pop()


def _find_parser(self: ScriptMacro) -> Parser:
    """The parser that this macro is called from; stands in for ``ScriptMacro._find_parser_def``."""
    if not _parsers:
        raise RuntimeError(f"{ScriptMacro.parser_object_name} not available")
    return _parsers[-1]


def _evaluate(node: doc.AST, values: dict):
    """The value of an expression whose operands have been evaluated; stands in for ``evaluator._eval_expr``."""
    kind = type(node)
    if kind is doc.Name and node.id in values:
        return values[node.id]
    if kind is doc.Constant:
        return node.value
    if kind is doc.Attribute:
        return getattr(_evaluate(node.value, values), node.attr)
    if kind is doc.Subscript:
        return _evaluate(node.value, values)[_evaluate(node.slice, values)]
    if kind is doc.Tuple:
        return tuple(_items(node.elts, values))
    if kind is doc.Call:
        named = {}
        for keyword in node.keywords:
            value = _evaluate(keyword.value, values)
            named.update(value if keyword.arg is None else {keyword.arg: value})
        return _evaluate(node.func, values)(*_items(node.args, values), **named)
    return _eval_by_python(node, values)


def _items(nodes: list, values: dict) -> list:
    """Values of arguments or elements, of which those with a star are several."""
    found = []
    for node in nodes:
        if type(node) is doc.Starred:
            found.extend(_evaluate(node.value, values))
        else:
            found.append(_evaluate(node, values))
    return found


#: Nodes without anything in them to be visited: constants, and what says how another node is meant.
_LEAVES = (doc.Constant, doc.expr_context, doc.operator, doc.boolop, doc.unaryop, doc.cmpop)


def _visit(self: ExprEvaluator, node):
    """Stands in for ``ExprEvaluator._visit``."""
    kind = type(node)
    if (kind is doc.Name and node.id in self.value_table) or isinstance(node, _LEAVES):
        return node
    if kind is list:
        return [_visit(self, x) for x in node]
    if kind is tuple:
        return tuple(_visit(self, x) for x in node)
    return self._visit_node(node)


def _assign(target: doc.expr, source) -> dict:
    """The names that an assignment gives, and their values; stands in for ``evaluator._eval_assign``."""
    return {target.id: source} if type(target) is doc.Name else _assign_by_python(target, source)


#: Sources that were looked for, by the number of a function's code, which is kept so that no other gets its number.
_sources: dict[int, tuple[CodeType, dict]] = {}


def _source(self: Source, program) -> None:
    """``Source.__init__``, which has looked for each function once."""
    code = getattr(program, "__code__", None)
    if code is None:
        return _look_for_source(self, program)
    if id(code) not in _sources:
        _look_for_source(self, program)
        _sources[id(code)] = code, vars(self).copy()
    vars(self).update(_sources[id(code)][1])
    return None


#: What the parser changes in the node of a function as it comes by: it takes the decorator off, and counts lines from
#: the beginning of the file.
_CHANGED = ("decorator_list", "lineno", "col_offset", "end_lineno", "end_col_offset")


@cache
def _read(text: str) -> tuple[doc.AST, list[tuple[doc.FunctionDef, dict]]]:
    """The tree of a text, and of each function in it what the parser will change."""
    tree, functions = doc.parse(text), []

    class Functions(doc.NodeVisitor):
        def visit_FunctionDef(self, node):
            functions.append((node, {name: getattr(node, name) for name in _CHANGED}))
            self.generic_visit(node)

    Functions().visit(tree)
    return tree, functions


def _as_ast(self: Source) -> doc.AST:
    """The tree of a text; stands in for ``Source.as_ast``."""
    tree, functions = _read(self.source)
    for function, original in functions:
        for name, value in original.items():
            setattr(function, name, list(value) if isinstance(value, list) else value)
    return tree


def _without_span(self: Parser, node: doc.AST):
    """Stands in for ``Parser.with_source_span``."""
    return contextlib.nullcontext()


def _unannotated(self: Parser, value):
    """Stands in for ``Parser.annotate_current_source_span``."""
    return value


@dataclass(frozen=True, slots=True)
class _Frame:
    """A frame as ``inspect.FrameInfo`` describes it, but that its line is read when somebody asks for it."""

    frame: FrameType
    lineno: int

    @property
    def filename(self) -> str:
        return self.frame.f_code.co_filename

    @property
    def code_context(self) -> list[str] | None:
        line = linecache.getline(self.filename, self.lineno, self.frame.f_globals)
        return [line] if line else None


class InspectWithQuickStack(ModuleType):
    """The module ``inspect``, but that ``stack`` reads no source file and looks at no loaded module.

    TVM asks for the stack at each ``T.prim_func``, and at what a ``meta_class`` allocates, and wants the frames and the
    line of one of them.
    """

    def __getattr__(self, name: str):
        return getattr(inspect, name)

    @staticmethod
    def stack(context: int = 1) -> list[_Frame]:
        frame, found = sys._getframe(1), []
        while frame is not None:
            found.append(_Frame(frame, frame.f_lineno))
            frame = frame.f_back
        return found


def install() -> None:
    """Make TVM's parser the faster one, in this process."""
    Parser.eval_expr = _eval_expr
    Parser.with_source_span = _without_span
    Parser.annotate_current_source_span = _unannotated
    ScriptMacro._find_parser_def = _find_parser
    Source.__init__ = _source
    Source.as_ast = _as_ast
    ExprEvaluator._visit = _visit
    evaluator._eval_expr, evaluator._eval_assign = _evaluate, _assign
    builder.inspect = entry.inspect = InspectWithQuickStack("inspect")

"""Expressions of a definition as one would write them on paper: ``1 - tanh(s / softcap)²``.

Casts between numbers are left out, and so is what keeps an index within its table.  Whatever has no form of its own
here stands as TIR prints it.
"""

from __future__ import annotations

import re

import tvm_ffi
from tvm import tirx
from tvm.ir import Call, Expr
from tvm.ir.expr import TensorLoad

#: How tightly each kind of expression holds together; an operand that holds less tightly gets parentheses.
_CHOICE, _OR, _AND, _NOT, _COMPARED, _SUM, _PRODUCT, _SIGN, _POWER, _ATOM = range(10)

#: Infix operators: their sign, how tightly they hold, and whether the right operand must hold more tightly.
_INFIX = {
    tirx.Or: (" or ", _OR, False),
    tirx.And: (" and ", _AND, False),
    tirx.LT: (" < ", _COMPARED, True),
    tirx.LE: (" <= ", _COMPARED, True),
    tirx.GT: (" > ", _COMPARED, True),
    tirx.GE: (" >= ", _COMPARED, True),
    tirx.EQ: (" == ", _COMPARED, True),
    tirx.NE: (" != ", _COMPARED, True),
    tirx.Add: (" + ", _SUM, False),
    tirx.Sub: (" - ", _SUM, True),
    tirx.Mul: (" * ", _PRODUCT, False),
    tirx.Div: (" / ", _PRODUCT, True),
    tirx.FloorDiv: (" // ", _PRODUCT, True),
    tirx.FloorMod: (" % ", _PRODUCT, True),
}

_FUNCTIONS = {tirx.Min: "min", tirx.Max: "max"}


def text(expr: Expr) -> str:
    """An expression in one line."""
    return _written(expr)[0]


def _written(e: Expr) -> tuple[str, int]:
    """The text, and how tightly it holds together."""
    if isinstance(e, (tirx.IntImm, tirx.FloatImm)):
        return _number(e)
    if isinstance(e, tirx.Var):
        return re.sub(r"^(.+)_size(\d+)$", r"\1.shape[\2]", e.name), _ATOM
    if isinstance(e, tirx.Cast):
        is_cut = str(e.value.ty.dtype).startswith(("float", "bfloat")) and str(e.ty.dtype).startswith("int")
        return (f"trunc({text(e.value)})", _ATOM) if is_cut else _written(e.value)
    if isinstance(e, tirx.Mul) and tvm_ffi.structural_equal(e.a, e.b):
        return f"{_operand(e.a, _ATOM)}²", _POWER
    negated = _negated(e)
    if negated is not None:
        return f"-{_operand(negated, _SIGN)}", _SIGN
    if type(e) in _INFIX:
        sign, holds, tighter = _INFIX[type(e)]
        return f"{_operand(e.a, holds)}{sign}{_operand(e.b, holds + tighter)}", holds
    if type(e) in _FUNCTIONS:
        return f"{_FUNCTIONS[type(e)]}({text(e.a)}, {text(e.b)})", _ATOM
    if isinstance(e, tirx.Not):
        return f"not {_operand(e.a, _NOT)}", _NOT
    if isinstance(e, tirx.Select) and _is_absolute(e):
        return f"|{text(e.true_value)}|", _ATOM
    if isinstance(e, tirx.Select):
        return _choice(e.condition, e.true_value, e.false_value)
    if isinstance(e, TensorLoad):
        return f"{e.source.name}[{', '.join(text(_free(x)) for x in e.indices)}]", _ATOM
    if isinstance(e, Call):
        return _call(e)
    return str(e), _ATOM


def _negated(e: Expr) -> Expr | None:
    """What has its sign changed, if that is all that happens."""
    if isinstance(e, tirx.Sub) and _is(e.a, 0):
        return e.b
    if isinstance(e, tirx.Mul):
        return e.a if _is(e.b, -1) else e.b if _is(e.a, -1) else None
    return None


def _is_absolute(e: tirx.Select) -> bool:
    """Whether it is how TIR writes the absolute value of an integer."""
    negated = _negated(e.false_value)
    same = negated is not None and tvm_ffi.structural_equal(negated, e.true_value)
    return same and isinstance(e.condition, tirx.GE) and tvm_ffi.structural_equal(e.condition.a, e.true_value)


def _is(e: Expr, value: int) -> bool:
    return isinstance(e, (tirx.IntImm, tirx.FloatImm)) and e.value == value


def _operand(e: Expr, least: int) -> str:
    found, holds = _written(e)
    return found if holds >= least else f"({found})"


def _number(e) -> tuple[str, int]:
    if str(e.ty.dtype) == "bool":
        return str(bool(e.value)), _ATOM
    return f"{e.value:.6g}" if isinstance(e, tirx.FloatImm) else str(e.value), _ATOM if e.value >= 0 else _SIGN


def _choice(condition: Expr, a: Expr, b: Expr) -> tuple[str, int]:
    return f"{_operand(a, _OR)} if {_operand(condition, _OR)} else {_operand(b, _CHOICE)}", _CHOICE


def _call(e: Call) -> tuple[str, int]:
    name = getattr(e.op, "name", "").rpartition(".")[2]
    if name == "if_then_else":
        return _choice(*e.args)
    if name == "fabs" or name == "abs":
        return f"|{text(e.args[0])}|", _ATOM
    if name == "pow":
        return f"{_operand(e.args[0], _ATOM)} ** {_operand(e.args[1], _ATOM)}", _POWER
    if not name or not all(isinstance(x, Expr) for x in e.args):
        return str(e), _ATOM
    return f"{name}({', '.join(map(text, e.args))})", _ATOM


def _free(index: Expr) -> Expr:
    """An index as it was before it was moved into its table."""
    if isinstance(index, tirx.Max) and isinstance(index.a, tirx.Min) and isinstance(index.b, tirx.IntImm):
        return index.a.a if index.b.value == 0 else index
    return index

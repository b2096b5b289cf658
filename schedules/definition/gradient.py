"""The derivative of a score, as an expression: one rule a line.

:func:`derivative` differentiates a TIR expression with respect to one of its variables.  Whatever isn't of a floating
type (an index, a comparison, a cast to an integer) is a constant, whichever variables it has.  Where a function has no
derivative, the rules take what PyTorch's autograd takes:

* ``abs`` at 0 has 0;
* ``min`` and ``max`` of equal values have the mean of both derivatives, and so has ``max(x, 0)`` at 0 one half;
* ``sqrt`` at 0 has infinity, and ``pow(x, n)`` at 0 that of its formula, but 0 if n is 0;
* the rounding functions have 0 everywhere;
* ``Select`` and ``if_then_else`` have the derivative of the branch that is taken.

TIR's own operators leave out ``0 * x``, ``1 * x`` and ``x + 0`` when an expression is made; what is zero here is so
even if the other factor were infinite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import tvm_ffi
from tvm import tirx
from tvm.ir import Call, Expr
from tvm.ir.expr import TensorLoad
from tvm.script import tirx as T

from schedules.definition.errors import DefinitionError


def derivative(expr: Expr, x: tirx.Var) -> Expr:
    """``d expr / d x``, of the dtype of ``expr``.

    Parameters
    ----------
    expr: of a floating type, made of the operations in ``NODES`` and ``FUNCTIONS``.
    x: a variable of a floating type.

    Raises
    ------
    DefinitionError: ``expr`` has ``x`` in an operation without a rule; the message has that operation.
    """

    def d(e: Expr) -> Expr:
        if e.same_as(x):
            return _number(e, 1)
        if not _is_floating(e) or not _mentions(e, x):
            return _number(e, 0)
        if isinstance(e, Call):
            rule = FUNCTIONS.get(e.op.name.rpartition(".")[2])
            if rule is not None:
                return rule(d, e, *e.args)
        elif type(e) in NODES:
            return NODES[type(e)](d, e)
        raise DefinitionError(f"no derivative with respect to {x.name} is known of {e}, a part of {expr}")

    return d(expr)


def by_elements(expr: Expr, table: tirx.Var) -> list[tuple[tuple[Expr, ...], Expr]]:
    """The elements of a table that ``expr`` reads, each by its indices, and the derivative with respect to it.

    Elements whose indices are written differently are told apart, though they may be the same one.

    Raises
    ------
    DefinitionError: as :func:`derivative`.
    """
    loads: list[TensorLoad] = []

    def collect(load: TensorLoad) -> None:
        if load.source.same_as(table) and not any(tvm_ffi.structural_equal(load, x) for x in loads):
            loads.append(load)

    tvm_ffi.structural_walk(expr, [(TensorLoad, collect)])
    return [(tuple(load.indices), _by_element(expr, load)) for load in loads]


def _by_element(expr: Expr, load: TensorLoad) -> Expr:
    element = tirx.Var(load.source.name, load.ty.dtype)

    def hide(node):
        return element if isinstance(node, TensorLoad) and tvm_ffi.structural_equal(node, load) else node

    def show(node):
        return load if isinstance(node, tirx.Var) and node.same_as(element) else node

    found = derivative(tvm_ffi.structural_map(expr, hide, order="post"), element)
    return tvm_ffi.structural_map(found, show, order="post")


def _is_floating(e: Expr) -> bool:
    return str(e.ty.dtype).startswith(("float", "bfloat"))


def _mentions(e: Expr, x: tirx.Var) -> bool:
    found = []
    tvm_ffi.structural_walk(e, [(tirx.Var, lambda v: found.append(v.same_as(x)))])
    return any(found)


def _number(like: Expr, value: float) -> Expr:
    """A constant of the dtype of ``like``."""
    return tirx.const(float(value) if _is_floating(like) else value, like.ty.dtype)


def _is(e: Expr, value: float) -> bool:
    return isinstance(e, tirx.FloatImm) and e.value == value


# ---------------------------------------------------------------- arithmetic that keeps derivatives small


def _times(a: Expr, b: Expr) -> Expr:
    """``a * b``; of ``a * (1 / b)`` a quotient is made, and ``b * (x / b)`` is ``x``, as the chain rule yields them."""
    for x, y in ((a, b), (b, a)):
        if isinstance(y, tirx.Div):
            if tvm_ffi.structural_equal(x, y.b):
                return y.a
            if _is(y.a, 1):
                return x / y.b
    return a * b


def _minus(a: Expr, b: Expr) -> Expr:
    return -b if _is(a, 0) else a - b


def _choice(make: Callable, condition: Expr, a: Expr, b: Expr) -> Expr:
    return a if tvm_ffi.structural_equal(a, b) else make(condition, a, b)


# ---------------------------------------------------------------- rules: d(u) is the derivative of u, e the expression


def _quotient(d, e):
    return _minus(d(e.a), _times(e, d(e.b))) / e.b


def _extreme(d, e, is_first: Expr, is_second: Expr):
    a, b = d(e.a), d(e.b)
    mean = _times(a + b, _number(e, 0.5))
    return _choice(tirx.Select, is_first, a, _choice(tirx.Select, is_second, b, mean))


def _cast(d, e):
    inner = d(e.value)
    return _number(e, inner.value) if isinstance(inner, tirx.FloatImm) else tirx.Cast(e.ty.dtype, inner)


def _let(d, e):
    def replace(node):
        return e.value if isinstance(node, tirx.Var) and node.same_as(e.var) else node

    return d(tvm_ffi.structural_map(e.body, replace, order="post"))


def _absolute(d, e, u):
    zero = _number(u, 0)
    sign = tirx.Select(u > zero, _number(u, 1), tirx.Select(u < zero, _number(u, -1), zero))
    return _times(sign, d(u))


def _power(d, e, u, n):
    zero, one = _number(u, 0), _number(u, 1)
    if isinstance(n, tirx.FloatImm):
        by_base = _times(n, u if n.value == 2 else T.pow(u, n - one)) if n.value else zero
    else:
        by_base = tirx.Select(n == zero, zero, n * T.pow(u, n - one))
    by_exponent = tirx.Select(tirx.And(u == zero, n >= zero), zero, e * T.log(u))
    return _times(by_base, d(u)) + _times(by_exponent, d(n))


def _flat(d, e, *_):
    return _number(e, 0)


#: Rules for the nodes of TIR, ``rule(d, e)``.
NODES: Mapping[type, Callable] = {
    tirx.Add: lambda d, e: d(e.a) + d(e.b),
    tirx.Sub: lambda d, e: _minus(d(e.a), d(e.b)),
    tirx.Mul: lambda d, e: _times(d(e.a), e.b) + _times(e.a, d(e.b)),
    tirx.Div: _quotient,
    tirx.Max: lambda d, e: _extreme(d, e, e.a > e.b, e.b > e.a),
    tirx.Min: lambda d, e: _extreme(d, e, e.a < e.b, e.b < e.a),
    tirx.Select: lambda d, e: _choice(tirx.Select, e.condition, d(e.true_value), d(e.false_value)),
    tirx.Cast: _cast,
    tirx.Let: _let,
}

#: Rules for functions by name, ``rule(d, e, *arguments)``.
FUNCTIONS: Mapping[str, Callable] = {
    "exp": lambda d, e, u: _times(e, d(u)),
    "exp2": lambda d, e, u: _times(e * _number(e, math.log(2)), d(u)),
    "exp10": lambda d, e, u: _times(e * _number(e, math.log(10)), d(u)),
    "log": lambda d, e, u: d(u) / u,
    "log2": lambda d, e, u: d(u) / (u * _number(e, math.log(2))),
    "log10": lambda d, e, u: d(u) / (u * _number(e, math.log(10))),
    "log1p": lambda d, e, u: d(u) / (_number(e, 1) + u),
    "sqrt": lambda d, e, u: _times(d(u), _number(e, 0.5)) / e,
    "rsqrt": lambda d, e, u: _times(e * e * e * _number(e, -0.5), d(u)),
    "pow": _power,
    "fabs": _absolute,
    "tanh": lambda d, e, u: _times(_number(e, 1) - e * e, d(u)),
    "sigmoid": lambda d, e, u: _times(e * (_number(e, 1) - e), d(u)),
    "erf": lambda d, e, u: _times(T.exp(-(u * u)) * _number(e, 2 / math.sqrt(math.pi)), d(u)),
    "sin": lambda d, e, u: _times(T.cos(u), d(u)),
    "cos": lambda d, e, u: _times(-T.sin(u), d(u)),
    "tan": lambda d, e, u: _times(_number(e, 1) + e * e, d(u)),
    "sinh": lambda d, e, u: _times(T.cosh(u), d(u)),
    "cosh": lambda d, e, u: _times(T.sinh(u), d(u)),
    "atan": lambda d, e, u: d(u) / (_number(e, 1) + u * u),
    "fma": lambda d, e, u, v, w: _times(d(u), v) + _times(u, d(v)) + d(w),
    "if_then_else": lambda d, e, condition, u, v: _choice(T.if_then_else, condition, d(u), d(v)),
    **dict.fromkeys(("floor", "ceil", "round", "nearbyint", "trunc"), _flat),
}

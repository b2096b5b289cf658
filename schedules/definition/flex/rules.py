"""What an operation of PyTorch is, as a TIR expression and in NumPy: one rule a line."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script import tirx as T

_POSITIONS = {"b": "b", "h": "h", "q_idx": "i", "kv_idx": "j"}


@dataclass(frozen=True)
class Node:
    """An operation of a graph.

    ``what`` is the name of a rule, or ``argument`` (its name), ``constant`` (its value), ``parameter`` (its name and
    rank), ``part`` (of a parameter, while a graph is read), ``read`` (a parameter and its indices) or ``cast``.
    ``kind`` is that of the result: ``float``, ``int`` or ``bool``.
    """

    what: str
    operands: tuple[Any, ...]
    kind: str

    @property
    def is_score(self) -> bool:
        return self.what == "argument" and self.operands[0] == "score"

    @property
    def is_table(self) -> bool:
        """Whether it is a parameter, or a part of one, that is still to be indexed."""
        return self.what == "part" or (self.what == "parameter" and self.operands[1] > 0)

    @property
    def is_minus_infinity(self) -> bool:
        if self.what == "cast":
            return self.operands[0].is_minus_infinity
        return self.what == "constant" and self.operands[0] == -math.inf

    @property
    def is_natural(self) -> bool:
        """Whether it is known to be an integer that isn't negative."""
        if self.kind != "int":
            return False
        if self.what == "constant":
            return self.operands[0] >= 0
        if self.what == "argument" or self.what == "abs":
            return True
        if self.what == "remainder":
            return self.operands[1].is_natural
        if self.what in ("add", "mul", "floor_divide", "minimum"):
            return all(x.is_natural for x in self.operands)
        if self.what == "clamp":
            x, low, high = (*self.operands, None, None)[:3]
            return (x.is_natural or (low is not None and low.is_natural)) and (high is None or high.is_natural)
        return self.what in ("maximum", "clamp_min") and any(x.is_natural for x in self.operands)

    def parts(self) -> list[Node]:
        """It, and all nodes below it, each once."""
        found, todo = {}, [self]
        while todo:
            node = todo.pop()
            if id(node) not in found:
                found[id(node)] = node
                todo.extend(x for x in node.operands if isinstance(x, Node))
        return list(found.values())


class Language:
    """Evaluates nodes at the positions ``at``; a subclass says what numbers, casts and functions are."""

    def __init__(self, at, score=None):
        self._at, self._score, self._known = at, score, {}

    def value(self, node: Node):
        """What a node is; each is evaluated once."""
        if id(node) not in self._known:
            self._known[id(node)] = self._evaluate(node)
        return self._known[id(node)]

    def of_kind(self, node: Node, kind: str):
        """The same, converted."""
        if node.what == "constant":
            return self.constant(node.operands[0], kind)
        value = self.value(node)
        return value if node.kind == kind else self.cast(value, kind)

    def _evaluate(self, node: Node):
        what, operands = node.what, node.operands
        if what == "argument":
            return self._score if node.is_score else getattr(self._at, _POSITIONS[operands[0]])
        if what == "constant":
            return self.constant(operands[0], node.kind)
        if what == "parameter":
            return self.number(operands[0], node.kind)
        if what == "cast":
            return self.of_kind(operands[0], node.kind)
        if what == "read":
            parameter, *indices = operands
            return self.element(parameter.operands[0], [self._index(i, parameter, d) for d, i in enumerate(indices)])
        rule = RULES[what]
        kinds = rule.kinds(node)
        given = [None if x is None else self.of_kind(x, kind) for x, kind in zip(operands, kinds, strict=True)]
        result = rule.function(self, *given)
        return self.cast(result, "bool") if rule.kinds is _of_result and node.kind == "bool" else result

    def _index(self, index: Node, parameter: Node, dimension: int):
        """A negative index counts from the end, as it does in PyTorch."""
        i = self.of_kind(index, "int")
        if index.is_natural:
            return i
        return self.where(i < 0, i + self.size(parameter.operands[0], dimension), i)


class Tir(Language):
    """TIR expressions; floats are float32, integers have the dtype of indices, or are int32."""

    def constant(self, value, kind):
        if kind == "float":
            return T.float32(value)
        return tirx.const(bool(value), "bool") if kind == "bool" else tirx.const(int(value), self._at.i.ty.dtype)

    def cast(self, value, kind):
        if kind == "bool":
            return tirx.NE(value, tirx.const(0, value.ty.dtype))
        dtype = "float32" if kind == "float" else str(self._at.i.ty.dtype)
        if str(value.ty.dtype) == "bool":  # of vectors of bools that were cast, TVM's analysis of integers fails
            return tirx.Select(value, tirx.const(1, dtype), tirx.const(0, dtype))
        return T.Cast(dtype, value)

    def number(self, name, kind):
        value = self._at.param[name]
        return self.cast(value, "bool") if kind == "bool" and str(value.ty.dtype) != "bool" else value

    def element(self, name, indices):
        dtype = self._at.i.ty.dtype
        return self._at.table[name](*(i if i.ty.dtype == dtype else T.Cast(str(dtype), i) for i in indices))

    def size(self, name, dimension):
        return self._at.table[name].shape[dimension]

    @staticmethod
    def _alike(a, b):
        """Values of one kind, for an operation that takes one dtype: integers may have two."""
        return (a, b) if a.ty.dtype == b.ty.dtype else (T.Cast("int64", x) for x in (a, b))

    def where(self, condition, a, b):
        return tirx.Select(condition, *self._alike(a, b))

    def equal(self, a, b):
        return tirx.EQ(*self._alike(a, b))

    def not_equal(self, a, b):
        return tirx.NE(*self._alike(a, b))

    @staticmethod
    def like(a, value):
        return tirx.const(value, a.ty.dtype)

    logical_and, logical_or, logical_not = staticmethod(T.And), staticmethod(T.Or), staticmethod(tirx.Not)
    minimum, maximum = staticmethod(T.min), staticmethod(T.max)
    power = staticmethod(T.pow)

    def erf(self, a):
        """By Abramowitz and Stegun (7.1.26), to 1.5e-7; machines have none that vectorises."""
        x = T.abs(a)
        t = 1 / (1 + T.float32(0.3275911) * x)
        terms = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
        tail = functools.reduce(lambda y, c: (y + T.float32(c)) * t, terms, T.float32(0)) * T.exp(-(x * x))
        return _sign(self, a) * (1 - tail)

    @staticmethod
    def floor_divide(a, b):
        return T.floor(a / b) if "float" in str(a.ty.dtype) else T.floordiv(a, b)

    def remainder(self, a, b):
        return a - b * self.floor_divide(a, b) if "float" in str(a.ty.dtype) else T.floormod(a, b)

    def __getattr__(self, name):
        return getattr(T, name)


class NumPy(Language):
    """Arrays that broadcast against the scores; floats are float64."""

    def constant(self, value, kind):
        return {"float": np.float64, "int": np.int64, "bool": np.bool_}[kind](value)

    def cast(self, value, kind):
        return np.asarray(value).astype({"float": np.float64, "int": np.int64, "bool": np.bool_}[kind])

    def number(self, name, kind):
        return self.cast(self._at.params[name], kind)

    def element(self, name, indices):
        table = self._at.params[name]
        within = (np.clip(self.cast(i, "int"), 0, n - 1) for i, n in zip(indices, table.shape, strict=True))
        found = table[tuple(within)]
        return found if found.dtype.kind in "bi" else found.astype(np.float64)

    def size(self, name, dimension):
        return self._at.params[name].shape[dimension]

    @staticmethod
    def erf(a):
        return np.vectorize(math.erf, otypes=[np.float64])(a)

    @staticmethod
    def like(a, value):
        return value

    def __getattr__(self, name):
        return getattr(np, name)


# ---------------------------------------------------------------- rules: l is the language, a, b, c are the operands


def _of_result(node):
    """The result's kind; truth values are computed with as integers, of which each but 0 is true."""
    return ["int" if node.kind == "bool" else node.kind] * len(node.operands)


def _of_all(node):
    kinds = [x.kind for x in node.operands]
    return ["float" if "float" in kinds else "int"] * len(kinds)


def _of_choice(node):
    return ["bool", node.kind, node.kind]


def _of_bools(node):
    return ["bool"] * len(node.operands)


@dataclass(frozen=True)
class Rule:
    """How an operation is computed, and of which kinds its operands are taken."""

    function: Callable
    kinds: Callable[[Node], list[str]] = _of_result


def _clamp(l, a, low=None, high=None):
    a = a if low is None else l.maximum(a, low)
    return a if high is None else l.minimum(a, high)


def _relu(l, a):
    zero = l.like(a, 0)
    return l.where(a <= zero, zero, a)


def _leaky_relu(l, a, slope=0.01):
    return l.where(a > l.like(a, 0), a, slope * a)


def _elu(l, a, alpha=1.0, scale=1.0, input_scale=1.0):
    return l.where(a > l.like(a, 0), scale * a, scale * alpha * (l.exp(input_scale * a) - 1))


def _softplus(l, a, beta=1.0, threshold=20.0):
    return l.where(beta * a > threshold, a, l.log(1 + l.exp(beta * a)) / beta)


def _sign(l, a):
    one, zero = l.like(a, 1), l.like(a, 0)
    return l.where(a > zero, one, l.where(a < zero, -one, zero))


def _sigmoid(l, a):
    return 0.5 + 0.5 * l.tanh(0.5 * a)  # no infinity, of which its derivative would be NaN


def _differ(l, a, b):
    return l.not_equal(l.cast(a, "int"), l.cast(b, "int"))


#: What each ATen operation is.
RULES: dict[str, Rule] = {
    "add": Rule(lambda l, a, b: a + b),
    "sub": Rule(lambda l, a, b: a - b),
    "rsub": Rule(lambda l, a, b: b - a),
    "mul": Rule(lambda l, a, b: a * b),
    "div": Rule(lambda l, a, b: a / b),
    "div_floor": Rule(lambda l, a, b: l.floor_divide(a, b)),
    "floor_divide": Rule(lambda l, a, b: l.floor_divide(a, b)),
    "remainder": Rule(lambda l, a, b: l.remainder(a, b)),
    "neg": Rule(lambda l, a: -a),
    "abs": Rule(lambda l, a: l.abs(a)),
    "sign": Rule(_sign),
    "square": Rule(lambda l, a: a * a),
    "reciprocal": Rule(lambda l, a: 1 / a),
    "minimum": Rule(lambda l, a, b: l.minimum(a, b)),
    "maximum": Rule(lambda l, a, b: l.maximum(a, b)),
    "clamp": Rule(_clamp),
    "hardtanh": Rule(lambda l, a, low=-1.0, high=1.0: _clamp(l, a, low, high)),
    "clamp_min": Rule(lambda l, a, b: l.maximum(a, b)),
    "clamp_max": Rule(lambda l, a, b: l.minimum(a, b)),
    "relu": Rule(_relu),
    "leaky_relu": Rule(_leaky_relu),
    "elu": Rule(_elu),
    "softplus": Rule(_softplus),
    "pow": Rule(lambda l, a, b: l.power(a, b)),
    "exp": Rule(lambda l, a: l.exp(a)),
    "exp2": Rule(lambda l, a: l.exp2(a)),
    "log": Rule(lambda l, a: l.log(a)),
    "log2": Rule(lambda l, a: l.log2(a)),
    "expm1": Rule(lambda l, a: l.exp(a) - 1),
    "log1p": Rule(lambda l, a: l.log(1 + a)),
    "sqrt": Rule(lambda l, a: l.sqrt(a)),
    "rsqrt": Rule(lambda l, a: 1 / l.sqrt(a)),
    "sin": Rule(lambda l, a: l.sin(a)),
    "cos": Rule(lambda l, a: l.cos(a)),
    "tan": Rule(lambda l, a: l.sin(a) / l.cos(a)),
    "tanh": Rule(lambda l, a: l.tanh(a)),
    "sigmoid": Rule(_sigmoid),
    "erf": Rule(lambda l, a: l.erf(a)),
    "silu": Rule(lambda l, a: a * _sigmoid(l, a)),
    "gelu": Rule(lambda l, a: 0.5 * a * (1 + l.erf(math.sqrt(0.5) * a))),
    "gelu_tanh": Rule(lambda l, a: 0.5 * a * (1 + l.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * (a * a * a))))),
    "floor": Rule(lambda l, a: l.floor(a)),
    "ceil": Rule(lambda l, a: l.ceil(a)),
    "where": Rule(lambda l, a, b, c: l.where(a, b, c), _of_choice),
    "eq": Rule(lambda l, a, b: l.equal(a, b), _of_all),
    "ne": Rule(lambda l, a, b: l.not_equal(a, b), _of_all),
    "lt": Rule(lambda l, a, b: a < b, _of_all),
    "le": Rule(lambda l, a, b: a <= b, _of_all),
    "gt": Rule(lambda l, a, b: a > b, _of_all),
    "ge": Rule(lambda l, a, b: a >= b, _of_all),
    "logical_and": Rule(lambda l, a, b: l.logical_and(a, b), _of_bools),
    "logical_or": Rule(lambda l, a, b: l.logical_or(a, b), _of_bools),
    "logical_xor": Rule(_differ, _of_bools),
    "logical_not": Rule(lambda l, a: l.logical_not(a), _of_bools),
    "bitwise_and": Rule(lambda l, a, b: l.bitwise_and(a, b)),
    "bitwise_or": Rule(lambda l, a, b: l.bitwise_or(a, b)),
    "bitwise_xor": Rule(lambda l, a, b: l.bitwise_xor(a, b)),
    "bitwise_not": Rule(lambda l, a: -a - 1),
}

"""Masks and score modifications: a few lines of TIR expression each, with a float64 numpy twin beside it.

A score modification is a function ``(s, at) -> expression`` of the scaled score ``s``; a mask is ``at -> predicate``,
true where a query may see a key.  ``at`` is a :class:`Position`: the indices of the score and the run-time parameters
by name.  To add one, write the function, write its twin, and enter the name with its parameters in
:mod:`tvm_flash.catalogue`; no template has to know.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from tvm.ir import Expr
from tvm.script import tirx as T

from schedules.definition.errors import DefinitionError
from schedules.definition.parameters import Table
from tvm_flash import catalogue, reference
from tvm_flash.packs.manifest import FARTHEST_START, Param


@dataclass(frozen=True)
class Position:
    """Where one score is: TIR expressions.

    ``b, h, i, j`` are batch, query head, query and key index.  ``param["name"]`` is a run-time parameter, of a tensor
    the value that belongs to this place: float32, int32 or a predicate.  ``table["name"](index, …)`` is an element of a
    table, each index moved to the nearest that there is, and ``table["name"].shape`` are its sizes.
    """

    b: Expr
    h: Expr
    i: Expr
    j: Expr
    seqlen_q: Expr
    seqlen_kv: Expr
    param: Mapping[str, Expr]
    table: Mapping[str, Table] = field(default_factory=dict)

    @property
    def diagonal(self) -> Expr:
        """The key position that query ``i`` stands on: the last query stands on the last key.

        With a parameter ``query_start``, and unless ``has_query_start`` is 0, query 0 stands there instead.
        """
        if "query_start" not in self.param:
            return self.i + self.seqlen_kv - self.seqlen_q
        start = T.max(T.min(self.param["query_start"], FARTHEST_START), -FARTHEST_START)
        dtype = self.seqlen_kv.ty.dtype
        given = self.param["has_query_start"] != 0
        return self.i + T.Select(given, T.Cast(str(dtype), start), self.seqlen_kv - self.seqlen_q)


@dataclass(frozen=True)
class Head:
    """Where a sink is: batch and query head, TIR expressions, and the run-time parameters as in :class:`Position`."""

    b: Expr
    h: Expr
    param: Mapping[str, Expr]


@dataclass(frozen=True)
class ScoreModification:
    """``expr(s, at)``: the modified score as float32; ``twin``: the same in numpy (:mod:`tvm_flash.reference`).

    ``sink(at)``, of a :class:`Head`, is a logit that the softmax has beside those of keys, float32, if there is one;
    its twin is that of the score's twin (:func:`tvm_flash.reference.with_sink`).
    """

    name: str
    expr: Callable[[Expr, Position], Expr]
    twin: Callable
    params: tuple[Param, ...] = ()
    sink: Callable[[Head], Expr] | None = None


@dataclass(frozen=True)
class Mask:
    """``expr(at)`` is a predicate, or None for "always"; ``twin`` is the same in numpy.

    Comparisons that are affine in ``i`` and ``j``, joined by ``T.And`` and ``T.Or``, let the templates skip and unmask
    whole tiles; anything else is computed element by element.  ``mask & other`` sees what both see, ``mask | other``
    what one of them does; parameters of one name are the same.
    """

    name: str
    expr: Callable[[Position], Expr | None]
    twin: Callable
    params: tuple[Param, ...] = ()

    def __and__(self, other: Mask) -> Mask:
        return self._joined(other, "and", T.And, np.logical_and, lambda a, b: b if a is None else a)

    def __or__(self, other: Mask) -> Mask:
        return self._joined(other, "or", T.Or, np.logical_or, lambda a, b: None)

    def _joined(self, other: Mask, word: str, join: Callable, join_twins: Callable, where_always: Callable) -> Mask:
        """Both masks as one; ``where_always`` says what they are if one of them hides nothing."""
        if not isinstance(other, Mask):
            return NotImplemented
        params = tuple(dict.fromkeys((*self.params, *other.params)))
        names = [p.name for p in params]
        if again := {n for n in names if names.count(n) > 1}:
            raise DefinitionError(
                f"masks {self.name!r} and {other.name!r}: mean different parameters by {min(again)!r}"
            )

        def expr(at):
            a, b = self.expr(at), other.expr(at)
            return where_always(a, b) if a is None or b is None else join(a, b)

        def twin(at):
            return join_twins(self.twin(at), other.twin(at))

        twin.__name__ = name = f"{self.name}_{word}_{other.name}"
        return Mask(name, expr, twin, params)


def _softcap(s, at):
    return at.param["softcap"] * T.tanh(s / at.param["softcap"])


def _alibi(s, at):
    return s - at.param["alibi_slopes"] * T.abs(T.Cast("float32", at.diagonal - at.j))


def _softcap_alibi(s, at):
    return _alibi(_softcap(s, at), at)


def _optional(s, at):
    capped, biased = at.param["softcap"] != T.float32(0), at.param["has_alibi_slopes"] != 0
    value = T.Select(capped, _softcap(s, at), s)
    distance = T.abs(T.Cast("float32", at.diagonal - at.j))
    value = value - T.Select(biased, at.param["alibi_slopes"], T.float32(0)) * distance
    return T.if_then_else(T.Or(capped, biased), value, s)


def _biased(s, at):
    return s + at.param["bias"]


def _sinks(at):
    return T.Select(at.param["has_sinks"] != 0, at.param["sinks"], T.float32(-math.inf))


def _causal(at):
    return at.j <= at.diagonal


def _window(at):
    return T.And(at.j >= at.diagonal - at.param["window_left"], at.j <= at.diagonal + at.param["window_right"])


def _sink_window(at):
    near = T.Or(at.j >= at.diagonal - at.param["window_left"], at.j < at.param["sink_tokens"])
    return T.And(at.j <= at.diagonal + at.param["window_right"], near)


def _padded(at):
    return T.And(T.And(at.j >= at.param["kv_start"], at.j < at.param["kv_end"]), _window(at))


def _score(expr: Callable[[Expr, Position], Expr], twin: Callable, sink: Callable | None = None) -> ScoreModification:
    name = twin.__name__
    return ScoreModification(name, expr, twin, catalogue.SCORES[name].params, sink)


def _mask(expr: Callable[[Position], Expr | None], twin: Callable) -> Mask:
    name = twin.__name__
    return Mask(name, expr, twin, catalogue.MASKS[name].params)


IDENTITY = _score(lambda s, at: s, reference.identity)
FULL = _mask(lambda at: None, reference.full)

#: Score modifications by name.
SCORES: Mapping[str, ScoreModification] = {
    m.name: m
    for m in (
        IDENTITY,
        _score(_softcap, reference.softcap),
        _score(_alibi, reference.alibi),
        _score(_softcap_alibi, reference.softcap_alibi),
        _score(_optional, reference.optional),
        _score(lambda s, at: s, reference.identity_sinks, lambda at: at.param["sinks"]),
        _score(_optional, reference.optional_sinks, _sinks),
        _score(_biased, reference.biased),
        _score(_biased, reference.biased_16),
    )
}

#: Masks by name.
MASKS: Mapping[str, Mask] = {
    m.name: m
    for m in (
        FULL,
        _mask(_causal, reference.causal),
        _mask(_window, reference.window),
        _mask(_sink_window, reference.sink_window),
        _mask(_padded, reference.padded),
        _mask(_padded, reference.positioned),
        _mask(lambda at: at.param["visible"], reference.given),
    )
}

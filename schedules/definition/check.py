"""Is a definition what its author means?  Its expressions against their numpy twins, its derivatives against
differences.

The expressions of the score, of the mask and of the derivatives are compiled as they stand, for every score of a small
call, and compared with what the twins say there; then the whole of attention, by its naive operator, with the float64
reference.  The first thing that differs is told with its place and its values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from schedules.definition import blocks
from schedules.definition.attention import Attention
from schedules.definition.blocks import Sizes
from schedules.definition.errors import DefinitionError
from schedules.definition.parameters import append_arguments, parameter_symbols
from schedules.definition.pattern import Pattern, match
from schedules.definition.sample import parameters_of
from tvm_flash import reference
from tvm_flash.packs.manifest import Param

#: Queries and keys of the calls in which every score is looked at, and of that which is computed as a whole: more and
#: fewer queries than keys.
_OF_SCORES, _OF_ALL = ((96, 160), (48, 32)), (9, 21)
_BATCH, _HEADS, _KV_HEADS, _HEAD_DIM = 2, 4, 2, 8
#: What a float32 expression may differ by from float64, of the largest value around; and a derivative from differences.
_TOLERANCE, _OF_DERIVATIVES = 1e-4, 1e-3


def check(definition: Attention) -> None:
    """Compare a definition with its twins.

    Raises
    ------
    DefinitionError: they disagree, or a twin fails; names what, where, and the values.
    """
    if definition.mask.twin is None or definition.score.twin is None:
        raise DefinitionError(f"{definition.name}: its mask and its score need a twin each, a numpy function")
    pattern = match(definition(_HEAD_DIM, "float32"))
    learnt = _derivatives_of(pattern)
    elements = _compiled(_elements(pattern, learnt))
    for lengths in _OF_SCORES:
        _check_scores(definition, _Call.of(definition, *lengths), elements, learnt)
    _check_whole(definition, _Call.of(definition, *_OF_ALL))


@dataclass(frozen=True)
class _Call:
    """A small call: how many queries and keys it has, its scaled products, its parameters, and what twins get."""

    name: str
    lengths: tuple[int, int]
    products: np.ndarray
    params: Mapping[str, Any]
    declared: tuple[Param, ...]
    at: reference.Positions

    @staticmethod
    def of(definition: Attention, seqlen_q: int, seqlen_kv: int) -> _Call:
        shape = (_BATCH, _HEADS, seqlen_q, seqlen_kv)
        params = parameters_of(definition, *shape)
        products = 2 * np.random.default_rng(1).standard_normal(shape, np.float32)
        axes = {p.name: p.axes for p in definition.params}
        at = reference.positions(*shape, reference.beside_scores(params, axes))
        return _Call(definition.name, (seqlen_q, seqlen_kv), products, params, definition.params, at)

    def twin(self, what: str, compute: Callable) -> np.ndarray:
        """What a twin says of every score."""
        try:
            return np.broadcast_to(np.asarray(compute()), self.products.shape)
        except Exception as e:  # a user's function may fail in any way; the cause is chained
            shapes = ", ".join(f"{n} {np.shape(x) or x}" for n, x in self.params.items())
            raise DefinitionError(
                f"{self.name}: the twin of its {what} fails in a call {self}: {type(e).__name__}: {e}; its parameters "
                f"are {shapes or 'none'}; values that make sense are given by the definition's example"
            ) from e

    def __str__(self) -> str:
        return "of {} x {} heads, {} queries and {} keys".format(*self.products.shape)

    def place(self, index: tuple[int, ...]) -> str:
        """A score in words, with the parameters there."""
        where = ", ".join(f"{a}={x}" for a, x in zip("bhij", index, strict=True))
        at = dict(zip("bhij", index, strict=True))
        known = [f"{p.name} is {self.params[p.name]}" for p in self.declared if not p.is_tensor]
        known += [f"{p.name} is {self.params[p.name][tuple(at[a] for a in p.axes)]}" for p in self.declared if p.axes]
        return f"at {where} {self}" + (f", where {', '.join(known)}" if known else "")


def _check_scores(definition: Attention, call: _Call, elements: Callable, learnt: tuple[Param, ...] | None) -> None:
    score, at, products = definition.score.twin, call.at, call.products.astype(np.float64)
    with np.errstate(all="ignore"):
        want_seen = call.twin(f"mask {definition.mask.name!r}", lambda: definition.mask.twin(at)).astype(bool)
        want_score = call.twin(f"score {definition.score.name!r}", lambda: score(products, at))
        found = elements(call)
        differ = np.argwhere(found["seen"].astype(bool) != want_seen)
        if len(differ):
            index = tuple(map(int, differ[0]))
            words = ("hides", "shows") if want_seen[index] else ("shows", "hides")
            raise DefinitionError(
                f"{call.name}: the mask {definition.mask.name!r} and its twin disagree {call.place(index)}: the "
                f"expression {words[0]} the key, the twin {words[1]} it; {len(differ)} of {want_seen.size} differ"
            )
        _compare(call, f"score {definition.score.name!r}", found["score"], want_score, _TOLERANCE)
        if learnt is None:
            return
        by_product = (lambda s: score(s, at)), products
        _compare_slopes(call, "derivative of the score by the scaled product", found["slope"], *by_product)
        for p in learnt:
            by_param = _by_param(score, products, at, p)
            _compare_slopes(call, f"derivative of the score by {p.name!r}", found[f"d_{p.name}"], *by_param)


def _by_param(score: Callable, products: np.ndarray, at: reference.Positions, param: Param):
    """Every score as a function of a parameter, and where it is; of a table of what is added to all of its elements."""
    value = np.asarray(at.params[param.name], np.float64)
    if not param.rank:
        return (lambda x: score(products, at.with_param(param.name, x))), value
    return (lambda x: score(products, at.with_param(param.name, value + x))), np.float64(0)


def _compare_slopes(call: _Call, what: str, found: np.ndarray, function: Callable, x: np.ndarray) -> None:
    """Compare derivatives with central differences; or, where a kink or a jump may be within a step, as there is beside
    one score or two of a call if scores are clipped, with the differences to both sides: they lie between these."""
    want = np.broadcast_to(reference.difference(function, x), found.shape)
    margin = _OF_DERIVATIVES * _scale(want)
    if not _near(found, want, _OF_DERIVATIVES).all():
        left, right = reference.differences_beside(function, x)
        between = (np.minimum(left, right) - margin <= found) & (found <= np.maximum(left, right) + margin)
        want = np.where(between, found, want)
    _compare(call, what, found, want, _OF_DERIVATIVES)


def _scale(want: np.ndarray) -> np.ndarray:
    return np.maximum(1.0, np.abs(np.where(np.isfinite(want), want, 0)))


def _near(found: np.ndarray, want: np.ndarray, tolerance: float) -> np.ndarray:
    close = np.abs(found - want) <= tolerance * _scale(want)
    return close | (found == want) | (np.isnan(found) & np.isnan(want))


def _compare(call: _Call, what: str, found: np.ndarray, want: np.ndarray, tolerance: float) -> None:
    near = _near(found, want, tolerance)
    if near.all():
        return
    index = tuple(map(int, np.argwhere(~near)[0]))
    twin = "the twin's differences" if "derivative" in what else "the twin"
    raise DefinitionError(
        f"{call.name}: the {what} and {twin} disagree {call.place(index)}, the scaled product being "
        f"{call.products[index]:.6g}: the expression has {found[index]:.6g}, {twin} {want[index]:.6g}; "
        f"{(~near).sum()} of {near.size} differ"
    )


def _check_whole(definition: Attention, call: _Call) -> None:
    """Output and log-sum-exp by the naive operator, with what a sink adds."""
    rng, (seqlen_q, seqlen_kv) = np.random.default_rng(2), call.lengths
    sizes = ((_HEADS, seqlen_q), (_KV_HEADS, seqlen_kv), (_KV_HEADS, seqlen_kv))
    q, k, v = (rng.standard_normal((_BATCH, *n, _HEAD_DIM), np.float32) for n in sizes)
    o, lse = np.empty_like(q), np.empty(q.shape[:3], np.float32)
    _run(definition(_HEAD_DIM, "float32"), [q, k, v, o, lse, 0.3, *call.params.values()], (3, 4))
    want, want_lse = reference.attention(
        q,
        k,
        v,
        softmax_scale=0.3,
        mask=definition.mask.twin,
        score=definition.score.twin,
        params=call.params,
        axes={p.name: p.axes for p in definition.params},
    )
    for what, got, exact in (("output", o, want), ("log-sum-exp", lse, want_lse)):
        near = np.isclose(got, exact, rtol=_TOLERANCE, atol=_TOLERANCE)
        if not near.all():
            index = tuple(map(int, np.argwhere(~near)[0]))
            raise DefinitionError(
                f"{call.name}: the {what} by the operator and by the twins disagree at {index} of a call {call}: "
                f"{got[index]:.6g} and {exact[index]:.6g}"
            )


# ---------------------------------------------------------------- the expressions, compiled as they stand


def _derivatives_of(pattern: Pattern) -> tuple[Param, ...] | None:
    """The parameters of the score that are learnt; None if the score has no derivative, and so no backward."""
    try:
        pattern.differentiate()
    except DefinitionError:
        return None
    return pattern.learnt


def _elements(pattern: Pattern, learnt: tuple[Param, ...] | None) -> PrimFunc:
    """``(s, seen, score, [slope, one derivative a learnt parameter,] *params)``, each of every score."""
    arguments, values = parameter_symbols(pattern.params, pattern.index_dtype)
    sizes = [tirx.Var(n, pattern.index_dtype) for n in ("batch", "heads", "seqlen_q", "seqlen_kv")]
    names = ["s", "seen", "score", *(() if learnt is None else ("slope", *(f"d_{p.name}" for p in learnt)))]
    buffers = {n: tirx.decl_buffer(sizes, "float32", name=n) for n in names}
    n = Sizes(*sizes[:3], None, sizes[1], sizes[3], softmax_scale=T.float32(1), params=values)
    of = (lambda name: buffers[name]), pattern, n

    @T.prim_func(s_tir=True, check_well_formed=False)
    def elements():
        T.func_attr({"tirx.noalias": True, "global_symbol": "elements"})
        _write(*of, learnt)

    return append_arguments(elements, [*buffers.values(), *arguments])


def _write(buffer: Callable, pattern: Pattern, n: Sizes, learnt: tuple[Param, ...] | None) -> None:
    s = buffer("s")

    def visible(site, i, j, _):
        seen = pattern.visible(site, i, j)
        return T.float32(1) if seen is None else T.Select(seen, T.float32(1), T.float32(0))

    def of_parameter(p):
        def slope(site, i, j, x):
            if not p.rank:
                return pattern.parameter_gradient(p.name, site, x, i, j)
            total = T.float32(0)
            for _, of_element in pattern.table_gradients(p.name, site, x, i, j):
                total = total + of_element
            return total

        return slope

    blocks.of_scores("seen", buffer("seen"), s, n, visible)
    blocks.of_scores("score", buffer("score"), s, n, lambda site, i, j, x: pattern.score(site, x, i, j))
    if learnt is not None:
        blocks.of_scores("slope", buffer("slope"), s, n, lambda site, i, j, x: pattern.score_gradient(site, x, i, j))
        for p in learnt:
            blocks.of_scores(f"d_{p.name}", buffer(f"d_{p.name}"), s, n, of_parameter(p))


def _compiled(func: PrimFunc) -> Callable[[_Call], dict[str, np.ndarray]]:
    module = tvm.compile(func, target=tvm.target.Target({"kind": "llvm"}))

    def run(call: _Call) -> dict[str, np.ndarray]:
        names = [str(p.name) for p in func.params[: len(func.params) - len(call.params)]]
        found = {n: np.full(call.products.shape, np.nan, np.float32) for n in names[1:]}
        arrays = [call.products, *found.values(), *call.params.values()]
        _call(module["elements"], arrays, range(1, len(names)))
        return found

    return run


def _run(func: PrimFunc, arguments: list, outputs: tuple[int, ...]) -> None:
    module = tvm.compile(func, target=tvm.target.Target({"kind": "llvm"}))
    _call(module[func.attrs["global_symbol"]], arguments, outputs)


def _call(function: Callable, arguments: list, outputs) -> None:
    """Call a function of TVM on NumPy's arrays, and bring back what it wrote."""
    given = [tvm.runtime.tensor(x) if isinstance(x, np.ndarray) else x for x in arguments]
    function(*given)
    for n in outputs:
        arguments[n][...] = given[n].numpy()

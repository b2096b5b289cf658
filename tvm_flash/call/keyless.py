"""Queries without any keys, whose softmax has a sink: a kernel computes them beside one key that nobody sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tvm_flash.call.memory import check_present
from tvm_flash.call.plan import EmptyPlan, Plan, check_starts_of
from tvm_flash.call.request import Request
from tvm_flash.call.signature import Options
from tvm_flash.errors import NotSupportedError
from tvm_flash.operators import PAGED, PAGED_SCALED, RAGGED_LAYOUT, SCALES
from tvm_flash.packs import manifest
from tvm_flash.packs.manifest import BUILTIN_DEFINITION
from tvm_flash.packs.registry import registry

#: Parameters over keys, of which there are none.
_OVER_KEYS = ("visible", "bias")


def lacks_only_keys(request: Request) -> bool:
    """Whether an empty problem has rows, which lack nothing but keys."""
    k = request.given[request.operator.inputs[1 + request.operator.differentiates]]
    sizes = (*request.q.shape, request.sizes.batch, *k.shape[2:])
    return 0 not in (sizes if request.operator.starts else (*request.q.shape, request.sizes.kv_heads))


def check_sees_nothing(request: Request) -> None:
    """Check that rows without keys see nothing else either.

    Raises
    ------
    NotSupportedError: their softmax has a sink, and no kernel knows of a key that nobody sees.
    """
    problem = request.problem
    builtin = problem.definition == BUILTIN_DEFINITION
    over_keys = [name for name in _OVER_KEYS if name in request.parameters]
    if builtin and "sinks" in request.parameters and over_keys:
        what, remedy = f"sinks beside {over_keys[0]}", f"leave {over_keys[0]} out"
    elif not builtin and any(e.has_sink for e in registry().entries_of(problem.definition)):
        what, remedy = f"the definition {problem.definition!r}, which has a sink", "pass a key that its mask hides"
    else:
        return
    raise NotSupportedError(f"k: has no keys, which nothing can compute for {what}; {remedy}")


def is_keyless(request: Request) -> bool:
    """Whether rows that have no keys have sinks, which are what they see then; not by a user's own definition."""
    if request.problem.definition != BUILTIN_DEFINITION:
        return False
    return "sinks" in request.parameters and not any(name in request.parameters for name in _OVER_KEYS)


def hidden_key(request: Request) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shapes and dtypes of what such a problem is computed with instead, all zeros: one key, which nobody sees."""
    given, batch = request.given, request.sizes.batch
    if request.operator.form == manifest.PAGED:
        shapes = {n: (1, 1, *given[n].shape[2:]) for n in ("k_cache", "v_cache")}
        other = {"seqlens_k": (batch,), "page_table": (batch, 1)}
    else:
        axis = {RAGGED_LAYOUT: 0, "bshd": 1, "bhsd": 2}[request.layout]
        shapes = {n: (*given[n].shape[:axis], 1, *given[n].shape[axis + 1 :]) for n in "kv"}
        other = {"cu_seqlens_k": (batch + 1,)} if request.operator.starts else {"kv_end": (1,)}
    return {n: (x, request.q.dtype) for n, x in shapes.items()} | {n: (x, "int32") for n, x in other.items()}


class KeylessPlan(EmptyPlan):
    """The plan of such a problem; gradients of sinks come by it too."""

    def __init__(self, request: Request, options: Options, prepare: Callable[[Options, Mapping[str, Any]], Plan]):
        super().__init__(request)
        self._dropped = SCALES if options.op == PAGED_SCALED else ()
        options = options._replace(op=PAGED) if self._dropped else options
        made = hidden_key(request)
        if request.problem.accumulate:
            made |= {f"d{n}": (made[n][0], "float32") for n in "kv"}
        self._makers = {n: request.framework.allocator(*x, request.q) for n, x in made.items()}
        self._options, self._prepare = options, prepare

    def run(self, tensors: Mapping[str, Any]) -> list[Any]:
        request, framework = self._request, self._request.framework
        at = {name: framework.pointer(x) for name, x in tensors.items()}
        check_present(request.footprints, at)
        check_starts_of(request, at)
        made = {name: make() for name, make in self._makers.items()}
        for x in made.values():
            framework.fill(x, 0)
        empty = {n: tensors.get(n) for n in ("dk", "dv") if n in request.results}
        instead = {n: x for n, x in tensors.items() if n not in empty and n not in self._dropped} | made
        found = dict(zip(request.results, self._prepare(self._options, instead).run(instead), strict=True))
        for name, x in empty.items():
            shape = request.shape_of(name)
            found[name] = framework.allocator(shape, request.dtype_of(name), request.q)() if x is None else x
        return [found[name] for name in request.results]

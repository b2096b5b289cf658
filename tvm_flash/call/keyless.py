"""Queries without any keys, whose softmax has a sink: a kernel computes them beside one key that nobody sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tvm_flash.call.plan import EmptyPlan, Plan, check_starts_of
from tvm_flash.call.request import Request
from tvm_flash.call.signature import Options
from tvm_flash.errors import NotSupportedError
from tvm_flash.operators import PAGED, PAGED_SCALED, SCALES
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


class KeylessPlan(EmptyPlan):
    """The plan of such a problem; gradients of sinks come by it too."""

    def __init__(self, request: Request, options: Options, prepare: Callable[[Options, Mapping[str, Any]], Plan]):
        super().__init__(request)
        form = request.operator.form
        self._dropped = SCALES if options.op == PAGED_SCALED else ()
        options = options._replace(op=PAGED) if self._dropped else options
        shapes = self._of_pages() if form == manifest.PAGED else self._of_rows(ragged=form == manifest.RAGGED)
        given = {n: request.given[n].dtype for n in ("k", "v", "k_cache", "v_cache") if n in request.given}
        dtypes = {name: request.q.dtype if name in given else "int32" for name in shapes}
        if request.problem.accumulate:
            shapes |= {f"d{n}": shapes[n] for n in ("k", "v")}
            dtypes |= dict.fromkeys(("dk", "dv"), "float32")
        self._makers = {n: request.framework.allocator(s, dtypes[n], request.q) for n, s in shapes.items()}
        self._options, self._prepare = options, prepare

    def _of_rows(self, ragged: bool) -> dict[str, tuple[int, ...]]:
        k, v = (list(self._request.given[n].shape) for n in "kv")
        axis = 0 if ragged else 2 if self._request.layout == "bhsd" else 1
        k[axis] = v[axis] = 1
        other = {"cu_seqlens_k": (self._request.sizes.batch + 1,)} if ragged else {"kv_end": (1,)}
        return {"k": tuple(k), "v": tuple(v), **other}

    def _of_pages(self) -> dict[str, tuple[int, ...]]:
        k, v = ((1, 1, *self._request.given[n].shape[2:]) for n in ("k_cache", "v_cache"))
        batch = self._request.sizes.batch
        return {"k_cache": k, "v_cache": v, "seqlens_k": (batch,), "page_table": (batch, 1)}

    def run(self, tensors: Mapping[str, Any]) -> list[Any]:
        request, framework = self._request, self._request.framework
        check_starts_of(request, {name: framework.pointer(x) for name, x in tensors.items()})
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

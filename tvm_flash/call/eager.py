"""One call: find its plan or make it, and run it."""

from __future__ import annotations

import sys
import threading
import warnings
from typing import Any

from tvm_flash.call import fast
from tvm_flash.call.plan import EmptyPlan, Plan
from tvm_flash.call.prepare import Options, Site, prepare, same_framework
from tvm_flash.errors import LayoutWarning
from tvm_flash.frameworks import Traced, framework_of
from tvm_flash.packs.registry import on_refresh

#: Plans that are kept; the oldest goes first.  One takes about 6 KB.
MAX_PLANS = 1024

#: (file, line, layout) of calls that were warned about.
_warned: set[tuple[str, int, str]] = set()
_PACKAGE = __name__.partition(".")[0]

_plans: dict[Any, Plan | EmptyPlan] = {}
_lock = threading.Lock()


def attend(*arguments: Any) -> Any:
    """What every public function does; see :func:`tvm_flash.flash_attention`.

    The arguments are a :class:`Site`; how many tensors follow; q, k, v, one for each of ``site.per_head``, and out,
    with None for what isn't given; then the options in the order of :meth:`Site.options`.  Passing them on by position
    and as one tuple saves 0.2 µs.
    """
    return fast.call(*arguments)


def slow(site: Site, tensors: int, *arguments: Any) -> Any:
    """:func:`attend` without the fast path, and for it if there is one."""
    q, k, v, *given, out = arguments[:tensors]
    per_head = {name: x for name, x in zip(site.per_head, given, strict=True) if x is not None}
    return attention(site.options(*arguments[tensors:]), q, k, v, per_head, out, (site, tensors, *arguments))


fast.install(slow)
attend._torchdynamo_inline = slow  # torch.compile can't look into C


def forget() -> None:
    """Forget all plans."""
    _plans.clear()
    fast.forget()


on_refresh(forget)


def attention(
    options: Options, q: Any, k: Any, v: Any, per_head: dict[str, Any], out: Any, call: tuple | None = None
) -> Any:
    """Attention by a plan, an old or a new one.

    ``per_head`` are the parameters that are tensors, by name.  ``call`` are the arguments of :func:`attend`, which the
    fast path shall know from now on.
    """
    try:
        return _on_memory(options, q, k, v, per_head, out, call)
    except Traced as e:
        return e.framework.traced(options, q, k, v, per_head, out)


def _torch_program(
    options: Options, q: Any, k: Any, v: Any, per_head: dict[str, Any], out: Any, call: tuple | None = None
) -> Any:
    """What ``torch.compile`` sees in place of :func:`attention`."""
    from tvm_flash.tracing import torch_ops

    return torch_ops.attention(options, q, k, v, per_head, out)


attention._torchdynamo_inline = _torch_program


def _on_memory(options: Options, q: Any, k: Any, v: Any, per_head: dict[str, Any], out: Any, call: tuple | None) -> Any:
    framework, like, result_to = framework_of(q, "q"), q, out
    if framework.adopts:
        if framework.traces:
            return framework.traced(options, q, k, v, per_head, out)
        same_framework(_named(q, k, v, per_head, out))
        q, k, v = framework.adopt(q), framework.adopt(k), framework.adopt(v)
        per_head = {name: framework.adopt(x) for name, x in per_head.items()}
        out = out if out is None else framework.adopt(out)
    try:
        key = (options, framework.key_of_three(q, k, v), out if out is None else framework.key(out))
        if per_head:
            key += tuple([framework.key(x) for x in per_head.values()])
        plan = None if framework.differentiated(q, k, v) else _plans.get(key)
    except (TypeError, AttributeError, RuntimeError):
        # Not tensors of one framework, or options that can't be a key: the checks say what is wrong, if anything is.
        key = plan = None
    if plan is None:
        if not framework.adopts:
            same_framework(_named(q, k, v, per_head, out))
        plan = prepare(options, framework, {"q": q, "k": k, "v": v}, per_head, out)
        if key is not None:
            _remember(key, plan)
    if plan.suspicion is not None:
        _warn(plan.suspicion, options.layout)
    result, lse = plan.run(q, k, v, tuple(per_head.values()), out)
    if call is not None and not framework.adopts:
        fast.remember(call, framework, plan)
    if result_to is not None:
        result = result_to
    elif framework.adopts:
        result = framework.release(result, like)
    if lse is None:
        return result
    return result, framework.release(lse, like)


def _warn(text: str, layout: str) -> None:
    """Warn of swapped layouts, once for each line of a program that calls."""
    level, caller = 1, sys._getframe()
    while caller.f_back and caller.f_globals.get("__name__", "").partition(".")[0] == _PACKAGE:
        level, caller = level + 1, caller.f_back
    place = (caller.f_code.co_filename, caller.f_lineno, layout)
    if place not in _warned:
        _warned.add(place)
        warnings.warn(text, LayoutWarning, stacklevel=level)


def _named(q: Any, k: Any, v: Any, per_head: dict[str, Any], out: Any) -> dict[str, Any]:
    return {"q": q, "k": k, "v": v, **per_head, **({} if out is None else {"out": out})}


def _remember(key: Any, plan: Plan | EmptyPlan) -> None:
    with _lock:
        while len(_plans) >= MAX_PLANS:
            del _plans[next(iter(_plans))]
        _plans[key] = plan

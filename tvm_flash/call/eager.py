"""One call over tensors in memory: find its plan or make it, and run it."""

from __future__ import annotations

import threading
from typing import Any

from tvm_flash.call import fast
from tvm_flash.call.plan import EmptyPlan, Plan
from tvm_flash.call.prepare import prepare, same_framework
from tvm_flash.call.signature import Options, never_change
from tvm_flash.call.suspicion import warn_of_layout
from tvm_flash.frameworks import Framework, Traced, framework_of
from tvm_flash.packs.registry import on_refresh

#: Plans that are kept; the oldest goes first.  One takes about 6 KB.
MAX_PLANS = 1024

_plans: dict[Any, Plan | EmptyPlan] = {}
_lock = threading.Lock()


def forget() -> None:
    """Forget all plans."""
    _plans.clear()
    fast.forget()


on_refresh(forget)


def attention(options: Options, tensors: dict[str, Any], call: tuple | None = None) -> Any:
    """An operator by a plan, an old or a new one; arguments as for :func:`tvm_flash.call.dispatch.attention`.

    Raises
    ------
    Traced: a tensor has no memory, but stands for others in a program that is being traced.
    """
    q = tensors["q"]
    framework, adopted = framework_of(q, "q"), tensors
    if framework.adopts:
        if framework.traces:
            raise Traced(framework, f"q: is a {type(q).__qualname__} without memory of its own")
        same_framework(tensors)
        adopted = {name: framework.adopt(x) for name, x in tensors.items()}
    plan = plan_of(options, framework, adopted)
    if plan.suspicion is not None:
        warn_of_layout(plan.suspicion, options.layout)
    results = plan.run(adopted)
    if call is not None and not framework.adopts:
        fast.remember(*call, framework, plan)
    if framework.adopts:
        names = plan.results
        results = [tensors[n] if n in tensors else framework.release(x, q) for n, x in zip(names, results, strict=True)]
    return results[0] if len(results) == 1 else tuple(results)


def plan_of(options: Options, framework: Framework, tensors: dict[str, Any]) -> Plan | EmptyPlan:
    """The plan of a call, once everything but its pointers is checked; ``tensors`` are adopted by the framework.

    Raises
    ------
    TvmFlashError: see :mod:`tvm_flash.errors`.
    """
    try:
        key = (options, *tensors, framework.keys(tensors.values()))
        plan = _plans.get(key)
    except (TypeError, AttributeError, RuntimeError):
        # Not tensors of one framework, or options that can't be a key: the checks say what is wrong, if anything is.
        key = plan = None
    if plan is None:
        if not framework.adopts:
            same_framework(tensors)
        plan = prepare(options, framework, tensors)
        if key is not None and never_change(options._replace(accept=None)):
            _remember(key, plan)
    return plan


def _remember(key: Any, plan: Plan | EmptyPlan) -> None:
    with _lock:
        while len(_plans) >= MAX_PLANS:
            del _plans[next(iter(_plans))]
        _plans[key] = plan

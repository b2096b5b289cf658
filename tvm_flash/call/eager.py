"""One call over tensors in memory: find its plan or make it, and run it."""

from __future__ import annotations

import threading
from typing import Any

from tvm_flash.call import fast
from tvm_flash.call.plan import EmptyPlan, Plan
from tvm_flash.call.prepare import named, prepare, same_framework
from tvm_flash.call.signature import Options
from tvm_flash.call.suspicion import warn_of_layout
from tvm_flash.frameworks import Traced, framework_of
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


def attention(
    options: Options, q: Any, k: Any, v: Any, per_head: dict[str, Any], out: Any, call: tuple | None = None
) -> Any:
    """Attention by a plan, an old or a new one; arguments as for :func:`tvm_flash.call.dispatch.attention`.

    Raises
    ------
    Traced: a tensor has no memory, but stands for others in a program that is being traced.
    """
    framework, like, result_to = framework_of(q, "q"), q, out
    if framework.adopts:
        if framework.traces:
            raise Traced(framework, f"q: is a {type(q).__qualname__} without memory of its own")
        same_framework(named(q, k, v, per_head, out))
        q, k, v = framework.adopt(q), framework.adopt(k), framework.adopt(v)
        per_head = {name: framework.adopt(x) for name, x in per_head.items()}
        out = out if out is None else framework.adopt(out)
    try:
        key = (options, framework.key_of_three(q, k, v), out if out is None else framework.key(out))
        if per_head:
            key += tuple([framework.key(x) for x in per_head.values()])
        given = named(q, k, v, per_head, out).values()
        plan = None if framework.differentiated(*given) else _plans.get(key)
    except (TypeError, AttributeError, RuntimeError):
        # Not tensors of one framework, or options that can't be a key: the checks say what is wrong, if anything is.
        key = plan = None
    if plan is None:
        if not framework.adopts:
            same_framework(named(q, k, v, per_head, out))
        plan = prepare(options, framework, {"q": q, "k": k, "v": v}, per_head, out)
        if key is not None:
            _remember(key, plan)
    if plan.suspicion is not None:
        warn_of_layout(plan.suspicion, options.layout)
    result, lse = plan.run(q, k, v, tuple(per_head.values()), out)
    if call is not None and not framework.adopts:
        fast.remember(*call, framework, plan)
    if result_to is not None:
        result = result_to
    elif framework.adopts:
        result = framework.release(result, like)
    if lse is None:
        return result
    return result, framework.release(lse, like)


def _remember(key: Any, plan: Plan | EmptyPlan) -> None:
    with _lock:
        while len(_plans) >= MAX_PLANS:
            del _plans[next(iter(_plans))]
        _plans[key] = plan

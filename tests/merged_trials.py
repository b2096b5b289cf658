"""What a kernel that puts its results into those of other keys must get right on hardware, and what of it is timed.

The forward's problems, with rows of every kind beforehand: those that have seen nothing, whose outputs nobody reads;
some that weigh about as much; some that weigh nearly all, or nothing.  Needs torch; no TVM.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import numpy as np
import torch

from tests import cases, forward_trials, torch_cases
from tests.cases import Case, Inputs
from tests.torch_cases import Compute
from tests.trials import Results, Trial, Usual
from tvm_flash import numerics
from tvm_flash.packs.manifest import KernelEntry

#: A result and its log-sum-exp, float32.
State = tuple[np.ndarray, np.ndarray]

#: How much what was there weighs, in powers of e, beside what is put in; a row of each in turn.
_MORE = (-np.inf, 0.3, 30.0, -30.0, -1.0)
#: The share of a result's numbers that a 16-bit type may have by chance.
_BY_CHANCE = 0.1


def nothing(case: Case) -> State:
    """No keys yet: outputs may be anything."""
    rows = (case.batch, case.heads, case.seqlen_q)
    return np.full((*rows, case.head_dim_v), np.nan, np.float32), np.full(rows, -np.inf, np.float32)


def state_of(case: Case, data: Inputs) -> State:
    """Results of keys that a case doesn't have."""
    rng = np.random.default_rng(case.seqlen_q)
    _, lse = cases.expected(case, data)
    rows = np.arange(lse.size).reshape(lse.shape)
    before = np.where(np.isneginf(lse), rng.normal(size=lse.shape), lse) + np.choose(rows % len(_MORE), _MORE)
    out = rng.normal(size=(*lse.shape, case.head_dim_v))
    out[np.isneginf(before)] = np.nan
    return out.astype(np.float32), before.astype(np.float32)


def expected(case: Case, data: Inputs, state: State) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both together, in float64, and the share of what is put in."""
    out, lse = cases.expected(case, data)
    before, before_lse = (x.astype(np.float64) for x in state)
    both = np.logaddexp(lse, before_lse)
    with np.errstate(invalid="ignore"):
        share, kept = (np.where(np.isneginf(x), 0, np.exp(x - both)) for x in (lse, before_lse))
    before = np.where(kept[..., None] == 0, 0, before)
    return out * share[..., None] + before * kept[..., None], both, share


def check(case: Case, data: Inputs, state: State, results: Results, device: str = "cpu") -> float:
    """Assert that results are right; the largest error as a share of what is allowed."""
    out, lse = results
    right, right_lse, share = expected(case, data, state)
    own, own_lse = cases.expected(case, data)
    # What is put in may be off by what the forward's result may, its share by what its log-sum-exp may, which is much
    # where scores are large; the rest is kept to float32.
    allowed = torch_cases.allowed_error(case, data, own, own_lse, device) * share[..., None]
    sways = share * (1 - share) * numerics.lse_bound(own_lse)
    allowed = allowed + sways[..., None] * np.abs(own - np.nan_to_num(state[0]))
    allowed = allowed + 4 * numerics.EPSILON["float32"] * (1 + np.abs(right))
    error = np.abs(out - right)
    assert (error <= allowed).all(), f"output differs by {np.nanmax(error):.3g}, up to {np.nanmax(error / allowed):.3g}"
    blind = np.isneginf(right_lse)
    assert np.array_equal(np.isneginf(lse), blind)
    assert not out[blind].any()
    lse_error = np.abs(lse[~blind] - right_lse[~blind]).max(initial=0.0)
    lse_allowed = numerics.lse_bound(right_lse)
    assert lse_error <= lse_allowed, f"lse differs by {lse_error:.3g}, allowed {lse_allowed:.3g}"
    seen = out[~blind]
    coarse = (numerics.round_to(seen.astype(np.float32), case.dtype) == seen).mean() if seen.size > 1000 else 0.0
    assert coarse < _BY_CHANCE, f"{coarse:.0%} of the results are {case.dtype}"
    return float((error / allowed).max(initial=0.0))


def problems(entry: KernelEntry) -> Iterator[tuple[str, Case, Inputs]]:
    """Those of the forward, but for what isn't finite."""
    labelled = ((case.id, case, data) for case, data in forward_trials.cases_of(entry))
    yield from labelled
    more = itertools.chain(forward_trials.many_places(entry), forward_trials.adversarial(entry))
    yield from ((f"{name} {case.id}", case, data) for name, case, data in more)


def trials(entry: KernelEntry) -> Iterator[Trial]:
    """All of them, for a kernel."""
    for label, case, data in problems(entry):
        state = state_of(case, data)
        yield _trial(entry, label, case, data, state, functools.partial(check, case, data, state))
    for name, case, clean, data in forward_trials.not_finite(entry):
        confined = functools.partial(_check_confined, case, clean, data)
        yield _trial(entry, f"{name} {case.id}", case, data, nothing(case), confined)


def _trial(entry: KernelEntry, label: str, case: Case, data: Inputs, state: State, right) -> Trial:
    def run(compute: Compute, device: str) -> Results:
        return torch_cases.run(case, data, compute, entry.layout, device=device, state=state)

    return Trial(label, run, right)


def _check_confined(case: Case, clean: Inputs, data: Inputs, results: Results, device: str) -> float:
    return torch_cases.check_confined(case, clean, data, *results, device)


def usual(entry: KernelEntry) -> Usual:
    """What is timed of a kernel: the forward's problem, put into the results of as many keys."""
    forward = forward_trials.usual(entry)
    o = forward.values["o"]
    rows = forward.sizes["batch"] * forward.sizes["heads"] * forward.sizes["seqlen_q"]
    values = {**forward.values, "o": torch.zeros_like(o, dtype=torch.float32)}
    values["lse"] = torch.full((rows,), 8.0, device="cuda")
    return dataclasses.replace(forward, values=values)

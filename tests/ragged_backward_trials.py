"""What a backward kernel of ragged sequences must get right, and what of it is timed.

The shared cases in the kernel's own width, numbers that aren't finite in the neighbours, and the same bits alone and in
a batch.  Needs torch; no TVM.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch

from tests import ragged_cases, ragged_trials
from tests.gradient_cases import SUMS, Outer
from tests.ragged_cases import RAGGED_CASES, RaggedCase, RaggedInputs
from tests.torch_cases import Compute
from tests.trials import Results, Trial, Usual
from tvm_flash.packs.manifest import KernelEntry

#: A window, a soft cap and sinks for kernels that have them.
_NUMBERS = {"window_left": 90, "window_right": 3, "softcap": 2.0, "has_alibi_slopes": 0, "has_sinks": 1}


def serves(entry, case: RaggedCase) -> bool:
    """Whether a kernel computes a case's mask and score."""
    if entry.score == "identity" and case.score != "identity":
        return False
    return case.mask == entry.mask or (entry.mask == "window" and case.mask in ("full", "causal"))


def own_cases(entry) -> list[RaggedCase]:
    """The shared cases that a kernel serves, those of 64 columns in its own width."""
    dims = {"head_dim": entry.head_dim, "head_dim_v": entry.head_dim_v}
    # gaps leave rows that begin at no multiple of 16 bytes
    found = [c for c in RAGGED_CASES if c.dtype == entry.dtype and c.strides != "gaps" and serves(entry, c)]
    wide = [replace(c, keys=_two(c.keys), **(dims if c.head_dim == 64 else {})) for c in found]
    own = _own(entry, (1, 300, 127, 0, 129, 128), kv_heads=1, heads=4, keys=(300, 3, 127, 40, 129, 128), after=(1, 2))
    many = tuple(n % 3 for n in range(45))
    return [
        *wide,
        own,
        _own(entry, many, heads=1, keys=tuple((0, 2, 3, 5, 4, 7)[n % 6] for n in range(45)), after=(130, 130)),
    ]


def _two(keys: tuple[int, ...]) -> tuple[int, ...]:
    """Two keys in place of one, of which gradients are 0 but for the order in which a row of values was summed."""
    return tuple(2 if n == 1 else n for n in keys)


def _own(entry, queries: tuple[int, ...], **fields) -> RaggedCase:
    """A case of a kernel's own mask and score."""
    mask, score = entry.mask, {"optional": "softcap_alibi"}.get(entry.score, entry.score)
    names = ("window_left", "window_right") if mask == "window" else ()
    options = ("softcap", "has_alibi_slopes", "has_sinks") if "sinks" in score else ("softcap",)
    names = (*names, *(options if "softcap" in score or "sinks" in score else ()))
    params = tuple((n, _NUMBERS[n]) for n in names)
    dims = {"head_dim": entry.head_dim, "head_dim_v": entry.head_dim_v, "dtype": entry.dtype}
    return RaggedCase(queries, mask=mask, score=score, params=params, **{"heads": 2, **dims, **fields})


def trials(entry: KernelEntry) -> Iterator[Trial]:
    """All of them, for a kernel."""
    for number, case in enumerate(own_cases(entry)):
        data, given = ragged_cases.inputs(case), ragged_cases.outer(case, with_dlse=number % 2 == 1)
        run = functools.partial(_run, entry, case, data, given)
        yield Trial(case.id, run, functools.partial(_check, entry, case, data, given))
    case = neighbours(entry)
    data, given = ragged_cases.inputs(case), ragged_cases.outer(case)

    def run(compute: Compute, device: str) -> Results:
        check_neighbours(entry, compute, device)
        return _run(entry, case, data, given, compute, device)

    yield Trial("neighbours", run, functools.partial(_check, entry, case, data, given))


def _names(entry) -> tuple[str, ...]:
    return (*SUMS, *(f"d_{p.name}" for p in entry.params if p.gradient))


def _run(entry, case: RaggedCase, data: RaggedInputs, given: Outer, compute: Compute, device: str) -> Results:
    got = ragged_cases.run_backward(case, data, given, compute, entry.params, device)
    return tuple(got[name] for name in _names(entry))


def _check(entry, case: RaggedCase, data: RaggedInputs, given: Outer, results: Results, device: str) -> float:
    return ragged_cases.check_backward(case, data, given, dict(zip(_names(entry), results, strict=True)))


def neighbours(entry) -> RaggedCase:
    """Sequences that share tiles of rows and of keys."""
    return _own(entry, (30, 40, 140, 1), keys=(30, 129, 75, 2), after=(9, 9))


def check_neighbours(entry, compute: Compute, device: str) -> None:
    """Assert that a sequence has the same bits alone, in a batch, and beside numbers that aren't finite."""
    case = neighbours(entry)
    data, given = ragged_cases.inputs(case), ragged_cases.outer(case)

    def gradients(case: RaggedCase, data: RaggedInputs, given: Outer) -> Mapping[str, np.ndarray]:
        return dict(zip(_names(entry), _run(entry, case, data, given, compute, device), strict=True))

    right = gradients(case, data, given)
    for parity in (0, 1):
        spoilt = [b for b in range(case.batch) if b % 2 == parity]
        found = gradients(case, *_spoil(case, data, given, spoilt))
        for b in set(range(case.batch)) - set(spoilt):
            for name, x in _of_sequence(case, right, b).items():
                assert np.array_equal(x, _of_sequence(case, found, b)[name]), f"a neighbour changes {name}"
    for b in range(case.batch):
        i, j = case.rows(b)
        alone = replace(case, queries=case.queries[b : b + 1], keys=case.keys[b : b + 1], after=(0, 0))
        params = {n: x[b : b + 1] if np.ndim(x) else x for n, x in data.params.items()}
        found = gradients(alone, RaggedInputs(data.q[i], data.k[j], data.v[j], params), Outer(given.dout[i]))
        for name, x in _of_sequence(case, right, b).items():
            assert np.array_equal(x, _of_sequence(alone, found, 0)[name]), f"{name} of a sequence alone is another"


def _spoil(case: RaggedCase, data: RaggedInputs, given: Outer, sequences) -> tuple[RaggedInputs, Outer]:
    """NaN and infinities in all that some sequences have."""
    q, k, v, dout = (x.copy() for x in (data.q, data.k, data.v, given.dout))
    for b in sequences:
        i, j = case.rows(b)
        for x, rows in ((q, i), (k, j), (v, j), (dout, i)):
            x[rows] = np.where(np.arange(x.shape[-1]) % 2, np.nan, np.inf)
    return RaggedInputs(q, k, v, data.params), Outer(dout)


def _of_sequence(case: RaggedCase, got: Mapping[str, np.ndarray], b: int) -> dict[str, np.ndarray]:
    i, j = case.rows(b)
    at = {"dq": i, "dk": j, "dv": j}
    return {name: x[at.get(name, slice(b, b + 1))] for name, x in got.items()}


def usual(entry: KernelEntry) -> Usual:
    """What is timed of a kernel: the forward's problem, 2.5 times its operations."""
    forward = ragged_trials.usual(entry)
    values = dict(forward.values)
    rows = forward.sizes["heads"] * forward.sizes["total_q"]
    values |= {"lse": torch.full((rows,), 8.0, device="cuda"), "dlse": torch.empty(1, device="cuda")}
    values |= {"do": torch.randn_like(values["o"]), **{f"d{x}": torch.empty_like(values[x]) for x in "qkv"}}
    values |= {f"d_{p.name}": torch.empty_like(values[p.name]) for p in entry.params if p.gradient}
    return Usual(forward.name, values, forward.sizes, 2.5 * forward.flops)

"""What a forward kernel must get right on hardware, whichever of the family's kinds it is, and what of it is timed.

The shared cases, more row tiles than there is room for, splits of every length, scores that an online softmax may
stumble over, and numbers that aren't finite.  Needs torch; no TVM.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import torch

from tests import cases, tensor_trials, torch_cases
from tests.cases import CASES, Case, Inputs
from tests.torch_cases import Compute
from tests.trials import Results, Trial, Usual
from tvm_flash import numerics
from tvm_flash.catalogue import SCORES
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import KernelEntry

#: What is timed: 16k tokens and a hidden size of 2048, 4096 positions; a window of 1024 keys where there is one.
TOKENS, HIDDEN, SEQLEN, WINDOW = 16384, 2048, 4096, 1024
#: The same of a kernel for few rows: a step of 8 sequences with 8192 keys, hidden size 4096, 4 heads to one of keys.
BATCH, STEP_HIDDEN, KEYS, GROUP = 8, 4096, 8192, 4
#: What a configuration of Hopper's says of its sections of heads (``sm90/config.py``), if they follow from the length.
_BY_LENGTH = -1

#: Masks that a window with sides beyond the ends computes as well: (left, right) by the mask.
_AS_WINDOW = {"full": (1 << 20, 1 << 20), "causal": (1 << 20, 0)}

#: Masks that another one computes as well, with the right parameters.
_NARROWER = {
    "window": ("full", "causal"),
    "padded": ("full", "causal", "window"),
    "positioned": ("full", "causal", "window", "padded"),
}


def cases_of(entry: KernelEntry) -> Iterator[tuple[Case, Inputs]]:
    """The shared cases that a kernel must get right, at their own head_dim and at the kernel's largest."""
    for case in CASES:
        fits = case.dtype == entry.dtype and is_for(entry, case)
        params = as_own(entry.mask, entry.score, case) if fits else None
        if params is None:
            continue
        dims = {(case.head_dim, case.head_dim_v), (entry.head_dim, entry.head_dim_v)}
        for head_dim, head_dim_v in sorted(dims):
            if head_dim <= entry.head_dim and head_dim_v <= entry.head_dim_v:
                own = dataclasses.replace(case, head_dim=head_dim, head_dim_v=head_dim_v)
                data = cases.inputs(own)
                yield own, dataclasses.replace(data, params={**params, **data.params})


def is_for(entry: KernelEntry, case: Case) -> bool:
    """Whether a case has few enough rows for a kernel that is meant for few, at any number of keys."""
    most = _most_rows(entry)
    return most is None or torch_cases.sizes_of(case)["rows"] <= most


def _most_rows(entry: KernelEntry) -> int | None:
    """The most rows for which a kernel is meant at any number of keys."""
    found = [rows for steps in _steps(entry.max_rows) for _, rows in steps[2:]]
    return max(found) if found else entry.max_rows


def _rows(entry: KernelEntry) -> int:
    """Query rows of a head in the trials below: several row tiles, but for kernels that are for fewer."""
    return min(140, _most_rows(entry) or 140)


def as_own(mask: str, score: str, case: Case) -> dict[str, object] | None:
    """The parameters with which a kernel of a mask and a score computes a case, beside the case's own; None if it
    can't."""
    params: dict[str, object] = {}
    if case.score != score:
        if score not in SCORES[case.score].stand_ins:
            return None
        params |= {"softcap": 0.0, "has_alibi_slopes": int("alibi" in case.score)}
        nothing = np.full((case.batch, case.heads), np.nan, np.float32)
        params |= {"alibi_slopes": nothing, "has_sinks": 0, "sinks": nothing}  # unless the case has its own
    if case.mask != mask:
        if case.mask not in _NARROWER.get(mask, ()):
            return None
        params |= zip(("window_left", "window_right"), _AS_WINDOW.get(case.mask, ()), strict=False)
        ends = {"kv_start": 0, "kv_end": case.seqlen_kv, "query_start": 7}
        params |= {n: np.full((case.batch, case.heads), x, np.int32) for n, x in ends.items()}
        params["has_query_start"] = 0
    return params


def many_places(entry: KernelEntry) -> Iterator[tuple[str, Case, Inputs]]:
    """More row tiles than a GPU has room for, where a kernel's blocks go on to others when they have done one; and
    heads in several sections, where it goes by these."""
    if not entry.config.get("waves"):
        return
    own = {"kv_heads": 25, "dtype": entry.dtype, "mask": entry.mask, "score": entry.score}
    all_sizes = [("many places", 50, 150, 200)]
    if entry.config.get("head_section") == _BY_LENGTH:
        all_sizes.append(("sections", 25, 32 * 64 * entry.config["num_consumer_warpgroups"] - 9, 40))
    for name, heads, seqlen_q, seqlen_kv in all_sizes:
        case = Case(3, heads, seqlen_q, min(40, entry.head_dim), seqlen_kv=seqlen_kv, **own)
        data = cases.inputs(case)
        params = {"window_left": 60, "window_right": 5, "softcap": 2.0}
        yield name, case, dataclasses.replace(data, params={**data.params, **_as_given(entry, params)})


def all_split_lengths(entry: KernelEntry) -> Iterator[tuple[str, Case, Inputs]]:
    """Keys that are split, at every length that the kernel splits them to: the last split has few keys."""
    lengths = (s.value for s in entry.scalars if s.name == "split_length")
    for steps in itertools.chain.from_iterable(map(_steps, lengths)):
        for begin, length in steps[2:] if steps[1] == "seqlen_kv" else ():
            own = {"kv_heads": 2, "seqlen_kv": begin + 3 * length + 5, "dtype": entry.dtype}
            case = Case(1, 4, 2, min(64, entry.head_dim), **own, mask=entry.mask, score=entry.score)
            params = {"window_left": begin + 2 * length, "window_right": 0}
            yield "splits", case, dataclasses.replace(cases.inputs(case), params=_as_given(entry, params))


def runs(entry: KernelEntry, most_units: int = 300) -> Iterator[Trial]:
    """Batches in which a block computes one split of a row's keys, some of them, and all: with the bits of each alone.

    ``most_units`` are the most heads of keys of a batch; a machine's places for blocks are fewer.
    """
    if not any(scalar.name == "run" for scalar in entry.scalars):
        return
    for units, seqlen_kv in (
        (2, 1101),
        (22, 1101),
        (44, 1101),
        (44, 2301),
        (132, 330),
        (132, 2301),
        (202, 330),
        (300, 330),
        (600, 330),
        (1100, 330),
    ):
        if units > most_units:
            return
        own = {"kv_heads": 2, "seqlen_kv": seqlen_kv, "dtype": entry.dtype, "mask": entry.mask, "score": entry.score}
        case = Case(units // 2, 4, 2, min(64, entry.head_dim), **own)
        data = dataclasses.replace(cases.inputs(case), params=_as_given(entry, _OPEN))
        yield _Batch(f"runs {case.id}", case, data, entry.layout).trial()


#: A window without ends on the left.
_OPEN = {"window_left": 1 << 20, "window_right": 0}


@dataclasses.dataclass(frozen=True)
class _Batch:
    """A batch, of which the first sequence, one in the middle and the last are also computed alone."""

    label: str
    case: Case
    data: Inputs
    layout: str

    def trial(self) -> Trial:
        return Trial(self.label, self.run, self.check)

    def _alone(self, b: int) -> Inputs:
        q, k, v = (x[b : b + 1] for x in (self.data.q, self.data.k, self.data.v))
        return dataclasses.replace(self.data, q=q, k=k, v=v)

    @property
    def _some(self) -> list[int]:
        return sorted({0, self.case.batch // 2, self.case.batch - 1})

    def run(self, compute: Compute, device: str) -> Results:
        own, one = (self.case, self.data), dataclasses.replace(self.case, batch=1)
        others = [(one, self._alone(b)) for b in self._some]
        each = (torch_cases.run(*x, compute, self.layout, device=device) for x in (own, *others))
        return tuple(itertools.chain.from_iterable(each))

    def check(self, results: Results, device: str) -> float:
        together, *alone = zip(results[::2], results[1::2], strict=True)
        for b, (o, lse) in zip(self._some, alone, strict=True):
            assert np.array_equal(together[0][b], o[0]) and np.array_equal(together[1][b], lse[0]), f"sequence {b}"
        return torch_cases.check(self.case, self.data, *together, device)


def _steps(expression: sizes.Expression) -> Iterator[tuple]:
    """The steps in an expression of sizes."""
    if isinstance(expression, tuple):
        if expression[0] == "steps":
            yield expression
        else:
            yield from itertools.chain.from_iterable(map(_steps, expression[1:]))


def _as_given(entry: KernelEntry, numbers: dict[str, int]) -> dict[str, object]:
    return {p.name: numbers[p.name] for p in entry.params if p.name in numbers}


def adversarial(entry: KernelEntry) -> Iterator[tuple[str, Case, Inputs]]:
    """Inputs with finite scores that an online softmax may stumble over; float64 has finite results for all."""
    if entry.score not in ("identity", "optional", "optional_sinks"):
        return
    params = {"window_left": 150, "window_right": 0, "kv_start": 3, "kv_end": 700, "query_start": 550}
    params = _own(entry, params)
    sizes = {"seqlen_kv": 700, "head_dim_v": entry.head_dim_v, "dtype": entry.dtype, "mask": entry.mask}
    case = Case(1, 2, _rows(entry), entry.head_dim, **sizes)

    def variant(name, edit):
        data = cases.inputs(case)
        q, k, v = (x.copy() for x in (data.q, data.k, data.v))
        edit(q, k)
        rounded = (numerics.round_to(x, entry.dtype) for x in (q, k, v))
        return name, case, Inputs(*rounded, params)

    def huge_late_key(q, k):
        k[:, :, 600:] *= 400

    def huge_key_before_the_last(q, k):
        k[:, :, -2] = 300 * np.sign(q[:, :, -1])

    def growing(q, k):
        q[:] = np.abs(q)
        k[:] = np.abs(k) * np.linspace(0, 60, k.shape[2])[:, None]

    def all_very_negative(q, k):
        q[:] = np.abs(q) * 20
        k[:] = -np.abs(k) * 20

    def large_logits(q, k):
        q *= 100
        k *= 100

    def denormals(q, k):
        q *= 1e-7
        k *= 1e-7

    for edit in (huge_late_key, huge_key_before_the_last, growing, all_very_negative, large_logits, denormals):
        yield variant(edit.__name__, edit)


def not_finite(entry: KernelEntry) -> Iterator[tuple[str, Case, Inputs, Inputs]]:
    """Inputs with NaN or infinity in some queries, or in a key that only the last query sees; and the same without."""
    if entry.score not in ("identity", "optional", "optional_sinks") or entry.mask not in (
        "full",
        "causal",
        "window",
        "positioned",
    ):
        return
    params = {"window_left": 100, "window_right": 0, "kv_start": 0, "kv_end": 300, "query_start": 300 - _rows(entry)}
    params = _own(entry, params)
    sizes = {"seqlen_kv": 300, "head_dim_v": entry.head_dim_v, "dtype": entry.dtype, "mask": entry.mask}
    rows = _rows(entry)
    case = Case(1, 2, rows, entry.head_dim, **sizes)
    clean = dataclasses.replace(cases.inputs(case), params=params)
    q = clean.q.copy()
    q[0, 0, 5, 3], q[0, 1, rows // 2 + 7, 0], q[0, 1, rows // 2 + 8, 1] = np.nan, np.inf, -np.inf
    yield "queries not finite", case, clean, dataclasses.replace(clean, q=q)
    if entry.mask != "full":
        k = clean.k.copy()
        k[0, 1, -1, 2] = np.nan
        yield "a key not finite", case, clean, dataclasses.replace(clean, k=k)


def _own(entry: KernelEntry, numbers: dict[str, int]) -> dict[str, object]:
    """Parameters of a kernel for a batch of 1 and 2 heads, without a soft cap and slopes."""
    values = {"softcap": 0.0, "alibi_slopes": np.nan, "has_alibi_slopes": 0, "has_query_start": 1}
    values |= {"sinks": np.nan, "has_sinks": 0, **numbers}
    return {p.name: np.full((1, 2), values[p.name], p.dtype) if p.per_head else values[p.name] for p in entry.params}


def trials(entry: KernelEntry) -> Iterator[Trial]:
    """All of them, for a kernel."""
    if any(p.is_spread for p in entry.params):
        yield from tensor_trials.forward(tensor_trials.kernel_of(entry))
        return
    labelled = [(case.id, case, data) for case, data in cases_of(entry)]
    more = itertools.chain(many_places(entry), all_split_lengths(entry), adversarial(entry))
    labelled += [(f"{name} {case.id}", case, data) for name, case, data in more]
    for label, case, data in labelled:
        yield _trial(entry, label, case, data, functools.partial(_check, case, data))
    yield from runs(entry)
    for name, case, clean, data in not_finite(entry):
        check = functools.partial(_check_confined, case, clean, data)
        yield _trial(entry, f"{name} {case.id}", case, data, check)


def _trial(entry: KernelEntry, label: str, case: Case, data: Inputs, check: Callable[[Results, str], float]) -> Trial:
    def run(compute: Compute, device: str) -> Results:
        return torch_cases.run(case, data, compute, entry.layout, device=device)

    return Trial(label, run, check)


def _check(case: Case, data: Inputs, results: Results, device: str) -> float:
    return torch_cases.check(case, data, *results, device)


def _check_confined(case: Case, clean: Inputs, data: Inputs, results: Results, device: str) -> float:
    return torch_cases.check_confined(case, clean, data, *results, device)


def usual(entry: KernelEntry) -> Usual:
    """What is timed of a kernel: a batch of prompts, or a step of decoding."""
    if entry.max_rows is None:
        seqlen_q = seqlen_kv = max(SEQLEN, entry.bucket)
        batch, heads = max(1, TOKENS // seqlen_q), max(1, HIDDEN // entry.head_dim)
        kv_heads, name = heads, f"b={batch} h={heads} s={seqlen_q} d={entry.head_dim}"
    else:
        batch, heads, seqlen_q, seqlen_kv = BATCH, STEP_HIDDEN // entry.head_dim, 1, KEYS
        kv_heads = heads // GROUP
        name = f"b={batch} h={heads} hk={kv_heads} s={seqlen_q} sk={seqlen_kv} d={entry.head_dim}"

    def tensor(heads: int, seqlen: int, dim: int) -> torch.Tensor:
        order = (batch, heads, seqlen) if entry.layout == "bhsd" else (batch, seqlen, heads)
        return torch.randn(*order, dim, device="cuda", dtype=getattr(torch, entry.dtype))

    D, E = entry.head_dim, entry.head_dim_v
    values = {"q": tensor(heads, seqlen_q, D), "k": tensor(kv_heads, seqlen_kv, D), "v": tensor(kv_heads, seqlen_kv, E)}
    values |= {"o": tensor(heads, seqlen_q, E), "lse": torch.empty(1, device="cuda"), "softmax_scale": D**-0.5}
    values |= {"window_left": WINDOW, "window_right": 0, "sink_tokens": 4, "softcap": 30.0}
    values["alibi_slopes"] = torch.rand(batch, heads, device="cuda")
    values |= {"has_alibi_slopes": 1, "has_query_start": 1}
    ends = {"kv_start": 0, "kv_end": seqlen_kv, "query_start": 0}
    values |= {n: torch.full((batch, heads), x, dtype=torch.int32, device="cuda") for n, x in ends.items()}
    whole = (batch, heads, seqlen_q, seqlen_kv)
    dtype = getattr(torch, next((p.dtype for p in entry.params if p.name == "bias"), "float32"))
    values["bias"] = torch.randn(seqlen_q, seqlen_kv, device="cuda", dtype=dtype).expand(whole)
    values["visible"] = (torch.rand(seqlen_q, seqlen_kv, device="cuda") < 0.9).expand(whole)
    values |= {"has_sinks": 1, "sinks": torch.rand(batch, heads, device="cuda")}
    pairs = {"full": seqlen_kv, "given": seqlen_kv, "causal": seqlen_kv / 2}.get(
        entry.mask, min(WINDOW + 1, seqlen_kv)
    ) * seqlen_q
    if entry.max_rows is not None:  # the keys that the step sees, all of them
        values["window_left"], pairs = seqlen_kv, seqlen_q * seqlen_kv
    flops = 2.0 * batch * heads * pairs * (D + E)
    return Usual(name, values, sizes.of(batch, heads, seqlen_q, kv_heads, seqlen_kv, D, E), flops)

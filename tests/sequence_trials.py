"""What kernels of a definition must get right over sequences of different lengths, one after the other or with their
keys on pages: each of them against float64, as if it were alone.

NaN is in rows and keys that belong to no sequence, and where no key is on a page.  Needs torch; no TVM.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from tests.tensor_trials import GRADIENTS, Kernel
from tests.torch_cases import Compute
from tests.trials import Results, Trial, gradients
from tvm_flash import numerics, reference
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import Param
from tvm_flash.quantised import dequantise_cache, quantise_cache

#: (queries, keys) of sequences: few and many of both, around the borders of tiles, more queries than keys, and none.
MANY_ROWS = ((3, 40), (130, 150), (0, 7), (70, 70), (5, 0), (1, 300), (65, 30))
FEW_ROWS = ((3, 40), (1, 1100), (0, 7), (17, 17), (5, 0), (1, 1), (6, 129))
NO_PAIRS = ((0, 7), (5, 0))

#: How far gradients may be off in any case, as a share of the largest: the roundings of many sums.
_FLOOR = {"float32": 5e-6, "float16": 2**-11, "bfloat16": 2**-11}
#: How large derivatives of a score by a parameter are at most, about: an error of delta comes to its gradient so.
_SLOPE = 4.0


@dataclass(frozen=True)
class Sequences:
    """A call: ``lengths`` are (queries, keys), ``after`` rows and keys that follow the last sequence.

    ``sample(batch, heads)`` has the parameters; ``page_size`` is 0 where keys lie one after the other, and ``cache``
    the dtype of keys and values on pages that have 8 bits.
    """

    kernel: Kernel
    sample: Callable[..., Mapping]
    lengths: tuple[tuple[int, int], ...]
    heads: int = 2
    kv_heads: int = 1
    after: int = 3
    page_size: int = 0
    cache: str = ""
    softmax_scale: float = 0.2

    @property
    def starts(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the sequences begin among the queries, and among the keys."""
        return tuple(np.cumsum([0, *n]).astype(np.int32) for n in zip(*self.lengths, strict=True))

    @functools.cached_property
    def drawn(self) -> dict[str, np.ndarray]:
        """q, k, v and dout ``(positions, heads, dim)``, whatever keys and values are stored as."""
        rng = np.random.default_rng(zlib.crc32(repr(self.lengths).encode()))
        total_q, total_k = (int(x[-1]) + self.after for x in self.starts)
        D, E = self.kernel.head_dim, self.kernel.head_dim_v
        shapes = {"q": (total_q, self.heads, D), "k": (total_k, self.kv_heads, D), "v": (total_k, self.kv_heads, E)}
        shapes["dout"] = (total_q, self.heads, E)
        found = {}
        for name, shape in shapes.items():
            x = numerics.round_to(rng.standard_normal(shape, np.float32), self.kernel.dtype)
            x[shape[0] - self.after :] = np.nan
            found[name] = x
        return found

    @functools.cached_property
    def stored(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values as elements of 8 bits with a scale for each head; nothing without such a ``cache``."""
        rows = {n: torch.from_numpy(np.nan_to_num(self.drawn[n])) for n in "kv" if self.cache}
        return {n: quantise_cache(x, self.cache) for n, x in rows.items()}

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """q, k, v and dout, as kernels compute with them."""
        stood_for = {n: dequantise_cache(*x, self.kernel.dtype).float().numpy() for n, x in self.stored.items()}
        return self.drawn | {n: x + 0 * self.drawn[n] for n, x in stood_for.items()}  # NaN stays

    @functools.cached_property
    def params(self) -> dict:
        """Those of the definition, by name."""
        return dict(self.sample(len(self.lengths), self.heads))

    def rows(self, b: int) -> dict[str, slice]:
        """Which positions of each tensor are a sequence's."""
        i, j = (slice(int(x[b]), int(x[b + 1])) for x in self.starts)
        return {"q": i, "dout": i, "k": j, "v": j}

    def own(self, b: int) -> tuple[dict[str, np.ndarray], dict]:
        """q, k, v and dout of one sequence, and the reference's arguments that say which attention it is."""
        at = self.rows(b)
        tensors = {n: x[at[n]].swapaxes(0, 1)[None] for n, x in self.arrays.items()}
        axes = {p.name: p.axes for p in self.kernel.params}
        params = {n: x[b : b + 1] if axes[n].startswith("b") else x for n, x in self.params.items()}
        twins = {"mask": _of_sequence(self.kernel.mask, b), "score": _of_sequence(self.kernel.score, b)}
        return tensors, {"softmax_scale": self.softmax_scale, "params": params, "axes": axes, **twins}

    @functools.cached_property
    def seeing(self) -> list[int]:
        """The sequences that have queries and keys."""
        return [b for b, (queries, keys) in enumerate(self.lengths) if queries and keys]

    @functools.cached_property
    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """Output ``(positions, heads, dim)`` and lse ``(heads, positions)`` in float64."""
        total_q = len(self.arrays["q"])
        out = np.zeros((total_q, self.heads, self.kernel.head_dim_v))
        lse = np.full((self.heads, total_q), -np.inf)
        for b in (b for b, (queries, _) in enumerate(self.lengths) if queries):
            tensors, what = self.own(b)
            o, own = reference.attention(*(tensors[n] for n in "qkv"), **what)
            i = self.rows(b)["q"]
            out[i], lse[:, i] = o[0].swapaxes(0, 1), own[0]
        return out, lse

    def alone(self, b: int) -> Sequences:
        """A sequence by itself."""
        own = replace(self, lengths=self.lengths[b : b + 1], after=0)
        at = self.rows(b)
        own.__dict__["arrays"] = {n: x[at[n]] for n, x in self.arrays.items()}
        by_sequence = {p.name for p in self.kernel.params if p.axes.startswith("b") or p.rank == 3}
        own.__dict__["params"] = {n: x[b : b + 1] if n in by_sequence else x for n, x in self.params.items()}
        return own

    # ------------------------------------------------------------ what kernels take

    def _tensor(self, x: np.ndarray, device: str) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(x, np.float32)).to(device, getattr(torch, self.kernel.dtype))

    def given(self, device: str) -> tuple[dict, dict[str, int]]:
        """What a kernel takes by role, and the sizes of the problem."""
        lengths = (len(self.lengths), self.heads, len(self.arrays["q"]), self.kv_heads)
        dims = self.kernel.head_dim, self.kernel.head_dim_v
        values = {"q": self._tensor(self.arrays["q"], device), "softmax_scale": self.softmax_scale}
        starts = dict(zip(("cu_seqlens_q", "cu_seqlens_k"), self.starts, strict=True))
        if self.page_size:
            caches, where = self.pages({n: self.arrays[n] for n in "kv"}, np.nan)
            pages, columns = len(caches["k"]), where["page_table"].shape[1]
            if self.cache:
                caches, _ = self.pages({n: x.view(torch.uint8).numpy() for n, (x, _) in self.stored.items()}, 0x7F)
                as_int8 = self.cache == "int8"
                values |= {n: torch.from_numpy(x.view(np.int8) if as_int8 else x).to(device) for n, x in caches.items()}
                values |= {f"{n}_scale": x.expand(pages, -1).to(device) for n, (_, x) in self.stored.items()}
            else:
                values |= {n: self._tensor(x, device) for n, x in caches.items()}
            del starts["cu_seqlens_k"]
            starts |= where
            most = max(queries for queries, _ in self.lengths)
            problem = sizes.of_pages(*lengths, pages, self.page_size, columns, *dims, most)
        else:
            values |= {n: self._tensor(self.arrays[n], device) for n in "kv"}
            problem = sizes.of_sequences(*lengths, len(self.arrays["k"]), *dims)
        values |= {n: torch.from_numpy(x).to(device) for n, x in starts.items()}
        for p in self.kernel.params:
            x = self.params[p.name]
            values[p.name] = torch.from_numpy(np.ascontiguousarray(x)).to(device) if p.is_tensor else x
        return values, problem

    def pages(self, rows: dict, nothing: float) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Caches ``(pages, page_size, kv_heads, dim)`` of rows, ``nothing`` where there is none, and which is where."""
        needed = [-(-keys // self.page_size) for _, keys in self.lengths]
        places = np.random.default_rng(self.page_size).permutation(sum(needed) + 2).astype(np.int32)
        table = np.full((len(needed), max(needed) + 1), np.iinfo(np.int32).max, np.int32)
        caches = {n: np.full((len(places), self.page_size, *x.shape[1:]), nothing, x.dtype) for n, x in rows.items()}
        taken = itertools.accumulate(needed, initial=0)
        for b, (first, n) in enumerate(zip(taken, needed, strict=False)):
            table[b, :n] = places[first : first + n]
            j = np.arange(self.lengths[b][1])
            for name, cache in caches.items():
                cache[table[b, j // self.page_size], j % self.page_size] = rows[name][self.rows(b)[name]]
        lengths = np.array([keys for _, keys in self.lengths], np.int32)
        return caches, {"seqlens_k": lengths, "page_table": table}

    # ------------------------------------------------------------ forward

    def run(self, compute: Compute, device: str) -> Results:
        """Output ``(positions, heads, dim)`` and lse ``(heads, positions)`` of a kernel, full of NaN beforehand."""
        values, problem = self.given(device)
        o = self._tensor(np.full(self.expected[0].shape, np.nan, np.float32), device)
        lse = torch.full((self.heads * len(o),), torch.nan, device=device)
        compute({**values, "o": o, "lse": lse}, problem)
        return o.double().cpu().numpy(), lse.double().cpu().numpy().reshape(self.heads, len(o))

    def check(self, results: Results, device: str) -> float:
        """Assert that each sequence is right, and the rest zeros; the largest error as a share of what is allowed."""
        (out, lse), (want, want_lse), worst = results, self.expected, 0.0
        for b in self.seeing:
            tensors, what = self.own(b)
            i = self.rows(b)["q"]
            with np.errstate(invalid="ignore"):
                usual = numerics.usual_attention(*(tensors[n] for n in "qkv"), dtype=self.kernel.dtype, **what)
            exact = want[i].swapaxes(0, 1)[None]
            allowed = numerics.bound(usual, exact, self.kernel.dtype)
            seen = np.isfinite(want_lse[:, i])
            allowed += numerics.EPSILON["float32"] / 2 * numerics.magnitude(want_lse[:, i]) * numerics.magnitude(exact)
            error = numerics.largest_error(out[i], want[i])
            assert error <= allowed, f"sequence {b}: output differs by {error:.3g}, allowed {allowed:.3g}"
            if seen.any():
                off = numerics.largest_error(lse[:, i][seen], want_lse[:, i][seen])
                assert off <= numerics.lse_bound(want_lse[:, i][seen]), f"sequence {b}: lse differs by {off:.3g}"
            worst = max(worst, error / allowed)
        blind = np.isneginf(want_lse)
        assert np.array_equal(np.isneginf(lse), blind), "a row's log-sum-exp isn't -inf, or is"
        assert not out.swapaxes(0, 1)[blind].any(), "rows that see nothing aren't zeros"
        return float(worst)

    # ------------------------------------------------------------ gradients

    @property
    def learnt(self) -> dict[str, Param]:
        """The parameters that ask for a gradient, by name."""
        return {p.name: p for p in self.kernel.params if p.gradient}

    def run_backward(self, compute: Compute, device: str) -> Results:
        """dq, dk, dv and the gradients of parameters, full of NaN beforehand."""
        values, problem = self.given(device)
        out, lse = self.expected
        values |= {"o": self._tensor(out, device), "do": self._tensor(self.arrays["dout"], device)}
        flat = {"lse": lse.astype(np.float32).reshape(-1), "dlse": np.full(1, np.nan, np.float32)}
        values |= {n: torch.from_numpy(x).to(device) for n, x in flat.items()}
        results = {f"d{n}": torch.full_like(values[n], torch.nan) for n in "qkv"}
        shape = (len(self.lengths), self.heads)
        shapes = {n: values[n].shape if p.rank else shape if p.axes else (1,) for n, p in self.learnt.items()}
        results |= {f"d_{n}": torch.full(x, torch.nan, device=device) for n, x in shapes.items()}
        compute({**values, **results}, problem)
        return tuple(x.double().cpu().numpy() for x in results.values())

    def check_backward(self, results: Results, device: str) -> float:
        """Assert that each sequence's gradients are right, those of tables and numbers together, and the rest zeros;
        else as :meth:`check`."""
        worst = 0.0
        left = [np.ones(len(x), bool) for x in results]
        of_all = {n: _OfAll() for n, p in self.learnt.items() if not p.axes}
        for b in self.seeing:
            tensors, what = self.own(b)
            given = [tensors[n] for n in ("dout", "q", "k", "v")]
            exact, usual = gradients(*given, dtype=self.kernel.dtype, learnt=self.learnt, **what)
            products = np.abs(tensors["dout"] * self.expected[0][self.rows(b)["q"]].swapaxes(0, 1)).sum(-1)
            of_delta = numerics.EPSILON[self.kernel.dtype] / 2 * products.max()
            for n, (name, got) in enumerate(zip((*GRADIENTS, *self.learnt), results, strict=True)):
                of_rows = name in GRADIENTS
                if name in of_all:
                    left[n][:] = False
                    of_all[name].add(usual.params[name], exact.params[name], of_delta**2 * products.size)
                    continue
                at = self.rows(b)[name[1:]] if of_rows else slice(b, b + 1)
                left[n][at] = False
                near, want = ((getattr(x, name) if of_rows else x.params[name]) for x in (usual, exact))
                own = got[at].swapaxes(0, 1)[None] if of_rows else got[at].reshape(want.shape)
                dtype = self.kernel.dtype if of_rows else "float32"
                allowed = max(numerics.bound([near], want, dtype), _FLOOR[self.kernel.dtype] * numerics.magnitude(want))
                allowed += 0 if of_rows else _SLOPE * of_delta * np.sqrt(products.size / want.size)
                error = numerics.largest_error(own, want)
                assert error <= allowed, f"sequence {b}: d{name} differs by {error:.3g}, allowed {allowed:.3g}"
                worst = max(worst, error / max(allowed, np.finfo(float).tiny))
        of_results = dict(zip((*GRADIENTS, *self.learnt), results, strict=True))
        worst = max([worst, *(of_all[n].check(n, of_results[n], _FLOOR[self.kernel.dtype]) for n in of_all)])
        for name, x, rest in zip((*GRADIENTS, *self.learnt), results, left, strict=True):
            assert not x[rest].any(), f"{name} of what sees nothing isn't 0"
        return float(worst)


@dataclass
class _OfAll:
    """The gradient of a table or a number: what the sequences give it, added up."""

    near: np.ndarray = field(default_factory=lambda: np.zeros(1, np.float32))
    want: np.ndarray = field(default_factory=lambda: np.zeros(1))
    of_delta: float = 0.0

    def add(self, near: np.ndarray, want: np.ndarray, of_delta: float) -> None:
        """What a sequence gives, as usual and exactly; the square of what errors of delta may come to."""
        self.near, self.want, self.of_delta = self.near + near, self.want + want, self.of_delta + of_delta

    def check(self, name: str, got: np.ndarray, floor: float) -> float:
        """Assert that the gradient is right; its error as a share of what is allowed."""
        allowed = max(numerics.bound([self.near], self.want, "float32"), floor * numerics.magnitude(self.want))
        allowed += _SLOPE * np.sqrt(self.of_delta / self.want.size)
        error = numerics.largest_error(got, self.want)
        assert error <= allowed, f"{name}: its gradient differs by {error:.3g}, allowed {allowed:.3g}"
        return float(error / max(allowed, np.finfo(float).tiny))


def _of_sequence(twin: Callable, b: int) -> Callable:
    """A twin that takes the only batch entry for sequence ``b``."""

    @functools.wraps(twin)
    def moved(*arguments):
        *others, at = arguments
        return twin(*others, dataclasses.replace(at, b=at.b + b))

    return moved


def calls(
    kernel: Kernel, sample: Callable, paged: bool = False, few: bool = False, cache: str = ""
) -> Iterator[tuple[str, Sequences]]:
    """The calls of a kernel, by label: over pages if it is ``paged``, of few queries where it is for these."""
    lengths = FEW_ROWS if few else MANY_ROWS
    pages, how = (16, 7) if paged else (0, 0), {"cache": cache}
    yield "grouped heads", Sequences(kernel, sample, lengths, after=5, page_size=pages[0], **how)
    yield "a head", Sequences(kernel, sample, lengths[::-1], heads=1, after=0, page_size=pages[1], **how)


def forward(kernel: Kernel, sample: Callable, **which) -> Iterator[Trial]:
    """Trials of a forward kernel, as :func:`calls` says."""
    for label, call in calls(kernel, sample, **which):
        yield Trial(label, call.run, call.check)


def backward(kernel: Kernel, sample: Callable) -> Iterator[Trial]:
    """Trials of a backward kernel."""
    of_nothing = Sequences(kernel, sample, NO_PAIRS)
    for label, call in (*calls(kernel, sample), ("no query sees a key", of_nothing)):
        yield Trial(label, call.run_backward, call.check_backward)

"""What kernels must get right that read tensors over the axes of scores, or tables: forward and backward.

Values of all, or a size of 1 that is broadcast, biases of −inf and of −1e9, tiles and rows that see nothing; memory in
which two neighbouring elements may be read at once, and such where they may not.  Needs torch; no TVM.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from tests.torch_cases import Compute, tensor
from tests.trials import Results, Trial, gradients
from tvm_flash import numerics, reference
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import Param

#: What is added to hide a score by those who have no −inf; in float32 nothing is left of a score beside it.
FAR = -1e9
#: Rows of the trial with it that see no other number.
FAR_ROWS = slice(3, 7)

#: Of (heads, kv_heads, seqlen_q, seqlen_kv), and how tensors lie: with all sizes, the same for all heads and batch
#: entries, for all keys (a column of a wider tensor), for all queries, or for all of these, or with strides that divide
#: nothing; or with all sizes, and some biases of ``FAR``.
TRIALS = (
    ((2, 1, 150, 200), "whole"),
    ((4, 2, 70, 332), "same for heads"),
    ((1, 1, 130, 96), "same for keys"),
    ((2, 1, 70, 208), "same for queries"),
    ((2, 1, 70, 96), "same for all"),
    ((2, 2, 65, 129), "apart"),
    ((2, 1, 90, 330), "far"),
)
#: Of forward kernels also rows that have ``FAR`` alone.
FORWARD_TRIALS = (*TRIALS, ((2, 1, 90, 332), "far rows"))
GRADIENTS = ("dq", "dk", "dv")


@dataclass(frozen=True)
class Kernel:
    """Of a kernel what trials need: its ``params``, ``layout``, largest head dimensions, and the numpy twins.

    ``sample(batch, heads, seqlen_q, seqlen_kv)`` gives parameters by name, where random ones make no sense.
    """

    params: tuple[Param, ...]
    layout: str
    dtype: str
    head_dim: int
    head_dim_v: int
    mask: Callable
    score: Callable
    name: str
    sample: Callable[..., Mapping] | None = None


@dataclass(frozen=True)
class Problem:
    """Sizes, and how tensors lie, as in ``TRIALS``."""

    kernel: Kernel
    sizes: tuple[int, int, int, int]
    lie: str
    batch: int = 2
    softmax_scale: float = 0.2

    @functools.cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """q, k, v and dout ``(batch, heads, seq, dim)``, and the parameters."""
        rng = np.random.default_rng(zlib.crc32(repr((self.sizes, self.lie)).encode()))
        heads, kv_heads, seqlen_q, seqlen_kv = self.sizes
        D, E = self.kernel.head_dim, self.kernel.head_dim_v
        shapes = {"q": (heads, seqlen_q, D), "k": (kv_heads, seqlen_kv, D), "v": (kv_heads, seqlen_kv, E)}
        shapes["dout"] = (heads, seqlen_q, E)
        found = {
            n: numerics.round_to(rng.standard_normal((self.batch, *s), np.float32), self.kernel.dtype)
            for n, s in shapes.items()
        }
        if self.kernel.sample is not None:
            return found | dict(self.kernel.sample(self.batch, heads, seqlen_q, seqlen_kv))
        return found | {p.name: self._values(p, rng) for p in self.kernel.params}

    def _values(self, param: Param, rng):
        extents = {"b": self.batch, "h": self.sizes[0], "i": self.sizes[2], "j": self.sizes[3]}
        of_one = {"same for heads": "bh", "same for keys": "j", "same for queries": "i", "same for all": "bhij"}
        missing = of_one.get(self.lie, "")
        shape = [1 if a in missing and len(param.axes) > 1 else extents[a] for a in param.axes]
        if param.rank:
            return rng.standard_normal((self.sizes[0], *[101] * (param.rank - 1)), np.float32)
        if param.dtype == "bool":
            x = rng.random(shape) < (1 if self.lie == "same for all" else 0.5)
            if shape[-1] > 1:
                x[..., : shape[-1] // 2 + 20] &= False  # tiles in which nobody sees anything
            if "i" in param.axes and extents["i"] == shape[param.axes.index("i")]:
                x[(..., shape[-2] // 2, slice(None)) if "j" in param.axes else (..., shape[-1] // 2)] = False
            return x
        if param.dtype == "int32":
            return np.sort(rng.integers(0, 4, shape)).astype(np.int32)
        x = rng.standard_normal(shape, np.float32)
        if self.lie == "apart" and param.axes.endswith("ij"):
            x[..., -40:] = -np.inf  # the keys that are walked over first
        if self.lie.startswith("far") and _takes_far(param):
            x[..., -140:] = x[..., 20:60] = FAR  # among them whole tiles, and those that are walked over first
            if self.lie == "far rows":
                x[..., FAR_ROWS, :] = FAR
        return numerics.round_to(x, param.dtype)

    @property
    def far(self) -> float | None:
        """``FAR`` as a parameter's dtype has it, if ``FAR_ROWS`` have it alone."""
        param = next(filter(_takes_far, self.kernel.params), None)
        if self.lie != "far rows" or param is None:
            return None
        return numerics.round_to(np.float32(FAR), param.dtype).item()

    @functools.cached_property
    def that_count(self) -> dict[str, np.ndarray]:
        """The arrays as they count: beside ``FAR`` float32 has nothing left of a row's scores, which are equal."""
        found = dict(self.arrays)
        if self.far is not None:
            for name in ("q", *(p.name for p in self.kernel.params if _takes_far(p))):
                found[name] = found[name].copy()
                found[name][..., FAR_ROWS, :] = 0
        return found

    @property
    def what(self) -> dict:
        """The arguments of the reference that say which attention it is."""
        params = {p.name: self.that_count[p.name] for p in self.kernel.params}
        axes = {p.name: p.axes for p in self.kernel.params}
        twins = {"mask": self.kernel.mask, "score": self.kernel.score}
        return {"softmax_scale": self.softmax_scale, "params": params, "axes": axes, **twins}

    @property
    def extents(self) -> dict[str, int]:
        """Sizes by name."""
        heads, kv_heads, seqlen_q, seqlen_kv = self.sizes
        of = (self.batch, heads, seqlen_q, kv_heads, seqlen_kv, self.kernel.head_dim, self.kernel.head_dim_v)
        return sizes.of(*of)

    @functools.cached_property
    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """Output and lse in float64."""
        with np.errstate(invalid="ignore"):
            return reference.attention(*(self.that_count[n] for n in "qkv"), **self.what)

    def given(self, device: str) -> dict:
        """What forward and backward take, by role."""
        lay = functools.partial(tensor, dtype=self.kernel.dtype, layout=self.kernel.layout, strides="contiguous")
        values = {n: lay(self.arrays[n], device=device) for n in "qkv"}
        for p in self.kernel.params:
            x = self.arrays[p.name]
            values[p.name] = self._spread(self._tensor(p).to(device), p) if p.is_tensor else x
        return values | {"softmax_scale": self.softmax_scale}

    def _tensor(self, param: Param) -> torch.Tensor:
        x = torch.from_numpy(self.arrays[param.name])
        return x.to(getattr(torch, param.dtype)) if "float" in param.dtype else x

    def _spread(self, x: torch.Tensor, param: Param) -> torch.Tensor:
        """With all sizes, as a call gives a tensor; with an element between any two if they are ``apart``, and NaN, or
        what isn't so, beside the one for all keys of a row."""
        if self.lie == "apart":
            room = torch.empty((*x.shape, 2), dtype=x.dtype, device=x.device)
            room[..., 0] = x
            x = room[..., 0]
        if self.lie == "same for keys" and x.shape[-1:] == (1,):
            beside = ~x if x.dtype == torch.bool else torch.full_like(x, torch.nan) if x.is_floating_point() else x + 1
            x = torch.cat((x, beside.expand(*x.shape[:-1], 31)), -1)[..., :1]
        extents = dict(zip("bhij", (self.batch, self.sizes[0], *self.sizes[2:]), strict=True))
        return x.expand([extents[a] for a in param.axes]) if param.axes else x

    def gradient_shape(self, param: Param) -> tuple[int, ...]:
        """That of what a kernel gives of a parameter."""
        if param.rank:
            return self.arrays[param.name].shape
        extents = dict(zip("bhij", (self.batch, self.sizes[0], *self.sizes[2:]), strict=True))
        return tuple(extents[a] for a in param.of_gradient) or (1,)


def _takes_far(param: Param) -> bool:
    """Whether a trial gives a parameter ``FAR``: float16 has no such number."""
    return param.axes.endswith("ij") and param.dtype in ("float32", "bfloat16")


def kernel_of(entry, twins: Mapping[str, Callable] | None = None, sample: Callable | None = None) -> Kernel:
    """What trials need of an entry; ``twins``, ``mask`` and ``score``, are those of a definition that isn't ours, and
    ``sample`` its parameters."""
    twins = twins or {"mask": reference.MASKS[entry.mask], "score": reference.SCORES[entry.score]}
    return Kernel(
        entry.params,
        entry.layout,
        entry.dtype,
        entry.head_dim,
        entry.head_dim_v,
        **twins,
        name=entry.symbol,
        sample=sample,
    )


def forward(kernel: Kernel, which=FORWARD_TRIALS) -> Iterator[Trial]:
    """Trials of a forward kernel, all or those named."""
    for problem in (Problem(kernel, *x) for x in which):
        yield Trial(f"tensors {problem.lie} {problem.sizes}", *_forward(problem))


def _forward(problem: Problem):
    def run(compute: Compute, device: str) -> Results:
        heads, _, rows, _ = problem.sizes
        shape = (problem.batch, heads, rows, problem.kernel.head_dim_v)
        out = tensor(
            np.full(shape, np.nan, np.float32), problem.kernel.dtype, problem.kernel.layout, "contiguous", device
        )
        lse = torch.full((problem.batch * heads * rows,), torch.nan, device=device)
        compute({**problem.given(device), "o": out, "lse": lse}, problem.extents)
        out = out if problem.kernel.layout == "bhsd" else out.transpose(1, 2)
        return out.double().cpu().numpy(), lse.double().cpu().numpy().reshape(shape[:3])

    def check(results: Results, device: str) -> float:
        (out, lse), (want, want_lse) = results, problem.expected
        with np.errstate(invalid="ignore"):
            usual = numerics.usual_attention(
                *(problem.that_count[n] for n in "qkv"), dtype=problem.kernel.dtype, **problem.what
            )
        allowed = numerics.bound(usual, want, problem.kernel.dtype)
        allowed += numerics.EPSILON["float32"] / 2 * numerics.magnitude(want_lse) * numerics.magnitude(want)
        error = np.abs(out - want).max()
        assert error <= allowed, f"output differs by {error:.3g}, allowed {allowed:.3g}"
        blind = np.isneginf(want_lse)
        assert np.array_equal(np.isneginf(lse), blind) and not out[blind].any()
        if problem.far is not None:
            assert (np.abs(lse[..., FAR_ROWS] - problem.far) <= -FAR * numerics.EPSILON["float32"]).all()
            blind[..., FAR_ROWS] = True
        lse_error = np.abs(lse[~blind] - want_lse[~blind]).max()
        assert lse_error <= numerics.lse_bound(want_lse[~blind]), f"lse differs by {lse_error:.3g}"
        return float(error / allowed)

    return run, check


def backward(kernel: Kernel, which=TRIALS) -> Iterator[Trial]:
    """Trials of a backward kernel, all or those named; the first one also of a caller who asks for no gradient of a
    tensor, if there are any."""
    problems = [Problem(kernel, *x) for x in which]
    for problem in problems:
        yield Trial(f"gradients, tensors {problem.lie} {problem.sizes}", *_backward(problem))
    if any(p.gradient and p.is_tensor for p in kernel.params):
        problem = problems[0]
        yield Trial(f"gradients of no tensor, {problem.lie} {problem.sizes}", *_backward(problem, asked=False))


def _backward(problem: Problem, asked: bool = True):
    kernel = problem.kernel
    # Gradients of a head's parameters are always made.
    learnt = [p for p in kernel.params if p.gradient and (asked or p.of_gradient in ("", "bh"))]
    unasked = [p for p in kernel.params if p.gradient and p not in learnt]

    def run(compute: Compute, device: str) -> Results:
        values = problem.given(device)
        out, lse = problem.expected
        lay = functools.partial(tensor, dtype=kernel.dtype, layout=kernel.layout, strides="contiguous", device=device)
        values |= {"o": lay(out.astype(np.float32)), "do": lay(problem.arrays["dout"])}
        flat = {"lse": lse.astype(np.float32).reshape(-1), "dlse": np.full(1, np.nan, np.float32)}
        values |= {n: torch.from_numpy(x).to(device) for n, x in flat.items()}
        results = {f"d{n}": torch.full_like(values[n], torch.nan) for n in "qkv"}
        of_params = {f"d_{p.name}": torch.full(problem.gradient_shape(p), torch.nan, device=device) for p in learnt}
        none = {f"d_{p.name}": torch.full((1,) * (p.rank or len(p.of_gradient)), 7.0, device=device) for p in unasked}
        compute({**values, **results, **of_params, **none}, problem.extents)
        assert all((x == 7).all() for x in none.values()), "a gradient was written that nobody asked for"
        if kernel.layout == "bshd":
            results = {n: x.transpose(1, 2) for n, x in results.items()}
        return tuple(x.double().cpu().numpy() for x in (*results.values(), *of_params.values()))

    def check(results: Results, device: str) -> float:
        given = [problem.arrays[n] for n in ("dout", "q", "k", "v")]
        names = [p.name for p in learnt]
        exact, usual = gradients(*given, dtype=kernel.dtype, learnt=names, **problem.what)
        # The output comes rounded, and so delta: gradients of scores are off by that, in proportion to weights.
        products = np.abs(problem.arrays["dout"] * problem.expected[0]).sum(-1)
        of_delta, rows, worst = numerics.EPSILON[kernel.dtype] / 2 * products.max(), products.size, 0.0
        for name, got in zip((*GRADIENTS, *names), results, strict=True):
            of = (getattr(x, name) if name in GRADIENTS else x.params[name] for x in (usual, exact))
            near, want = of
            if name not in GRADIENTS:
                param = next(p for p in learnt if p.name == name)
                got = _summed(got, param, want.shape)
            dtype = kernel.dtype if name in GRADIENTS else "float32"
            allowed = max(numerics.bound([near], want, dtype), 2**-8 * numerics.magnitude(want) / 8)
            if name not in GRADIENTS:
                allowed += of_delta * np.sqrt(max(1, rows / want.size))
            error = numerics.largest_error(got, want)
            assert error <= allowed, f"d{name} differs by {error:.3g}, allowed {allowed:.3g}"
            worst = max(worst, error / allowed)
        return float(worst)

    return run, check


def _summed(got: np.ndarray, param: Param, shape: tuple[int, ...]) -> np.ndarray:
    """The gradient that a kernel gives, summed over the axes that the parameter lacks or is broadcast along."""
    if not param.axes:
        return got.reshape(shape)
    sizes_of = dict(zip(param.axes, (1,) * (len(param.axes) - len(shape)) + tuple(shape), strict=True))
    for axis, a in enumerate(param.of_gradient):
        if sizes_of.get(a, 1) == 1:
            got = got.sum(axis, keepdims=True)
    return got.reshape(shape)

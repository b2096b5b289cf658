"""Random calls of the public functions, compared with float64.  A call follows from its seed alone:

python -m tests.random_cases --seed 1234                 # one call again, with what it is
python -m tests.random_cases --count 5000 --device cuda  # many; a failure is one line
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch

from tvm_flash import flash_attention, flash_attention_v2, numerics, padded_attention
from tvm_flash.machine.device import parse
from tvm_flash.packs.manifest import BUILTIN_DEFINITION
from tvm_flash.packs.registry import registry

DTYPES = {"cpu": ("float32", "float16", "bfloat16"), "cuda": ("float16", "bfloat16")}
#: Those that models have, and, as None, any; of q and k, then of v: None is the same.
HEAD_DIMS = ((64, None), (64, None), (128, None), (96, None), (192, None), (192, 128), (256, None), (None, None))
MAX_HEAD_DIM = 256
#: Scores of one call, so that float64 takes milliseconds.
MAX_SCORES = {"cpu": 80_000, "cuda": 4_000_000}
#: Of a gradient, whose sums are in float32: roundings of the sum of its terms' magnitudes.
SUM_ROUNDINGS = 4
#: How many query heads share a key head.
GROUPS = (1, 1, 1, 2, 3, 4, 7, 8, 16)
#: How a tensor lies in memory; ``flipped`` is NumPy's only.
STRIDES = ("contiguous", "transposed", "gaps", "shared batch", "flipped")


@dataclass(frozen=True)
class Call:
    """One call: sizes as in :func:`tvm_flash.flash_attention`, and how it is made.

    ``layout``, ``variant``, ``dtype``, ``strides`` (of q, k, v), ``options`` (keyword arguments that are numbers),
    ``slopes`` and ``ranges`` (whether there are per-head slopes, of one or two dimensions, and key ranges), ``starts``
    (with ranges, whether each entry says where its queries stand),
    ``magnitude`` (of q), ``out`` (how a given result lies in memory; empty if none is given).
    """

    seed: int
    device: str
    layout: str
    variant: str
    dtype: str
    batch: int
    heads: int
    kv_heads: int
    seqlen_q: int
    seqlen_kv: int
    head_dim: int
    head_dim_v: int
    strides: tuple[str, str, str]
    options: tuple[tuple[str, object], ...]
    slopes: int
    ranges: bool
    starts: bool
    magnitude: float
    out: str


def call_of(seed: int, device: str = "cpu") -> Call:
    """The call that belongs to a seed."""
    rng = random.Random(seed)
    length_q, length_kv = _length(rng), _length(rng)
    if rng.random() < 0.4:
        length_kv = length_q
    elif rng.random() < 0.2:
        length_q, length_kv = rng.randint(1, 9), rng.randint(1500, 10_000)
    kv_heads, batch = rng.choice((1, 1, 2, 3)), rng.choice((1, 1, 2, 3, 5))
    group = rng.choice(GROUPS)
    batch, kv_heads, group, length_q, length_kv = _small_enough(
        [batch, kv_heads, group, length_q, length_kv], MAX_SCORES[device], rng
    )
    heads = kv_heads * group
    head_dim, head_dim_v = rng.choice(HEAD_DIMS)
    head_dim = head_dim or 8 * rng.randint(1, MAX_HEAD_DIM // 8)
    head_dim_v = head_dim_v or (head_dim if rng.random() < 0.7 else 8 * rng.randint(1, MAX_HEAD_DIM // 8))
    numpy = device == "cpu" and rng.random() < 0.2
    dtypes = DTYPES[device][:2] if numpy else DTYPES[device]
    strides = STRIDES if numpy else STRIDES[:-1]
    ranges = rng.random() < 0.2
    options: dict[str, object] = {}
    if rng.random() < 0.4:
        options["causal"] = True
    if rng.random() < 0.3:
        options["window_size"] = tuple(rng.choice((-1, 0, 1, 7, rng.randint(0, length_kv + 2))) for _ in range(2))
    if rng.random() < 0.3:
        options["softmax_scale"] = rng.choice((0.01, 0.1, 0.5, 1.0))
    if rng.random() < 0.2:
        options["softcap"] = rng.choice((0.5, 5.0, 50.0))
    return Call(
        seed=seed,
        device="numpy" if numpy else device,
        layout=rng.choice(("bhsd", "bshd")),
        variant=rng.choice(("v1", "v2", "auto")),
        dtype=rng.choice(dtypes),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        seqlen_q=length_q,
        seqlen_kv=length_kv,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        strides=tuple(rng.choice(strides) for _ in range(3)),
        options=tuple(options.items()),
        slopes=rng.choice((0, 0, 0, 1, 2)),
        ranges=ranges,
        starts=ranges and rng.random() < 0.5,
        magnitude=rng.choice((0.1, 1.0, 1.0, 3.0)),
        out=rng.choice(("", "", "contiguous", "transposed", "gaps")),
    )


def _length(rng: random.Random) -> int:
    """1 to 1500, small ones and those beside multiples of tiles more often; 0 now and then."""
    kind = rng.random()
    if kind < 0.02:
        return 0
    if kind < 0.2:
        return rng.randint(1, 9)
    if kind < 0.4:
        return max(1, 64 * rng.randint(1, 8) + rng.choice((-1, 0, 1)))
    return int(math.exp(rng.uniform(0, math.log(1500))))


def _small_enough(sizes: list[int], product: int, rng: random.Random) -> list[int]:
    """Sizes of which some were halved until their product is small enough."""
    while math.prod(sizes) > product:
        i = rng.randrange(len(sizes))
        sizes[i] = max(1, sizes[i] // 2)
    return sizes


# ---------------------------------------------------------------- running one


def check(call: Call) -> float:
    """Make the call; its error as a share of what is allowed.

    Raises
    ------
    AssertionError: a number is wrong, or not the same when asked again, or memory was written that isn't the result's.
    """
    logical, slopes, ranges, starts = _tensors(call)
    q, k, v = (_placed(x, s, call) for x, s in zip(logical, call.strides, strict=True))
    results = [_run(call, q, k, v, slopes, ranges, starts, return_lse) for return_lse in (True, False)]
    (out, lse), (again, _) = results
    assert torch.equal(out, again), "other bits when asked again without the log-sum-exp"
    return _compare(call, out, lse, *_expected(call, *logical, slopes, ranges, starts))


def _tensors(call: Call):
    """q, k, v as ``(batch, heads, seq, head_dim)``, slopes, key ranges, and where queries start."""
    rng = np.random.default_rng(call.seed)
    device = "cpu" if call.device == "numpy" else call.device
    dtype = getattr(torch, call.dtype)

    def random_tensor(heads, length, dim, factor=1.0):
        x = rng.standard_normal((call.batch, heads, length, dim), np.float32) * np.float32(factor)
        return torch.from_numpy(x).to(device, dtype)

    logical = [
        random_tensor(call.heads, call.seqlen_q, call.head_dim, call.magnitude),
        random_tensor(call.kv_heads, call.seqlen_kv, call.head_dim),
        random_tensor(call.kv_heads, call.seqlen_kv, call.head_dim_v),
    ]
    for x, strides in zip(logical, call.strides, strict=True):
        if strides == "shared batch":
            x[:] = x[:1].clone()
    slopes = ranges = starts = None
    if call.slopes:
        shape = (call.heads,) if call.slopes == 1 else (call.batch, call.heads)
        slopes = torch.from_numpy(rng.random(shape, np.float32)).to(device)
    if call.ranges:
        ends = np.sort(rng.integers(-2, call.seqlen_kv + 3, (call.batch, 2)), axis=1).astype(np.int32)
        ranges = torch.from_numpy(ends).to(device)
    if call.starts:
        places = rng.integers(-call.seqlen_q - 2, call.seqlen_kv + 3, call.batch).astype(np.int32)
        starts = torch.from_numpy(places).to(device)
    return logical, slopes, ranges, starts


def _placed(x: torch.Tensor, strides: str, call: Call):
    """``(batch, heads, seq, dim)`` in the call's layout, lying in memory as ``strides`` says; NumPy's if it asks so."""
    x = x if call.layout == "bhsd" else x.transpose(1, 2)
    if strides == "transposed":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif strides == "gaps":
        x = _with_gaps(x)[0]
    elif strides == "shared batch":
        x = x[:1].contiguous().expand(x.shape)
    elif strides == "flipped":
        return np.flip(np.ascontiguousarray(np.flip(x.numpy(), 1)), 1)
    else:
        x = x.contiguous()
    return x.numpy() if call.device == "numpy" else x


def _with_gaps(x: torch.Tensor):
    """The same amid NaN, and the whole memory; aligned as little as kernels of the device allow."""
    before, columns = (1, 9) if x.device.type == "cpu" else (8, 16)
    room = torch.full([n + 2 for n in x.shape[:3]] + [x.shape[3] + columns], torch.nan, dtype=x.dtype, device=x.device)
    view = room[(*(slice(1, 1 + n) for n in x.shape[:3]), slice(before, before + x.shape[3]))]
    view.copy_(x)
    return view, room


def _run(call: Call, q, k, v, slopes, ranges, starts, return_lse: bool):
    """Result and log-sum-exp (None if not asked for) as torch tensors ``(batch, heads, seq, …)``."""
    options = {**dict(call.options), "variant": call.variant, "return_lse": return_lse}
    out = room = None
    if call.out:
        shape = (call.batch, call.heads, call.seqlen_q, call.head_dim_v)
        device = "cpu" if call.device == "numpy" else call.device
        blank = torch.full(shape, torch.nan, dtype=getattr(torch, call.dtype), device=device)
        if call.out == "gaps":
            out, room = _with_gaps(blank if call.layout == "bhsd" else blank.transpose(1, 2))
            out = out.numpy() if call.device == "numpy" else out
        else:
            out = _placed(blank, call.out, call)
    as_given = (lambda x: x if x is None else x.numpy()) if call.device == "numpy" else (lambda x: x)
    options |= {"alibi_slopes": as_given(slopes), "out": out}
    if ranges is not None:
        options |= {"query_start": as_given(starts), "layout": call.layout}
        result = padded_attention(q, k, v, as_given(ranges), **options)
    else:
        function = flash_attention if call.layout == "bhsd" else flash_attention_v2
        result = function(q, k, v, **options)
    found, lse = result if return_lse else (result, None)
    assert out is None or found is out
    found, lse = (torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in (found, lse))
    if room is not None:
        written = int((~room.isnan()).sum())
        assert written <= found.numel(), f"{written - found.numel()} elements beside the result were written"
    return found if call.layout == "bhsd" else found.transpose(1, 2), lse


def _expected(call: Call, q, k, v, slopes, ranges, starts):
    """Result and log-sum-exp in float64, the largest score, and results that one would expect of the call's own dtype.

    The latter are torch's, and those of the formula with one product added after another, as kernels sum; where there
    are few results, with the terms of a score in several orders.  All is written out, and not taken from the package.
    """
    k, v = (x.repeat_interleave(call.heads // call.kv_heads, 1) for x in (k, v))
    visible, scores = _scores(call, slopes, ranges, starts, q.device)
    scale = dict(call.options).get("softmax_scale", 1 / math.sqrt(call.head_dim))
    s = scores(q.double() @ k.double().transpose(-1, -2))
    lse = torch.logsumexp(s, -1)
    largest = s[s.isfinite()].abs().max().item() if s.isfinite().any() else 0.0
    exact = torch.exp(s - torch.where(lse.isneginf(), 0, lse)[..., None]) @ v.double()

    def usual(terms, keys):
        a, b, c = q[..., terms], k[..., keys, :][..., terms], v[..., keys, :]
        if slopes is None and "softcap" not in dict(call.options):
            return torch.nn.functional.scaled_dot_product_attention(a, b, c, visible[..., keys], scale=scale)
        s = (a @ b.transpose(-1, -2))[..., keys.argsort()]
        return torch.softmax(scores(s)[..., keys], -1) @ c

    orders = list(numerics.orders(call.head_dim, call.seqlen_kv, exact.numel(), call.seed))
    usuals = [usual(*order) for order in orders]
    if call.dtype == "float32" and call.seqlen_kv:
        usuals += _one_after_another(q, k, v, scores, [terms for terms, _ in orders])
    return exact, lse, largest, [torch.where(lse.isneginf()[..., None], 0, x) for x in usuals]


def _scores(call: Call, slopes, ranges, starts, device):
    """Which keys are seen, and a function from products of queries and keys to scores."""
    options = dict(call.options)
    scale = options.get("softmax_scale", 1 / math.sqrt(call.head_dim))
    first = call.seqlen_kv - call.seqlen_q if starts is None else starts[:, None, None, None]
    i = torch.arange(call.seqlen_q, device=device)[:, None] + first
    j = torch.arange(call.seqlen_kv, device=device)[None]
    left, right = options.get("window_size", (-1, -1))
    visible = torch.ones(call.batch, 1, call.seqlen_q, call.seqlen_kv, dtype=torch.bool, device=device)
    visible &= (j <= i) if options.get("causal") else True
    visible &= (j >= i - left) if left >= 0 else True
    visible &= (j <= i + right) if right >= 0 else True
    if ranges is not None:
        start, end = (x[:, None, None, None] for x in ranges.unbind(1))
        visible &= (j >= start) & (j < end)

    def scores(s):
        s = s * scale
        cap = options.get("softcap", 0.0)
        s = cap * torch.tanh(s / cap) if cap else s
        if slopes is not None:
            s = s - slopes.to(s.dtype)[..., None, None] * (i - j).abs().to(s.dtype)
        return s.masked_fill(~visible, -torch.inf)

    return visible, scores


def _one_after_another(q, k, v, scores, orders):
    """Attention in float32 with all sums taken term by term; once for each order of the terms of a score."""
    q, k = (torch.stack([x[..., order] for order in orders]) for x in (q, k))
    s = torch.zeros(*q.shape[:4], k.shape[3])
    for d in range(q.shape[4]):
        s += q[..., :, None, d] * k[..., None, :, d]
    s = scores(s)
    largest = s.amax(-1, keepdim=True)
    p = torch.exp(s - torch.where(largest.isneginf(), 0, largest))
    row_sum, acc = torch.zeros(*q.shape[:4], 1), torch.zeros(*q.shape[:4], v.shape[3])
    for j in range(k.shape[3]):
        row_sum += p[..., j, None]
        acc += p[..., j, None] * v[..., None, j, :]
    return [*(acc / row_sum)]


def check_gradients(call: Call) -> float:
    """Make the call with tensors that require gradients, twice; the largest error of a gradient as a share of what is
    allowed.

    Raises
    ------
    AssertionError: a number is wrong, or not the same when asked again.
    """
    if call.device == "numpy":  # by torch, which has autograd
        strides = tuple("contiguous" if s == "flipped" else s for s in call.strides)
        call = dataclasses.replace(call, device="cpu", strides=strides)
    call = dataclasses.replace(call, out="")
    logical, slopes, ranges, starts = _tensors(call)
    generator = torch.Generator().manual_seed(call.seed)
    rows = (call.batch, call.heads, call.seqlen_q)
    dout = torch.randn(*rows, call.head_dim_v, generator=generator).to(logical[0])
    dlse = torch.randn(rows, generator=generator).to(logical[0].device)

    def ours():
        placed = [_placed(x, s, call).detach().requires_grad_() for x, s in zip(logical, call.strides, strict=True)]
        learnt = [] if slopes is None else [slopes.clone().requires_grad_()]
        out, lse = _run(call, *placed, *(learnt or [None]), ranges, starts, True)
        torch.autograd.backward((out, lse), (dout, dlse))
        found = [x.grad if call.layout == "bhsd" else x.grad.transpose(1, 2) for x in placed]
        return [*found, *(x.grad for x in learnt)]

    def by_formula(dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in logical]
        learnt = [] if slopes is None else [slopes.to(dtype).requires_grad_()]
        visible, scores = _scores(call, *(learnt or [None]), ranges, starts, logical[0].device)
        k, v = (x.repeat_interleave(call.heads // call.kv_heads, 1) for x in leaves[1:])
        s = scores(leaves[0] @ k.transpose(-1, -2))
        seen = visible.any(-1).expand(rows)
        s = torch.where(seen[..., None], s, 0.0)  # a row that sees nothing has no gradient, and makes no NaN
        keep = seen.to(dtype)
        out, lse = torch.softmax(s, -1) @ v, torch.logsumexp(s, -1)
        ((out * dout.to(dtype)).sum(-1) * keep + lse * dlse.to(dtype) * keep).sum().backward()
        found = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
        if dtype != torch.float64:
            return found, None
        # What the sums are of, without signs: sums in float32 are off by roundings of these, however they cancel.
        # An error of a score is one of its weight, relative to it.
        scale = dict(call.options).get("softmax_scale", 1 / math.sqrt(call.head_dim))
        p, weight = torch.softmax(s, -1) * keep[..., None], dout.to(dtype).abs()
        p = p * (1 + scale * (leaves[0].abs() @ k.abs().transpose(-1, -2)))
        size = (weight @ v.abs().transpose(-1, -2)) + (weight * out.abs()).sum(-1)[..., None] + dlse.abs()[..., None]
        size = p * size * scale
        grouped = (call.batch, call.kv_heads, call.heads // call.kv_heads, call.seqlen_kv)
        of_keys = (size.transpose(-1, -2) @ leaves[0].abs(), p.transpose(-1, -2) @ weight)
        of_keys = (x.reshape(*grouped, x.shape[-1]).sum(2) for x in of_keys)
        return found, [x.detach() for x in (size @ k.abs(), *of_keys)]

    found, again, worst = ours(), ours(), 0.0
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "other bits when asked again"
    (exact, terms), (usual, _) = by_formula(torch.float64), by_formula(getattr(torch, call.dtype))
    # The gradient of slopes, whose terms cancel one another, is compared in tests of its own.
    for name, a, b, c, size in zip(("dq", "dk", "dv"), found, exact, usual, terms, strict=False):
        assert a.shape == b.shape
        if a.numel():
            allowed = numerics.gradient_bound(c.double().cpu().numpy(), b.cpu().numpy(), call.dtype)
            allowed = max(allowed, SUM_ROUNDINGS * numerics.EPSILON["float32"] * size.max().item())
            error = (a.double() - b).abs().max().item()
            assert error <= allowed, f"{name} differs by {error:.3g}, allowed {allowed:.3g}"
            worst = max(worst, error / allowed if allowed else 0.0)
    return worst


def _compare(call: Call, out, lse, exact, exact_lse, largest_score, usuals) -> float:
    assert out.shape == exact.shape and lse.shape == exact_lse.shape and lse.dtype == torch.float32
    if not out.numel():
        return 0.0
    usual = numerics.largest_of((x - exact).abs().max().item() for x in usuals)
    allowed = numerics.allowed_error(usual, exact.abs().max().item(), call.dtype)
    error = (out - exact).abs().max().item()
    assert error <= allowed, f"differs by {error:.3g}, allowed {allowed:.3g}"
    blind = exact_lse.isneginf()
    assert torch.equal(lse.isneginf(), blind), "−inf in the log-sum-exp of other rows than those that see nothing"
    assert not out[blind].any(), "not zero in a row that sees nothing"
    if not blind.all():
        tolerance = numerics.LSE_TOLERANCE if call.device != "cuda" else numerics.EPSILON[call.dtype] / 2
        lse_error = (lse - exact_lse)[~blind].abs().max().item()
        lse_allowed = tolerance * max(1.0, largest_score, exact_lse[~blind].abs().max().item())
        assert lse_error <= lse_allowed, f"the log-sum-exp differs by {lse_error:.3g}, allowed {lse_allowed:.3g}"
    return error / allowed if allowed else 0.0


def wide_enough(call: Call) -> bool:
    """Whether kernels of every kind are installed for the head dimensions of a call: those of sm_70 end at 128."""
    device = parse("cpu" if call.device == "numpy" else call.device)
    kernels = [k.entry for arch in device.archs() for k in registry().candidates(arch, BUILTIN_DEFINITION, call.dtype)]
    return any(
        k.head_dim >= call.head_dim and k.head_dim_v >= call.head_dim_v
        for k in kernels
        if k.mask == "positioned"  # the head dimensions that have this kind have all
    )


def failures(seeds, device: str = "cpu", seconds: float = math.inf, gradients: bool = False):
    """Check the calls of many seeds, or their ``gradients``: how many there were, the largest share of the allowed
    error, and a line for each that failed."""
    lines, worst, count, start = [], 0.0, 0, time.monotonic()
    for seed in seeds:
        call = call_of(seed, device)
        if not wide_enough(call):
            continue
        try:
            worst = max(worst, check_gradients(call) if gradients else check(call))
        except Exception as e:  # whatever goes wrong is told with the call that it happened in
            lines.append(f"{type(e).__name__}: {e}  [python -m tests.random_cases --seed {seed} --device {device}]")
        count += 1
        if time.monotonic() - start > seconds:
            break
    return count, worst, lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1, help="calls, of this seed and those after it")
    parser.add_argument("--device", choices=tuple(DTYPES), default="cpu")
    parser.add_argument("--gradients", action="store_true", help="of the calls, by autograd")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long")
    options = parser.parse_args()
    if options.count == 1:
        print(call_of(options.seed, options.device))
    seeds = range(options.seed, options.seed + options.count)
    count, worst, lines = failures(seeds, options.device, options.seconds, options.gradients)
    print(*lines, sep="\n", end="\n" if lines else "")
    print(f"{count} calls, {len(lines)} failed; largest error {worst:.2f} of what is allowed")
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())

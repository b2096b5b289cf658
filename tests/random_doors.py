"""Random calls of the drop-ins of torch and flash_attn, compared with float64.  A call follows from its seed alone:

python -m tests.random_doors sdpa --seed 1234                     # one call again, with what it is
python -m tests.random_doors kvcache --count 5000 --device cuda   # many; a failure is one line

What they have beside the package's own functions, of which :mod:`tests.random_cases`, :mod:`tests.random_ragged` and
:mod:`tests.random_paged` make calls, is what is drawn here: masks and biases of every shape that broadcasts, gradients
of them, head dimensions that no kernel has, and tensors that lie in memory as nobody would choose.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch

from tests.random_cases import DTYPES, GROUPS
from tvm_flash import KernelNotFoundError, nn, numerics
from tvm_flash.nn import sdpa as sdpa_door

#: Scores of one call, so that float64 takes milliseconds.
MAX_SCORES = {"cpu": 60_000, "cuda": 1_000_000}
HEAD_DIMS = (64, 64, 128, 128, 32, 96, 40, 8, 20, 33, 72, 120, 192, 256)
#: What of a sum in float32 its terms may be off by, in roundings of the sum of their magnitudes.
SUM_ROUNDINGS = 16


class Draw(random.Random):
    """The choices of a call, each with a name, so that a failure can tell them."""

    def __init__(self, seed: int, device: str):
        super().__init__(seed)
        self.device, self.said = device, {}
        self.generator = torch.Generator().manual_seed(seed)

    def say(self, name: str, value: Any) -> Any:
        """Remember a choice."""
        self.said[name] = value
        return value

    def one_of(self, name: str, *values: Any) -> Any:
        """One of some values."""
        return self.say(name, self.choice(values))

    def chance(self, name: str, share: float) -> bool:
        """True in a share of all calls."""
        return self.say(name, self.random() < share)

    def length(self, name: str, longest: int = 600) -> int:
        """1 to ``longest``, small ones and those beside multiples of tiles more often."""
        kind = self.random()
        if kind < 0.2:
            return self.say(name, self.randint(1, 9))
        if kind < 0.4:
            return self.say(name, max(1, min(longest, 64 * self.randint(1, 4) + self.choice((-1, 0, 1)))))
        return self.say(name, int(math.exp(self.uniform(0, math.log(longest)))))

    def normal(self, *shape: int, dtype: torch.dtype, factor: float = 1.0) -> torch.Tensor:
        """Random numbers on the device."""
        return (torch.randn(shape, generator=self.generator) * factor).to(self.device, dtype)

    def placed(self, name: str, x: torch.Tensor, rows: bool = False) -> torch.Tensor:
        """The same numbers, lying in memory in one of many ways, amid NaN where there is room; ``rows``: which are
        contiguous, and on a GPU begin at multiples of 16 bytes."""
        ways = () if rows else ("columns", "every other")
        ways += () if rows and self.device != "cpu" else ("odd address",)
        how = self.one_of(name, *("contiguous",) * 4, "transposed", "gaps", *ways)
        if how == "transposed" and x.ndim > 2:
            return x.transpose(0, -2).contiguous().transpose(0, -2)
        if how in ("gaps", "odd address"):
            unit = 16 // x.element_size()
            before, columns = (unit, unit + -x.shape[-1] % unit) if how == "gaps" else (1, 3)
            room = _blank((*(n + 1 for n in x.shape[:-1]), x.shape[-1] + columns), x)
            view = room[(*(slice(1, None) for _ in x.shape[:-1]), slice(before, before + x.shape[-1]))]
            return view.copy_(x)
        if how == "columns" and x.ndim > 1:
            return x.transpose(-1, -2).contiguous().transpose(-1, -2)
        if how == "every other":
            return _blank((*x.shape[:-1], 2 * x.shape[-1]), x)[..., ::2].copy_(x)
        return x.contiguous()


def _blank(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    value = True if like.dtype == torch.bool else math.nan if like.is_floating_point() else 127
    return torch.full(shape, value, dtype=like.dtype, device=like.device)


# ---------------------------------------------------------------- attention, written out


class Rounded(torch.autograd.Function):
    """Softmax and its product with v in float32 with what is rounded to 16 bits, or to nothing less: ``(s, v, dtype)``.

    Weights are rounded relative to a power of two, and a row's sum is of weights that weren't.  Gradients follow from
    the result as it was rounded; those of scores are rounded before they are multiplied.
    """

    @staticmethod
    def forward(ctx, s, v, dtype):
        s = s * math.log2(math.e)
        reference = s.amax(-1, keepdim=True).floor() if s.shape[-1] else s.new_zeros(*s.shape[:-1], 1)
        p = torch.exp2(s - reference)
        row_sum = p.sum(-1, keepdim=True) if s.shape[-1] else torch.ones_like(reference)
        out = (p.to(dtype).float() @ v / row_sum).to(dtype).float()
        ctx.dtype = dtype
        ctx.save_for_backward(p / row_sum, v, out)
        return out

    @staticmethod
    def backward(ctx, dout):
        p, v, out = ctx.saved_tensors
        ds = p * (dout @ v.transpose(-1, -2) - (dout * out).sum(-1, keepdim=True))
        return ds.to(ctx.dtype).float(), p.to(ctx.dtype).float().transpose(-1, -2) @ dout, None


def attention(q, k, v, scale: float, visible, bias=None, softcap: float = 0.0, rounded: torch.dtype | None = None):
    """Result and log-sum-exp of ``(…, heads, rows, head_dim)``, in the dtype of q; k and v may have fewer heads.

    A row that sees nothing has 0 and −inf.  ``rounded``: tensors are float32, and this is what is rounded to this dtype
    on the way.
    """
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) if q.ndim > 2 else x for x in (k, v))
    s = q @ k.transpose(-1, -2) * scale
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s if bias is None else s + bias.to(s.dtype)
    s = s.masked_fill(~visible, -torch.inf)
    seen = visible.expand(s.shape).any(-1)
    s = torch.where(seen[..., None], s, 0.0)  # so that no gradient of such a row is NaN
    lse = torch.logsumexp(s, -1)
    out = torch.softmax(s, -1) @ v if rounded is None else Rounded.apply(s, v, rounded)
    return out * seen[..., None], torch.where(seen, lse, -torch.inf)


def compare(found, q, k, v, scale, visible, bias=None, softcap=0.0, lse=None) -> float:
    """Assert that a result is right; its error as a share of what is allowed."""
    of = (scale, visible, bias, softcap)
    exact, exact_lse = attention(*(x.double() for x in (q, k, v)), *of)
    usual = [attention(*(x.float() for x in (q, k, v)), *of, rounded=q.dtype)[0].to(q.dtype)]
    if softcap or bias is not None:  # what is made of scores may be rounded as torch rounds it
        usual.append(attention(q, k, v, *of)[0])
    assert found.shape == exact.shape and found.dtype == q.dtype, f"{found.shape} of {found.dtype}"
    if not found.numel():
        return 0.0
    allowed = numerics.allowed_error(max(_largest(x - exact) for x in usual), _largest(exact), _name(q.dtype))
    allowed += SUM_ROUNDINGS * numerics.EPSILON["float32"] * _largest(v)
    error = _largest(found - exact)
    assert error <= allowed, f"differs by {error:.3g}, allowed {allowed:.3g}"
    if lse is not None:
        blind = exact_lse.isneginf()
        assert torch.equal(lse.isneginf(), blind), "−inf in the log-sum-exp of other rows than those that see nothing"
        assert not found[blind].any(), "not zero in a row that sees nothing"
        off, largest = _largest((lse - exact_lse)[~blind]), _largest(exact_lse[~blind])
        unit = numerics.LSE_TOLERANCE if found.device.type == "cpu" else numerics.EPSILON[_name(q.dtype)] / 2
        largest = max(1.0, largest, _largest(q) * _largest(k) * q.shape[-1] ** 0.5 * scale)
        assert off <= unit * largest, f"the log-sum-exp differs by {off:.3g}, allowed {unit * largest:.3g}"
    return error / allowed if allowed else 0.0


def compare_gradients(leaves: dict[str, torch.Tensor], dout, formula: Callable, *qkv: torch.Tensor) -> None:
    """Assert that the gradients that autograd has left in ``leaves`` are those of ``formula``.

    ``formula``: of tensors by name, and the dtype to which :func:`attention` rounds.  Its q, k and v say how large
    terms are that cancel one another.
    """

    def by_formula(dtype, rounded=None):
        own = {n: x.detach().to(dtype).requires_grad_() for n, x in leaves.items()}
        out = formula(own, rounded)
        out.backward(dout.to(out.dtype))
        return {n: torch.zeros_like(x) if x.grad is None else x.grad for n, x in own.items()}

    dtype = dout.dtype
    exact, *usual = by_formula(torch.float64), by_formula(dtype), by_formula(torch.float32, dtype)
    terms = math.prod(max(1.0, _largest(x)) for x in (*qkv, dout)) * math.sqrt(sum(x.shape[-1] for x in qkv))
    for name, leaf in leaves.items():
        got, want = leaf.grad, exact[name]
        assert got is not None and got.shape == leaf.shape and got.dtype == leaf.dtype, f"no gradient of {name}"
        off = numerics.largest_of(_largest(x[name].to(leaf.dtype).double() - want) for x in usual)
        allowed = numerics.allowed_error(off, _largest(want), _name(dtype))
        allowed += SUM_ROUNDINGS * numerics.EPSILON["float32"] * terms
        error = _largest(got.double() - want)
        assert error <= allowed, f"the gradient of {name} differs by {error:.3g}, allowed {allowed:.3g}"


def _largest(x: torch.Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------- the doors


def sdpa(draw: Draw) -> float:
    """``nn.scaled_dot_product_attention``: masks and biases of every shape, with gradients."""
    dtype = getattr(torch, draw.one_of("dtype", *DTYPES[draw.device]))
    rows, keys, sizes, (heads, kv_heads), dims = _sizes(draw)
    batch = sizes[0]
    lead_q, lead_kv = (batch, heads), (batch, kv_heads)
    if draw.chance("three dimensions", 0.1):
        lead_q = lead_kv = (batch,)
    q = draw.normal(*lead_q, rows, dims[0], dtype=dtype, factor=draw.one_of("magnitude", 0.3, 1.0, 1.0, 3.0))
    k, v = (draw.normal(*lead_kv, keys, n, dtype=dtype) for n in dims)
    scale = draw.one_of("scale", None, None, 0.05, 1.0)
    options: dict[str, Any] = {} if scale is None else {"scale": scale}
    if lead_q != lead_kv or draw.chance("grouped", 0.1):
        options["enable_gqa"] = True
    visible = torch.ones(rows, keys, dtype=torch.bool, device=draw.device)
    mask = None
    if draw.chance("is_causal", 0.2):
        options["is_causal"] = True
        visible = visible.tril()
    elif draw.chance("masked", 0.85):
        mask = draw.placed("mask", _mask(draw, (*lead_q, rows, keys), dtype))
        visible = mask if mask.dtype == torch.bool else ~mask.isneginf()
    bias = mask if mask is not None and mask.dtype != torch.bool else None
    trains = draw.chance("gradients", 0.3)
    leaves = {n: draw.placed(n, x).requires_grad_(trains) for n, x in (("q", q), ("k", k), ("v", v))}
    if bias is not None and trains and draw.chance("gradient of the bias", 0.5):
        leaves["bias"] = mask = mask.detach().requires_grad_()
    found = nn.scaled_dot_product_attention(leaves["q"], leaves["k"], leaves["v"], mask, **options)
    scale = 1 / math.sqrt(dims[0]) if scale is None else scale
    worst = compare(found.detach(), q, k, v, scale, visible, None if bias is None else bias.detach())
    if trains:
        dout = draw.normal(*found.shape, dtype=dtype)
        found.backward(dout)

        def formula(own, rounded):
            return attention(own["q"], own["k"], own["v"], scale, visible, own.get("bias", bias), rounded=rounded)[0]

        compare_gradients(leaves, dout, formula, q, k, v)
    return worst


def _sizes(draw: Draw):
    """Lengths of queries and keys, (batch,), heads of queries and keys, head dimensions of keys and values."""
    keys = draw.length("keys")
    rows = keys if draw.chance("as many queries", 0.4) else draw.length("queries")
    batch, kv_heads, group = draw.choice((1, 1, 2, 3)), draw.choice((1, 2, 3)), draw.choice(GROUPS)
    while batch * kv_heads * group * rows * keys > MAX_SCORES[draw.device]:
        if max(batch, kv_heads, group) == 1:
            rows, keys = (rows + 1) // 2, (keys + 1) // 2
        batch, kv_heads, group = (max(1, n // 2) for n in (batch, kv_heads, group))
    head_dim = draw.choice(HEAD_DIMS)
    head_dim_v = head_dim if draw.random() < 0.8 else draw.choice(HEAD_DIMS)
    draw.say("sizes", (batch, kv_heads * group, kv_heads, rows, keys, head_dim, head_dim_v))
    return rows, keys, (batch,), (kv_heads * group, kv_heads), (head_dim, head_dim_v)


def _mask(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """A mask or a bias that broadcasts to ``shape``, and isn't always of its size."""
    own = [n if draw.random() < 0.7 else 1 for n in shape]
    while len(own) > 1 and own[0] == 1 and draw.random() < 0.7:
        own = own[1:]
    draw.say("shape of the mask", tuple(own))
    rows, keys = (own[-2] if len(own) > 1 else 1), own[-1]
    share = draw.one_of("visible", 0.05, 0.5, 0.95, 1.0)
    visible = torch.rand(own, generator=draw.generator) < share
    kind = draw.one_of("kind", "random", "random", "band", "padding", "rows")
    i, j = torch.arange(rows)[:, None], torch.arange(keys)
    if kind == "band":
        visible = ((i - j).abs() <= draw.randint(0, keys)).expand(*own[:-2], rows, keys).reshape(own).clone()
    elif kind == "padding":
        visible = (j < draw.randint(0, keys)).expand(own).clone()
    elif kind == "rows":
        visible &= (torch.rand(*own[:-1], 1, generator=draw.generator) < 0.7) if len(own) > 1 else True
    visible = visible.to(draw.device)
    if draw.chance("of bits", 0.5):
        found = visible
    else:
        own_dtype = dtype if draw.chance("bias of 16 bits", 0.5) else torch.float32
        bias = draw.normal(*own, dtype=own_dtype, factor=draw.one_of("size of the bias", 0.0, 1.0, 30.0))
        found = bias.masked_fill(~visible, -torch.inf)
    if draw.chance("expanded", 0.2):
        found = found.expand(shape)
    return found


def _options(draw: Draw, heads: tuple[int, int], keys: int) -> dict[str, Any]:
    """Options that functions of flash_attn share; slopes of ``heads``, (batch, heads)."""
    options: dict[str, Any] = {}
    if draw.chance("causal", 0.4):
        options["causal"] = True
    if draw.chance("window", 0.3):
        sides = (draw.choice((-1, 0, 3, draw.randint(0, keys))) for _ in range(2))
        options["window_size"] = draw.say("window_size", tuple(sides))
    if draw.chance("capped", 0.2):
        options["softcap"] = draw.one_of("softcap", 1.0, 30.0)
    if draw.chance("scaled", 0.2):
        options["softmax_scale"] = draw.one_of("softmax_scale", 0.05, 0.5)
    if draw.chance("slopes", 0.2):
        shape = heads if draw.chance("slopes of each sequence", 0.5) else heads[1:]
        options["alibi_slopes"] = torch.rand(shape, generator=draw.generator).to(draw.device)
    return options


def _of_sequence(options: dict[str, Any], b: int, rows: int, keys: int, device: str, hidden: int = 0):
    """What :func:`attention` takes of the options, bottom-right aligned, of sequence ``b`` with so many keys hidden."""
    slopes = options.get("alibi_slopes")
    i, j = torch.arange(rows, device=device)[:, None] + (keys - rows), torch.arange(keys, device=device)
    left, right = options.get("window_size", (-1, -1))
    visible = (j >= hidden) & ((i >= j) if options.get("causal") else True)
    visible = visible & ((j >= i - left) if left >= 0 else True) & ((j <= i + right) if right >= 0 else True)
    bias = None
    if slopes is not None:
        own = slopes if slopes.ndim == 1 else slopes[b]
        bias = -own.double()[:, None, None] * (i - j).abs()
    return visible.expand(rows, keys), bias, options.get("softcap", 0.0)


def flash_attn(draw: Draw) -> float:
    """``nn.flash_attn_func``, those of packed tensors, and all of these of sequences of different lengths."""
    dtype = getattr(torch, draw.one_of("dtype", *DTYPES[draw.device]))
    rows, keys, (batch,), (heads, kv_heads), dims = _sizes(draw)
    form, varlen = draw.one_of("form", "", "", "kvpacked_", "qkvpacked_"), draw.chance("sequences", 0.5)
    if form:
        dims = dims[0], dims[0]
    if form == "qkvpacked_":
        kv_heads, rows = heads, keys
    lengths = [(rows, keys)] * batch
    if varlen:
        batch = draw.one_of("batch", 1, 2, 5)
        lengths = [(draw.choice((0, 1, draw.randint(1, rows), rows)), draw.randint(0, keys)) for _ in range(batch)]
        lengths = draw.say("lengths", [(n, n) if form == "qkvpacked_" else (m, n) for m, n in lengths])
    options = _options(draw, (batch, heads), keys)
    total_q, total_k = (sum(x) + (draw.choice((0, 0, 3)) if varlen else 0) for x in zip(*lengths, strict=True))
    total_k = total_q if form == "qkvpacked_" else total_k
    q = draw.normal(total_q, heads, dims[0], dtype=dtype)
    k, v = (draw.normal(total_k, kv_heads, n, dtype=dtype) for n in dims)
    starts = [torch.tensor([0, *x]).cumsum(0).tolist() for x in zip(*lengths, strict=True)]

    # How q, k and v are made of what a call is given, and what it returns is made rows one after the other.
    packs = {
        "": {"q": [q], "k": [k], "v": [v]},
        "kvpacked_": {"q": [q], "kv": [k, v]},
        "qkvpacked_": {"qkv": [q, k, v]},
    }
    trains = draw.chance("gradients", 0.3)
    leaves = {}
    for name, parts in packs[form].items():
        x = torch.stack(parts, 1) if len(parts) > 1 else parts[0]
        x = x if varlen else x.reshape(batch, -1, *x.shape[1:])
        leaves[name] = draw.placed(name, x).requires_grad_(trains)

    def unpacked(own):
        flat = ((x if varlen else x.flatten(0, 1), len(packs[form][n])) for n, x in own.items())
        return [y for x, count in flat for y in (x.unbind(1) if count > 1 else [x])]

    where = []
    if varlen:
        where = [torch.tensor(x, dtype=torch.int32, device=draw.device) for x in starts]
        where += [max(x) for x in zip(*lengths, strict=True)]
        where = where[::2] if form == "qkvpacked_" else where
    function = getattr(nn, f"flash_attn_{'varlen_' if varlen else ''}{form}func")
    out, lse, _ = function(*leaves.values(), *where, return_attn_probs=True, **options)
    found = out.detach() if varlen else out.detach().flatten(0, 1)
    found_lse = lse.detach() if varlen else lse.detach().transpose(0, 1).flatten(1)
    scale = options.get("softmax_scale", 1 / math.sqrt(dims[0]))

    def sequences(own):
        """Of each sequence its rows, and what :func:`attention` takes."""
        own_q, own_k, own_v = own
        for b, (m, n) in enumerate(lengths):
            of_q, of_k = (slice(x[b], x[b + 1]) for x in starts)
            tensors = (x.transpose(0, 1) for x in (own_q[of_q], own_k[of_k], own_v[of_k]))
            yield of_q, *tensors, scale, *_of_sequence(options, b, m, n, draw.device)

    worst = 0.0
    for place, *of in sequences((q, k, v)):
        worst = max(worst, compare(found[place].transpose(0, 1), *of, lse=found_lse[:, place]))
    after = starts[0][-1]
    assert not found[after:].any() and found_lse[:, after:].isneginf().all(), (
        "rows after the last sequence aren't empty"
    )
    if trains:
        dout = draw.normal(*out.shape, dtype=dtype)
        out.backward(dout)

        def formula(own, rounded):
            pieces = [attention(*of, rounded=rounded)[0].transpose(0, 1) for _, *of in sequences(unpacked(own))]
            pieces.append(pieces[0].new_zeros(total_q - after, heads, dims[1]))
            return torch.cat(pieces).reshape(out.shape)

        compare_gradients(leaves, dout, formula, q, k, v)
    return worst


def kvcache(draw: Draw) -> float:
    """``nn.flash_attn_with_kvcache``: appended and turned tokens, pages, entries of a cache, padding on the left."""
    dtype = getattr(torch, draw.one_of("dtype", *DTYPES[draw.device]))
    _, most, (batch,), (heads, kv_heads), (head_dim, head_dim_v) = _sizes(draw)
    batch, rows = draw.one_of("batch", batch, 5), draw.one_of("new queries", 1, 1, 2, 5, 17, 70)
    fresh = draw.one_of("new keys", 0, rows, draw.randint(1, 9)) if draw.chance("appends", 0.6) else 0
    most += fresh
    options = _options(draw, (batch, heads), most)
    before = [draw.choice((0, draw.randint(0, most - fresh), most - fresh)) for _ in range(batch)]
    draw.say("keys before", before)
    page = draw.one_of("page size", 0, 0, 1, 3, 16, 64, 100)
    dims = head_dim, head_dim_v
    if page:
        per_sequence = -(-most // page)
        pages = batch * per_sequence + draw.randint(0, 3)
        order = torch.randperm(pages, generator=draw.generator)[: batch * per_sequence].reshape(batch, per_sequence)
        options["block_table"] = order.to(draw.device, torch.int32)
        rooms = [draw.normal(pages, page, kv_heads, n, dtype=dtype) for n in dims]
    else:
        entries, room = batch + draw.randint(0, 2), most + draw.choice((0, 5))
        rooms = [draw.normal(entries, room, kv_heads, n, dtype=dtype) for n in dims]
        order = torch.arange(batch)
        if draw.chance("entries", 0.4):
            order = torch.randperm(entries, generator=draw.generator)[:batch]
            options["cache_batch_idx"] = order.to(draw.device, torch.int32)
    hidden = [0] * batch
    if draw.chance("padding on the left", 0.2):
        hidden = draw.say("hidden", [draw.randint(0, n) for n in before])
        options["cache_leftpad"] = torch.tensor(hidden, dtype=torch.int32, device=draw.device)
    q = draw.normal(batch, rows, heads, head_dim, dtype=dtype)
    new = [draw.normal(batch, fresh, kv_heads, n, dtype=dtype) for n in dims] if fresh else [None, None]
    turned = 0
    if fresh and head_dim >= 8 and draw.chance("turned", 0.5):
        turned = draw.one_of("elements turned", *(n for n in (8, 16, 32, head_dim // 16 * 16) if 0 < n <= head_dim))
        angles = torch.rand(most + rows, turned // 2, generator=draw.generator) * 6
        options["rotary_cos"], options["rotary_sin"] = (
            f(angles).to(draw.device, dtype) for f in (torch.cos, torch.sin)
        )
        options["rotary_interleaved"] = draw.chance("interleaved", 0.5)
    scales = [None, None]
    if draw.chance("8 bits", 0.25) and (draw.device == "cpu" or not any(n % 16 for n in dims)):
        narrow = getattr(torch, draw.one_of("cache", "float8_e4m3fn", "int8"))
        sizes = [0.01 + 0.02 * torch.rand(batch, kv_heads, generator=draw.generator) for _ in dims]
        scales = [x.to(draw.device) for x in sizes]
        options["k_descale"], options["v_descale"] = scales
        rooms = [_in_8_bits(x * 50, narrow) for x in rooms]
    caches = [
        draw.placed(n, x.view(torch.uint8), rows=True).view(x.dtype)
        if x.element_size() == 1
        else draw.placed(n, x, True)
        for n, x in zip(("k_cache", "v_cache"), rooms, strict=True)
    ]
    given = [None if x is None else draw.placed(n, x) for n, x in zip("kv", new, strict=True)]
    lengths = torch.tensor(before, dtype=torch.int32, device=draw.device)
    out, lse = nn.flash_attn_with_kvcache(
        *(draw.placed("q", q), *caches, *given), cache_seqlens=lengths, return_softmax_lse=True, **options
    )

    def turn(x, first, every):
        """Rows ``(rows, heads, head_dim)`` turned by their positions from ``first`` on, or all by that."""
        if not turned:
            return x
        at = first + torch.arange(len(x), device=x.device) * int(every)
        cos, sin = (options[f"rotary_{n}"][at][:, None].float() for n in ("cos", "sin"))
        part, rest = x[..., :turned].float(), x[..., turned:]
        pairs = part.unflatten(-1, (-1, 2) if options["rotary_interleaved"] else (2, -1))
        a, b = pairs.unbind(-1 if options["rotary_interleaved"] else -2)
        both = torch.stack((a * cos - b * sin, a * sin + b * cos), -1 if options["rotary_interleaved"] else -2)
        return torch.cat((both.flatten(-2).to(x.dtype), rest), -1)

    worst = 0.0
    local = options.get("causal") or any(n >= 0 for n in options.get("window_size", (-1,)))
    want = [x.clone() for x in rooms]
    for b in range(batch):
        end = before[b] + fresh
        at, own = torch.arange(end, device=draw.device), order[b].to(draw.device)
        place = (own[at // page], at % page) if page else (own.expand(end), at)
        if fresh:
            added = turn(new[0][b], before[b], True), new[1][b]
            for room, x, scale in zip(want, added, scales, strict=True):
                x = x if scale is None else _in_8_bits(x.float() / scale[b][:, None], room.dtype)
                room[tuple(axis[before[b] :] for axis in place)] = x
        seen = (
            x[place] if s is None else (x[place].float() * s[b][:, None]).to(dtype)
            for x, s in zip(want, scales, strict=True)
        )
        tensors = (x.transpose(0, 1) for x in (turn(q[b], before[b], local), *seen))
        of = _of_sequence(options, b, rows, end, draw.device, hidden[b])
        scale = options.get("softmax_scale", 1 / math.sqrt(head_dim))
        worst = max(worst, compare(out[b].transpose(0, 1), *tensors, scale, *of, lse=lse[b]))
    for name, room, cache in zip("kv", want, caches, strict=True):
        assert torch.equal(*(x.view(torch.uint8) if x.element_size() == 1 else x for x in (room, cache))), (
            f"{name}_cache isn't what it was with the new rows in their places"
        )
    return worst


def latents(draw: Draw) -> float:
    """``nn.flash_mla_with_kvcache``: values in keys, on pages, split where a call says so."""
    dtype = getattr(torch, draw.one_of("dtype", *DTYPES[draw.device]))
    batch, rows, heads = (
        draw.one_of("batch", 1, 2, 5),
        draw.one_of("queries", 1, 1, 2, 3),
        draw.one_of("heads", 1, 3, 16, 40),
    )
    head_dim, head_dim_v = draw.one_of("head_dim", (576, 512), (576, 512), (192, 128), (80, 64), (576, 504), (136, 136))
    most, page = draw.length("keys", 3000), draw.one_of("page size", 1, 3, 16, 64, 64, 100)
    lengths = draw.say("lengths", [draw.choice((0, 1, draw.randint(0, most), most)) for _ in range(batch)])
    per_sequence = -(-most // page)
    order = torch.randperm(batch * per_sequence + 2, generator=draw.generator)[: batch * per_sequence]
    table = order.view(batch, per_sequence).to(draw.device, torch.int32)
    cache = draw.normal(batch * per_sequence + 2, page, head_dim, dtype=dtype)
    q = draw.normal(batch, rows, heads, head_dim, dtype=dtype)
    causal, split = draw.chance("causal", 0.5), draw.one_of("split_length", None, None, 64, 256, 4096)
    scale = draw.one_of("scale", 0.1, head_dim**-0.5)
    out, lse = nn.flash_mla_with_kvcache(
        draw.placed("q", q, rows=True),
        draw.placed("k_cache", cache, rows=True),
        table,
        torch.tensor(lengths, dtype=torch.int32, device=draw.device),
        head_dim_v,
        *nn.get_mla_metadata(split_length=split),
        scale,
        causal,
    )
    worst = 0.0
    for b, length in enumerate(lengths):
        at = torch.arange(length, device=draw.device)
        keys = cache[table[b].long()[at // page], at % page][None]
        of = _of_sequence({"causal": causal}, b, rows, length, draw.device)
        tensors = (q[b].transpose(0, 1), keys, keys[..., :head_dim_v])
        worst = max(worst, compare(out[b].transpose(0, 1), *tensors, scale, *of, lse=lse[b]))
    return worst


def _in_8_bits(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest numbers of a dtype of 8 bits, those out of its range at its ends."""
    if dtype == torch.int8:
        return x.float().clamp(-127, 127).round().to(dtype)
    return x.float().clamp(-448, 448).to(dtype)


DOORS = {"sdpa": sdpa, "flash_attn": flash_attn, "kvcache": kvcache, "latents": latents}


def failures(door: str, seeds: Iterable[int], device: str = "cpu", seconds: float = math.inf):
    """How many calls of a door were computed here, for how many no kernel is installed, the largest error as a share of
    what is allowed, and a line for each that failed."""
    count, others, worst, lines, begin = 0, 0, 0.0, [], time.monotonic()
    for seed in seeds:
        if time.monotonic() - begin > seconds:
            break
        draw = Draw(seed, device)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", nn.FallbackWarning)
                sdpa_door._warned.clear()
                worst = max(worst, DOORS[door](draw))
            count += 1
        except (nn.FallbackWarning, KernelNotFoundError):
            others += 1
        except Exception as e:  # whatever a call raises is told with the call
            lines.append(f"{type(e).__name__}: {e}  [{door} --seed {seed} --device {device}: {draw.said}]")
    return count, others, worst, lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("door", choices=DOORS)
    parser.add_argument("--seed", type=int, default=0, help="of the first call")
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--device", choices=DTYPES, default="cpu")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long")
    options = parser.parse_args()
    seeds = range(options.seed, options.seed + options.count)
    count, others, worst, lines = failures(options.door, seeds, options.device, options.seconds)
    print(*lines, sep="\n", end="\n" if lines else "")
    print(
        f"{count} calls, {others} without a kernel, {len(lines)} failed; largest error {worst:.2f} of what is allowed"
    )
    return int(bool(lines))


if __name__ == "__main__":
    sys.exit(main())

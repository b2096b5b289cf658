"""``flash_attention_with_kvcache``: what is appended, turned and attended to, and wrong calls."""

from __future__ import annotations

import itertools
import math
import zlib
from unittest import mock

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.overrides import BaseTorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tvm_flash import (
    ArgumentTypeError,
    InvalidArgumentError,
    NotSupportedError,
    TvmFlashError,
    flash_attention_with_kvcache,
    nn,
    quantise_cache,
)
from tvm_flash.call import append
from tvm_flash.tracing import torch_cache

pytestmark = pytest.mark.usefixtures("cpu_pack")

HEADS, KV_HEADS, WIDTH, ROOM, PAGE = 4, 2, 64, 96, 16


def by_operations(*tensors):
    """Appending where no kernel takes the tensors."""
    with mock.patch.object(torch_cache, "by_kernel", lambda *_: False):
        torch_cache._append_to_cache(*tensors)


APPENDS = [torch_cache._append_to_cache, by_operations]


def turned(x, cos, sin, positions, interleaved):
    """``(rows, heads, head_dim)`` by the definition of the rotation, in float64."""
    width = 2 * cos.shape[1]
    pairs = [(2 * i, 2 * i + 1) if interleaved else (i, width // 2 + i) for i in range(width // 2)]
    y = x.double().clone()
    for n, (i, j) in enumerate(pairs):
        c, s = (t[positions, n].double()[:, None] for t in (cos, sin))
        y[..., i], y[..., j] = x[..., i] * c - x[..., j] * s, x[..., i] * s + x[..., j] * c
    return y


def case(dtype, paged, turns, causal, queries, added, leftpad):
    """A call of three sequences, and what must come out: of the function, and in the caches."""
    named = repr((dtype, paged, turns, causal, queries, added, leftpad))
    rng = torch.Generator().manual_seed(zlib.crc32(named.encode()) % 2**31)  # the same in every process
    lengths = torch.tensor([20, 0, 70] if sum(added) else [20, 30, 70], dtype=torch.int32)

    def normal(*sizes):
        return torch.randn(*sizes, generator=rng).to(dtype)

    caches = [normal(5, ROOM, KV_HEADS, WIDTH) for _ in "kv"]
    entries = torch.tensor([4, 0, 2], dtype=torch.int32)
    q, k, v = (normal(sum(n), h, WIDTH) for n, h in ((queries, HEADS), (added, KV_HEADS), (added, KV_HEADS)))
    angles = torch.rand(100, 16, generator=rng) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    pad = torch.tensor([0, 0, 9], dtype=torch.int32) if leftpad else None
    after, outs = [x.clone() for x in caches], []
    for b, (first, entry) in enumerate(zip(lengths.tolist(), entries.tolist(), strict=True)):
        rows, new = (slice(sum(n[:b]), sum(n[: b + 1])) for n in (queries, added))
        x, y = q[rows], k[new]
        if turns:
            places = torch.arange(queries[b]) + first if causal else torch.full((queries[b],), first)
            x = turned(x, cos, sin, places, turns == "interleaved").to(dtype)
            y = turned(y, cos, sin, torch.arange(added[b]) + first, turns == "interleaved").to(dtype)
        end = first + added[b]
        after[0][entry, first:end], after[1][entry, first:end] = y, v[new]
        keys, values = (t[entry, :end].double().repeat_interleave(HEADS // KV_HEADS, 1) for t in after)
        scores = torch.einsum("ihd,jhd->hij", x.double(), keys) / math.sqrt(WIDTH)
        i, j = torch.arange(queries[b])[:, None], torch.arange(end)
        seen = (j >= (pad[b] if leftpad else 0)) & ((j <= i + end - queries[b]) | (not causal))
        weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).nan_to_num(0)
        outs.append(torch.einsum("hij,jhd->ihd", weights, values))
    options = {"cache_seqlens": lengths, "cache_leftpad": pad, "causal": causal, "cache_batch_idx": entries}
    if turns:
        options |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": turns == "interleaved"}
    if paged:
        order = torch.randperm(5 * ROOM // PAGE, generator=rng)
        caches = [x.view(-1, PAGE, KV_HEADS, WIDTH)[order] for x in caches]
        options["page_table"] = order.argsort().view(5, -1)[entries.long()].int()
        options["cache_batch_idx"] = None
        after = [x.view(-1, PAGE, KV_HEADS, WIDTH)[order] for x in after]
    return q, caches, (k, v) if sum(added) else (None, None), options, torch.cat(outs), after


def starts(lengths):
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


@pytest.mark.parametrize("paged", (False, True), ids=("contiguous", "paged"))
@pytest.mark.parametrize("turns", ("", "interleaved", "halves"))
@pytest.mark.parametrize(
    ("queries", "added"), [((1, 1, 1), (1, 1, 1)), ((5, 2, 20), (3, 2, 17)), ((3, 3, 3), (0, 0, 0))]
)
@pytest.mark.parametrize(("dtype", "causal"), [(torch.float32, True), (torch.bfloat16, False)])
def test_against_float64(dtype, causal, paged, turns, queries, added):
    if turns and not sum(added):
        return
    q, caches, new, options, want, after = case(dtype, paged, turns, causal, queries, added, leftpad=causal)
    equal = len({*queries}) == len({*added}) == 1
    if equal:
        q, new = (q.view(3, -1, HEADS, WIDTH), [x if x is None else x.view(3, -1, KV_HEADS, WIDTH) for x in new])
    else:
        options |= {"cu_seqlens_q": starts(queries), "cu_seqlens_k_new": starts(added)}
    out, lse = flash_attention_with_kvcache(q, *caches, *new, **options, return_lse=True)
    assert out.shape == q.shape and lse.shape == ((3, HEADS, queries[0]) if equal else (HEADS, sum(queries)))
    assert (out.flatten(0, -3).double() - want).abs().max() < (2e-6 if dtype == torch.float32 else 2e-2)
    for found, wanted in zip(caches, after, strict=True):
        assert (found.double() - wanted.double()).abs().max() < (1e-6 if dtype == torch.float32 else 0.02)


def test_the_drop_in_of_flash_attn():
    q, caches, (k, v), options, want, after = case(torch.float32, True, "", True, (1, 1, 1), (1, 1, 1), False)
    q, k, v = (x[:, None] for x in (q, k, v))
    lengths, table = options["cache_seqlens"].long(), options["page_table"]
    copies = [[x.clone() for x in caches] for _ in range(2)]
    out = nn.flash_attn_with_kvcache(q, *copies[0], k, v, None, None, lengths, block_table=table, causal=True)
    assert (out[:, 0] - want).abs().max() < 2e-6 and torch.equal(copies[0][0], after[0])
    given = {"cache_seqlens": lengths, "page_table": table, "causal": True, "num_splits": 3, "pack_gqa": True}
    again = nn.flash_attn_with_kvcache(
        q.flatten(0, 1), *copies[1], k, v, **given, cu_seqlens_q=starts((1, 1, 1)), return_softmax_lse=True
    )
    assert torch.equal(again[0], out[:, 0]) and again[1].shape == (HEADS, 3)
    lengths = (lengths + 1).tolist()
    paged = nn.flash_attn_varlen_func(
        *(q[:, 0], *copies[0], starts((1, 1, 1)), starts(lengths), 1, max(lengths)), causal=True, block_table=table
    )
    assert torch.equal(paged, out[:, 0])
    for name in ("qv", "q_descale"):
        with pytest.raises(NotSupportedError, match=f"^{name}"):
            nn.flash_attn_with_kvcache(q, *caches, **{name: q})


@pytest.mark.parametrize("append", APPENDS, ids=["kernel", "operations"])
def test_rows_and_places_that_there_are_not_change_nothing(append):
    """As a captured graph leaves them: rows after the last sequence, and sequences without room or pages."""
    _, caches, (k, v), options, _, after = case(torch.float32, True, "", True, (5, 2, 20), (3, 2, 17), False)
    table, lengths = options["page_table"], options["cache_seqlens"]
    more = [torch.cat([x, torch.full_like(x[:7], torch.nan)]) for x in (k, v)]
    found = [x.clone() for x in caches]
    append(*found, *more, starts((3, 2, 17)), lengths, table)
    assert torch.equal(found[0], after[0]) and torch.equal(found[1], after[1])
    found = [x.clone() for x in caches]
    append(*found, *more, starts((0, 0, 0)), lengths, table)
    assert torch.equal(found[0], caches[0])
    nowhere = torch.cat([table, torch.full_like(table[:1], -1)]), torch.cat([lengths, torch.tensor([-1]).int()])
    append(*found, *(x[:4, None] for x in (k, v)), None, *nowhere[::-1])
    changed = (found[0] != caches[0]).any(-1).any(-1).sum()
    assert changed == 3 and all(
        (found[0][table[b, n // PAGE], n % PAGE] == k[b]).all() for b, n in enumerate((20, 0, 70))
    )


@pytest.mark.parametrize("scaled", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("batch", [7, 300])
def test_rows_that_pad_a_batch_have_one_page(batch, paged, scaled):
    """As engines bring a batch to a size for which they have a graph: all others are as without them."""
    rows, dummy = 3, 3
    q, k, v = torch.randn(batch, 1, HEADS, WIDTH), *torch.randn(2, batch, 1, KV_HEADS, WIDTH).clamp(-3, 3)
    caches, scales = list(torch.randn(2, 4, 24, KV_HEADS, WIDTH)), {}
    if scaled:
        pairs = [
            quantise_cache(x, "int8", torch.full((KV_HEADS,), s)) for x, s in zip(caches, (0.02, 0.03), strict=True)
        ]
        caches, scales = [x for x, _ in pairs], {"k_scale": pairs[0][1], "v_scale": pairs[1][1]}
    lengths = torch.tensor([20, 0, 7, *[0] * (batch - rows)], dtype=torch.int32)
    entries = torch.tensor([2, 0, 1, *[dummy] * (batch - rows)], dtype=torch.int32)

    def attend(count, caches):
        given = {"page_table": entries[:count, None]} if paged else {"cache_batch_idx": entries[:count]}
        tensors = (q[:count], *caches, k[:count], v[:count])
        given |= {"cache_seqlens": lengths[:count], "causal": True, "return_lse": True, **scales}
        return flash_attention_with_kvcache(*tensors, **given)

    copies = [[x.clone() for x in caches] for _ in range(4)]
    want = attend(rows, copies[0])
    found = attend(batch, copies[1])
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)(batch, copies[2])
    for x, y, z in zip(found, want, compiled, strict=True):
        assert torch.equal(x[:rows], y) and torch.equal(x, z)
    by_operations(*copies[3], k, v, None, lengths, entries[:, None], *scales.values())
    for x, y, *same in zip(*copies[:2], *copies[2:], strict=True):
        assert torch.equal(x[:dummy], y[:dummy]) and torch.equal(x[dummy, 1:], y[dummy, 1:])
        assert all(torch.equal(y, z) for z in same)
    last = v[-1, 0] if not scaled else copies[1][1][dummy, 0].float() * scales["v_scale"][:, None]
    assert (last - v[-1, 0]).abs().max() < 0.02
    assert (found[0][rows:, 0] - last.repeat_interleave(HEADS // KV_HEADS, 0)).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("before", "new", "entries"),
    [
        ((0, 0, 0), (2, 2, 2), (1, 1, 0)),  # beginnings of two sequences
        ((4, 4, 0), (1, 1, 1), (1, 1, 0)),  # branches of a sequence that have its last page in common
        ((0, 0, 0), (1, 2, 1), (1, 1, 0)),
        ((0, 3, 0), (1, 1, 1), (1, 1, 1)),  # a row of padding on a page that is in use
    ],
)
def test_keys_that_would_be_replaced_are_told_of(before, new, entries):
    caches = torch.randn(2, 2, PAGE, KV_HEADS, WIDTH)
    copies, table = caches.clone(), torch.tensor(entries, dtype=torch.int32)
    q, k, v = (torch.randn(sum(new), h, WIDTH) for h in (HEADS, KV_HEADS, KV_HEADS))
    given = {"cache_seqlens": torch.tensor(before, dtype=torch.int32)}
    given |= {"cu_seqlens_q": starts(new), "cu_seqlens_k_new": starts(new)}
    for where, says in (({"page_table": table[:, None]}, "other keys"), ({"cache_batch_idx": table}, "an entry twice")):
        with pytest.raises(InvalidArgumentError, match=says):
            flash_attention_with_kvcache(q, *caches, k, v, **given, **where)
    assert torch.equal(caches, copies)


@pytest.mark.parametrize("append", APPENDS, ids=["kernel", "operations"])
@pytest.mark.parametrize("total", [1, 40, 900])
def test_of_new_keys_with_one_place_the_last_stands(append, total):
    """In sequences of all lengths, some of whose places there are not."""
    rng = np.random.default_rng(total)
    cuts = [0, *np.sort(rng.integers(0, total + 1, 20)), total]
    table = torch.from_numpy(rng.integers(-1, 5, (len(cuts) - 1, 3)).astype(np.int32))
    before = torch.from_numpy(rng.integers(-2, 9, len(cuts) - 1).astype(np.int32))
    k, v = torch.randn(2, total, 1, 8)
    caches = torch.randn(2, 4, 5, 1, 8)
    want = caches.clone()
    for b, (first, end) in enumerate(itertools.pairwise(cuts)):
        for row in range(first, end):
            at = int(before[b]) + row - first
            page = int(table[b, at // 5]) if 0 <= at < 15 else -1
            if 0 <= page < 4:
                want[:, page, at % 5] = torch.stack((k[row], v[row]))
    append(*caches, k, v, torch.tensor(cuts, dtype=torch.int32), before, table)
    assert torch.equal(caches, want)


def called(by_kernel, given):
    """What a call gives, the caches after it as bytes, and whether a kernel appended."""
    given = {n: x.clone() if n in ("k_cache", "v_cache") else x for n, x in given.items()}
    done = []

    def watched(*args):
        done.append(by_kernel and append.append(*args))
        return done[-1]

    with mock.patch.object(torch_cache, "by_kernel", watched):
        out = flash_attention_with_kvcache(**given)
    return [out, *(given[n].view(torch.uint8) for n in ("k_cache", "v_cache"))], done


@pytest.mark.parametrize("cache", ("", "float8_e4m3fn", "int8"))
@pytest.mark.parametrize("turns", ("", "interleaved", "halves"))
@pytest.mark.parametrize("paged", (False, True), ids=("contiguous", "paged"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16), ids=str)
def test_the_kernel_has_the_bits_of_torch_s_operations(dtype, paged, turns, cache):
    for queries, added in (((1, 1, 1), (1, 1, 1)), ((5, 2, 20), (3, 2, 17))):
        q, caches, new, options, *_ = case(dtype, paged, turns, True, queries, added, True)
        if cache:
            pages, kv_heads = caches[0].shape[0], caches[0].shape[2]
            scales = torch.rand(2, pages, kv_heads) / 40 + 0.01
            pairs = [quantise_cache(x, cache, s) for x, s in zip(caches, scales, strict=True)]
            caches, options = [x for x, _ in pairs], options | {"k_scale": scales[0], "v_scale": scales[1]}
        options |= {"cu_seqlens_q": starts(queries), "cu_seqlens_k_new": starts(added)}
        options = {n: x for n, x in options.items() if x is not None}
        given = {"q": q, "k_cache": caches[0], "v_cache": caches[1], "k": new[0], "v": new[1], **options}
        (found, used), (right, unused) = (called(by_kernel, given) for by_kernel in (True, False))
        assert used == [True] and unused == [False]
        assert all(map(torch.equal, found, right))
        # New keys that no kernel takes: elements of a row that don't lie side by side.
        apart = {"k": new[0].repeat_interleave(2, -1)[..., ::2], "v": new[1].repeat_interleave(2, -1)[..., ::2]}
        other, used = called(True, given | apart)
        assert used == [False] and all(map(torch.equal, other, right))


def test_autograd_knows_that_a_cache_has_changed():
    given = good()
    versions = [given[n]._version for n in ("k_cache", "v_cache")]
    flash_attention_with_kvcache(**given)
    assert all(given[n]._version > before for n, before in zip(("k_cache", "v_cache"), versions, strict=True))
    with torch.inference_mode():
        flash_attention_with_kvcache(**{n: x.clone() if torch.is_tensor(x) else x for n, x in given.items()})


def test_a_compiled_program_appends_and_attends():
    q, caches, (k, v), options, _, _ = case(torch.float32, True, "interleaved", True, (1, 1, 1), (1, 1, 1), False)
    options = {name: x for name, x in options.items() if x is not None}

    def program(q, k_cache, v_cache, k, v):
        return flash_attention_with_kvcache(q, k_cache, v_cache, k, v, **options)

    new = [x[:, None] for x in (k, v)]
    found = [[x.clone() for x in caches] for _ in range(2)]
    out = program(q[:, None], *found[0], *new)
    assert torch.equal(torch.compile(program, backend="aot_eager", fullgraph=True)(q[:, None], *found[1], *new), out)
    assert torch.equal(found[0][0], found[1][0])


def profiled(call):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        return call()


def counted(call):
    with FlopCounterMode(display=False):
        return call()


def overridden(call):
    with BaseTorchFunctionMode():
        return call()


def compiled(call):
    return torch.compile(call, backend="aot_eager", fullgraph=True)()


def turned_too_far(given):
    return dict.fromkeys(("rotary_cos", "rotary_sin"), torch.zeros(70, 8))


def in_columns(given):
    return {"page_table": given["page_table"].T.contiguous().T}


WATCHED = (profiled, counted, overridden)
IN_TENSORS = [
    (lambda g: {"page_table": torch.full((3, 6), 99).int()}, r"^page_table: is 99 at \[0, 0\]"),
    (lambda g: {"page_table": g["page_table"][:1].expand(3, -1), "cache_seqlens": 7}, "page_table: has page"),
    (lambda g: {"cache_seqlens": torch.tensor([5, 96, 7]).int()}, "^cache_seqlens: is 96 of sequence 1"),
    (lambda g: dict.fromkeys(("rotary_cos", "rotary_sin"), torch.zeros(70, 8)), "^rotary_cos: has 70"),
]
OF_TENSORS = [
    (lambda g: {"page_table": g["page_table"].T.contiguous().T}, "^page_table: has strides"),
    (lambda g: {"sinks": torch.zeros(7)}, "^sinks: has shape"),
    (lambda g: {"k": g["k_cache"][:3, :1]}, "^k: shares memory"),
]


@pytest.mark.parametrize(
    ("way", "changes", "says"),
    [
        *((way, *wrong) for way in WATCHED for wrong in IN_TENSORS + OF_TENSORS),
        *((compiled, *wrong) for wrong in IN_TENSORS),
    ],
)
def test_nothing_is_written_by_a_wrong_call_that_is_watched(way, changes, says):
    given = good()
    given |= changes(given)
    caches = [given[name].clone() for name in ("k_cache", "v_cache")]
    with pytest.raises(InvalidArgumentError, match=says):
        way(lambda: flash_attention_with_kvcache(**given))
    assert torch.equal(given["k_cache"], caches[0]) and torch.equal(given["v_cache"], caches[1])


@pytest.mark.parametrize("mapped", ("k", "alibi_slopes"))
def test_nothing_is_written_where_a_call_is_mapped(mapped):
    given = {"alibi_slopes": torch.rand(HEADS), **good()}
    caches = [given[name].clone() for name in ("k_cache", "v_cache")]
    with pytest.raises(NotSupportedError, match=r"mapped by torch\.vmap"):
        torch.vmap(lambda x: flash_attention_with_kvcache(**{**given, mapped: x}))(
            given[mapped].expand(2, *given[mapped].shape)
        )
    assert torch.equal(given["k_cache"], caches[0]) and torch.equal(given["v_cache"], caches[1])


def test_fake_tensors_have_the_shapes_after_a_plain_call():
    """Starts that are kept of plain calls aren't mixed with tensors of a mode."""
    given = good()
    want = flash_attention_with_kvcache(**given)
    with FakeTensorMode() as mode:
        fake = {n: mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for n, x in given.items()}
        found = flash_attention_with_kvcache(**fake)
    assert found.shape == want.shape and found.dtype == want.dtype


def test_a_number_for_all_sequences_and_none():
    k_cache, v_cache = torch.randn(2, 3, 40, KV_HEADS, WIDTH)
    q = torch.randn(3, 2, HEADS, WIDTH)
    whole = flash_attention_with_kvcache(q, k_cache, v_cache, causal=True)
    assert torch.equal(whole, flash_attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=40, causal=True))
    assert not torch.equal(whole, flash_attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=39, causal=True))


def good():
    q, caches, (k, v), options, _, _ = case(torch.float32, True, "", True, (1, 1, 1), (1, 1, 1), False)
    given = {"q": q[:, None], "k_cache": caches[0], "v_cache": caches[1], "k": k[:, None], "v": v[:, None], **options}
    return {name: x for name, x in given.items() if x is not None}


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"k": None}, InvalidArgumentError, "^k: is None, and the other isn't"),
        ({"cache_seqlens": None}, InvalidArgumentError, "^cache_seqlens: is None, and k and v"),
        ({"cache_seqlens": 96}, InvalidArgumentError, "^cache_seqlens: is 96 of sequence 0, and 1 more"),
        ({"cache_seqlens": -1}, InvalidArgumentError, "^cache_seqlens: is -1, expected 0 to 96"),
        ({"cache_seqlens": 1.5}, ArgumentTypeError, "^cache_seqlens: is 1.5"),
        ({"cache_seqlens": torch.zeros(3)}, ArgumentTypeError, "^cache_seqlens: has dtype float32, expected int32"),
        ({"cache_seqlens": torch.zeros(2).int()}, InvalidArgumentError, "^cache_seqlens: has shape"),
        ({"page_table": torch.full((3, 6), 99).int()}, InvalidArgumentError, r"^page_table: is 99 at \[0, 0\]"),
        ({"page_table": torch.zeros(2, 6).int()}, InvalidArgumentError, "^page_table: has shape"),
        ({"cache_batch_idx": torch.zeros(3).int()}, InvalidArgumentError, "^cache_batch_idx: is given beside"),
        (
            {"page_table": None, "cache_batch_idx": torch.ones(3).int(), "cache_seqlens": 9},
            *(InvalidArgumentError, "names an entry twice"),
        ),
        ({"v": torch.zeros(3, 2, 2, 64)}, InvalidArgumentError, "^v: has shape"),
        ({"k": torch.zeros(3, 1, 2, 64).half()}, ArgumentTypeError, "^k: has dtype float16, but q has float32"),
        ({"rotary_cos": torch.zeros(99, 8)}, InvalidArgumentError, "^rotary_sin: is None"),
        (dict.fromkeys(("rotary_cos", "rotary_sin"), torch.zeros(70, 8)), InvalidArgumentError, "^rotary_cos: has 70"),
        (dict.fromkeys(("rotary_cos", "rotary_sin"), torch.zeros(99, 33)), InvalidArgumentError, "at most 64"),
        ({"q": torch.zeros(3, 1, 3, 64)}, InvalidArgumentError, "^k_cache: has 2 heads"),
        ({"q": torch.zeros(3, 4, 64)}, InvalidArgumentError, "^q: has shape"),
        ({"softcap": -1.0}, InvalidArgumentError, "^softcap"),
        ({"num_splits": -1}, ArgumentTypeError, "^num_splits"),
        ({"q": torch.zeros(3, 1, 4, 64).requires_grad_()}, NotSupportedError, "^q: a gradient is required"),
        ({"sinks": torch.zeros(4).requires_grad_()}, NotSupportedError, "^sinks: a gradient is required"),
        (
            {"rotary_cos": torch.zeros(99, 8).requires_grad_(), "rotary_sin": torch.zeros(99, 8)},
            *(NotSupportedError, "^rotary_cos: a gradient is required"),
        ),
        ({"causal": torch.ones(3) > 0}, ArgumentTypeError, "^causal: is"),
        ({"window_size": 5}, ArgumentTypeError, "^window_size: is 5"),
        ({"cache_seqlens": np.zeros(3, np.int32)}, ArgumentTypeError, "^cache_seqlens: is array"),
        ({"k": np.zeros((3, 1, 2, 64))}, ArgumentTypeError, r"^k: is a numpy.ndarray.*torch.as_tensor\(k\)"),
        ({"k": torch.zeros(3, 1, 2, 64).to_sparse()}, ArgumentTypeError, "^k: has the layout"),
        (
            {"cache_seqlens": torch.tensor([5, 2**31 - 1, 7]).int()},
            *(InvalidArgumentError, "^cache_seqlens: is 2147483647 of sequence 1, and 1 more"),
        ),
        ({"q": torch.zeros(3, 1, 4, 64).numpy()}, ArgumentTypeError, "^q: is a numpy.ndarray"),
    ],
)
def test_nothing_is_written_by_a_wrong_call(changes, error, says):
    given = good()
    caches = [given[name].clone() for name in ("k_cache", "v_cache")]
    with pytest.raises(error, match=says):
        flash_attention_with_kvcache(**{**given, **changes})
    assert issubclass(error, TvmFlashError)
    assert torch.equal(given["k_cache"], caches[0]) and torch.equal(given["v_cache"], caches[1])


@pytest.mark.parametrize("kind", ("sparse", "nested", "quantized", "meta"))
@pytest.mark.parametrize("name", ("sinks", "alibi_slopes"))
def test_nothing_is_written_where_a_parameter_is_no_plain_tensor(name, kind):
    """The operator that appends knew nothing of it, and ran before the one that refused."""
    q, k, v = (torch.randn(2, 1, h, 16) for h in (4, 2, 2))
    caches = [torch.zeros(2, 8, 2, 16) for _ in "kv"]
    wrong = {
        "sparse": lambda: torch.ones(4).to_sparse(),
        "nested": lambda: torch.nested.nested_tensor([torch.ones(4)]),
        "meta": lambda: torch.ones(4, device="meta"),
        "quantized": lambda: torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
    }[kind]()
    with pytest.raises(ArgumentTypeError, match=rf"^{name}: (has the layout|is nested|is quantized|is on meta)"):
        flash_attention_with_kvcache(q, *caches, k, v, cache_seqlens=3, **{name: wrong})
    assert not any(x.any() for x in caches)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (lambda g: {"v_cache": g["k_cache"]}, "^v_cache: shares memory with k_cache"),
        (
            lambda g: {"k_cache": g["k_cache"][:-1], "v_cache": g["k_cache"].as_strided(*shifted(g))},
            "^v_cache: shares memory with",
        ),
        (lambda g: {"v": g["k_cache"][:3, :1]}, r"^v: shares memory with k_cache.*v\.clone\(\)"),
        (lambda g: {"q": g["v_cache"].view(-1, 1, 4, 64)[:3]}, "^q: shares memory with v_cache"),
        (lambda g: {"k_cache": g["k_cache"][:1].expand(len(g["k_cache"]), -1, -1, -1)}, "^k_cache: has strides"),
        (lambda g: {"k_cache": g["k_cache"][:, :1].expand_as(g["k_cache"])}, "^k_cache: has strides"),
        (lambda g: {"page_table": g["page_table"][:1].expand(3, -1), "cache_seqlens": 7}, "page_table: has page"),
        (lambda g: {"page_table": shared(g)}, r"\[1, 0\], to whose rows 0 to 0.*at \[0, 1\], where they are other"),
        (lambda g: {"k_cache": made_in_inference_mode(g["k_cache"])}, "^k_cache: was made in torch.inference_mode"),
    ],
)
def test_what_would_overwrite_other_keys_is_refused(changes, says):
    given = good()
    caches = [given[name].clone() for name in ("k_cache", "v_cache")]
    with pytest.raises(InvalidArgumentError, match=says):
        flash_attention_with_kvcache(**{**given, **changes(given)})
    assert torch.equal(given["k_cache"], caches[0]) and torch.equal(given["v_cache"], caches[1])


def shifted(given):
    """Shape, strides and offset of a cache that lies a row of a head behind that of the keys."""
    return (len(given["k_cache"]) - 1, *given["k_cache"].shape[1:]), given["k_cache"].stride(), 64


def shared(given):
    """A table by which the first key of sequence 1 comes to a page of sequence 0."""
    table = given["page_table"].clone()
    table[1, 0] = table[0, 1]
    return table


def made_in_inference_mode(x):
    with torch.inference_mode():
        return x.clone()


def test_caches_side_by_side_and_prefixes_in_common_are_written():
    given = good()
    pairs = torch.stack((given["k_cache"], given["v_cache"]), 3).contiguous()
    want = flash_attention_with_kvcache(**given)
    again = {**given, "k_cache": pairs[:, :, :, 0], "v_cache": pairs[:, :, :, 1]}
    assert torch.equal(flash_attention_with_kvcache(**again), want)
    assert torch.equal(pairs[:, :, :, 0], given["k_cache"]) and torch.equal(pairs[:, :, :, 1], given["v_cache"])
    turns = torch.stack((given["k_cache"], given["v_cache"]), 1).flatten(0, 1)
    again |= {"k_cache": turns[:-1], "v_cache": turns[1:], "page_table": 2 * given["page_table"]}
    assert torch.equal(flash_attention_with_kvcache(**again), want)
    assert torch.equal(turns[::2], given["k_cache"]) and torch.equal(turns[1::2], given["v_cache"])
    with pytest.raises(InvalidArgumentError, match=r"^v_cache: shares memory.* sequences need both"):
        longest = int(given["cache_seqlens"].argmax())  # one of its pages of keys is another's of its values
        again["page_table"] = again["page_table"].clone()
        again["page_table"][longest, 1] = again["page_table"][longest, ::2].min() + 1
        flash_attention_with_kvcache(**again)
    assert torch.equal(turns[::2], given["k_cache"]) and torch.equal(turns[1::2], given["v_cache"])
    lengths = torch.tensor([PAGE + 3, PAGE + 2, PAGE], dtype=torch.int32)
    table = given["page_table"].clone()
    table[:, 0] = table[0, 0]  # a prefix that is full, and nobody writes to
    strided = torch.stack((lengths, lengths), 1)[:, 0]
    before = given["k_cache"].clone()
    out = flash_attention_with_kvcache(**{**given, "page_table": table, "cache_seqlens": strided})
    for b in range(3):
        assert torch.equal(given["k_cache"][table[b, 1], lengths[b] - PAGE], given["k"][b, 0])
    assert torch.equal(given["k_cache"][table[0, 0]], before[table[0, 0]]) and out.isfinite().all()
    seen = flash_attention_with_kvcache(
        **{**given, "page_table": table, "cache_seqlens": strided + 1, "k": None, "v": None}
    )
    assert torch.equal(seen, out)


@pytest.mark.parametrize("turns", (False, True))
def test_rows_of_no_sequence_at_all_change_nothing(turns):
    """A step of an engine that has room for tokens, and no request."""
    k_cache, v_cache = torch.randn(2, 3, PAGE, KV_HEADS, WIDTH)
    before, new = k_cache.clone(), torch.randn(2, 3, KV_HEADS, WIDTH)
    none, angles = torch.zeros(1, dtype=torch.int32), torch.rand(2, 9, 4)
    out, lse = flash_attention_with_kvcache(
        *(torch.randn(3, HEADS, WIDTH), k_cache, v_cache, *new),
        cache_seqlens=none[1:],
        page_table=torch.zeros(0, 2, dtype=torch.int32),
        cu_seqlens_q=none,
        cu_seqlens_k_new=none,
        return_lse=True,
        **(dict(zip(("rotary_cos", "rotary_sin"), angles, strict=True)) if turns else {}),
    )
    assert torch.equal(out, torch.zeros(3, HEADS, WIDTH)) and lse.isneginf().all() and torch.equal(k_cache, before)


def test_where_new_tensors_are_made_is_nothing_to_a_call(monkeypatch):
    given, kept = good(), {}
    monkeypatch.setattr(torch_cache, "_kept", kept)
    want = flash_attention_with_kvcache(**{**given, "k_cache": given["k_cache"].clone()})
    assert kept
    kept.clear()
    with torch.device("meta"):
        assert torch.equal(flash_attention_with_kvcache(**given), want)


def test_starts_are_kept_for_each_number_of_sequences():
    first = torch_cache.multiples(torch.device("cpu"), 3, 5)
    assert first is torch_cache.multiples(torch.device("cpu"), 3, 5) and first.tolist() == [0, 5, 10, 15]


def test_rows_of_a_table_for_each_entry_of_a_batch_of_caches():
    """FlashAttention 3 takes ``cache_batch_idx`` beside ``page_table``: which of its rows each sequence has."""
    q, cache = torch.randn(2, 1, 4, 16), torch.randn(9, 4, 2, 16)
    table, lengths = torch.randperm(9)[:8].int().view(4, 2), torch.tensor([5, 7], dtype=torch.int32)
    entries = torch.tensor([3, 1])

    def attend(entries, **tables):
        return nn.flash_attn_with_kvcache(q, cache, cache, cache_seqlens=lengths, cache_batch_idx=entries, **tables)

    assert torch.equal(attend(entries, page_table=table), attend(None, page_table=table[entries]))
    for wrong in ([4, 0], [-1, 0], [[1, 0]], [1.0, 0.0], [True, False]):
        with pytest.raises((InvalidArgumentError, ArgumentTypeError), match="cache_batch_idx"):
            attend(torch.tensor(wrong), page_table=table)


def _every_other(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, with others between them."""
    return torch.stack((x, torch.full_like(x, 99)), -1).flatten(-2)[..., ::2]


def _columns(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, the first axis the fastest in memory, which conversions keep so."""
    return x.movedim(0, -1).contiguous().movedim(-1, 0)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
@pytest.mark.parametrize("paged", [False, True])
def test_rows_of_the_drop_in_need_not_be_contiguous_but_those_of_caches(paged, integers):
    """As flash_attn copies them; caches, which are written in place, aren't copied."""
    torch.manual_seed(0)
    caches = [torch.randn(*((6, 4) if paged else (2, 12)), 2, 16) for _ in range(2)]
    tensors = {"q": torch.randn(2, 3, 4, 16), **{name: torch.randn(2, 3, 2, 16) for name in "kv"}}
    tensors["cache_seqlens"] = torch.tensor([5, 7], dtype=integers)
    tensors["cache_leftpad"] = torch.tensor([0, 2], dtype=integers)
    tensors |= {"block_table": torch.randperm(6).to(integers).view(2, 3)} if paged else {}
    results = []
    for made in (torch.Tensor.contiguous, _every_other, _columns):
        own = [x.clone() for x in caches]
        given = {name: made(x) for name, x in tensors.items()}
        results.append([*own, nn.flash_attn_with_kvcache(k_cache=own[0], v_cache=own[1], **given)])
    for others in results[1:]:
        assert all(map(torch.equal, results[0], others))
    with pytest.raises(InvalidArgumentError, match="k_cache: has strides"):
        nn.flash_attn_with_kvcache(tensors["q"], _every_other(caches[0]), caches[1], cache_seqlens=3)


@pytest.mark.parametrize("sizes", [(59, 59), (20, 33), (16, 20)], ids=str)
@pytest.mark.parametrize("paged", [False, True])
def test_any_head_dim_in_the_drop_in(sizes, paged):
    """flash_attn pads; what is appended stands in the caller's cache, and what else was there still does."""
    torch.manual_seed(0)
    caches = [torch.randn(*((6, 4) if paged else (2, 12)), 2, size) for size in sizes]
    table = torch.randperm(6).int().view(2, 3) if paged else None
    lengths = torch.tensor([5, 7], dtype=torch.int32)
    q, k, v = torch.randn(2, 3, 4, sizes[0]), *(torch.randn(2, 3, 2, size) for size in sizes)
    wanted = [x.clone() for x in caches]
    rows = [x.view(-1, *x.shape[2:]) for x in wanted]
    for b in range(2):
        for i in range(3):
            place = int(lengths[b]) + i
            at = int(table[b, place // 4]) * 4 + place % 4 if paged else b * 12 + place
            rows[0][at], rows[1][at] = k[b, i], v[b, i]
    out, lse = nn.flash_attn_with_kvcache(
        q, *caches, k, v, cache_seqlens=lengths, page_table=table, causal=True, return_softmax_lse=True
    )
    assert all(map(torch.equal, caches, wanted))
    for b in range(2):
        seen = [x[table[b].long()].flatten(0, 1) if paged else x[b] for x in wanted]
        keys, values = (x[: lengths[b] + 3].double().repeat_interleave(2, 1) for x in seen)
        scores = torch.einsum("ihd,jhd->hij", q[b].double(), keys) * sizes[0] ** -0.5
        hidden = torch.arange(len(keys)) > torch.arange(3)[:, None] + lengths[b]
        scores = scores.masked_fill(hidden, -torch.inf)
        want = torch.einsum("hij,jhd->ihd", scores.softmax(-1), values)
        torch.testing.assert_close(out[b].double(), want, atol=2e-6, rtol=0)
        torch.testing.assert_close(lse[b].double(), scores.logsumexp(-1), atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_any_head_dim_of_8_bits_in_the_drop_in(dtype):
    """What stands in the cache is what a cache of a wider row has there."""
    torch.manual_seed(0)
    q, k, v, *caches = torch.randn(2, 3, 4, 13), *torch.randn(2, 2, 3, 2, 13), *torch.randn(2, 2, 12, 2, 13)
    pairs = [quantise_cache(x, dtype) for x in caches]
    wide = [torch.nn.functional.pad(x, (0, 3)) for x in (q, k, v)]
    wider = [torch.nn.functional.pad(x.view(torch.uint8), (0, 3)).view(x.dtype) for x, _ in pairs]
    given = {"cache_seqlens": torch.tensor([5, 7]), "causal": True}
    given |= {"k_descale": pairs[0][1][None], "v_descale": pairs[1][1][None]}
    found = nn.flash_attn_with_kvcache(q, *(x for x, _ in pairs), k, v, **given)
    want = nn.flash_attn_with_kvcache(wide[0], *wider, *wide[1:], **given, softmax_scale=13**-0.5)
    assert torch.equal(found, want[..., :13])
    for (x, _), y in zip(pairs, wider, strict=True):
        assert torch.equal(x.view(torch.uint8), y[..., :13].view(torch.uint8))


@pytest.mark.parametrize("how", ["in turns", "the same", "expanded"])
def test_caches_that_are_copied_and_share_memory_are_refused(how):
    """Of a head_dim that flash_attn pads: copied back, one would replace what was written to the other."""
    room = torch.randn(9, 4, 2, 13)
    caches = {"in turns": (room[:-1], room[1:]), "the same": (room, room)}
    caches["expanded"] = (room[:1].expand(8, -1, -1, -1), torch.randn(8, 4, 2, 13))
    table, before = torch.tensor([[0, 4], [2, 6]]), room.clone()
    q, k, v = (torch.randn(2, 1, heads, 13) for heads in (4, 2, 2))
    says = {
        "in turns": "^k_cache: its pages",
        "the same": "^v_cache: shares memory",
        "expanded": "^k_cache: has strides",
    }
    with pytest.raises(InvalidArgumentError, match=says[how]):
        nn.flash_attn_with_kvcache(q, *caches[how], k, v, cache_seqlens=3, page_table=table)
    assert torch.equal(room, before)

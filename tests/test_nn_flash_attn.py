"""The drop-ins of flash_attn's functions agree with torch's attention and take what the originals take."""

from __future__ import annotations

import itertools

import pytest

from tests.test_torch_program import DEVICES
from tvm_flash import ArgumentTypeError, InvalidArgumentError, NotSupportedError, flash_attention_v2

torch = pytest.importorskip("torch")


from tests.nn_cases import agree, fresh, tensors  # noqa: E402, F401
from tvm_flash import nn  # noqa: E402
from tvm_flash.nn import sequences  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("cpu_pack", "fresh"),
    pytest.mark.filterwarnings("error::tvm_flash.nn.FallbackWarning"),
]


def bshd(**options):
    return [x.transpose(1, 2) for x in tensors(**options)]


@pytest.mark.parametrize("device", DEVICES)
def test_flash_attn_func(device):
    q, k, v = bshd(heads=(4, 2), device=device)
    options = {"softmax_scale": 0.2, "causal": True, "window_size": (20, 0), "softcap": 4.0}
    slopes = torch.rand(4, device=device)
    out, lse, pattern = nn.flash_attn_func(q, k, v, 0.0, **options, alibi_slopes=slopes, return_attn_probs=True)
    want = flash_attention_v2(q, k, v, **options, alibi_slopes=slopes, return_lse=True, variant="auto")
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1]) and pattern is None
    assert torch.equal(nn.flash_attn_func(q, k, v, 0.0, None, True), flash_attention_v2(q, k, v, causal=True))


def test_flash_attn_func_is_compiled():
    q, k, v = bshd()
    program = torch.compile(nn.flash_attn_func, fullgraph=True, backend="aot_eager")
    assert torch.equal(program(q, k, v, causal=True), nn.flash_attn_func(q, k, v, causal=True))


@pytest.mark.parametrize("head_dims", ((20, 20), (36, 7), (1, 1), (250, 250), (7, 64)))
def test_flash_attn_func_takes_any_head_dim(head_dims):
    q, k, v = bshd(head_dims=head_dims)
    want, want_lse = exact(q, k, v)
    out, lse, _ = nn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert (out - want).abs().max() <= 3e-6 and (lse - want_lse).abs().max() <= 1e-5
    starts = [torch.arange(3, dtype=torch.int32) * x.shape[1] for x in (q, k)]
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    found = nn.flash_attn_varlen_func(*packed, *starts, q.shape[1], k.shape[1]).view(out.shape)
    assert (found - want).abs().max() <= 3e-6


def test_flash_attn_func_takes_any_strides():
    q, k, v = bshd()
    want = nn.flash_attn_func(q, k, v)
    channels_first = [x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2) for x in (q, k, v)]
    every_second = [torch.stack((x, x), -1).flatten(-2)[..., ::2] for x in (q, k, v)]
    for strided in (channels_first, every_second):
        assert strided[0].stride(-1) != 1
        assert torch.equal(nn.flash_attn_func(*strided), want)


def test_windows_that_are_unbounded_in_words():
    q, k, v = bshd()
    for one, other in ((None, (-1, -1)), ((None, 3), (-1, 3)), ((5, -7), (5, -1))):
        assert torch.equal(nn.flash_attn_func(q, k, v, window_size=one), nn.flash_attn_func(q, k, v, window_size=other))


def exact(q, k, v):
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT / q.shape[-1] ** 0.5
    return (torch.softmax(s, -1) @ v).transpose(1, 2), torch.logsumexp(s, -1)


def test_rows_outside_of_all_sequences():
    q, k, v = (torch.randn(40, 2, 32) for _ in range(3))
    starts = torch.tensor([0, 11, 11, 30], dtype=torch.int32)
    out, lse, _ = nn.flash_attn_varlen_func(q, k, v, starts, starts, 19, 19, causal=True, return_attn_probs=True)
    for first, last in ((0, 11), (11, 30)):
        want = nn.flash_attn_func(*(x[None, first:last] for x in (q, k, v)), causal=True)[0]
        assert (out[first:last] - want).abs().max() <= 2e-6
    outside = torch.ones(40, dtype=torch.bool)
    outside[:30] = False
    assert not out[outside].any() and lse[:, outside].isneginf().all() and lse[:, ~outside].isfinite().all()


def test_packed_functions():
    q, k, v = bshd(lengths=(50, 50))
    want = nn.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(nn.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), causal=True), want)
    assert torch.equal(nn.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), causal=True), want)
    starts, flat = torch.tensor([0, 50, 100], dtype=torch.int32), [x.flatten(0, 1) for x in (q, k, v)]
    out = nn.flash_attn_varlen_qkvpacked_func(torch.stack(flat, 1), starts, 50, causal=True)
    assert (out.view(want.shape) - want).abs().max() <= 2e-6
    ends = (starts, starts, 50, 50)
    out = nn.flash_attn_varlen_kvpacked_func(flat[0], torch.stack(flat[1:], 1), *ends, causal=True)
    assert (out.view(want.shape) - want).abs().max() <= 2e-6


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "lengths", ([(5, 9), (5, 9), (30, 30), (1, 70), (12, 3)], [(8, 8)] * 4, [(0, 4), (7, 0), (3, 3)])
)
def test_varlen(lengths, device):
    dtype = torch.float32 if device == "cpu" else torch.float16
    starts = [
        torch.tensor([0, *itertools.accumulate(n)], dtype=torch.int32, device=device)
        for n in zip(*lengths, strict=True)
    ]
    total_q, total_k = (int(s[-1]) for s in starts)
    q = torch.randn(total_q, 4, 64, device=device, dtype=dtype)
    k, v = (torch.randn(total_k, 2, 64, device=device, dtype=dtype) for _ in range(2))
    slopes = torch.rand(len(lengths), 4, device=device)
    options = {"causal": True, "window_size": (25, 0)}
    most = [max(n) for n in zip(*lengths, strict=True)]
    out, lse, _ = nn.flash_attn_varlen_func(
        q, k, v, *starts, *most, alibi_slopes=slopes, return_attn_probs=True, **options
    )
    assert out.shape == q.shape and lse.shape == (4, total_q)
    at_q = at_k = 0
    for (length_q, length_k), slope in zip(lengths, slopes, strict=True):
        rows, columns = slice(at_q, at_q + length_q), slice(at_k, at_k + length_k)
        one = q[rows][None], k[columns][None], v[columns][None]
        want, want_lse, _ = nn.flash_attn_func(*one, alibi_slopes=slope, return_attn_probs=True, **options)
        if length_q:
            assert (out[rows] - want[0]).abs().max() <= (2e-6 if device == "cpu" else 2e-3)
            assert torch.allclose(lse[:, rows], want_lse[0], rtol=0, atol=4e-6)
        at_q, at_k = at_q + length_q, at_k + length_k


@pytest.mark.parametrize("needs_gradients", (False, True))
def test_sequences_where_a_pack_has_no_kernels_for_them(monkeypatch, needs_gradients):
    """A call for each run of equal lengths gives the same, gradients too."""
    lengths = (5, 9), (5, 9), (30, 30), (12, 0), (0, 3)
    starts = [torch.tensor([0, *itertools.accumulate(n)]) for n in zip(*lengths, strict=True)]
    leaves = [torch.randn(60, h, 32, requires_grad=needs_gradients) for h in (4, 2, 2)]

    def attend():
        for x in leaves:
            x.grad = None
        out, lse, _ = nn.flash_attn_varlen_func(
            *leaves, *starts, 30, 30, causal=True, alibi_slopes=torch.ones(5, 4) / 8, return_attn_probs=True
        )
        if needs_gradients:
            out.square().sum().backward()
        return [out.detach(), lse.detach(), *(x.grad for x in leaves if needs_gradients)]

    want = attend()
    monkeypatch.setattr(sequences, "no_kernel", lambda *a, ragged=False: "there is none" if ragged else None)
    calls = []
    attend_once = sequences.attend
    monkeypatch.setattr(sequences, "attend", lambda *a, **b: calls.append(a) or attend_once(*a, **b))
    for a, b in zip(attend(), want, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)
    assert len(calls) == 4
    with pytest.raises(InvalidArgumentError, match=r"^cu_seqlens_q: begins with 1"):
        nn.flash_attn_varlen_func(*leaves, starts[0] + 1, starts[1], 30, 30)


def test_what_flash_attn_functions_refuse():
    q, k, v = bshd()
    with pytest.raises(NotSupportedError, match=r"^dropout_p: is 0.1.*give 0.0"):
        nn.flash_attn_func(q, k, v, 0.1)
    packed = [x[0] for x in (q, k, v)]
    good = torch.tensor([0, 33]), torch.tensor([0, 70])
    two = torch.tensor([0, 20, 10]), torch.tensor([0, 70, 70])
    for starts, says in (
        ((torch.tensor([0, 34]), good[1]), "^cu_seqlens_q: ends with 34, expected at most the 33 rows of q"),
        (two, "^cu_seqlens_q: falls from 20 to 10"),
        ((good[0], torch.tensor([-1, 70])), "^cu_seqlens_k: begins with -1"),
        ((good[0], torch.tensor([0, 30, 70])), "^cu_seqlens_k: is of 2 sequences, but cu_seqlens_q of 1"),
    ):
        with pytest.raises(InvalidArgumentError, match=says):
            nn.flash_attn_varlen_func(*packed, *starts, 33, 70)


def test_errors_name_the_arguments_of_flash_attn():
    """They come from functions whose arguments have other names, such as page_table for a block_table."""
    q, table, lengths = torch.randn(2, 1, 4, 64), torch.zeros(2, 2, dtype=torch.int32), torch.tensor([3, 5]).int()
    k, v = torch.randn(2, 8, 16, 2, 64)
    starts = torch.tensor([0, 1, 2], dtype=torch.int32)

    def cached(**given):
        return nn.flash_attn_with_kvcache(q, **{"k_cache": k, "v_cache": v, "cache_seqlens": lengths, **given})

    def ragged(k, v, lengths, table):
        return nn.flash_attn_varlen_func(q[:, 0], k, v, starts, lengths, 1, 32, block_table=table)

    small = {name: x.to(torch.int8) for name, x in (("k_cache", k), ("v_cache", v))}
    scales = {"k_descale": torch.ones(2, 2), "v_descale": torch.ones(2, 2).half()}
    for call, says in (
        (lambda: cached(block_table=table.float()), "^block_table: has dtype float32"),
        (lambda: cached(page_table=table.float()), "^page_table: has dtype float32"),
        (lambda: cached(page_table=table + 9), r"^page_table: is 9 at \[0, 0\]"),
        (lambda: cached(block_table=table + 9), r"^block_table: is 9 at \[0, 0\]"),
        (lambda: cached(block_table=table, cache_batch_idx=lengths), r"^cache_batch_idx: names an entry beyond the 2"),
        (lambda: cached(block_table=table, return_softmax_lse=3), "^return_softmax_lse: is 3"),
        (lambda: cached(block_table=table, **small), "^k_cache: has dtype int8, .*; give k_descale and v_descale"),
        (lambda: cached(block_table=table, **small, **scales), "^v_descale: has dtype float16"),
        (lambda: ragged(k, v, starts, table[0]), r"^block_table: has shape \(2,\)"),
        (lambda: ragged(k, v, 100 * starts, table), "^cu_seqlens_k: is 100 of sequence 0"),
        (lambda: ragged(k[:, :, 0], v, starts, table), r"^k: has shape \(8, 16, 64\)"),
        (lambda: ragged(k, v[:5], starts, table), r"^v: has shape \(5, 16, 2, 64\), but k \(8, 16, 2, 64\)"),
    ):
        with pytest.raises((ArgumentTypeError, InvalidArgumentError), match=says):
            call()


HEAD_DIMS = ((20, 24, 24), (24, 20, 20), (20, 17, 20))


@pytest.mark.parametrize("head_dims", HEAD_DIMS)
def test_head_dims_that_do_not_fit_are_not_padded_until_they_do(head_dims):
    """Zeros up to the next multiple of 8 made them equal, and the result was one of other queries and keys."""
    q, k, v = (torch.randn(1, 5, 2, d) for d in head_dims)
    starts = torch.tensor([0, 5], dtype=torch.int32)
    says = rf"^k.*: has head_dim {head_dims[1]}, but q has {head_dims[0]}; expected the same"
    table = torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(InvalidArgumentError, match=says):
        nn.flash_attn_func(q, k, v)
    with pytest.raises(InvalidArgumentError, match=says):
        nn.flash_attn_varlen_func(q[0], k[0], v[0], starts, starts, 5, 5)
    with pytest.raises(InvalidArgumentError, match=says):
        nn.flash_attn_varlen_func(q[0], k, v, starts, starts, 5, 5, block_table=table)
    with pytest.raises(InvalidArgumentError, match=says):
        nn.flash_attn_with_kvcache(q, k, v, cache_seqlens=5)


@pytest.mark.parametrize(
    ("widths", "says"),
    (
        ({"k": 20}, r"^k: has shape \(1, 1, 2, 20\), expected \(1, 1, 2, 23\)"),
        ({"v": 20}, r"^v: has shape \(1, 1, 2, 20\), expected \(1, 1, 2, 23\)"),
        ({"rotary_cos": 12, "rotary_sin": 12}, r"^rotary_cos: .* half of a rotary_dim of at most 23"),
    ),
)
def test_new_rows_of_another_head_dim_are_not_padded_into_a_cache(widths, says):
    q, k, v = (torch.randn(1, 1, 2, widths.get(name, 23)) for name in "qkv")
    caches = [torch.zeros(1, 8, 2, 23) for _ in "kv"]
    angles = {name: torch.rand(8, widths.get(name, 11)) for name in ("rotary_cos", "rotary_sin")}
    with pytest.raises(InvalidArgumentError, match=says):
        nn.flash_attn_with_kvcache(q, *caches, k, v, **angles, cache_seqlens=3, causal=True)
    assert not any(x.any() for x in caches)


@pytest.mark.parametrize("head_dims", ((20, 20), (64, 5), (3, 16)))
def test_pages_of_any_head_dim(head_dims):
    """As flash_attn pads them; they were refused, by a name that the function hasn't."""
    q, k, v = (torch.randn(2, h, 7, d) for h, d in ((4, head_dims[0]), (2, head_dims[0]), (2, head_dims[1])))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    starts = torch.tensor([0, 7, 14])
    pages = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1)).reshape(4, 4, 2, -1) for x in (k, v)]
    table = torch.tensor([[0, 1], [2, 3]])
    out, lse, _ = nn.flash_attn_varlen_func(
        q.flatten(0, 1), *pages, starts, starts, 7, 7, causal=True, block_table=table, return_attn_probs=True
    )
    want, want_lse, _ = nn.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert torch.allclose(out, want.flatten(0, 1), rtol=0, atol=2e-6)
    assert torch.allclose(lse, want_lse.transpose(0, 1).flatten(1), rtol=0, atol=4e-6)


def test_what_is_packed_wrongly_is_told_of():
    starts = torch.tensor([0, 5])
    for call, says in (
        (
            lambda: nn.flash_attn_qkvpacked_func(torch.randn(1, 5, 2, 2, 8)),
            r"^qkv: .*expected \(batch, seqlen, 3, heads",
        ),
        (lambda: nn.flash_attn_kvpacked_func(torch.randn(1, 5, 2, 8), torch.zeros(1, 5, 3, 2, 8)), r"^kv: .* 2, heads"),
        (lambda: nn.flash_attn_varlen_qkvpacked_func(torch.randn(5, 3, 8), starts, 5), r"^qkv: .*\(total, 3, heads"),
        (
            lambda: nn.flash_attn_varlen_kvpacked_func(torch.randn(5, 2, 8), None, starts, starts, 5, 5),
            r"^kv: is a None",
        ),
    ):
        with pytest.raises((InvalidArgumentError, ArgumentTypeError), match=says):
            call()
    q = torch.randn(1, 5, 2, 8)
    for window in (3, "ab", (1, 2, 3), (1.5, 2)):
        with pytest.raises(ArgumentTypeError, match=r"^window_size: is .*, expected two integers"):
            nn.flash_attn_func(q, q, q, window_size=window)
    for option, value, says in (
        ("dropout_p", torch.zeros(0), "^dropout_p: is "),
        ("softcap", torch.zeros(2), "^softcap: is a Tensor, expected a number"),
        ("window_size", torch.zeros(2, 2), "^window_size: is "),
    ):
        with pytest.raises((ArgumentTypeError, NotSupportedError), match=says):
            nn.flash_attn_varlen_func(q[0], q[0], q[0], starts, starts, 5, 5, **{option: value})
    with pytest.raises(ArgumentTypeError, match=r"^cu_seqlens_k: is a list, expected a tensor"):
        nn.flash_attn_varlen_func(q[0], q, q, starts, [0, 5], 5, 5, block_table=torch.zeros(1, 1, dtype=torch.int32))


@pytest.mark.parametrize(
    ("changes", "says"),
    (
        ({"k_descale": [1.0]}, "^k_descale: is a list, expected a dense tensor"),
        ({"v_descale": torch.ones(2)}, r"^v_descale: has shape \(2,\), expected 2 dimensions"),
        ({"k_descale": torch.ones(2, 2, device="meta")}, "^k_descale: is on meta, expected cpu"),
        ({"block_table": "x"}, "^block_table: is a str, expected a"),
        ({"block_table": torch.zeros(0, 2, dtype=torch.int32)}, "^block_table: has no rows"),
        ({"block_table": torch.zeros(2, 2)}, "^block_table: has dtype torch.float32, expected int32"),
        ({"cache_seqlens": torch.ones(4, dtype=torch.int32)}, r"^cache_seqlens: has shape \(4,\), expected \(2,\)"),
        (
            {"cache_batch_idx": torch.zeros(3, dtype=torch.int32)},
            "^block_table: has 3 rows, or cache_batch_idx names",
        ),
        ({"q": 3}, "^q: is a int, expected a dense tensor"),
    ),
)
def test_what_is_read_for_scales_of_sequences_is_checked_before(changes, says):
    """Where a scale of a sequence becomes one of its pages, which were torch's own errors."""
    q, k, v = (torch.randn(2, 1, h, 16) for h in (4, 2, 2))
    caches = {name: torch.zeros(4, 8, 2, 16, dtype=torch.int8) for name in ("k_cache", "v_cache")}
    table = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    given = {"q": q, **caches, "k": k, "v": v, "cache_seqlens": torch.tensor([3, 5], dtype=torch.int32)}
    given |= {"cache_batch_idx": torch.tensor([1, 0], dtype=torch.int32), "block_table": table}
    given |= {"k_descale": torch.rand(2, 2), "v_descale": torch.rand(2, 2)}
    with pytest.raises((ArgumentTypeError, InvalidArgumentError), match=says):
        nn.flash_attn_with_kvcache(**given | changes)
    assert not any(x.any() for x in caches.values())
    nn.flash_attn_with_kvcache(**given)
    assert all(x.any() for x in caches.values())

"""``flash_attention_varlen``: the answer, what a sequence owes to its neighbours, results, and wrong calls."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from tests import ragged_cases, random_ragged
from tests.ragged_cases import RAGGED_CASES, RaggedCase, rows_tensor
from tests.test_torch_program import DEVICES
from tvm_flash import (
    ArgumentTypeError,
    InvalidArgumentError,
    KernelNotFoundError,
    flash_attention_v2,
    flash_attention_varlen,
    padded_attention,
)
from tvm_flash.call import eager, fast

pytestmark = pytest.mark.usefixtures("cpu_pack")

CASE = RaggedCase((33, 0, 5, 70, 1), 4, 64, (40, 9, 5, 60, 130), kv_heads=2, mask="causal", after=(6, 3))


def options_of(case: RaggedCase, data) -> dict:
    """The options of a function for a case."""
    found = {"causal": case.mask == "causal", "softcap": data.params.get("softcap", 0.0)}
    if "alibi" in case.score:
        found["alibi_slopes"] = torch.from_numpy(data.params["alibi_slopes"])
    if case.mask == "window":
        found["window_size"] = (data.params["window_left"], data.params["window_right"])
    return found


def tensors(case: RaggedCase, data=None):
    data = data or ragged_cases.inputs(case)
    rows = [rows_tensor(x, case) for x in (data.q, data.k, data.v)]
    return [*rows, *(torch.from_numpy(x) for x in case.starts)]


@pytest.mark.parametrize("case", [c for c in RAGGED_CASES if c.dtype == "bfloat16"], ids=lambda c: c.id)
def test_against_float64(case):
    data = ragged_cases.inputs(case)
    out, lse = flash_attention_varlen(*tensors(case, data), return_lse=True, **options_of(case, data))
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    ragged_cases.check(case, data, out.double().numpy(), lse.double().numpy())


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
def test_a_sequence_owes_nothing_to_its_neighbours(dtype):
    """Alone, among others, elsewhere, and beside NaN and infinities, it has the same bits."""
    lengths = (70, 5, 130), (90, 40, 130)
    rng = np.random.default_rng(0)
    q, k, v = (
        torch.from_numpy(rng.standard_normal((sum(n), 2, 64), np.float32)) for n in (lengths[0], *[lengths[1]] * 2)
    )
    q, k, v = (x.to(getattr(torch, dtype)) for x in (q, k, v))
    starts = [torch.tensor([0, *np.cumsum(n)], dtype=torch.int32) for n in lengths]
    for options in ({}, {"causal": True}, {"window_size": (30, 0), "softcap": 3.0}):
        out, lse = flash_attention_varlen(q, k, v, *starts, return_lse=True, **options)
        for b in range(3):
            i, j = (slice(int(s[b]), int(s[b + 1])) for s in starts)
            ends = [torch.tensor([0, x.stop - x.start], dtype=torch.int32) for x in (i, j)]
            alone = flash_attention_varlen(q[i], k[j], v[j], *ends, return_lse=True, **options)
            assert torch.equal(alone[0], out[i]) and torch.equal(alone[1], lse[:, i])
            for poison in (np.nan, np.inf, -np.inf):
                others = [torch.full_like(x, poison) for x in (q, k, v)]
                for x, whole, own in zip(others, (q, k, v), (i, j, j), strict=True):
                    x[own] = whole[own]
                among = flash_attention_varlen(*others, *starts, return_lse=True, **options)
                assert torch.equal(among[0][i], out[i]) and torch.equal(among[1][:, i], lse[:, i])


def test_equal_lengths_are_a_batch():
    q, k, v = (torch.randn(3, 50, h, 64) for h in (4, 2, 2))
    starts = torch.arange(4, dtype=torch.int32) * 50
    for options in ({}, {"causal": True}, {"window_size": (7, 3)}):
        want, want_lse = flash_attention_v2(q, k, v, return_lse=True, **options)
        out, lse = flash_attention_varlen(
            *(x.flatten(0, 1) for x in (q, k, v)), starts, starts, return_lse=True, **options
        )
        assert (out.view(want.shape) - want).abs().max() <= 2e-6
        assert (lse.view(4, 3, 50).transpose(0, 1) - want_lse).abs().max() <= 4e-6


def test_results_go_where_they_shall(monkeypatch):
    data = ragged_cases.inputs(CASE)
    arguments = tensors(CASE, data)
    want = flash_attention_varlen(*arguments, causal=True)
    for out in (torch.full_like(want, torch.nan), torch.full((76 + 39, 5, 80), torch.nan)[: len(want), :4, :64]):
        before = out.data_ptr()
        assert flash_attention_varlen(*arguments, causal=True, out=out) is out
        assert out.data_ptr() == before and torch.equal(out, want)
    with pytest.raises(InvalidArgumentError, match=r"^out: shares memory with q"):
        flash_attention_varlen(*arguments, causal=True, out=arguments[0])
    with pytest.raises(InvalidArgumentError, match=r"^out: has shape"):
        flash_attention_varlen(*arguments, out=want[1:])


def test_starts_lie_anywhere():
    """A slice of a larger tensor is aligned to nothing but its elements."""
    arguments = tensors(CASE)
    want = flash_attention_varlen(*arguments)
    for shift in range(1, 9):
        moved = [torch.cat((torch.zeros(shift, dtype=torch.int32), x))[shift:] for x in arguments[3:]]
        assert torch.equal(flash_attention_varlen(*arguments[:3], *moved), want)


def test_frameworks():
    data = ragged_cases.inputs(CASE)
    want, want_lse = flash_attention_varlen(*tensors(CASE, data), causal=True, return_lse=True)
    out, lse = flash_attention_varlen(data.q, data.k, data.v, *CASE.starts, causal=True, return_lse=True)
    assert type(out) is np.ndarray and np.array_equal(out, want.numpy()) and np.array_equal(lse, want_lse.numpy())
    jnp = pytest.importorskip("jax.numpy")
    out = flash_attention_varlen(*map(jnp.asarray, (data.q, data.k, data.v, *CASE.starts)), causal=True)
    assert np.array_equal(np.asarray(out), want.numpy())


def test_nothing_depends_on_the_longest():
    arguments = tensors(CASE)
    want = flash_attention_varlen(*arguments)
    assert torch.equal(flash_attention_varlen(*arguments, max_seqlen_q=70, max_seqlen_k=np.int64(130)), want)
    with pytest.raises(ArgumentTypeError, match=r"^max_seqlen_q: is 1.5, expected a whole number"):
        flash_attention_varlen(*arguments, max_seqlen_q=1.5)
    with pytest.raises(InvalidArgumentError, match=r"^max_seqlen_k: is -1"):
        flash_attention_varlen(*arguments, max_seqlen_k=-1)


@pytest.mark.parametrize("empty", ("rows", "keys", "sequences", "heads"))
def test_nothing_to_attend_to(empty):
    total_q, total_k = (0 if empty == "rows" else 7), (0 if empty == "keys" else 9)
    heads, batch = (0 if empty == "heads" else 2), (0 if empty == "sequences" else 2)
    q, k = torch.randn(total_q, heads, 64), torch.randn(total_k, heads, 64)
    starts = [torch.tensor([0, n // 2, n][: batch + 1], dtype=torch.int32) for n in (total_q, total_k)]
    out, lse = flash_attention_varlen(q, k, k, *starts, return_lse=True)
    assert out.shape == q.shape and not out.any() and lse.shape == (heads, total_q) and lse.isneginf().all()


def starts(*numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


GOOD = starts(0, 4, 9)
WRONG = {
    "dtype": (
        starts(0, 4, 9, dtype=torch.int64),
        GOOD,
        ArgumentTypeError,
        "cu_seqlens_q: has dtype int64, expected int32",
    ),
    "float": (GOOD, GOOD.float(), ArgumentTypeError, "cu_seqlens_k: has dtype float32, expected int32"),
    "rank": (GOOD[None], GOOD, InvalidArgumentError, r"cu_seqlens_q: has shape \(1, 3\), expected \(batch \+ 1,\)"),
    "nothing": (GOOD[:0], GOOD, InvalidArgumentError, r"cu_seqlens_q: has shape \(0,\), expected \(batch \+ 1,\)"),
    "number": (GOOD, GOOD[:2], InvalidArgumentError, "cu_seqlens_k: is of 1 sequences, but cu_seqlens_q of 2"),
    "strides": (starts(0, 0, 4, 0, 9)[::2], GOOD, InvalidArgumentError, r"cu_seqlens_q: has strides \(2,\)"),
    "list": ([0, 4, 9], GOOD, ArgumentTypeError, "cu_seqlens_q: is a builtins.list"),
    "missing": (GOOD, None, ArgumentTypeError, "cu_seqlens_k: is a builtins.NoneType"),
    "framework": (GOOD, GOOD.numpy(), ArgumentTypeError, "cu_seqlens_k: is a numpy tensor, but q is one of torch"),
    "device": (GOOD, GOOD.to("meta"), ArgumentTypeError, "cu_seqlens_k: is on meta, expected cpu, where q is"),
    "first": (starts(1, 4, 9), GOOD, InvalidArgumentError, "cu_seqlens_q: begins with 1, expected 0"),
    "falls": (GOOD, starts(0, 7, 5), InvalidArgumentError, "cu_seqlens_k: falls from 7 to 5 after sequence 1"),
    "beyond": (
        GOOD,
        starts(0, 4, 13),
        InvalidArgumentError,
        "cu_seqlens_k: ends with 13, expected at most the 12 rows of k",
    ),
    "negative": (starts(0, -4, 9), GOOD, InvalidArgumentError, "cu_seqlens_q: falls from 0 to -4 after sequence 0"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_starts_are_refused_before_anything_is_written(fault):
    q, k = torch.randn(10, 2, 64), torch.randn(12, 2, 64)
    of_q, of_k, error, says = WRONG[fault]
    out = torch.full_like(q, 7.0)
    for _ in range(2):  # the second time where the fast path might know the call
        flash_attention_varlen(q, k, k, GOOD, GOOD)
        with pytest.raises(error, match=says):
            flash_attention_varlen(q, k, k, of_q, of_k, out=out)
    assert (out == 7).all()


def test_wrong_tensors():
    q, k = torch.randn(10, 4, 64), torch.randn(12, 2, 64)
    with pytest.raises(
        InvalidArgumentError, match=r"^q: has shape \(1, 10, 4, 64\) of rank 4, expected 3 dim.*total, heads"
    ):
        flash_attention_varlen(q[None], k, k, GOOD, GOOD)
    with pytest.raises(InvalidArgumentError, match=r"^v: has length 11, but k has 12"):
        flash_attention_varlen(q, k, k[1:], GOOD, GOOD)
    with pytest.raises(InvalidArgumentError, match=r"^k: has 3 heads, expected a divisor of q's 4"):
        flash_attention_varlen(q, torch.randn(12, 3, 64), torch.randn(12, 3, 64), GOOD, GOOD)
    with pytest.raises(InvalidArgumentError, match=r"^alibi_slopes: has shape \(3, 4\), expected \(4,\) or \(2, 4\)"):
        flash_attention_varlen(q, k, k, GOOD, GOOD, alibi_slopes=torch.rand(3, 4))
    with pytest.raises(KernelNotFoundError, match=r"^no cpu ragged kernel for head_dim 512.*--kind ragged"):
        flash_attention_varlen(*(torch.randn(10, 2, 512) for _ in range(3)), GOOD, GOOD)
    with pytest.raises(ArgumentTypeError, match=r"^q: has dtype float64"):
        flash_attention_varlen(q.double(), k.double(), k.double(), GOOD, GOOD)


def test_other_lengths_go_by_the_fast_path(monkeypatch):
    if not fast.is_loaded():
        pytest.skip("the pack has no fast path")
    arguments = tensors(CASE)
    want = flash_attention_varlen(*arguments, causal=True)
    other = [*arguments[:3], *(x.clone() for x in arguments[3:])]
    other[3][1] += 3  # the first sequence takes three rows of the third's neighbour
    other[3][2] += 3
    slow = flash_attention_varlen(*other, causal=True)
    monkeypatch.setattr(eager, "attention", lambda *a: pytest.fail("the slow path is asked"))
    assert torch.equal(flash_attention_varlen(*arguments, causal=True), want)
    assert torch.equal(flash_attention_varlen(*other, causal=True), slow)
    gc.collect()


def test_against_padding():
    """The same as a padded batch with as many keys each."""
    lengths = (40, 7, 25)
    q = torch.randn(sum(lengths), 2, 64)
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    out = flash_attention_varlen(q, q, q, ends, ends, causal=True)
    padded = torch.zeros(3, 40, 2, 64)
    for b, n in enumerate(lengths):
        padded[b, :n] = q[ends[b] : ends[b + 1]]
    ranges = torch.tensor([[0, n] for n in lengths], dtype=torch.int32)
    start = ranges[:, 1] - torch.tensor(lengths, dtype=torch.int32)
    whole = padded_attention(padded, padded, padded, ranges, causal=True, query_start=start, layout="bshd")
    for b, n in enumerate(lengths):
        assert (out[ends[b] : ends[b + 1]] - whole[b, :n]).abs().max() <= 2e-6


@pytest.mark.parametrize("device", DEVICES)
def test_random_calls(device):
    count, _, lines = random_ragged.failures(range(25), device)
    assert count and not lines, "\n".join(lines)


def test_gradients_of_random_calls(trains):
    count, _, lines = random_ragged.failures(range(100, 125), gradients=True)
    assert count and not lines, "\n".join(lines)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_as_torchs_varlen_attn(device):
    """PyTorch's own function, where it has one: it has none on CPUs."""
    varlen_attn = pytest.importorskip("torch.nn.attention.varlen").varlen_attn
    q, k, v = (torch.randn(300, 4, 64, device=device, dtype=torch.bfloat16) for _ in range(3))
    ends = torch.tensor([0, 5, 5, 170, 300], dtype=torch.int32, device=device)
    for ours, theirs in (({}, {}), ({"causal": True}, {"window_size": (-1, 0)})):
        out = flash_attention_varlen(q, k, v, ends, ends, 165, 165, **ours)
        want = varlen_attn(q, k, v, ends, ends, 165, 165, **theirs)
        assert (out.float() - want.float()).abs().max() <= 2e-2

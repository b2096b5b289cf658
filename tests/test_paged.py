"""``flash_attention_paged``: the answer, what a token owes to others, results, and wrong calls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests import paged_cases, ragged_cases, random_paged
from tests.paged_cases import PAGED_CASES, PagedCase
from tests.ragged_cases import RaggedCase, rows_tensor
from tests.test_varlen import options_of
from tvm_flash import (
    ArgumentTypeError,
    InvalidArgumentError,
    NotSupportedError,
    check_pages,
    flash_attention_paged,
    flash_attention_varlen,
)
from tvm_flash.call import fast

pytestmark = pytest.mark.usefixtures("cpu_pack")

_OF = RaggedCase((33, 0, 5, 70, 1), 4, 64, (40, 9, 5, 160, 1330), kv_heads=2, mask="causal", after=(6, 0))
CASE = PagedCase(_OF, 16, spare=1)


def tensors(case: PagedCase, data=None, order: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of a call by name."""
    data = data or ragged_cases.inputs(case.of)
    made = paged_cases.caches(case, data, order)
    k_cache, v_cache = paged_cases.cache_tensors(case, made)
    found = {"q": rows_tensor(data.q, case.of), "k_cache": k_cache, "v_cache": v_cache}
    found["cu_seqlens_q"] = torch.from_numpy(case.of.starts[0])
    return found | {name: torch.from_numpy(getattr(made, name)) for name in ("seqlens_k", "page_table")}


@pytest.mark.parametrize("case", [c for c in PAGED_CASES if c.of.dtype == "bfloat16"], ids=lambda c: c.id)
def test_against_float64(case):
    data = ragged_cases.inputs(case.of)
    out, lse = flash_attention_paged(**tensors(case, data), return_lse=True, **options_of(case.of, data))
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    paged_cases.check(case, data, out.double().numpy(), lse.double().numpy())


def test_random_calls():
    count, _, lines = random_paged.failures(range(12))
    assert not lines and count == 12, "\n".join(lines)


@pytest.mark.parametrize("dtype", ("float32", "float16", "bfloat16"))
def test_the_bits_of_a_sequence_have_nothing_to_do_with_pages_or_neighbours(dtype):
    case = replace(CASE, of=replace(CASE.of, dtype=dtype))
    data = ragged_cases.inputs(case.of)
    whole = flash_attention_paged(**tensors(case, data), return_lse=True, causal=True)
    for other in (case, replace(case, page_size=1), replace(case, page_size=50, strides="heads")):
        given = tensors(other, data, order=1)
        check_pages(*(given[n] for n in ("q", "k_cache", "cu_seqlens_q", "seqlens_k", "page_table")))
        found = flash_attention_paged(**given, return_lse=True, causal=True)
        assert all(torch.equal(x, y) for x, y in zip(found, whole, strict=True))
    for b in case.of.seeing:
        i, j = case.of.rows(b)
        alone = replace(case, of=replace(case.of, queries=(i.stop - i.start,), keys=(j.stop - j.start,), after=(0, 0)))
        own = ragged_cases.RaggedInputs(data.q[i], data.k[j], data.v[j], data.params)
        found = flash_attention_paged(**tensors(alone, own), return_lse=True, causal=True)
        assert torch.equal(found[0], whole[0][i]) and torch.equal(found[1], whole[1][:, i])


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("options", ({}, {"window_size": (300, 0), "softcap": 3.0, "alibi_slopes": torch.rand(4)}))
def test_a_token_has_the_same_bits_in_chunks(dtype, options):
    """Of at most 8 rows, one among them: whatever the size; and of more: whatever the size."""
    length, heads = 2150, 4
    q, k, v = (torch.randn(length, h, 64).to(getattr(torch, dtype)) for h in (heads, 2, 2))
    table = torch.randperm(-(-length // 16)).int()[None]
    cache = torch.empty(2, table.shape[1], 16, 2, 64, dtype=q.dtype)
    for place, x in zip(cache, (k, v), strict=True):
        place[table[0].long()] = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, -length % 16)).view(-1, 16, 2, 64)

    def chunk(first, count):
        """Rows from ``first`` on, with the keys up to their last."""
        starts, lengths = torch.tensor([0, count]).int(), torch.tensor([first + count]).int()
        return flash_attention_paged(q[first : first + count], *cache, starts, lengths, table, causal=True, **options)

    for sizes in ((1, 3, 8), (9, 40, 200)):
        last = max(sizes)
        for end in (300, 1130, length):
            want = chunk(end - last, last)
            for size in sizes[:-1]:
                first, chunks = end - last, []
                while first < end:
                    count = size if first + 2 * size <= end else end - first  # the last one takes what is left
                    chunks.append(chunk(first, count))
                    first += count
                assert torch.equal(torch.cat(chunks), want), (size, end)


def test_a_call_is_repeated_without_checks_and_sees_other_pages(monkeypatch):
    given = tensors(CASE)
    out = torch.empty_like(given["q"])
    want = flash_attention_paged(**given, causal=True)
    assert flash_attention_paged(**given, causal=True, out=out) is out and torch.equal(out, want)
    if fast.is_loaded():
        monkeypatch.setattr(fast, "_slow", None)
    given["page_table"][...] = tensors(CASE, order=3)["page_table"]
    for cache in ("k_cache", "v_cache"):
        given[cache][...] = tensors(CASE, order=3)[cache]
    flash_attention_paged(**given, causal=True, out=out)
    assert torch.equal(out, want)


def test_left_padding_hides_keys():
    """The same as without the keys that come before."""
    given, start = tensors(CASE), 3
    found = flash_attention_paged(**given, kv_start=torch.full((5, 1), start, dtype=torch.int32), window_size=(20, 4))
    data = ragged_cases.inputs(CASE.of)
    for b in CASE.of.seeing:
        i, j = CASE.of.rows(b)
        ends = [torch.tensor([0, n], dtype=torch.int32) for n in (i.stop - i.start, j.stop - j.start - start)]
        rows = [rows_tensor(x, CASE.of) for x in (data.q[i], data.k[j][start:], data.v[j][start:])]
        want = flash_attention_varlen(*rows, *ends, window_size=(20, 4))
        assert torch.allclose(found[i], want, atol=2e-6)


def test_numpy_and_empty_calls():
    given = tensors(CASE)
    want = flash_attention_paged(**given)
    found = flash_attention_paged(**{name: x.numpy() for name, x in given.items()})
    assert isinstance(found, np.ndarray) and np.array_equal(found, want.numpy())
    nothing = {**given, "seqlens_k": torch.zeros_like(given["seqlens_k"])}
    for changes in ({}, {"page_table": given["page_table"][:, :0]}, {"k_cache": given["k_cache"][:0]}):
        if "k_cache" in changes:
            changes["v_cache"] = given["v_cache"][:0]
        out, lse = flash_attention_paged(**{**nothing, **changes}, return_lse=True)
        assert not out.any() and lse.isneginf().all()
    with pytest.raises(InvalidArgumentError, match=r"^seqlens_k: is 40 of sequence 0, expected 0 to 0"):
        flash_attention_paged(**{**given, "page_table": given["page_table"][:, :0]})


def test_a_compiled_program_calls_the_operator():
    given = tensors(CASE)

    def program(*arguments):
        return flash_attention_paged(*arguments, causal=True, return_lse=True)

    compiled = torch.compile(program, backend="aot_eager", fullgraph=True)
    for x, y in zip(compiled(*given.values()), program(*given.values()), strict=True):
        assert torch.equal(x, y)
    torch.library.opcheck(torch.ops.tvm_flash.attention_paged.default, tuple(given.values()))


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"seqlens_k": lambda x: x.long()}, ArgumentTypeError, r"^seqlens_k: has dtype int64, expected int32"),
        ({"page_table": lambda x: x[:3]}, InvalidArgumentError, r"^page_table: has shape .* of 5 sequences"),
        ({"page_table": lambda x: x.T.contiguous().T}, InvalidArgumentError, r"^page_table: has strides"),
        ({"page_table": lambda x: x * 0 + 99_999}, InvalidArgumentError, r"^page_table: has page 99999 at \[0, 0\]"),
        ({"page_table": lambda x: x * 0 - 1}, InvalidArgumentError, r"^page_table: has page -1 at \[0, 0\]"),
        ({"seqlens_k": lambda x: x + 9999}, InvalidArgumentError, r"^seqlens_k: is 10039 of sequence 0, expected 0 to"),
        ({"seqlens_k": lambda x: x - 9}, InvalidArgumentError, r"^seqlens_k: is -4 of sequence 2"),
        ({"cu_seqlens_q": lambda x: x + 1}, InvalidArgumentError, r"^cu_seqlens_q: begins with 1"),
        ({"cu_seqlens_q": lambda x: x[:-1]}, InvalidArgumentError, r"^cu_seqlens_q: has shape \(5,\)"),
        ({"k_cache": lambda x: x.half()}, ArgumentTypeError, r"^k_cache: has dtype float16, but q has float32"),
        ({"v_cache": lambda x: x[1:]}, InvalidArgumentError, r"^v_cache: has shape"),
        ({"k_cache": lambda x: x[..., :56]}, InvalidArgumentError, r"^k_cache: has head_dim 56, but q has 64"),
        ({"k_cache": lambda x: x[0]}, InvalidArgumentError, r"^k_cache: .* of rank 3, expected 4 dimensions"),
        ({"q": lambda x: x[:, :3]}, InvalidArgumentError, r"^k_cache: has 2 heads, expected a divisor of q's 3"),
        ({"q": lambda x: x.clone().requires_grad_()}, NotSupportedError, r"^q: a gradient is required"),
    ],
)
def test_wrong_calls(changes, error, says):
    given = tensors(CASE)
    out = torch.full_like(given["q"], 7.0)
    given |= {name: change(given[name]) for name, change in changes.items()}
    out = out[:, : given["q"].shape[1]]
    with pytest.raises(error, match=says):
        flash_attention_paged(**given, out=out)
    assert (out == 7).all()

"""``flash_attention_latent`` and its sibling for programs written for ``flash_mla``: results, what a token owes to
others, and wrong calls."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from schedules.builder.compile import lower, pattern_of
from schedules.builder.suite import KernelSpec
from schedules.families import cpu
from schedules.families.cpu.config import multiplication
from schedules.families.interface import Target
from tests import latent_trials
from tests.cpu_kernels import installed, make, runnable_isas
from tests.latent_cases import SCALE, Call
from tests.ragged_trials import own_case
from tvm_flash import (
    ArgumentTypeError,
    InvalidArgumentError,
    KernelNotFoundError,
    NotSupportedError,
    flash_attention_latent,
    flash_attention_paged,
)
from tvm_flash.nn import flash_mla_with_kvcache, get_mla_metadata
from tvm_flash.packs.manifest import BUILTIN_DEFINITION

pytestmark = pytest.mark.usefixtures("cpu_pack")

DTYPES = ("float32", "float16", "bfloat16")
ONE_KERNEL = ("window", "identity", "bfloat16", 576, 512)


@pytest.mark.parametrize("dtype", DTYPES)
def test_calls_against_float64(dtype):
    entry, _ = installed(dtype=dtype, kind="paged_latent")

    def compute(values, _):
        names = ("q", "k", "cu_seqlens_q", "seqlens_k", "page_table")
        window = (values["window_left"], values["window_right"])
        out, lse = flash_attention_latent(
            *(values[n] for n in names),
            head_dim_v=values["o"].shape[2],
            softmax_scale=values["softmax_scale"],
            window_size=window,
            return_lse=True,
            out=values["o"],
        )
        assert out is values["o"] and out.dtype == values["q"].dtype and lse.dtype == torch.float32
        values["lse"].copy_(lse.flatten())

    for label, problem in latent_trials.problems(entry, entry.params):
        try:
            problem.check(*problem.run(compute, "cpu"), "cpu")
        except AssertionError as e:
            raise AssertionError(f"{label}: {e}") from e


def test_rows_alone_where_bfloat16_is_multiplied_in_pairs():
    """A tile of latents has so few keys that the pairs of a row alone don't fill a vector.

    Where the best kernels here multiply them in another way, packs for other processors have it.
    """
    for isa in (x for x in runnable_isas() if multiplication(cpu.ISAS[x], "bfloat16") == "pairs"):
        spec, target = KernelSpec("v2", BUILTIN_DEFINITION, *ONE_KERNEL, kind="paged_latent"), Target("cpu", isa)
        made = lower(spec, pattern_of(spec, target), target).program
        (launch,), function = made.launches, make(isa, made)[made.launches[0].symbol]

        def compute(values, _, launch=launch, function=function):
            function(*(values[role] for role in launch.roles))

        for heads in (1, 2, 5):
            case = own_case(spec, pattern_of(spec, target).params, heads=heads, kv_heads=1)
            problem = latent_trials.Latent(case, ((1, 90), (1, 5), (3, 1100)), page_size=16)
            problem.check(*problem.run(compute, "cpu"), "cpu")


def test_causal_is_a_window():
    case = Call()
    assert all(map(torch.equal, case.attend(causal=True), case.attend(window_size=(-1, 0))))


def test_values_that_lie_beside_keys_give_the_same():
    """To rounding: kernels that take such have other tiles."""
    case = Call(head_dim=128, head_dim_v=64)
    given = case.tensors()
    cache = given.pop("kv_cache")
    want = flash_attention_paged(
        **given, k_cache=cache, v_cache=cache[..., :64].clone(), softmax_scale=SCALE, causal=True, return_lse=True
    )
    for x, y in zip(case.attend(causal=True), want, strict=True):
        torch.testing.assert_close(x, y, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_and_places_of_pages_change_no_bit(dtype):
    case = Call(dtype=dtype)
    whole = case.attend(causal=True)
    for other, seed in ((case, 1), (replace(case, page_size=16), 2), (replace(case, page_size=7), 3)):
        assert all(map(torch.equal, other.attend(seed, causal=True), whole))
    given = case.tensors()
    for b in (0, 2):
        rows = slice(given["cu_seqlens_q"][b], given["cu_seqlens_q"][b + 1])
        alone = {**given, "q": given["q"][rows], "cu_seqlens_q": torch.tensor([0, case.queries[b]]).int()}
        alone |= {"seqlens_k": given["seqlens_k"][b : b + 1], "page_table": given["page_table"][b : b + 1]}
        out, lse = flash_attention_latent(**alone, softmax_scale=SCALE, causal=True, return_lse=True)
        assert torch.equal(out, whole[0][rows]) and torch.equal(lse, whole[1][:, rows])


def test_where_gpus_split_keys_is_nothing_to_a_processor():
    case = Call()
    assert all(map(torch.equal, case.attend(split_length=64), case.attend()))


def test_results_are_written_where_they_are_asked_for():
    case = Call()
    given, (want, _) = case.tensors(), case.attend()
    out = torch.full_like(want, torch.nan)
    assert flash_attention_latent(**given, softmax_scale=SCALE, out=out) is out and torch.equal(out, want)
    arrays = {name: x.numpy() for name, x in given.items()}
    found = flash_attention_latent(**arrays, softmax_scale=SCALE)
    assert isinstance(found, np.ndarray) and np.array_equal(found, want.numpy())


def test_strides_of_a_cache():
    """Rows that lie in a wider cache, and pages with heads outside."""
    case = Call()
    given, want = case.tensors(), case.attend()
    cache = given["kv_cache"]
    wide = torch.full((*cache.shape[:3], 640), torch.nan)
    wide[..., :576] = cache
    turned = cache.transpose(1, 2).contiguous().transpose(1, 2)
    for x in (wide[..., :576], turned):
        found = flash_attention_latent(**{**given, "kv_cache": x}, softmax_scale=SCALE, return_lse=True)
        assert all(map(torch.equal, found, want))


def test_programs_see_an_operator():
    given = Call().tensors()

    def attend(**tensors):
        return flash_attention_latent(**tensors, softmax_scale=SCALE, causal=True, return_lse=True)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, compiled(**given), attend(**given)))
    operator = torch.ops.tvm_flash.attention_paged_latent.default
    given["kv_cache"] = torch.nan_to_num(given["kv_cache"])
    options = {"head_dim_v": 512, "softmax_scale": SCALE, "causal": True, "split_length": 64, "return_lse": True}
    torch.library.opcheck(operator, tuple(given.values()), options)
    meta = [x.to("meta") for x in given.values()]
    out, lse = operator(*meta, **options)
    assert out.shape == (7, 16, 512) and lse.shape == (16, 7)


def test_operations_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    case = Call()
    with FlopCounterMode(display=False) as counter:
        flash_mla_with_kvcache(torch.randn(5, 2, 16, 576), *cached(case), 512)
    assert counter.get_total_flops() == 2 * 2 * 16 * sum(case.keys) * (576 + 512)


def cached(case: Call) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cache, table and lengths as ``flash_mla`` takes them."""
    given = case.tensors()
    return given["kv_cache"], given["page_table"], given["seqlens_k"]


@pytest.mark.parametrize("causal", (False, True))
def test_the_arguments_of_flash_mla(causal):
    case = Call(queries=(2,) * 5)
    cache, table, lengths = cached(case)
    q = case.tensors()["q"].view(5, 2, 16, 576)
    metadata, splits = get_mla_metadata(lengths, 32, 1)
    assert (metadata, splits) == (None, None) and get_mla_metadata(lengths, 32, 1, split_length=64) == (64, None)
    out, lse = flash_mla_with_kvcache(q, cache, table, lengths, 512, metadata, splits, causal=causal)
    assert out.shape == (5, 2, 16, 512) and lse.shape == (5, 16, 2)
    want, of_rows = case.attend(softmax_scale=576**-0.5, causal=causal)
    assert torch.equal(out.flatten(0, 1), want) and torch.equal(lse.transpose(0, 1).flatten(1), of_rows)
    again = flash_mla_with_kvcache(q, cache[:, :, 0], table.long(), lengths.long(), softmax_scale=SCALE, causal=causal)
    assert torch.equal(again[0].flatten(0, 1), case.attend(causal=causal)[0])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"head_dim_v": 600}, InvalidArgumentError, "head_dim_v: is 600, expected 1 to 576"),
        ({"head_dim_v": 0}, InvalidArgumentError, "head_dim_v: is 0"),
        ({"head_dim_v": 12}, InvalidArgumentError, "head_dim_v: is 12, expected a multiple of 8"),
        ({"head_dim_v": 1.5}, ArgumentTypeError, "head_dim_v: is 1.5, expected a whole number"),
        ({"head_dim_v": True}, ArgumentTypeError, "head_dim_v: is True"),
        ({"softmax_scale": "1"}, ArgumentTypeError, "softmax_scale: is a str"),
        ({"kv_cache": torch.zeros(3, 64, 576)}, InvalidArgumentError, "of rank 3, expected 4 dimensions"),
        ({"kv_cache": torch.zeros(3, 64, 1, 512)}, InvalidArgumentError, "kv_cache: has head_dim 512, but q has 576"),
        ({"kv_cache": torch.zeros(3, 64, 3, 576)}, InvalidArgumentError, "kv_cache: has 3 heads, expected a divisor"),
        ({"kv_cache": torch.zeros(3, 64, 1, 576).half()}, ArgumentTypeError, "kv_cache: has dtype float16, but q has"),
        (
            {"kv_cache": torch.zeros(3, 64, 1, 576).to(torch.float8_e4m3fn)},
            ArgumentTypeError,
            "kv_cache: has dtype float8_e4m3fn, but q has float32",
        ),
        ({"seqlens_k": torch.tensor([1, 2])}, ArgumentTypeError, "seqlens_k: has dtype int64, expected int32"),
        ({"cu_seqlens_q": torch.tensor([0, 7]).int()}, InvalidArgumentError, "cu_seqlens_q: has shape"),
        ({"seqlens_k": torch.tensor([1 << 20] * 5).int()}, InvalidArgumentError, "seqlens_k: is 1048576 of sequence 0"),
        ({"page_table": torch.full((5, 4), -1).int()}, InvalidArgumentError, "page_table: has page -1"),
        ({"split_length": 96}, InvalidArgumentError, "split_length: is 96, expected a power of two from 64 to 1048576"),
        ({"split_length": 32}, InvalidArgumentError, "split_length: is 32"),
        ({"split_length": 64.0}, ArgumentTypeError, "split_length: is 64.0, expected a whole number or None"),
        ({"causal": "yes"}, ArgumentTypeError, "causal"),
        ({"max_seqlen_q": -1}, InvalidArgumentError, "max_seqlen_q"),
        ({"out": torch.zeros(7, 16, 576)}, InvalidArgumentError, "out: has shape"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_wrong_calls(change, error, words):
    with pytest.raises(error, match=words):
        flash_attention_latent(**{**Call().tensors(), "softmax_scale": SCALE, **change})


def test_jax_has_results_and_no_program():
    jax = pytest.importorskip("jax")
    given = {name: jax.numpy.asarray(x.numpy()) for name, x in Call().tensors().items()}
    found = flash_attention_latent(**given, softmax_scale=SCALE)
    assert np.array_equal(np.asarray(found), Call().attend()[0].numpy())
    with pytest.raises(NotSupportedError, match="kv_cache: are traced by JAX"):
        jax.jit(lambda given: flash_attention_latent(**given, softmax_scale=SCALE))(given)


def test_gradients_are_refused():
    given = Call().tensors()
    with pytest.raises(NotSupportedError, match="kv_cache: a gradient is required"):
        flash_attention_latent(**{**given, "kv_cache": given["kv_cache"].requires_grad_()}, softmax_scale=SCALE)


def test_rows_wider_than_any_kernel():
    case = Call(head_dim=640, head_dim_v=512)
    with pytest.raises(KernelNotFoundError, match="for head_dim 640:512"):
        case.attend()


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"is_fp8_kvcache": True}, NotSupportedError, "is_fp8_kvcache: is True"),
        ({"tile_scheduler_metadata": torch.zeros(4, 8)}, ArgumentTypeError, "^tile_scheduler_metadata: is tensor"),
        ({"block_table": torch.zeros(5)}, InvalidArgumentError, r"^block_table: has shape \(5,\)"),
        ({"cache_seqlens": torch.full((5,), 9999)}, InvalidArgumentError, "^cache_seqlens: is 9999"),
        ({"k_cache": torch.zeros(9, 64, 2)}, InvalidArgumentError, "^k_cache: has head_dim 2, but q has 576"),
        ({"indices": torch.zeros(1)}, NotSupportedError, "indices: is given"),
        ({"attn_sink": torch.zeros(16)}, NotSupportedError, "attn_sink: is given"),
        ({"q": torch.zeros(2, 16, 576)}, InvalidArgumentError, "q: has shape"),
        ({"q": np.zeros((5, 2, 16, 576))}, ArgumentTypeError, "q: is a ndarray"),
        ({"k_cache": torch.zeros(64, 576)}, InvalidArgumentError, "k_cache: has shape"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else None,
)
def test_wrong_calls_of_flash_mla(change, error, words):
    cache, table, lengths = cached(Call())
    given = {"q": torch.zeros(5, 2, 16, 576), "k_cache": cache, "block_table": table, "cache_seqlens": lengths}
    with pytest.raises(error, match=words):
        flash_mla_with_kvcache(**{**given, **change})

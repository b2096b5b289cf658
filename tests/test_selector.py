"""Which kernel is chosen, why, and what is said of the others: on manifests alone, for devices that needn't be here."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from tests import entries
from tvm_flash import BackendSelector, InvalidArgumentError, KernelNotFoundError, NotSupportedError, flash_attention
from tvm_flash.call.choice import choose, explain
from tvm_flash.call.problem import Problem
from tvm_flash.machine import cuda
from tvm_flash.machine.device import Device, default_device
from tvm_flash.packs.manifest import MANIFEST_NAME, Manifest, Param, Speed, Waves

WINDOW = (Param("window_left", "int32"), Param("window_right", "int32"))
GPU = Device("cuda", 0)


def kernel(template="v1", arch="sm_80", dtype="float16", head_dim=64, mask="window", score="identity", **more):
    symbol = f"{template}_{dtype}_d{head_dim}_{mask}_{score}"
    symbol += "".join(
        f"_{letter}{more[name]}" for letter, name in (("m", "block_m"), ("s", "bucket")) if more.get(name)
    )
    fields = {"head_dim_v": head_dim, "params": WINDOW if mask == "window" else (), **more}
    what = {"template": template, "arch": arch, "head_dim": head_dim, "mask": mask, "score": score}
    return entries.forward(symbol, dtype, **what, **fields)


@pytest.fixture
def packs(tmp_path, use_packs, monkeypatch):
    """A function that installs manifests of kernels, and a GPU of the given compute capability."""

    def install(*kernels, capability=(8, 0), multiprocessors=132):
        for arch in {k.arch for k in kernels}:
            folder = tmp_path / "packs" / arch
            folder.mkdir(parents=True)
            chosen = tuple(k for k in kernels if k.arch == arch)
            (folder / MANIFEST_NAME).write_text(Manifest(arch, {}, (), chosen).to_json())
        monkeypatch.setattr(cuda, "gpu", lambda index: cuda.Gpu(index, "Test GPU", capability, multiprocessors))
        monkeypatch.setattr(cuda, "device_count", lambda: 1)
        use_packs(tmp_path / "packs")

    default_device.cache_clear()
    yield install
    default_device.cache_clear()


def problem(**changes):
    sizes = {"batch": 2, "heads": 4, "kv_heads": 4, "seqlen_q": 100, "seqlen_kv": 100, "head_dim": 64, "head_dim_v": 64}
    return Problem(**{**sizes, "dtype": "float16", "layout": "bhsd", **changes})


@pytest.mark.parametrize(
    ("capability", "arch", "prefer", "template", "says"),
    [
        ((8, 0), "sm_80", "speed", "v2", "Ampere and later"),
        ((9, 0), "sm_90a", "speed", "v2", "Ampere and later"),
        ((7, 5), "sm_75", "speed", "v1", "Volta and Turing"),
        ((7, 0), "sm_70", "speed", "v1", "Volta and Turing"),
        ((8, 0), "sm_80", "compatibility", "v1", "compatibility"),
    ],
)
def test_the_policy_on_gpus(packs, capability, arch, prefer, template, says):
    packs(kernel("v1", arch), kernel("v2", arch), capability=capability)
    selected = BackendSelector(prefer=prefer).select_attention(batch=2, heads=8, seq_len=1024, head_dim=64)
    assert (selected.variant, selected.layout, selected.arch) == (template, "bhsd", arch)
    assert says in selected.reason


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (
            {"score": "optional_sinks"},
            r"^sinks: no sm_80 kernel .*--score optional_sinks`, or .*sigmoid\(lse - sinks\)$",
        ),
        ({"mask": "given"}, r"^visible: .*--mask given --score identity`, or use PyTorch's own function$"),
        ({"score": "biased"}, r"^bias: .*--mask full --score biased`, or use PyTorch's own function$"),
    ],
)
def test_what_few_kernels_know_names_a_build_and_what_does_the_same(packs, what, says):
    packs(kernel("v1", "sm_80"), kernel("v2", "sm_80"))
    with pytest.raises(NotSupportedError, match=says):
        choose(problem(**what), GPU, "auto")


@pytest.mark.parametrize(
    ("layout", "batch", "seq_len", "template"),
    [("bhsd", 2, 512, "v1"), ("bshd", 2, 512, "v2"), ("bhsd", 16, 4096, "v2"), ("bhsd", 16, 512, "v1")],
)
def test_the_policy_on_the_processor(packs, layout, batch, seq_len, template):
    packs(kernel("v1", "cpu", "float32"), kernel("v2", "cpu", "float32"))
    selected = BackendSelector("cpu").select_attention(batch, 8, seq_len, 64, layout=layout)
    assert (selected.variant, selected.layout) == (template, layout)


def speed(microseconds, seqlen=1024, device="Test GPU"):
    return Speed(device, 2, 8, seqlen, seqlen, 64, microseconds, 100.0 / microseconds, f"log#{microseconds:g}")


def measured_pair(packs, v1, v2):
    kernels = (kernel(t, "sm_90a", mask="full", speeds=speeds) for t, speeds in (("v1", v1), ("v2", v2)))
    packs(*kernels, kernel("v1", "sm_90a"), capability=(9, 0))
    return BackendSelector()


def test_measured_speeds_choose_the_template_by_length(packs):
    selector = measured_pair(packs, (speed(10, 512), speed(40, 4096)), (speed(12, 512), speed(30, 4096)))
    short, long = (selector.select_attention(2, 8, s, 64) for s in (600, 3000))
    assert (short.variant, long.variant) == ("v1", "v2")
    assert short.reason == (
        "measured on Test GPU: V2 12.0, V1 10.0 µs, 10 TFLOP/s at batch 2, heads 8, seq 512, head_dim 64 (log#10)"
    )
    assert "V1 40.0, V2 30.0 µs" in long.reason


@pytest.mark.parametrize(
    ("v1", "v2"),
    [
        ((speed(10.0),), (speed(10.1),)),  # a tie
        ((speed(10.0),), ()),  # the other wasn't measured
        ((speed(10.0),), (speed(20.0, 2048),)),  # not on the same problem
        ((speed(10.0, device="Other GPU"),), (speed(20.0, device="Other GPU"),)),
        ((speed(10.0, 16384),), (speed(20.0, 16384),)),  # too far from the problem
    ],
)
def test_without_a_clear_measurement_the_table_decides(packs, v1, v2):
    selected = measured_pair(packs, v1, v2).select_attention(2, 8, 1024, 64)
    assert (selected.variant, selected.reason) == ("v2", "V2 is made for Ampere and later")


def test_what_is_asked_for_is_not_measured_away(packs):
    measured_pair(packs, (speed(10.0),), (speed(20.0),))
    assert choose(problem(seqlen_kv=1024, seqlen_q=1024), GPU, "v2").kernel.entry.template == "v2"
    chosen = BackendSelector(prefer="compatibility").select_attention(2, 8, 1024, 64)
    assert "compatibility" in chosen.reason


def test_explain_shows_the_record_or_the_command(packs):
    selector = measured_pair(packs, (speed(10.0),), (speed(20.0),))
    text = str(selector.explain(2, 8, 1024, 64))
    assert "measured: 10.0 µs, 10 TFLOP/s at batch 2, heads 8, seq 1024, head_dim 64 (log#10)" in text
    assert "configuration: default" in text
    text = str(selector.explain(2, 8, 100000, 64, causal=True))
    assert 'never on Test GPU; scripts/tune.py --arch sm_90a --problem "b=2 h=8 s=100000 d=64 causal float16"' in text


def test_sizes_that_kernels_cannot_count_are_refused_before_there_are_tensors(packs):
    """As the call refuses them: strides of 32 heads of a million positions need more than 32 bits."""
    packs(kernel("v2", head_dim=128, mask="full"), kernel("v1", head_dim=128, mask="full"))
    selector = BackendSelector()
    assert selector.explain(1, 8, 2**20, 128).chosen
    with pytest.raises(NotSupportedError, match="more than 32 bits"):
        selector.select_attention(1, 32, 2**20, 128)
    found = selector.explain(1, 32, 2**20, 128)
    assert found.chosen is None and "more than 32 bits" in found.reason
    assert {r.reason for r in found.rejected} == {"counts in 32 bits, and a size or stride needs more"}
    packs(kernel("v2", "cpu", "float32", head_dim=128, mask="full", index_bits=64))
    assert BackendSelector("cpu").explain(1, 32, 2**20, 128).chosen


def test_a_selected_kernel_is_pickled(cpu_pack):
    selected = BackendSelector("cpu").select_attention(1, 2, 8, 64)
    again = pickle.loads(pickle.dumps(selected))
    x = np.ones((1, 2, 8, 64), np.float32)
    assert again == selected and np.array_equal(again(x, x, x), selected(x, x, x))


def test_ragged_and_paged_are_two_questions(packs):
    packs(kernel())
    with pytest.raises(InvalidArgumentError, match=r"^ragged: is True beside paged"):
        BackendSelector().explain(2, 4, 100, 64, ragged=True, paged=True)


@pytest.mark.parametrize(("variant", "there"), [("v2", "v1"), ("v1", "v2")])
def test_a_template_that_is_not_there_is_stood_in_for(packs, variant, there):
    packs(kernel(there, "sm_75"), capability=(7, 5))
    choice = choose(problem(), GPU, variant)
    assert choice.kernel.entry.template == there
    assert f"no {variant.upper()} kernel fits (none is installed)" in choice.reason


def test_the_closest_arch(packs):
    packs(kernel(arch="sm_80"), kernel(arch="sm_86"), kernel(arch="sm_90a"), capability=(8, 9))
    choice = choose(problem(), GPU, "v1")
    assert choice.kernel.entry.arch == "sm_86" and "sm_86 code runs on sm_89" in choice.reason


def test_the_smallest_head_dim_that_fits(packs):
    packs(*(kernel(head_dim=d) for d in (256, 64, 128)), kernel(head_dim=96, head_dim_v=64))
    for (qk, v), symbol in {(8, 8): 64, (64, 64): 64, (72, 64): 96, (72, 72): 128, (200, 8): 256}.items():
        entry = choose(problem(head_dim=qk, head_dim_v=v), GPU, "v1").kernel.entry
        assert entry.head_dim == symbol


def test_the_cheapest_mask(packs):
    packs(kernel(mask="full"), kernel(mask="window"))
    for kind, chosen in (("full", "full"), ("causal", "window"), ("window", "window")):
        choice = choose(problem(mask=kind), GPU, "v1")
        assert choice.kernel.entry.mask == chosen
    assert "the mask window stands in for causal" in choose(problem(mask="causal"), GPU, "v1").reason


def test_the_largest_bucket_that_is_reached(packs):
    packs(kernel(), kernel(bucket=1024), kernel(bucket=8192))
    for seqlen_kv, bucket in ((1, 0), (1023, 0), (1024, 1024), (8191, 1024), (10**6, 8192)):
        assert choose(problem(seqlen_kv=seqlen_kv), GPU, "v1").kernel.entry.bucket == bucket


def test_a_kernel_of_longer_sequences_that_is_meant_for_so_many_heads(packs):
    packs(kernel(), kernel(bucket=1024, meant_for=("steps", ("*", "heads", "seqlen_kv"), (0, 0), (8192, 1))))
    for heads, seqlen_kv, bucket in ((2, 1023, 0), (2, 4095, 0), (2, 4096, 1024), (8, 1023, 0), (8, 1024, 1024)):
        changes = {"heads": heads, "kv_heads": heads, "seqlen_kv": seqlen_kv}
        assert choose(problem(**changes), GPU, "v1").kernel.entry.bucket == bucket
        assert choose(problem(batch=64, **changes), GPU, "v1").kernel.entry.bucket == bucket
    said = explain(problem(heads=2, kv_heads=2, seqlen_kv=4000), GPU, "v1")
    assert "fits, but with 2 heads on 4000 keys there is a faster one" in str(said)


def test_a_kernel_that_is_meant_for_others_is_better_than_none(packs):
    packs(kernel(bucket=1024, meant_for=("steps", "heads", (0, 0), (8, 1))))
    assert choose(problem(seqlen_kv=2000), GPU, "v1").kernel.entry.bucket == 1024


def heights(**more):
    """Kernels whose work tiles have 256 rows, or 192: a wave of the latter takes 0.8 as long."""
    usual, other = (Waves(m, 64, 9, ((n, n),), "test.jsonl#0") for m, n in ((256, 10**6), (192, 8 * 10**5)))
    return kernel(mask="full", waves=usual), kernel(mask="full", block_m=192, **{"waves": other, **more})


@pytest.mark.parametrize(
    ("batch", "heads", "seqlen", "block_m"),
    [
        (2, 20, 1024, 192),  # two waves of either
        (33, 4, 1024, 0),  # 4 full waves, or 6
        (33, 4, 192, 192),
        (33, 4, 256, 0),
        (1, 1, 192, 192),
    ],
)
def test_the_height_of_tiles_whose_waves_take_the_least_time(packs, batch, heads, seqlen, block_m):
    packs(*heights())
    shape = {"batch": batch, "heads": heads, "kv_heads": heads, "seqlen_q": seqlen, "seqlen_kv": seqlen}
    assert choose(problem(**shape), GPU, "v1").kernel.entry.block_m == block_m
    found = explain(problem(**shape), GPU, "v1")
    assert "rows a tile take" in found.rejected[0].reason and "µs where by their waves" in found.rejected[0].reason


def test_the_usual_height_of_tiles_where_waves_say_nothing(packs):
    short = {"batch": 2, "heads": 20, "seqlen_q": 1024, "seqlen_kv": 1024}
    packs(*heights())
    assert choose(problem(**short, kv_heads=4), GPU, "v1").kernel.entry.block_m == 0  # a tile may pack heads


@pytest.mark.parametrize("known", [{"waves": None}, {"multiprocessors": 0}], ids=str)
def test_the_usual_height_of_tiles_where_nothing_was_measured(packs, known):
    device = {"multiprocessors": known.pop("multiprocessors", 132)}
    packs(*heights(**known), **device)
    found = explain(problem(batch=2, heads=20, kv_heads=20, seqlen_q=1024, seqlen_kv=1024), GPU, "v1")
    assert found.chosen.block_m == 0 and "never taken where waves weren't measured" in found.rejected[0].reason


def test_misaligned_data_gets_the_kernel_that_can(packs):
    packs(kernel("v2", alignment=16), kernel("v1", alignment=2))
    assert choose(problem(alignment=16), GPU, "auto").kernel.entry.template == "v2"
    choice = choose(problem(alignment=8), GPU, "auto")
    assert choice.kernel.entry.template == "v1"
    assert "needs data and strides at multiples of 16 bytes, not 8" in choice.reason
    with pytest.raises(InvalidArgumentError, match=r"q, k, v, out: .*multiple of 1 bytes only.*needs \d+; copy"):
        choose(problem(alignment=1), GPU, "auto")


@pytest.mark.parametrize(("head_dim", "mends"), [(40, r"cache\[\.\.\., :40\] of a cache with room"), (64, "clone")])
def test_the_remedy_for_a_misaligned_cache_of_8_bits_mends_it(packs, head_dim, mends):
    packs(kernel("v2", mask="full", kind="paged_int8", alignment=16))
    of = {"op": "paged_scaled", "cache_dtype": "int8", "head_dim": head_dim, "head_dim_v": head_dim}
    with pytest.raises(InvalidArgumentError, match=f"multiple of 8 bytes only.*{mends}"):
        choose(problem(layout="shd", alignment=8, page_size=16, pages=9, pages_per_sequence=4, **of), GPU, "auto")


_LATENT = {"op": "paged_latent", "layout": "shd", "head_dim": 576, "head_dim_v": 512, "heads": 128, "kv_heads": 1}
_LATENT |= {"page_size": 64, "pages": 9, "pages_per_sequence": 4, "longest": 1}


def test_kernels_with_values_in_keys_are_for_those_alone(packs):
    latent = kernel("v2", mask="window", kind="paged_latent", head_dim=576, head_dim_v=512, max_rows=1024)
    packs(latent, kernel("v2", mask="window", kind="paged", head_dim=576, head_dim_v=512))
    assert choose(problem(**_LATENT), GPU, "auto").kernel.entry.kind == "paged_latent"
    assert choose(problem(**_LATENT | {"op": "paged"}), GPU, "auto").kernel.entry.kind == "paged"
    with pytest.raises(KernelNotFoundError, match=r"is for 1024 query rows a key or fewer, not 1152"):
        choose(problem(**_LATENT | {"seqlen_q": 9, "longest": 9}), GPU, "auto")


def test_where_there_are_no_kernels_with_values_in_keys_something_else_will_do(packs):
    packs(kernel("v2", mask="window", kind="paged"))
    with pytest.raises(
        KernelNotFoundError, match=r"--kind paged_latent --head-dim 576:512 .*or attend by flash_attent"
    ):
        choose(problem(**_LATENT), GPU, "auto")


def test_large_strides_get_the_kernel_that_can(packs):
    packs(kernel("v2"), kernel("v1", index_bits=64))
    assert choose(problem(index_bits=64), GPU, "auto").kernel.entry.template == "v1"


def test_sizes_beyond_32_bits(packs):
    packs(kernel("v2"), kernel("v1"))
    with pytest.raises(NotSupportedError, match=r"needs more than 32 bits.*split the batch"):
        choose(problem(index_bits=64), GPU, "auto")


def test_more_blocks_than_an_axis_of_the_grid_has_room_for(packs):
    packs(kernel("v2", narrow_axes=(("ceildiv", "seqlen_q", 128),)), kernel("v1", narrow_axes=("heads", "batch")))
    choice = choose(problem(batch=65536), GPU, "v1")
    assert choice.kernel.entry.template == "v2"
    assert "would launch 65536 blocks along an axis of the grid that has room for 65535" in choice.reason
    assert choose(problem(batch=65535), GPU, "v1").kernel.entry.template == "v1"
    with pytest.raises(NotSupportedError, match=r"q, k, v, out: .*would launch 65537 blocks.*split the batch"):
        choose(problem(batch=65536, seqlen_q=65536 * 128 + 1), GPU, "auto")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"dtype": "bfloat16"},
            "no sm_89 kernel for bfloat16; run `python -m tvm_flash build --arch sm_89 --dtype bfloat16`",
        ),
        ({"head_dim": 160, "head_dim_v": 160}, "no sm_89 kernel for head_dim 160 (the largest takes 64:64)"),
        ({"head_dim": 160, "head_dim_v": 160}, "run `python -m tvm_flash build --arch sm_89 --head-dim 160`"),
        ({"head_dim_v": 128}, "--arch sm_89 --head-dim 64:128`"),
        ({"score": "softcap"}, "no sm_89 kernel for the score softcap; run `python -m tvm_flash build --arch sm_89"),
        ({"mask": "window"}, "no sm_89 kernel for the mask window; run `python -m tvm_flash build --arch sm_89"),
        ({"definition": "mine", "mask": "", "score": ""}, "no sm_89 kernel of the definition 'mine'"),
        ({"definition": "mine", "mask": "", "score": ""}, "--definition <file.py>:mine --dtype float16`"),
    ],
)
def test_what_is_missing_and_the_command_that_makes_it(packs, changes, says):
    packs(kernel(arch="sm_89", mask="full"), capability=(8, 9))
    with pytest.raises(KernelNotFoundError) as e:
        choose(problem(**changes), GPU, "auto")
    assert says in str(e.value)


def test_a_size_that_a_definition_was_not_built_for_is_named_with_the_command(packs):
    packs(kernel(arch="sm_89", definition="mine", mask="mine", score="mine", head_dim=128), capability=(8, 9))
    with pytest.raises(KernelNotFoundError) as e:
        choose(problem(definition="mine", mask="", score="", head_dim=256, head_dim_v=256), GPU, "auto")
    assert "no sm_89 kernel for head_dim 256 (the largest takes 128:128)" in str(e.value)
    assert "`python -m tvm_flash build --arch sm_89 --definition <file.py>:mine --head-dim 256`" in str(e.value)


def test_explain_accounts_for_every_kernel(packs):
    kernels = [
        kernel("v2", mask="full"),
        kernel("v2", mask="window"),
        kernel("v2", mask="full", head_dim=128),
        kernel("v1", mask="full"),
        kernel("v2", mask="causal"),
        kernel("v2", score="softcap"),
        kernel("v2", head_dim=32),
        kernel("v2", bucket=4096),
        kernel("v2", dtype="bfloat16"),
    ]
    packs(*kernels)
    explanation = explain(problem(), GPU, "auto")
    assert explanation.chosen == kernels[0]
    assert explanation.others == 1
    reasons = {r.kernel.symbol: r.reason for r in explanation.rejected}
    assert reasons == {
        kernels[1].symbol: "fits, but the mask full is cheaper",
        kernels[2].symbol: "fits, but its head_dim 128 is larger than needed",
        kernels[3].symbol: "fits, but V2 is preferred",
        kernels[4].symbol: "computes the mask causal, which can't stand in for full",
        kernels[5].symbol: "computes the score softcap, not identity",
        kernels[6].symbol: "takes head_dim up to 32, not 64",
        kernels[7].symbol: "is for 4096 keys or more, not 100",
    }
    page = str(explanation)
    assert page.count("\n") == 11 and "✓ v2_float16_d64_full_identity [sm_80]" in page and "Test GPU" in page


def test_explain_says_why_nothing_fits(packs):
    packs(kernel())
    explanation = BackendSelector().explain(2, 4, 100, 512)
    assert explanation.chosen is None and "--head-dim 512" in str(explanation)


def test_dtypes_of_every_kind(packs):
    torch = pytest.importorskip("torch")
    packs(kernel(), kernel(dtype="bfloat16"))
    for dtype, name in (
        *((None, "float16"), ("bfloat16", "bfloat16"), (torch.bfloat16, "bfloat16")),
        *((np.float16, "float16"), (np.dtype("float16"), "float16"), ("torch.float16", "float16")),
    ):
        assert BackendSelector().explain(2, 4, 100, 64, dtype=dtype).problem.dtype == name


@pytest.mark.parametrize("device", (None, "cuda", "cuda:0", 0))
def test_devices_of_every_kind(packs, device):
    packs(kernel())
    assert BackendSelector(device).device == GPU


def test_torch_devices(packs):
    torch = pytest.importorskip("torch")
    packs(kernel())
    assert BackendSelector(torch.device("cuda", 0)).device == GPU
    assert BackendSelector(torch.device("cpu")).device == Device("cpu")


@pytest.mark.parametrize("layout", ("bhsd", "bshd"))
def test_a_selected_kernel_is_called_like_flash_attention(cpu_pack, layout):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 4, n, 64), np.float32) for n in (33, 70, 70))
    slopes = rng.random(4, np.float32)
    options = {"causal": True, "softcap": 3.0, "alibi_slopes": slopes, "return_lse": True, "softmax_scale": 0.1}
    want, want_lse = flash_attention(q, k, v, **options)
    selected = BackendSelector("cpu").select_attention(2, 4, 33, 64, seq_len_kv=70, causal=True, layout=layout)
    swap = (lambda x: x) if layout == "bhsd" else (lambda x: x.swapaxes(1, 2))
    out, lse = selected(*map(swap, (q, k, v)), **options)
    np.testing.assert_allclose(swap(out), want, atol=1e-6)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


def test_a_kernel_selected_for_another_device_refuses(cpu_pack):
    selected = BackendSelector("cpu").select_attention(1, 2, 9, 64)
    elsewhere = dataclasses.replace(selected, arch="sm_80", device=GPU)
    x = np.zeros((1, 2, 9, 64), np.float32)
    with pytest.raises(InvalidArgumentError, match=r"^q: is on cpu, .* selected for cuda:0; move"):
        elsewhere(x, x, x)
    assert selected(x, x, x).shape == x.shape


def decode_kernel(**more):
    """Splits the keys: for up to 4 rows from 512 keys on, up to 16 from 2048."""
    most = ("steps", "seqlen_kv", (0, 0), (512, 4), (2048, 16))
    made = kernel("v2", "sm_90a", kind="decode", max_rows=most, **more)
    (launch,) = made.launches
    return dataclasses.replace(made, symbol=f"{made.symbol}_decode", launches=(launch, launch))


@pytest.mark.parametrize(
    ("rows", "keys", "says"),
    [
        (1, 511, "is for longer sequences, at 511 keys"),
        (4, 512, ""),
        (5, 2047, "is for 4 query rows a key or fewer, not 5, at 2047 keys"),
        (16, 2048, ""),
        (17, 9000, "is for 16 query rows a key or fewer, not 17, at 9000 keys"),
    ],
)
def test_few_rows_take_the_kernel_that_splits_the_keys(packs, rows, keys, says):
    packs(kernel("v2", "sm_90a", mask="full"), decode_kernel(), capability=(9, 0))
    found = {
        explain(problem(seqlen_q=rows, seqlen_kv=keys, batch=batch), GPU, "auto").chosen.symbol for batch in (1, 4, 999)
    }
    assert found == {"v2_float16_d64_full_identity" if says else "v2_float16_d64_window_identity_decode"}
    text = str(explain(problem(seqlen_q=rows, seqlen_kv=keys), GPU, "auto"))
    assert (says or f"it splits the keys among blocks, for {rows} query rows a key") in text
    grouped = explain(problem(seqlen_q=1, heads=4 * rows, seqlen_kv=keys), GPU, "auto").chosen
    assert (grouped.kind == "decode") == (not says)


def test_a_larger_head_dim_is_better_than_a_dearer_mask_where_keys_are_split(packs):
    larger = decode_kernel(head_dim=256, head_dim_v=256)
    packs(decode_kernel(mask="positioned"), larger, capability=(9, 0))
    found = explain(problem(seqlen_q=1, seqlen_kv=9000), GPU, "auto")
    assert found.chosen.symbol == larger.symbol
    assert "fits, but the mask window is cheaper" in str(found)


def test_a_program_that_can_run_one_launch_takes_a_kernel_of_one(packs):
    packs(kernel("v2", "sm_90a", mask="full"), decode_kernel(), capability=(9, 0))
    found = explain(problem(seqlen_q=1, seqlen_kv=9000, workspaces=False), GPU, "auto")
    assert found.chosen.symbol == "v2_float16_d64_full_identity"
    assert "needs several launches or a workspace" in str(found)


@pytest.mark.parametrize(("page_size", "kind"), [(16, "paged_decode"), (24, "paged_decode_any")])
def test_a_kernel_for_pages_of_some_sizes_comes_before_one_for_any(packs, page_size, kind):
    rows = ("steps", "seqlen_kv", (0, 64))
    boxes = ("*", ("steps", "page_size", (0, 1), (17, 0)), rows)
    kernels = [
        kernel("v2", "sm_90a", head_dim=128, kind="paged_decode_any", max_rows=rows),
        kernel("v2", "sm_90a", head_dim=128, kind="paged_decode", max_rows=boxes),
    ]
    kernels = [dataclasses.replace(k, symbol=k.kind) for k in kernels]
    packs(*kernels, capability=(9, 0))
    of = {"op": "paged", "head_dim": 128, "head_dim_v": 128, "seqlen_q": 2, "longest": 1, "mask": "causal"}
    asked = problem(**of, pages=100, page_size=page_size, pages_per_sequence=40)
    explanation = explain(asked, GPU, "auto")
    assert explanation.chosen.kind == kind
    (other,) = explanation.rejected
    assert other.reason.startswith("fits, but there is a kernel for pages" if page_size == 16 else "is for longer")


@pytest.mark.parametrize(
    ("longest", "kinds"), [(1, {"paged_decode"}), (400, {"paged"}), (None, {"paged", "paged_decode"})]
)
def test_the_queries_of_others_say_nothing_of_the_kernel_where_the_longest_is_told(packs, longest, kinds):
    packs(
        kernel("v2", "sm_90a", head_dim=128, kind="paged"),
        kernel("v2", "sm_90a", head_dim=128, kind="paged_decode", max_rows=64),
        capability=(9, 0),
    )
    found = set()
    for total in (1, 7, 300, 100_000):
        of = {"op": "paged", "head_dim": 128, "head_dim_v": 128, "seqlen_q": total, "longest": longest}
        found.add(explain(problem(**of, pages=100, page_size=16, pages_per_sequence=40), GPU, "auto").chosen.kind)
    assert found == kinds


def test_what_keys_on_pages_get(cpu_pack):
    found = BackendSelector("cpu").explain(8, 32, 1, 128, kv_heads=8, seq_len_kv=4096, causal=True, paged=True)
    assert found.chosen.kind == "paged" and "stands in for causal" in found.reason
    with pytest.raises(InvalidArgumentError, match=r"^backward: is True"):
        BackendSelector("cpu").explain(8, 32, 1, 128, paged=True, backward=True)

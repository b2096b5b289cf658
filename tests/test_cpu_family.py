"""The CPU family against float64: every case, both templates, every instruction set that this machine can run."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import tvm
from tvm import tirx
from tvm.script import tirx as T

from schedules.builder.compile import Lowered, lower, pattern_of
from schedules.builder.suite import CPU_VARIANTS, KernelSpec
from schedules.definition.attention import Attention
from schedules.definition.catalogue import MASKS, SCORES
from schedules.definition.pattern import match
from schedules.families import cpu
from schedules.families.cpu import vector_math
from schedules.families.interface import BACKWARD, FORWARD, Rejected, Target
from schedules.toolchain.machine import best_isa
from tests import cases, forward_trials, torch_cases
from tests.cases import CASES, Case
from tests.cpu_kernels import TEMPLATES, compile_for, installed, make, others, runnable_isas
from tests.pairs import ALL_PAIRS
from tvm_flash import numerics
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, LAYOUT_OF_TEMPLATE


@functools.cache
def kernel(template: str, dtype: str, mask: str, score: str, isa: str, head_dim: int = 64):
    """A kernel's function and parameters: the pack's, if that was made of the present sources, else one made here."""
    spec, target = KernelSpec(template, BUILTIN_DEFINITION, mask, score, dtype, head_dim, head_dim), Target("cpu", isa)
    pattern = match(Attention(SCORES[score], MASKS[mask])(head_dim, dtype, index_dtype=cpu.INDEX_DTYPE))
    lowered = lower(spec, pattern, target)
    assert isinstance(lowered, Lowered), lowered
    found = installed(symbol=spec.symbol, source_hash=lowered.source_hash)
    module = found[1] if found else make(isa, lowered.program)
    return module[spec.symbol], pattern.params


def run(case: Case, data: cases.Inputs, template: str, isa: str, lse_length: int | None = None, variant=None):
    """Output and lse of the kernel, the case's own or that of a ``variant``; see :func:`tests.torch_cases.run`."""
    mask, score = variant or (case.mask, case.score)
    function, params = kernel(template, case.dtype, mask, score, isa)
    data = replace(data, params={**forward_trials.as_own(mask, score, case), **data.params})
    return torch_cases.run(case, data, torch_cases.by_abi(function, params), LAYOUT_OF_TEMPLATE[template], lse_length)


def check(case: Case, data: cases.Inputs, template: str, isa: str):
    torch_cases.check(case, data, *run(case, data, template, isa))


#: Kernels of the cases that aren't built unless they are asked for: most of the time goes into making them here.
ASKED_FOR = sorted({(c.mask, c.score) for c in CASES} - set(CPU_VARIANTS))
#: The kernel of the pack that has everything.
ALL_IN_ONE = ("positioned", "optional_sinks")


def kernels_of(case: Case) -> list[tuple[str, tuple[str, str]]]:
    """Template and variant of the kernels that compute a case: those of its own kind, of both templates.

    Of a kind that has to be made here one is, of one template and in one dtype, which are others for other kinds: the
    pack's kernel for everything computes the case in the other dtypes, if it can.
    """
    own = case.mask, case.score
    if ALL_PAIRS or own not in ASKED_FOR:
        return [(template, own) for template in TEMPLATES]
    number = ASKED_FOR.index(own) + cpu.DTYPES.index(case.dtype)
    stands_in = number % len(cpu.DTYPES) and forward_trials.as_own(*ALL_IN_ONE, case) is not None
    return [(list(TEMPLATES)[number % len(TEMPLATES)], ALL_IN_ONE if stands_in else own)]


@pytest.mark.parametrize(
    ("case", "template", "variant"),
    [(case, *kernel) for case in CASES for kernel in kernels_of(case)],
    ids=lambda x: x.id if isinstance(x, Case) else x if isinstance(x, str) else "-".join(x),
)
def test_against_float64(case, template, variant):
    data, isa = cases.inputs(case), runnable_isas()[0]
    torch_cases.check(case, data, *run(case, data, template, isa, variant=variant))


@pytest.mark.parametrize(("dtype", "isa"), [(dtype, isa) for dtype in cpu.DTYPES for isa in others(dtype)])
def test_every_isa(dtype, isa):
    """Scores are float32 in all dtypes: modified ones are tried in one, bfloat16 where that has products of its own."""
    modified = "float32" if cpu.ISAS[isa].bfloat16 == "floats" else "bfloat16"
    kinds = [("causal", "identity"), *([("window", "softcap")] if dtype == modified else [])]
    for case in CASES:
        if case.dtype == dtype and (case.mask, case.score) in kinds:
            check(case, cases.inputs(case), "v1", isa)


@pytest.mark.parametrize("dtype", ("float32", "float16"))
def test_what_is_for_bfloat16_alone_changes_nothing_of_other_dtypes(dtype, tmp_path):
    """Compiled only: kernels for AMX are those for AVX-512 alone, in float32 the code of a causal one byte by byte."""
    same = ("amx", "avx512_bf16", "avx512")
    for mask, score, kind in (
        ("causal", "identity", FORWARD),
        ("window", "softcap", FORWARD),
        ("given", "identity", BACKWARD),
    ):
        spec = KernelSpec("v1", BUILTIN_DEFINITION, mask, score, dtype, 64, 64, kind=kind)
        made = [lower(spec, pattern_of(spec, target), target) for target in (Target("cpu", isa) for isa in same)]
        assert len({lowered.text for lowered in made}) == 1
        if (mask, dtype) == ("causal", "float32"):
            for isa, lowered in zip(same, made, strict=True):
                compile_for(isa, lowered.program).mod.write_to_file(str(tmp_path / isa), "o")
            assert len({(tmp_path / isa).read_bytes() for isa in same}) == 1


#: What the assembly of a causal bfloat16 kernel must hold, and what would be illegal where there is no more than that.
INSTRUCTIONS = {
    "amx": (r"\tsttilecfg[^#]*\tldtilecfg(.|\n)*\ttdpbf16ps\t.*%tmm(.|\n)*\tldtilecfg", r"\ttilerelease"),
    "avx512_bf16": (r"\tvdpbf16ps\t.*%zmm", r"\tt(dp|ile)"),
    "avx512": (r"\tvfmadd\w+ps\t.*%zmm", r"\tt(dp|ile)|\tvdpbf16|\tvcvtneps2bf16"),
    "avx2": (r"\tvfmadd\w+ps\t.*%ymm", r"%zmm|%[xy]mm(1[6-9]|[23]\d)|%k[0-7]\b|\{%k|\tvdp"),
    "baseline": (
        r"\tmulps\t.*%xmm",
        r"\tv[a-z]+\w*\t|%ymm|%zmm|\t(andn[lq]|bextr|blsr|mulx|rorx|sarx|shlx|shrx|lzcnt|tzcnt)",
    ),
}


@pytest.mark.parametrize("isa", cpu.ISAS)
def test_instructions(isa):
    """Compiled only: also for machines that are not this one."""
    program = TEMPLATES["v1"].apply(
        match(Attention(mask=MASKS["causal"])(64, "bfloat16", index_dtype="int64")), Target("cpu", isa), "f"
    )
    text = compile_for(isa, program).mod.inspect_source("asm")
    wanted, illegal = INSTRUCTIONS[isa]
    assert re.search(wanted, text)
    found = re.search(illegal, text)
    assert not found, f"{isa}: {text[found.start() : found.end() + 40]!r}"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_repeats_are_bit_equal(dtype, template):
    case = Case(2, 3, 200, 64, seqlen_kv=333, dtype=dtype, mask="causal")
    data = cases.inputs(case)
    first = run(case, data, template, runnable_isas()[0])
    for _ in range(5):
        for a, b in zip(first, run(case, data, template, runnable_isas()[0]), strict=True):
            assert np.array_equal(a, b, equal_nan=True)


@pytest.mark.parametrize("head_dim", (8, 24, 40, 64))
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_rows_that_are_apart_give_the_same_bits(dtype, head_dim):
    """Two groups of queries and more have the keys brought together; narrow rows are no whole block to transpose."""
    case = Case(2, 3, 150, head_dim, seqlen_kv=133, dtype=dtype, mask="causal")
    data = cases.inputs(case)
    together = run(case, data, "v1", runnable_isas()[0])
    torch_cases.check(case, data, *together)
    apart = run(replace(case, strides="transposed"), data, "v1", runnable_isas()[0])
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(together, apart, strict=True))


@pytest.mark.parametrize("seqlen_q", (1, 80))
@pytest.mark.parametrize("dtype", cpu.DTYPES)
@pytest.mark.parametrize("magnitude", (1e4, 1e-4))
def test_scores_of_any_size(magnitude, dtype, seqlen_q):
    case = Case(1, 2, seqlen_q, 64, seqlen_kv=150, dtype=dtype, mask="causal")
    data = cases.inputs(case)
    factor = np.sqrt(magnitude)
    data = replace(data, q=numerics.round_to(data.q * factor, dtype), k=numerics.round_to(data.k * factor, dtype))
    check(case, data, "v1", runnable_isas()[0])


@pytest.mark.parametrize("seqlen_q", (1, 40))
def test_large_scores_weigh_early_and_late_tiles_alike(seqlen_q):
    """The same key again and again: the output is the mean of the values, whatever the score's size."""
    case = Case(1, 1, seqlen_q, 64, seqlen_kv=2048)
    data = cases.inputs(case)
    q, k = np.full_like(data.q, 12.34), np.full_like(data.k, 123.4)
    check(case, replace(data, q=q, k=k), "v1", runnable_isas()[0])


@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_rows_with_very_negative_scores(dtype):
    case = Case(1, 1, 70, 64, seqlen_kv=90, dtype=dtype)
    data = cases.inputs(case)
    k = np.abs(data.k) * 30
    check(
        case,
        replace(data, q=numerics.round_to(-np.abs(data.q) * 30, dtype), k=numerics.round_to(k, dtype)),
        "v1",
        runnable_isas()[0],
    )


@pytest.mark.parametrize("seqlen_q", (3, 100))
@pytest.mark.parametrize("bad", (np.inf, -np.inf, np.nan))
@pytest.mark.parametrize("tensor_name", ("q", "k", "v"))
@pytest.mark.parametrize("dtype", cpu.DTYPES)
def test_inf_and_nan_stay_in_the_rows_that_see_them(dtype, tensor_name, bad, seqlen_q):
    case = Case(1, 2, seqlen_q, 64, seqlen_kv=100, dtype=dtype, mask="causal")
    data = cases.inputs(case)
    position = {"q": seqlen_q // 2, "k": 98, "v": 98}[tensor_name]
    poisoned = {n: getattr(data, n).copy() for n in "qkv"}
    poisoned[tensor_name][0, 0, position, 7] = bad
    data = cases.Inputs(**poisoned, params={})
    expected, expected_lse = cases.expected(case, data)
    out, lse = run(case, data, "v1", runnable_isas()[0])
    clean = np.isfinite(expected)
    assert np.isfinite(out[clean]).all()
    assert np.abs(out[clean] - expected[clean]).max() <= 32 * numerics.EPSILON[dtype]
    if tensor_name != "v" and not np.isfinite(expected).all():
        assert np.isnan(out[~clean]).any()
    assert np.isfinite(lse[np.isfinite(expected_lse)]).all()


@pytest.mark.parametrize("length", (1, 2 * 3 * 40 - 1))
def test_a_short_lse_is_not_written(length):
    case = Case(2, 3, 40, 64)
    _, lse = run(case, cases.inputs(case), "v1", runnable_isas()[0], lse_length=length)
    assert np.isnan(lse).all()


def test_one_parameter_row_serves_every_batch():
    case = Case(2, 2, 40, 64, score="alibi")
    data = cases.inputs(case)
    shared = np.broadcast_to(data.params["alibi_slopes"][:1], (2, 2))
    expected, _ = cases.expected(case, replace(data, params={"alibi_slopes": shared}))
    function, _ = kernel("v1", "float32", "full", "alibi", runnable_isas()[0])
    q, k, v = (torch.from_numpy(x) for x in (data.q, data.k, data.v))
    o = torch.empty_like(q)
    function(q, k, v, o, torch.empty(1), case.softmax_scale, torch.from_numpy(shared[0].copy()).expand(2, 2))
    assert np.abs(o.numpy() - expected).max() <= 1e-5


@pytest.mark.parametrize("isa", runnable_isas())
@pytest.mark.parametrize(
    ("function", "exact", "inputs"),
    (
        (vector_math.exp2, np.exp2, np.linspace(-125.4, 1, 1 << 16)),
        (vector_math.tanh, np.tanh, np.linspace(-12, 12, 1 << 16)),
        (vector_math.tanh, np.tanh, np.geomspace(1e-30, 1, 1 << 12)),
    ),
)
def test_vector_functions(function, exact, inputs, isa):
    x = inputs.astype(np.float32)
    y = elementwise(function, isa)(x)
    error = np.abs(y / exact(x.astype(np.float64)) - 1).max(where=x != 0, initial=0)
    assert error <= 4e-7, f"relative error {error:.3g}"


@pytest.mark.parametrize("isa", runnable_isas())
def test_vector_functions_at_the_edges(isa):
    edges = np.array([-np.inf, -1e30, -200, -126.5, 0, np.nan] + [0] * 10, np.float32)
    assert np.array_equal(elementwise(vector_math.exp2, isa)(edges)[:6], [0, 0, 0, 0, 1, np.nan], equal_nan=True)
    edges = np.array([-np.inf, -1e30, -0.0, 0, 1e30, np.inf, np.nan] + [0] * 9, np.float32)
    assert np.array_equal(elementwise(vector_math.tanh, isa)(edges)[:7], [-1, -1, 0, 0, 1, 1, np.nan], equal_nan=True)


def test_functions_of_functions_are_short_expressions():
    """A function names its argument a dozen times, and evaluates it once where it is large."""

    def nested(x):
        for _ in range(3):
            x = T.tanh(x * T.float32(1.5))
        return vector_math.vectorizable(x)

    x = np.linspace(-4, 4, 1 << 10).astype(np.float32)
    want = x.astype(np.float64)
    for _ in range(3):
        want = np.tanh(want * 1.5)
    assert np.abs(elementwise(nested, runnable_isas()[0])(x) - want).max() <= 1e-6
    assert len(str(nested(tirx.Var("x", "float32")))) < 40_000


def test_functions_of_numbers_are_numbers():
    """As arguments of functions of functions they can't be variables, whose values TVM would find to differ."""

    def sigmoid(x):
        return T.float32(0.5) + T.float32(0.5) * T.tanh(x * T.float32(0.5))

    def modified(x):
        return vector_math.vectorizable(x + sigmoid(sigmoid(sigmoid(T.float32(-0.742)))) * sigmoid(x))

    number = vector_math.vectorizable(T.tanh(sigmoid(sigmoid(T.float32(-0.742)))))
    x, want = np.linspace(-4, 4, 1 << 8).astype(np.float32), -0.742
    for _ in range(2):
        want = 1 / (1 + np.exp(-want))
    assert isinstance(number, tirx.FloatImm) and abs(number.value - np.tanh(want)) < 1e-7
    factor = 1 / (1 + np.exp(-want))
    exact = x.astype(np.float64) + factor / (1 + np.exp(-x.astype(np.float64)))
    assert np.abs(elementwise(modified, runnable_isas()[0])(x) - exact).max() <= 1e-6


def elementwise(function, isa: str):
    """A numpy function that computes an expression of :mod:`schedules.families.cpu.vector_math` on whole vectors."""

    @T.prim_func(s_tir=True)
    def apply(x: T.handle, y: T.handle):
        T.func_attr({"global_symbol": "apply"})
        n = T.int64()
        X = T.match_buffer(x, (n,), "float32", align=4)
        Y = T.match_buffer(y, (n,), "float32", align=4)
        for i in T.serial(n // 16):
            for lane in T.vectorized(16):
                Y[i * 16 + lane] = function(X[i * 16 + lane])

    compiled = tvm.compile(apply, target=cpu.ISAS[isa].tvm_target())["apply"]

    def call(x):
        y = torch.empty(x.size)
        compiled(torch.from_numpy(x), y)
        return y.numpy()

    return call


@pytest.mark.parametrize(
    ("change", "reason"),
    (
        ({"block_m": 100}, "row group"),
        ({"tile_rows": 3}, "tile_rows"),
        ({"row_vectors": 8, "block_m": 1024, "tile_rows": 8}, "registers"),
        ({"block_m": 1 << 14}, "scratch"),
        ({"block_n": 72}, "lanes"),
        ({"block_n": 0}, "positive"),
        ({"isa": "amx", "tile_rows": 8}, "tile registers"),
    ),
)
def test_refusals_say_why(change, reason):
    change = dict(change)
    isa = change.pop("isa", "avx512")
    pattern = match(Attention()(64, "bfloat16" if isa == "amx" else "float32"))
    target = Target("cpu", isa)
    config = replace(cpu.default_configs("v1", pattern, target)[0], **change)
    refusal = cpu.feasible(pattern, config, target)
    assert isinstance(refusal, Rejected)
    assert reason in refusal.reason


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_a_sequence_has_the_same_bits_alone_in_a_batch_and_with_any_threads(dtype):
    """Decoding, where the keys are split: where depends on their number alone."""
    isa = best_isa(cpu.ISAS)
    function, _ = kernel("v1", dtype, "full", "identity", isa)
    torch.manual_seed(0)
    q, k, v = (torch.randn(9, 8, n, 64).to(getattr(torch, dtype)) for n in (2, 5000, 5000))

    def attend(*arguments):
        q, _, v = arguments
        out, lse = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype), torch.empty(q.shape[:3].numel())
        function(*arguments, out, lse, 0.125)
        return out, lse.view(q.shape[:3])

    want = attend(q, k, v)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 16):
            torch.set_num_threads(count)
            assert all(map(torch.equal, attend(q, k, v), want))
            for heads in (slice(0, 1), slice(3, 7)):
                one = attend(*(x[4:5, heads] for x in (q, k, v)))
                assert all(torch.equal(a, b[4:5, heads]) for a, b in zip(one, want, strict=True))
    finally:
        torch.set_num_threads(threads)

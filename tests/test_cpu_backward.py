"""The CPU's backward kernels against float64: masks, scores, layouts, strides, instruction sets, and the same bits."""

from __future__ import annotations

import functools
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from schedules.definition.attention import Attention
from schedules.definition.catalogue import MASKS, SCORES
from schedules.definition.pattern import match
from schedules.families import cpu
from schedules.families.interface import BACKWARD, BACKWARD_ACCUMULATE, Program, Rejected, Target
from tests import cases, gradient_cases
from tests.cases import CASES, Case
from tests.cpu_kernels import TEMPLATES, compile_for, installed, make, others, runnable_isas
from tests.gradient_cases import Kernel, check, outer, run
from tvm_flash.packs.manifest import LAYOUT_OF_TEMPLATE


@functools.cache
def kernel(template, dtype, mask, score, isa="", head_dim=64, asked=(), kind=BACKWARD, **changes) -> Kernel:
    isa = isa or runnable_isas()[0]
    params = tuple(replace(p, gradient=p.name in asked) for p in SCORES[score].params)
    attention = Attention(replace(SCORES[score], params=params), MASKS[mask])
    pattern = match(attention(head_dim, dtype, index_dtype=cpu.INDEX_DTYPE))
    target = Target("cpu", isa)
    config = replace(cpu.backward.default_configs(template, pattern, target)[0], **changes)
    program = TEMPLATES[template].apply(pattern, target, "kernel", config, kind)
    assert isinstance(program, Program), program
    loaded = make(isa, program)
    functions = tuple(loaded[launch.symbol] for launch in program.launches)
    roles = tuple(launch.roles for launch in program.launches)
    return Kernel(functions, roles, program.workspaces, pattern.params, LAYOUT_OF_TEMPLATE[template], program.scalars)


@functools.cache
def core(template, dtype, head_dim=64) -> Kernel:
    """The kernel of a pack that serves every mask and score of the functions."""
    found = installed(
        template=template, dtype=dtype, head_dim=head_dim, kind=BACKWARD, mask="positioned", score="optional_sinks"
    )
    assert found, "no such backward kernel in the pack"
    e, module = found
    functions = tuple(module[launch.symbol] for launch in e.launches)
    roles = tuple(tuple(a.role for a in launch.arguments) for launch in e.launches)
    return Kernel(functions, roles, e.workspaces, e.params, e.layout, e.scalars)


def checked(case: Case, one: Kernel, with_dlse: bool = False):
    data, given = cases.inputs(case), outer(case, with_dlse)
    check(case, data, given, run(case, data, given, one))


#: Which template a dtype's cases run on: both, and the other way round in a few.
TEMPLATE_OF = {"float32": "v1", "float16": "v2", "bfloat16": "v2"}


@pytest.mark.parametrize("case", [c for c in CASES if c.mask != "sink_window"], ids=lambda c: c.id)
def test_against_float64(case, cpu_pack):
    checked(case, core(TEMPLATE_OF[case.dtype], case.dtype), with_dlse=case.batch > 1)


@pytest.mark.parametrize(("template", "dtype"), (("v1", "bfloat16"), ("v2", "float32"), ("v1", "float16")))
@pytest.mark.parametrize("strides", cases.STRIDES)
def test_the_other_layout(template, dtype, strides, cpu_pack):
    case = Case(2, 4, 93, 64, kv_heads=2, seqlen_kv=131, dtype=dtype, mask="causal", strides=strides)
    checked(case, core(template, dtype))


@pytest.mark.parametrize(
    ("head_dim", "sizes", "dtype"),
    (*((256, (256, 8, 200), dtype) for dtype in cpu.DTYPES), (128, (128, 72), "bfloat16")),
)
def test_head_dims(head_dim, sizes, dtype, cpu_pack):
    one = core("v2", dtype, head_dim)
    for size, size_v in zip(sizes, sizes[::-1], strict=True):
        checked(Case(1, 2, 100, size, seqlen_kv=90, head_dim_v=size_v, dtype=dtype, mask="causal"), one, True)


@pytest.mark.parametrize(("mask", "score"), (("full", "alibi"), ("sink_window", "identity")))
def test_kernels_of_their_own(mask, score):
    for case in CASES:
        if (case.dtype, case.mask, case.score) == ("float32", mask, score):
            checked(case, kernel("v2", "float32", mask, score), with_dlse=True)


#: Where bfloat16 is tried too: it is multiplied otherwise than by the best, or as on machines without AVX-512.
DTYPES_OF_ISA = {"avx2": ("float32", "bfloat16"), "avx512_bf16": ("bfloat16",)}


@pytest.mark.parametrize("isa", [x for x in others("bfloat16") if x in (*others("float32"), *DTYPES_OF_ISA)])
def test_every_isa(isa):
    dtypes = DTYPES_OF_ISA.get(isa, ("float32",))
    for dtype in dtypes:
        case = Case(1, 4, 150, 64, kv_heads=2, seqlen_kv=170, head_dim_v=40, dtype=dtype, mask="causal")
        checked(case, kernel("v1", dtype, "causal", "identity", isa))
    if "float32" not in dtypes:
        return
    case = Case(1, 4, 50, 64, kv_heads=2, seqlen_kv=70, mask="causal", score="alibi")
    data, given = cases.inputs(case), outer(case)
    one = kernel("v1", "float32", "causal", "alibi", isa, asked=("alibi_slopes",))
    check(case, data, given, run(case, data, given, one))


def test_tile_registers():
    """Compiled only, for the five products of a tile and for what keeps the unit awake."""
    pattern = match(Attention(mask=MASKS["causal"])(64, "bfloat16", index_dtype=cpu.INDEX_DTYPE))
    program = TEMPLATES["v1"].apply(pattern, Target("cpu", "amx"), "f", None, BACKWARD)
    text = compile_for("amx", program).mod.inspect_source("asm")
    assert len(re.findall(r"\ttdpbf16ps\t", text)) >= 5 * 4
    assert not re.search(r"\tvdpbf16ps\t", text)


@pytest.mark.parametrize("isa", [isa for isa in runnable_isas() if isa in ("amx", "avx512_bf16", "avx2")][:2])
def test_other_tiles(isa):
    """Sizes of tiles that are not the default's, with keys and queries that fill none."""
    changes = {"pairs": {"block_n": 64, "row_vectors": 4, "tile_rows": 4}, "floats": {"block_n": 96, "row_vectors": 3}}
    own = changes.get(cpu.ISAS[isa].bfloat16, {"block_n": 96})
    one = kernel("v1", "bfloat16", "window", "identity", isa, block_m=32, **own)
    window = (("window_left", 40), ("window_right", 3))
    checked(Case(1, 2, 171, 64, seqlen_kv=203, dtype="bfloat16", mask="window", params=window), one)


def test_gradients_of_parameters():
    asked = ("softcap", "alibi_slopes")
    params = (("window_left", 90), ("window_right", 3), ("sink_tokens", 5), ("softcap", 2.0))
    one = kernel("v1", "float32", "sink_window", "softcap_alibi", asked=asked)
    for sizes, more in (((2, 4, 300, 64), {"kv_heads": 2}), ((1, 2, 40, 64), {"seqlen_kv": 600})):
        case = Case(*sizes, mask="sink_window", score="softcap_alibi", params=params, **more)
        data, given = cases.inputs(case), outer(case, with_dlse=True)
        got = run(case, data, given, one)
        got["d_softcap"] = got["d_softcap"].reshape(())
        check(case, data, given, got)


def test_a_kernel_that_accumulates():
    """In float32, to gradients of the inputs and of parameters."""
    asked = ("softcap", "alibi_slopes")
    one = kernel("v2", "bfloat16", "full", "softcap_alibi", asked=asked, kind=BACKWARD_ACCUMULATE)
    case = Case(1, 2, 70, 64, seqlen_kv=90, dtype="bfloat16", score="softcap_alibi", params=(("softcap", 2.0),))
    data, given = cases.inputs(case), outer(case)
    once = run(case, data, given, one, before=0.0)
    check(case, data, given, {**once, "d_softcap": once["d_softcap"].reshape(())})
    twice = run(case, data, given, one, before=3.0)
    for name, x in once.items():
        np.testing.assert_allclose(twice[name] - 3, x, rtol=0, atol=4e-6 * (3 + np.abs(x).max()))


def by_threads(case, data, given, one):
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            yield run(case, data, given, one)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_the_same_bits_with_any_threads_and_alone_in_a_batch(dtype, cpu_pack):
    case = Case(2, 4, 1100, 64, kv_heads=2, seqlen_kv=1300, dtype=dtype, mask="causal")
    data, given = cases.inputs(case), outer(case)
    one = core(TEMPLATE_OF[dtype], dtype)
    first, *others = by_threads(case, data, given, one)
    for other in others:
        assert all(np.array_equal(first[name], other[name]) for name in first)
    alone = replace(case, batch=1)
    part = replace(data, q=data.q[1:], k=data.k[1:], v=data.v[1:])
    got = run(alone, part, gradient_cases.Outer(given.dout[1:]), one)
    assert all(np.array_equal(first[name][1:], got[name]) for name in first)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("bad", (np.nan, np.inf))
def test_what_is_hidden_spoils_nothing(dtype, bad, cpu_pack):
    """Rows that see nothing, and keys that nobody sees, may hold anything."""
    case = Case(1, 2, 180, 64, seqlen_kv=100, dtype=dtype, mask="causal")  # rows up to 79 see nothing
    data, given = cases.inputs(case), outer(case)
    one = core(TEMPLATE_OF[dtype], dtype)
    clean = run(case, data, given, one)
    poisoned = replace(data, q=data.q.copy())
    dout = given.dout.copy()
    for x in (poisoned.q, dout):
        x[:, :, [0, 40, 79], 3] = bad
    out, lse = cases.expected(case, data)
    got = run(case, poisoned, gradient_cases.Outer(dout), one, known=(out, lse))
    assert not got["dq"][:, :, :80].any()
    check(case, data, given, got)
    assert all(np.array_equal(clean[name][:, :, 130:], got[name][:, :, 130:]) for name in ("dq",))


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_nan_stays_with_those_that_see_it(dtype, cpu_pack):
    case = Case(1, 1, 200, 64, dtype=dtype, mask="causal")
    data, given = cases.inputs(case), outer(case)
    one = core(TEMPLATE_OF[dtype], dtype)
    out, lse = cases.expected(case, data)
    for name in ("k", "v"):
        poisoned = replace(data, **{name: getattr(data, name).copy()})
        getattr(poisoned, name)[0, 0, 150, 5] = np.nan
        got = run(case, poisoned, given, one, known=(out, lse))
        assert np.isfinite(got["dq"][0, 0, :150]).all()
        assert np.isnan(got["dq"][0, 0, 150:]).any(axis=-1).all()
    dout = given.dout.copy()
    dout[0, 0, 70, 5] = np.nan
    got = run(case, data, gradient_cases.Outer(dout), one, known=(out, lse))
    assert np.isfinite(got["dv"][0, 0, 71:]).all()
    assert np.isfinite(got["dk"][0, 0, 71:]).all()
    assert np.isnan(got["dk"][0, 0, :71]).any(axis=-1).all()


@pytest.mark.parametrize(
    ("change", "reason"),
    (
        ({"block_n": 48}, "columns of a register tile"),
        ({"tile_rows": 3}, "tile_rows"),
        ({"row_vectors": 4}, "registers"),
        ({"block_m": 1 << 14}, "scratch"),
        ({"block_n": 0}, "positive"),
    ),
)
def test_refusals_say_why(change, reason):
    pattern, target = match(Attention()(64, "float32")), Target("cpu", "avx512")
    config = replace(cpu.backward.default_configs("v1", pattern, target)[0], **change)
    refusal = cpu.backward.feasible(pattern, config, target)
    assert isinstance(refusal, Rejected)
    assert reason in refusal.reason

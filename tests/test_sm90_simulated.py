"""Hopper kernels compute attention, their CUDA sources run on the processor (tests/simt), against float64."""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

import numpy as np

from schedules.builder.compile import export_cuda, pattern_of
from schedules.builder.suite import KernelSpec
from schedules.families import sm90
from schedules.families.interface import Target
from schedules.families.sm90 import decode, tile_scheduler
from schedules.families.sm90.config import BY_LENGTH
from schedules.templates import v1, v2
from tests import cases, torch_cases
from tests.cases import Case
from tests.simt.simulate import Simulated, with_places
from tests.torch_cases import attend, own_case, shared_cases
from tvm_flash import numerics
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, LAYOUT_OF_TEMPLATE

TARGET = Target("sm_90a")
TEMPLATES = {"v1": v1, "v2": v2}

#: Kind, template, head_dim, head_dim_v, mask, score, dtype: chained and persistent tiles, outputs in the place of the
#: queries and in their own, turns between warpgroups and none, packed heads, and splits of the keys.
KERNELS = (
    ("forward", "v2", 64, 64, "causal", "identity", "float16"),
    ("forward", "v2", 32, 32, "full", "identity", "bfloat16"),
    ("forward", "v2", 128, 128, "full", "identity", "bfloat16"),
    ("forward", "v2", 128, 128, "window", "softcap_alibi", "float16"),
    ("forward", "v1", 256, 256, "full", "identity", "float16"),
    ("forward", "v2", 192, 128, "padded", "identity", "float16"),
    ("forward", "v2", 64, 64, "positioned", "optional_sinks", "bfloat16"),
    ("decode", "v2", 128, 128, "window", "softcap_alibi", "bfloat16"),
)


@functools.cache
def exported(kind, spec, block_m=0, config=None):
    """The parameters, the program and the source of a kernel, made once; who changes a constant of its modules has a
    ``config`` that nobody else has.

    ``block_m`` is the height of its work tiles, and ``config`` its configuration, if these aren't the usual ones.
    """
    pattern = pattern_of(spec, TARGET)
    maker, traversal = (decode if kind == "decode" else sm90), TEMPLATES[spec.template].TRAVERSAL
    config = config or maker.default_configs(spec.template, pattern, TARGET)[0]
    config = sm90.further_tiles(pattern, config)[block_m] if block_m else config
    program = maker.program(pattern, config, TARGET, traversal, spec.symbol)
    return pattern.params, program, export_cuda(program, TARGET)


def made(kind, template, head_dim, head_dim_v, mask, score, dtype, folder, edit=lambda text: text, **which):
    """A kernel that stands alone, and runs on CPU tensors; ``edit`` changes its source before, and ``which`` is as in
    :func:`exported`."""
    spec = KernelSpec(template, BUILTIN_DEFINITION, mask, score, dtype, head_dim, head_dim_v)
    params, program, text = exported(kind, spec, **which)
    simulated = Simulated(program, edit(text), folder)
    names = [p.name for p in params]

    def function(q, k, v, o, lse, softmax_scale, *values):
        tensors = {"q": q, "k": k, "v": v, "o": o, "lse": lse, "softmax_scale": softmax_scale}
        simulated(tensors | dict(zip(names, values, strict=True)), LAYOUT_OF_TEMPLATE[template])

    return SimpleNamespace(kind=kind, spec=spec, params=params, simulated=simulated, function=function)


@pytest.fixture(scope="module", params=KERNELS, ids=lambda k: "-".join(map(str, k)))
def kernel(request, tmp_path_factory):
    return made(*request.param, tmp_path_factory.mktemp("sm90"))


def own(kernel, **sizes) -> Case:
    """A case of the kernel's own kind that it can compute: decoding has no more rows than a work tile."""
    if kernel.kind == "decode":
        sizes["seqlen_q"] = sizes["seqlen_q"] % 40
    return own_case(kernel, **sizes)


def test_the_shared_cases(kernel):
    count = 0
    for case in shared_cases(kernel.spec):
        data = cases.inputs(case)
        torch_cases.check(case, data, *attend(kernel, case, data))
        count += 1
    assert count or "alibi" in kernel.spec.score or kernel.spec.head_dim < 64  # those are wider


def test_full_width_grouped_heads_and_every_order_of_turns(kernel):
    """Lengths that divide no tile, and few multiprocessors, so that blocks go on to others' tiles."""
    case = own(kernel, kv_heads=1, seqlen_q=150, seqlen_kv=213)
    data = cases.inputs(case)
    results = []
    for order, multiprocessors in ((0, 2), (1, 1), (7, 1), (8, 3)):
        kernel.simulated.configure(order, multiprocessors)
        results.append(attend(kernel, case, data))
    kernel.simulated.configure()
    torch_cases.check(case, data, *results[0])
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert np.array_equal(one, same, equal_nan=True)


def test_many_tiles_of_keys(kernel):
    """Every stage of the pipelines is used several times."""
    case = own(kernel, seqlen_q=300, seqlen_kv=900)
    data = cases.inputs(case)
    torch_cases.check(case, data, *attend(kernel, case, data))


def test_scores_that_outgrow_a_row_s_first_maximum(kernel):
    """Keys are walked from the last to the first: the first are far larger, so that steps without maxima overflow."""
    if kernel.spec.score != "identity":
        pytest.skip("modified scores are bounded, or grow with the distance")
    case = own(kernel, seqlen_q=140, seqlen_kv=400)
    data = cases.inputs(case)
    data.k[:, :, :120] = numerics.round_to(data.k[:, :, :120] * 200, case.dtype)
    torch_cases.check(case, data, *attend(kernel, case, data))


@pytest.mark.parametrize(
    ("head_dim", "mask", "score", "changes"),
    [
        (64, "positioned", "optional_sinks", {"overlap_tiles": False}),
        (128, "padded", "identity", {}),
    ],
)
def test_parameters_of_heads_that_a_block_goes_on_to(head_dim, mask, score, changes, tmp_path):
    pattern = pattern_of(KernelSpec("v2", BUILTIN_DEFINITION, mask, score, "float16", head_dim, head_dim), TARGET)
    config = replace(sm90.default_configs("v2", pattern, TARGET)[0], waves=1, **changes)
    kernel = made("forward", "v2", head_dim, head_dim, mask, score, "float16", tmp_path, config=config)
    test_full_width_grouped_heads_and_every_order_of_turns(kernel)


def test_the_height_of_work_tiles_changes_no_bits(tmp_path):
    """Lengths that divide no tile, rows that outgrow their first maximum, few multiprocessors."""
    what = ("forward", "v2", 64, 64, "full", "identity", "bfloat16")
    results = []
    for block_m in (0, 192, 64):
        folder = tmp_path / str(block_m)
        folder.mkdir()
        kernel = made(*what, folder, block_m=block_m)
        kernel.simulated.configure(0, 2)
        case = own(kernel, seqlen_q=300, seqlen_kv=213)
        data = cases.inputs(case)
        data.k[:, :, :70] = numerics.round_to(data.k[:, :, :70] * 200, case.dtype)
        results.append(attend(kernel, case, data))
        torch_cases.check(case, data, *results[-1])
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert np.array_equal(one, same, equal_nan=True)


def test_sections_of_heads_change_no_bits(tmp_path, monkeypatch):
    """Three work tiles a head: of 24 heads eight sections, of 14 four, the first of them wider, of four one."""
    monkeypatch.setattr(tile_scheduler, "SECTION_TILES", 8)
    usual = sm90.Config(num_consumer_warpgroups=1, block_n=64, blocks_per_sm=2, pingpong=False, waves=1)
    kernels = []
    for section in (1, BY_LENGTH):
        folder = tmp_path / str(section)
        folder.mkdir()
        config = replace(usual, head_section=section)
        kernels.append(made("forward", "v2", 64, 64, "causal", "identity", "bfloat16", folder, config=config))
        kernels[-1].simulated.configure(0, 3)
    for heads, kv_heads in ((12, 2), (7, 7), (2, 1)):
        case = replace(own(kernels[0], seqlen_q=150, seqlen_kv=213), batch=2, heads=heads, kv_heads=kv_heads)
        data = cases.inputs(case)
        by_heads, in_sections = (attend(kernel, case, data) for kernel in kernels)
        torch_cases.check(case, data, *by_heads)
        for one, same in zip(by_heads, in_sections, strict=True):
            assert np.array_equal(one, same, equal_nan=True)


#: A kernel whose two warpgroups take turns, with outputs in the place of its queries.
FAULTY = ("forward", "v2", 128, 128, "full", "identity", "bfloat16")

#: What a kernel waits with, and what it tells others with.
SYNCHRONISATION = "|".join(
    (
        r"tvm_builtin_cuda_(?:mbarrier_wait|cta_sync)",
        r"tvm_builtin_ptx_mbarrier_arrive\w*",
        r"tvm_builtin_ptx_bar_\w+",
        r"tvm_builtin_ptx_wgmma_(?:fence|commit_group|wait_group)\w*",
        r"tvm_builtin_ptx_fence_proxy\w+",
        r"tvm_builtin_ptx_cp_async_bulk_commit_group\w*",
        r"wait_stored",
    )
)


def complaint(kernel, case, data, orders=(0,), **fault) -> str:
    """What a run of a faulty kernel tells, in one of some orders of turns; empty if all are right."""
    for order in orders:
        kernel.simulated.configure(order, 1, **fault)
        try:
            torch_cases.check(case, data, *attend(kernel, case, data))
        except (AssertionError, RuntimeError) as e:
            return str(e)
    return ""


def test_without_any_of_its_synchronisations_a_kernel_is_wrong(tmp_path):
    """Each is left out in turn, and each wait for a barrier waits for the other parity."""
    places = []

    def edit(text):
        text, names = with_places(text, SYNCHRONISATION)
        places.extend(names)
        return text

    kernel = made(*FAULTY, tmp_path, edit)
    case = own(kernel, kv_heads=1, seqlen_q=150, seqlen_kv=400)
    data = cases.inputs(case)
    assert len(places) > 40
    assert not complaint(kernel, case, data, orders=(0, 9))
    unnoticed, noticed = [], []
    for place, name in enumerate(places):
        for other_parity in (False, True) if name.endswith("mbarrier_wait") else (False,):
            fault = {"faulty_place": place, "other_parity": other_parity}
            if said := complaint(kernel, case, data, (0, 9), **fault):
                noticed.append(said)
            else:
                unnoticed.append(name.removeprefix("tvm_builtin_ptx_"))
    # Two stores are committed as one group.  Turns are for speed.  In the model no warp reads another one's queries.
    assert Counter(unnoticed) == {
        "cp_async_bulk_commit_group_async_bulk_commit_group": 1,
        "bar_sync_count_sync": 2,
    }
    forever = r"\n  warp 0, lane 0 to warp 7, lane 31: mbarrier 0 .* 1 of 1 arrivals and 0 bytes are missing"
    assert any(re.search(forever, said) for said in noticed)


def test_other_faults_of_the_text(tmp_path):
    """Fields of descriptors, and bytes that are announced."""

    def swizzle_of_64_bytes(text):
        text, count = re.subn(r"\(uint64_t\)(\d{19})ULL", lambda m: f"{int(m[1]) ^ 3 << 62}ull", text)
        assert count == 48
        return text

    def half_of_the_bytes(text):
        text, count = re.subn(r"\(uint\)32768\)", "(uint)16384)", text)
        assert count
        return text

    for edit in (swizzle_of_64_bytes, half_of_the_bytes):
        kernel = made(*FAULTY, tmp_path, edit)
        case = own(kernel, kv_heads=1, seqlen_q=64, seqlen_kv=64)
        assert complaint(kernel, case, cases.inputs(case))

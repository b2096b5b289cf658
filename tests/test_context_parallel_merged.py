"""Parts that kernels merge themselves, in context parallel attention: a pack for the processor with a GPU's kernel.

The CUDA source of an sm_80 kernel runs on the processor (tests/simt), and stands in a pack as one of the processor's.
"""

from __future__ import annotations

import dataclasses

import pytest

pytest.importorskip("tvm")

import torch

from schedules.builder import pack
from schedules.builder.compile import entry_of, lower, pattern_of
from schedules.builder.suite import KernelSpec
from schedules.families import maker_of
from schedules.families.interface import MERGED, Target
from tests.simt import simulate
from tvm_flash.call import eager
from tvm_flash.distributed import kernels, steps
from tvm_flash.distributed.plan import Call, Plan, Step
from tvm_flash.errors import InvalidArgumentError, KernelNotFoundError
from tvm_flash.machine.device import Device
from tvm_flash.packs import registry
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, MANIFEST_NAME, Manifest

HEADS, KV_HEADS, ROWS, KEYS, DIM = 4, 2, 70, 130, 64
LATE = KEYS - ROWS  # the first key that stands beside a query


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the kernel in a pack."""
    folder = tmp_path_factory.mktemp("packs") / "cpu"
    folder.mkdir()
    target = Target("sm_80")
    spec = KernelSpec("v2", BUILTIN_DEFINITION, "positioned", "optional", "bfloat16", DIM, DIM, kind=MERGED)
    pattern = pattern_of(spec, target)
    lowered = lower(spec, pattern, target, maker_of(target, MERGED).default_configs("v2", pattern, target)[0])
    module = pack.store(simulate.build(lowered.text, tmp_path_factory.mktemp("work")), folder, "merged")
    entry = entry_of(spec, target, pattern, lowered, "default", {})
    entry = dataclasses.replace(entry, module=module.file, arch="cpu")
    (folder / MANIFEST_NAME).write_text(Manifest("cpu", {}, (module,), (entry,)).to_json())
    return folder


@pytest.fixture
def installed(built, cpu_pack, use_packs):
    use_packs(built, cpu_pack.parent)
    yield
    eager.forget()


def test_it_is_found_for_nothing_else(installed):
    of = (Device("cpu"), "bfloat16", DIM, DIM)
    assert kernels.has_merged(*of) and kernels.has_partial(*of)
    assert not kernels.has_merged(Device("cpu"), "float16", DIM, DIM)
    found = [k.entry.kind for k in registry.registry().candidates("cpu", BUILTIN_DEFINITION, "bfloat16")]
    assert MERGED in found
    q, out, lse = torch.zeros(1, 1, 8, DIM), torch.zeros(1, 1, 8, DIM), torch.zeros(1, 1, 8)
    job = kernels.Kernels(1.0, 0.0, None, None)
    with pytest.raises(KernelNotFoundError, match=r"no cpu merged kernel.* --kind merged"):
        job._dense(MERGED, Call((0, 8), (0, 8), None, None, 0), q, q, q, out, lse)
    q = q.bfloat16()
    with pytest.raises(InvalidArgumentError, match="lse: isn't given"):
        job._dense(MERGED, Call((0, 8), (0, 8), None, None, 0), q, q, q, out, None)


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("slopes", [False, True])
def test_parts_are_put_together_by_the_kernel(installed, monkeypatch, slopes, has_sinks):
    """Of a causal mask, in two steps; some rows have a part of their own first, and the last key has none."""
    make = torch.Generator().manual_seed(3)
    q = torch.randn(2, HEADS, ROWS, DIM, generator=make).bfloat16()
    k, v = (torch.randn(2, KV_HEADS, KEYS, DIM, generator=make).bfloat16() for _ in range(2))
    slope = torch.rand(HEADS, generator=make) / 10 if slopes else None
    sinks = torch.randn(HEADS, generator=make) if has_sinks else None
    diagonal = Call((0, ROWS), (LATE, KEYS), None, 0, 0)
    earlier = [Call(rows, (0, LATE), None, None, LATE + rows[0]) for rows in ((0, 30), (30, ROWS))]
    made = (Step(KEYS, (), (), None, (diagonal,)), Step(KEYS, (), (), None, tuple(earlier)))
    plan = Plan(ROWS, made, merges=True, covers=True, positions=KEYS, most_keys=KEYS)
    job = steps.Job(plan, None, None, kernels.Kernels(DIM**-0.5, 0.0, None, 0, slope), sinks)

    def refuse(*_):
        raise AssertionError("the kernel was to merge")

    monkeypatch.setattr(kernels, "merge", refuse)
    out, lse = job.forward(q, k, v)
    monkeypatch.undo()
    assert out.dtype == torch.bfloat16

    i, j = torch.arange(LATE, KEYS)[:, None], torch.arange(KEYS)[None]
    keys, values = (x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = q.double() @ keys.mT * DIM**-0.5
    if slopes:
        scores = scores - slope.double()[:, None, None] * (i - j).abs()
    scores = scores.masked_fill(j > i, -torch.inf)
    if has_sinks:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(2, -1, ROWS, 1)], -1)
        values = torch.cat([values, torch.zeros(2, HEADS, 1, DIM)], 2)
    exact = scores.softmax(-1) @ values
    assert (out.double() - exact).abs().max() <= 2.0**-8 * exact.abs().max()
    assert (lse.double() - scores.logsumexp(-1)).abs().max() <= 1e-5

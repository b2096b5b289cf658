"""Splits of the keys on the mma.sync families: CUDA sources run on the processor (tests/simt), against float64.

First what each split leaves, then both launches on the trials that hardware gets.
"""

from __future__ import annotations

import re

import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

import numpy as np
import torch
import tvm
import tvm_ffi
from tvm.backend.cuda import export_cuda_host

from schedules.builder.compile import entry_of, lower, pattern_of, without_unused_headers
from schedules.builder.suite import KernelSpec
from schedules.families import limits
from schedules.families.interface import Target
from schedules.families.mma import sm80
from schedules.families.mma.decode import partial
from schedules.templates import v1, v2
from tests import forward_trials
from tests.simt import simulate
from tvm_flash.packs.manifest import BUILTIN_DEFINITION

TRAVERSALS = {"v1": v1.TRAVERSAL, "v2": v2.TRAVERSAL}
#: Template, head_dim, mask, score: each layout, a mask that hides whole splits, and one score that differs by head.
KERNELS = (
    ("v1", 64, "full", "identity"),
    ("v2", 128, "window", "identity"),
    ("v2", 64, "window", "softcap_alibi"),
    ("v1", 64, "sink_window", "identity"),
)
LEFT, RIGHT, SINKS, SOFTCAP = 70, 0, 3, 2.0
SLOPES = (0.5, 0.01, 0.0625, 0.25)


@pytest.fixture(scope="module", params=KERNELS, ids=lambda k: "-".join(map(str, k)))
def kernel(request, tmp_path_factory):
    """A kernel's parameters, and its function on CPU tensors."""
    template, head_dim, mask, score = request.param
    target = Target("sm_80")
    pattern = pattern_of(KernelSpec(template, BUILTIN_DEFINITION, mask, score, "float16", head_dim, head_dim), target)
    config = limits.by_head_dim(sm80.DECODE_CONFIGS, pattern)
    packs = not pattern.depends_on_head
    func = partial(pattern, config, TRAVERSALS[template], "partial", sm80.DecodeMachine, packs)
    options = tvm.target.Target({"kind": "cuda", "arch": target.arch}, host={"kind": "cuda_host"})
    executable = tvm.compile(tvm.IRModule({"partial": func}), target=options, tir_pipeline="tirx")
    text = without_unused_headers(export_cuda_host(executable.mod))
    module = simulate.build(text, tmp_path_factory.mktemp("decode"))
    return *request.param, tvm_ffi.load_module(str(module))["partial"]


def expected(q, k, v, mask, score, seqlen_q, seqlen_kv, first, last):
    """Output and log-sum-exp over keys ``first .. last`` (exclusive) in float64, (batch, heads, seqlen_q, ...)."""
    i = np.arange(seqlen_q)[:, None] + seqlen_kv - seqlen_q
    j = np.arange(first, last)[None]
    s = q @ k[:, :, first:last].swapaxes(2, 3) * q.shape[3] ** -0.5
    if score == "softcap_alibi":
        s = SOFTCAP * np.tanh(s / SOFTCAP) - np.array(SLOPES)[None, :, None, None] * np.abs(i - j)
    seen = {
        "full": (j >= 0) | (i < 0),
        "window": (j >= i - LEFT) & (j <= i + RIGHT),
        "sink_window": ((j >= i - LEFT) | (j < SINKS)) & (j <= i + RIGHT),
    }[mask]
    s = np.where(seen, s, -np.inf)
    with np.errstate(divide="ignore"):
        lse = np.log(np.exp(s).sum(-1))
    p = np.where(seen, np.exp(s - np.where(np.isinf(lse), 0, lse)[..., None]), 0)
    return p @ v[:, :, first:last], lse


@pytest.mark.parametrize(("seqlen_q", "kv_heads", "seqlen_kv", "split_length"), [(1, 1, 150, 64), (9, 2, 201, 64)])
def test_partial_results_of_each_split(kernel, seqlen_q, kv_heads, seqlen_kv, split_length):
    template, head_dim, mask, score, function = kernel
    batch, heads = 2, 4
    splits = -(-seqlen_kv // split_length)
    rng = np.random.default_rng(seqlen_q)

    def tensor(h, n):
        return torch.from_numpy(rng.standard_normal((batch, h, n, head_dim)).astype(np.float16))

    def laid_out(x):
        return x if template == "v1" else x.transpose(1, 2).contiguous()

    q, k, v = tensor(heads, seqlen_q), tensor(kv_heads, seqlen_kv), tensor(kv_heads, seqlen_kv)
    out = torch.full((batch * heads * seqlen_q, splits, head_dim), torch.nan)
    lse = torch.full((batch * heads * seqlen_q, splits), torch.nan)
    params = {
        ("full", "identity"): (),
        ("window", "identity"): (LEFT, RIGHT),
        ("window", "softcap_alibi"): (LEFT, RIGHT, SOFTCAP, torch.tensor([SLOPES] * batch)),
        ("sink_window", "identity"): (LEFT, RIGHT, SINKS),
    }[mask, score]
    function(*map(laid_out, (q, k, v)), out, lse, head_dim**-0.5, split_length, *params)
    q, k, v = (x.double().numpy() for x in (q, k, v))
    k, v = (np.repeat(x, heads // kv_heads, 1) for x in (k, v))
    out, lse = out.double().numpy(), lse.double().numpy()
    for split in range(splits):
        first, last = split * split_length, min((split + 1) * split_length, seqlen_kv)
        right, logs = expected(q, k, v, mask, score, seqlen_q, seqlen_kv, first, last)
        logs = logs.reshape(-1)
        assert np.array_equal(np.isneginf(lse[:, split]), np.isneginf(logs))
        seen = ~np.isneginf(logs)
        assert not np.abs(lse[seen, split] - logs[seen]).max(initial=0) > 1e-4
        difference = np.abs(out[:, split] - right.reshape(-1, head_dim))[seen]
        assert np.isfinite(difference).all()
        assert difference.max(initial=0) < 4e-3  # P is rounded to 11 bits, values reach 4


#: Template, dtype, head_dim, keys of a trial at most, lengths of splits that these have: also columns that are no power
#: of two.
WHOLE = (("v1", "float16", 64, 2500, {64, 128, 512}), ("v2", "bfloat16", 96, 200, {64, 448}))


@pytest.mark.parametrize(("template", "dtype", "head_dim", "most_keys", "split_lengths"), WHOLE)
def test_both_launches(template, dtype, head_dim, most_keys, split_lengths, tmp_path):
    target = Target("sm_80")
    spec = KernelSpec(template, BUILTIN_DEFINITION, "window", "identity", dtype, head_dim, head_dim, kind="decode")
    pattern = pattern_of(spec, target)
    config = sm80.KINDS["decode"].default_configs(template, pattern, target)[0]
    lowered = lower(spec, pattern, target, config)
    entry = entry_of(spec, target, pattern, lowered, "default", {})
    simulated = simulate.Simulated(lowered.program, lowered.text, tmp_path)

    def compute(values, problem):
        simulated(values, entry.layout)
        lengths.add(entry.extents(problem)["split_length"])

    lengths = set()
    for trial in forward_trials.trials(entry):
        if int(re.search(r"s\d+\.(\d+)d", trial.label)[1]) <= most_keys:
            assert trial.check(trial.run(compute, "cpu"), "cpu") <= 1, trial.label
    assert split_lengths <= lengths  # by the keys, and by the rows

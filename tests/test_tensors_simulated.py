"""Kernels that read tensors over the axes of scores, or tables, or learn numbers: CUDA sources run on the processor
(tests/simt)."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

import numpy as np

from schedules.builder.suite import KernelSpec
from schedules.definition.attention import Attention
from schedules.definition.catalogue import FULL, IDENTITY, MASKS, SCORES, Mask
from schedules.definition.pattern import match
from schedules.definition.sample import parameters_of
from schedules.families.interface import BACKWARD, FORWARD
from tests import tensor_trials, torch_cases
from tests.definitions.with_numbers import with_numbers
from tests.definitions.with_tensors import documents, learnt_relative, relative
from tests.simt.defaults import default_kernel
from tvm_flash import numerics


def every_fourth(at):
    return (at.i - at.j) % 4 == 0


BIASED, GIVEN = Attention(SCORES["biased"], FULL, "biased"), Attention(IDENTITY, MASKS["given"], "given")
BIASED_16 = Attention(SCORES["biased_16"], FULL, "biased_16")
BIASED_CAUSAL = Attention(SCORES["biased"], MASKS["causal"], "biased_causal")
#: A table that the score reads, beside masks that a launch of their own looks at: one of ids, and one with gaps.
OF_DOCUMENTS = Attention(relative.score, documents.mask, "of_documents")
OF_GAPS = Attention(relative.score, Mask("every_fourth", every_fourth, every_fourth), "of_gaps")

#: Definition, arch, template, kind, head_dim, dtype: each family, each kind, gradients of all axes and of numbers;
#: those of tables on two more kernels in ``test_table_gradients.py``.
KERNELS = (
    (documents, "sm_80", "v2", FORWARD, 64, "bfloat16"),
    (documents, "sm_80", "v2", BACKWARD, 64, "float16"),
    (BIASED, "sm_80", "v2", BACKWARD, 192, "float16"),  # pairs of warps share keys
    (BIASED_16, "sm_80", "v2", FORWARD, 64, "bfloat16"),  # elements two at once, or one at a time
    (relative, "sm_86", "v1", FORWARD, 128, "float16"),
    (GIVEN, "sm_75", "v1", BACKWARD, 64, "float16"),
    (documents, "sm_70", "v1", FORWARD, 64, "float16"),
    (documents, "sm_90a", "v2", FORWARD, 64, "bfloat16"),
    (relative, "sm_90a", "v1", FORWARD, 128, "float16"),
    (BIASED_16, "sm_90a", "v1", FORWARD, 128, "float16"),  # in boxes of TMA, or filled by warps
    (BIASED_CAUSAL, "sm_90a", "v2", FORWARD, 64, "bfloat16"),
    (documents, "sm_90a", "v2", BACKWARD, 64, "float16"),
    (BIASED_16, "sm_90a", "v2", BACKWARD, 128, "bfloat16"),
    (learnt_relative, "sm_75", "v1", BACKWARD, 64, "float16"),
    (learnt_relative, "sm_70", "v1", BACKWARD, 64, "float16"),
    (learnt_relative, "sm_90a", "v1", BACKWARD, 128, "bfloat16"),
    (OF_DOCUMENTS, "sm_80", "v2", FORWARD, 64, "bfloat16"),
    (OF_DOCUMENTS, "sm_90a", "v2", BACKWARD, 64, "float16"),
    (OF_GAPS, "sm_90a", "v1", FORWARD, 64, "float16"),
    (with_numbers, "sm_80", "v2", BACKWARD, 64, "bfloat16"),
    (with_numbers, "sm_90a", "v2", BACKWARD, 64, "float16"),
)


def made(attention, arch, template, kind, head_dim, dtype, folder, **changes):
    """What trials need of a kernel, and what runs it on CPU tensors by role."""
    spec = KernelSpec(template, attention.name, "own", "own", dtype, head_dim, head_dim, kind=kind)
    pattern = match(attention(head_dim, dtype, index_dtype="int32"))
    default = default_kernel(spec, arch, folder, pattern, **changes)
    twins = {"mask": attention.mask.twin, "score": attention.score.twin}
    compute = torch_cases.by_entry(default.entry, default.functions, "cpu")
    sample = functools.partial(parameters_of, attention) if attention.example else None
    kernel = tensor_trials.kernel_of(default.entry, twins, sample)
    return SimpleNamespace(kernel=kernel, simulated=default.simulated, compute=compute, text=default.lowered.text)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """``made`` for kernels that several tests use: it makes each once."""

    @functools.cache
    def make(*kernel):
        return made(*kernel, tmp_path_factory.mktemp("kept"))

    return make


#: Two tiles of queries, and keys that no tile divides; of the second, neighbours can't be read at once.
TRIALS = (((2, 1, 140, 136), "whole"), ((2, 2, 65, 97), "apart"))


def check(found, trials):
    """Each trial, and the last once more with threads in another order."""
    for trial in trials:
        results = trial.run(found.compute, "cpu")
        try:
            trial.check(results, "cpu")
        except AssertionError as e:
            raise AssertionError(f"{trial.label}: {e}") from e
    found.simulated.configure(7)
    again = trial.run(found.compute, "cpu")
    found.simulated.configure()
    assert all(np.array_equal(a, b) for a, b in zip(results, again, strict=True))


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: f"{k[0].name}-{k[0].score.name}-{'-'.join(map(str, k[1:]))}")
def test_all_ways_in_which_tensors_lie(kernel, tmp_path):
    found = made(*kernel, tmp_path)
    trials = tensor_trials.backward if kernel[3] == BACKWARD else tensor_trials.forward
    check(found, trials(found.kernel, TRIALS))


@pytest.mark.parametrize("attention, kind, head_dim", [(GIVEN, FORWARD, 64), (BIASED_16, BACKWARD, 128)])
def test_an_element_for_all_keys(attention, kind, head_dim, tmp_path):
    """Of rows that lie as TMA reads them, and of all scores: no box of it has the others beside the first."""
    found = made(attention, "sm_90a", "v2", kind, head_dim, "bfloat16", tmp_path)
    trials = tensor_trials.backward if kind == BACKWARD else tensor_trials.forward
    check(found, trials(found.kernel, (((1, 1, 70, 97), "same for keys"), ((2, 1, 70, 97), "same for all"))))


def test_tensors_that_are_fetched_at_the_beginning_of_their_step(tmp_path):
    changes = {"tensor_stages": 0, "batches_beside": False, "running_max": True}
    found = made(BIASED, "sm_90a", "v2", FORWARD, 64, "bfloat16", tmp_path, **changes)
    check(found, tensor_trials.forward(found.kernel, TRIALS))


def test_boxes_as_wide_as_a_tile_or_wider(tmp_path):
    for n, block_n in enumerate((48, 64)):  # 24 columns, and 72
        folder = tmp_path / str(n)
        folder.mkdir()
        found = made(BIASED, "sm_90a", "v2", FORWARD, 64, "bfloat16", folder, block_n=block_n)
        check(found, tensor_trials.forward(found.kernel, TRIALS))


@pytest.mark.parametrize(
    ("attention", "head_dim", "changes"),
    [
        (BIASED, 128, {}),
        (GIVEN, 128, {"overlap_tiles": True}),  # as by default
    ],
    ids=["bias", "mask"],
)
def test_boxes_of_blocks_that_go_on_to_other_heads(attention, head_dim, changes, tmp_path):
    found = made(attention, "sm_90a", "v2", FORWARD, head_dim, "bfloat16", tmp_path, waves=1, **changes)
    found.simulated.configure(0, 2)
    check(found, tensor_trials.forward(found.kernel, (*TRIALS, ((4, 2, 265, 208), "whole"))))


@pytest.mark.parametrize(("attention", "head_dim"), [(BIASED, 64), (GIVEN, 128)])
def test_boxes_of_the_launch_for_dq(attention, head_dim, tmp_path):
    found = made(attention, "sm_90a", "v2", BACKWARD, head_dim, "bfloat16", tmp_path)
    check(found, tensor_trials.backward(found.kernel, (*TRIALS, ((4, 2, 265, 208), "whole"))))


def outgrow(batch, heads, seqlen_q, seqlen_kv):
    """A bias that grows from right to left, as keys are walked over: nothing, then −1e9, then more and more."""
    bias = np.random.default_rng(3).standard_normal((batch, heads, seqlen_q, seqlen_kv), np.float32)
    bias += np.float32(0.4) * (seqlen_kv - np.arange(seqlen_kv, dtype=np.float32))
    bias[..., seqlen_kv // 2 : 2 * seqlen_kv // 3] = -1e9
    bias[..., 2 * seqlen_kv // 3 :] = -np.inf
    return {"bias": bias}


def outgrow_rounded(*sizes):
    return {"bias": numerics.round_to(outgrow(*sizes)["bias"], "bfloat16")}


def seen_in_part(batch, heads, seqlen_q, seqlen_kv):
    """A mask of which the first half of the rows sees nothing of the tiles that are walked over first, and keys that
    grow from right to left."""
    rng = np.random.default_rng(4)
    visible = rng.random((batch, heads, seqlen_q, seqlen_kv)) < 0.5
    visible[..., : seqlen_q // 2, seqlen_kv // 2 :] = False
    grown = np.linspace(4, 0.1, seqlen_kv, dtype=np.float32)[:, None]
    k = grown * rng.standard_normal((batch, 1, seqlen_kv, 128), np.float32)
    return {"visible": visible, "k": numerics.round_to(k, "bfloat16")}


@pytest.mark.parametrize(
    ("kernel", "sample", "keys", "lie"),
    [
        ((BIASED, "sm_90a", "v2", FORWARD, 64, "float16"), outgrow, 332, "whole"),
        ((BIASED_16, "sm_90a", "v2", FORWARD, 128, "bfloat16"), outgrow_rounded, 330, "whole"),
        ((GIVEN, "sm_90a", "v2", FORWARD, 128, "bfloat16"), seen_in_part, 330, "whole"),
        ((GIVEN, "sm_90a", "v2", FORWARD, 128, "bfloat16"), seen_in_part, 330, "apart"),
    ],
    ids=["bias", "bias not in boxes", "mask", "mask apart"],
)
def test_scores_that_outgrow_what_their_rows_have_seen(kernel, sample, keys, lie, kept):
    found = kept(*kernel)
    given = dataclasses.replace(found.kernel, sample=sample)
    check(found, tensor_trials.forward(given, [((2, 1, 70, keys), lie)]))


@pytest.mark.parametrize(("bias", "head_dim", "dtype"), [(BIASED, 64, "float16"), (BIASED_16, 128, "bfloat16")])
def test_rows_far_from_zero_in_boxes(bias, head_dim, dtype, kept):
    found = kept(bias, "sm_90a", "v2", FORWARD, head_dim, dtype)
    check(found, tensor_trials.forward(found.kernel, [((2, 1, 90, 332), "far rows")]))

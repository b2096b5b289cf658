"""GPU kernels of a user's own definitions over sequences of different lengths, run on the processor (tests/simt)."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

from schedules.builder.suite import KernelSpec
from schedules.definition.gallery import token_tree
from schedules.definition.pattern import match
from schedules.families import family_of
from schedules.families.interface import PAGED, PAGED_DECODE, PAGED_DECODE_ANY, RAGGED, RAGGED_BACKWARD, Target
from tests import sequence_trials, tensor_trials, torch_cases
from tests.definitions import of_sequences, with_numbers
from tests.simt.defaults import default_kernel
from tvm_flash.packs.manifest import CACHE_OF_KIND


def trees(batch, heads):
    """A tree of at most seven tokens for each sequence; more tokens see what the last ones do."""
    sees = token_tree.example(batch, heads, 7, 7)["sees"].copy()
    sees[0] = token_tree.sees_of([-1, 0, 1, 2, 3, 4, 5])
    return {"sees": sees}


DEFINITIONS = {
    "of_sequences": (of_sequences.of_sequences, of_sequences.sample),
    "token_tree": (token_tree.token_tree, trees),
    "with_numbers": (with_numbers.with_numbers, with_numbers.sample),
}
#: Arch, kind, definition, head_dim, dtype: each family, and of both that have them each kind and way; of caches of 8
#: bits, which know nothing of definitions, each format and each kind once.
KERNELS = (
    ("sm_80", RAGGED, "of_sequences", 64, "bfloat16"),
    ("sm_80", RAGGED_BACKWARD, "of_sequences", 64, "float16"),
    ("sm_80", PAGED, "token_tree", 64, "float16"),
    ("sm_80", PAGED_DECODE, "of_sequences", 64, "float16"),
    ("sm_90a", RAGGED, "of_sequences", 64, "bfloat16"),
    ("sm_90a", RAGGED_BACKWARD, "of_sequences", 64, "float16"),
    ("sm_90a", PAGED, "of_sequences", 64, "float16"),
    ("sm_90a", PAGED_DECODE, "token_tree", 128, "bfloat16"),  # by boxes
    ("sm_90a", PAGED_DECODE_ANY, "token_tree", 128, "float16"),
    ("sm_80", "paged_decode_e4m3", "of_sequences", 64, "bfloat16"),
    ("sm_90a", "paged_int8", "token_tree", 64, "float16"),
    ("sm_75", PAGED, "of_sequences", 64, "float16"),
    ("sm_70", RAGGED_BACKWARD, "of_sequences", 64, "float16"),
    ("sm_80", RAGGED_BACKWARD, "with_numbers", 64, "bfloat16"),
    ("sm_90a", RAGGED_BACKWARD, "with_numbers", 128, "float16"),
    ("sm_75", RAGGED_BACKWARD, "with_numbers", 128, "float16"),
)


@pytest.mark.parametrize(("arch", "kind", "name", "head_dim", "dtype"), KERNELS)
def test_kernels(arch, kind, name, head_dim, dtype, tmp_path):
    definition, sample = DEFINITIONS[name]
    template = family_of(Target(arch)).TEMPLATES[-1]
    spec = KernelSpec(template, name, "own", "own", dtype, head_dim, head_dim, kind=kind)
    made = default_kernel(spec, arch, tmp_path, match(definition(head_dim, dtype, index_dtype="int32")))
    compute = torch_cases.by_entry(made.entry, made.functions, "cpu")
    kernel = tensor_trials.kernel_of(made.entry, {"mask": definition.mask.twin, "score": definition.score.twin})
    if kind == RAGGED_BACKWARD:
        trials = sequence_trials.backward(kernel, sample)
    else:
        which = {"paged": kind != RAGGED, "few": "decode" in kind, "cache": CACHE_OF_KIND.get(kind, "")}
        trials = sequence_trials.forward(kernel, sample, **which)
    for trial in trials:
        results = trial.run(compute, "cpu")
        trial.check(results, "cpu")
        if kind == RAGGED_BACKWARD:  # the same bits, whichever threads come first
            made.simulated.configure(7)
            again = trial.run(compute, "cpu")
            made.simulated.configure()
            assert all(np.array_equal(x, y) for x, y in zip(results, again, strict=True))

"""GPU kernels of a user's own definitions over sequences compile for every arch, with nothing in local memory."""

from __future__ import annotations

import pytest

pytest.importorskip("tvm")

from schedules.definition.gallery.token_tree import token_tree
from schedules.definition.pattern import match
from schedules.families import FAMILY, family_of, schedule
from schedules.families.interface import PAGED, PAGED_DECODE, RAGGED, RAGGED_BACKWARD, Program, Target
from schedules.templates import v1, v2
from tests.definitions.of_sequences import of_sequences
from tests.definitions.with_numbers import with_numbers
from tests.machine_code import compiled

TEMPLATES = {"v1": v1, "v2": v2}
#: Arch, kind, definition, head_dim.
KERNELS = (
    ("sm_70", RAGGED, token_tree, 64),
    ("sm_75", PAGED, token_tree, 128),
    ("sm_80", PAGED_DECODE, token_tree, 64),
    ("sm_86", RAGGED_BACKWARD, of_sequences, 64),
    ("sm_89", PAGED, token_tree, 128),
    ("sm_90a", PAGED, token_tree, 128),
    ("sm_90a", RAGGED_BACKWARD, of_sequences, 128),
    ("sm_120", RAGGED, of_sequences, 128),
    ("sm_80", RAGGED_BACKWARD, with_numbers, 128),
    ("sm_90a", RAGGED_BACKWARD, with_numbers, 128),
)


def test_every_arch_has_one():
    assert {arch for arch, *_ in KERNELS} == {arch for arch in FAMILY if arch != "cpu"}


@pytest.mark.parametrize(("arch", "kind", "definition", "head_dim"), KERNELS)
def test_kernels(arch, kind, definition, head_dim, tmp_path):
    target = Target(arch)
    pattern = match(definition(head_dim, "float16", index_dtype="int32"))
    traversal = TEMPLATES[family_of(target).TEMPLATES[-1]].TRAVERSAL
    program = schedule(traversal, pattern, target, "kernel", kind=kind)
    assert isinstance(program, Program), program
    _, report, count = compiled(program, arch, tmp_path)
    assert all(kernel.stack == 0 for kernel in report.kernels)
    assert count["LDL"] == count["STL"] == 0
    assert count["HMMA"] + count["HMMA.884"] + count["HGMMA"] > 0

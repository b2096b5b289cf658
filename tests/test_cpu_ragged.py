"""The CPU's kernels of ragged sequences against float64, and what a sequence owes to its neighbours: nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from schedules.definition.attention import Attention
from schedules.definition.catalogue import MASKS, SCORES
from schedules.definition.pattern import match
from schedules.families import cpu
from schedules.families.cpu.ragged import sequences
from schedules.families.interface import RAGGED, RAGGED_BACKWARD, Program, Target
from tests import ragged_cases, torch_cases
from tests.cpu_kernels import TEMPLATES, installed, make, runnable_isas
from tests.ragged_cases import RAGGED_CASES, RaggedCase
from tvm_flash.packs import sizes

pytestmark = pytest.mark.usefixtures("cpu_pack")


_DEFINITION = Attention(SCORES["optional"], MASKS["window"])


@functools.cache
def core(dtype: str, kind: str = RAGGED, head_dim: int = 64) -> tuple[Callable, tuple]:
    """``compute(values, sizes)`` and the parameters of a kernel of the pack."""
    found = installed(dtype=dtype, kind=kind, head_dim=head_dim)
    assert found, f"no {kind} kernel for {dtype} in the pack"
    e, module = found
    return torch_cases.by_entry(e, [module[x.symbol] for x in e.launches], "cpu"), e.params


@functools.cache
def kernel(
    dtype: str, isa: str, kind: str = RAGGED, definition: Attention = _DEFINITION, source: str = "", **changes
) -> tuple[Callable, tuple]:
    """The same of a kernel that is made here; ``source`` as in :func:`tests.cpu_kernels.make`."""
    pattern = match(definition(64, dtype, index_dtype=cpu.INDEX_DTYPE))
    target = Target("cpu", isa)
    config = replace(cpu.KINDS[kind].default_configs("v2", pattern, target)[0], **changes)
    program = TEMPLATES["v2"].apply(pattern, target, "kernel", config, kind)
    assert isinstance(program, Program), program
    loaded = make(isa, program, source)
    (launch,) = program.launches

    def compute(values, extents):
        shapes = {w.name: [sizes.evaluate(n, extents) for n in w.shape] for w in program.workspaces}
        made = {name: torch.full(shape, torch.nan) for name, shape in shapes.items()}
        loaded[launch.symbol](*({**values, **made}[role] for role in launch.roles))

    return compute, pattern.params


def attend(case: RaggedCase, data, made: tuple = ()):
    compute, params = made or core(case.dtype)
    return ragged_cases.run(case, data, compute, params)


def back(case: RaggedCase, data, given, made: tuple = ()):
    compute, params = made or core(case.dtype, RAGGED_BACKWARD)
    return ragged_cases.run_backward(case, data, given, compute, params)


#: Every case in one dtype, and gradients too, mostly in float32; ``test_varlen.py`` has all of them in bfloat16.
CASES = [c for i, c in enumerate(RAGGED_CASES) if i % 3 == (i // 3) % 2]
GRADIENT_CASES = [c for i, c in enumerate(RAGGED_CASES) if i % 3 == (0, 0, 1, 0, 2)[i // 3 % 5] and i // 3 % 3 != 1]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_against_float64(case):
    data = ragged_cases.inputs(case)
    ragged_cases.check(case, data, *attend(case, data))


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda c: c.id)
def test_gradients_against_float64(case):
    data, given = ragged_cases.inputs(case), ragged_cases.outer(case, with_dlse=case.heads > 2)
    ragged_cases.check_backward(case, data, given, back(case, data, given))


_ONE = RaggedCase((3, 150, 0, 1, 70), 4, 64, (9, 61, 5, 0, 333), kv_heads=2, mask="causal", after=(3, 4))


def test_another_instruction_set():
    """Of scores as they are: what else may become of them is the same in kernels of all forms; of the set that has the
    smallest code to compile."""
    isa = runnable_isas()[-1]
    plain = Attention(mask=MASKS["window"])
    data, given = ragged_cases.inputs(_ONE), ragged_cases.outer(_ONE)
    ragged_cases.check(_ONE, data, *attend(_ONE, data, kernel(_ONE.dtype, isa, definition=plain)))
    got = back(_ONE, data, given, kernel(_ONE.dtype, isa, RAGGED_BACKWARD, definition=plain))
    ragged_cases.check_backward(_ONE, data, given, got)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_a_sequence_has_the_same_bits_in_any_batch(dtype):
    """Gradients too: alone, and among others, of which one has more turns."""
    case = RaggedCase((70, 600, 33), 2, 64, (90, 700, 20), kv_heads=1, dtype=dtype, mask="causal")
    data, given = ragged_cases.inputs(case), ragged_cases.outer(case)
    whole, grads = attend(case, data), back(case, data, given)
    for b in range(case.batch):
        i, j = case.rows(b)
        alone = replace(case, queries=case.queries[b : b + 1], keys=case.keys[b : b + 1])
        own = ragged_cases.RaggedInputs(data.q[i], data.k[j], data.v[j], data.params)
        out, lse = attend(alone, own)
        assert np.array_equal(out, whole[0][i]) and np.array_equal(lse, whole[1][:, i])
        found = back(alone, own, ragged_cases.Outer(given.dout[i]))
        for name, rows in (("dq", i), ("dk", j), ("dv", j)):
            assert np.array_equal(found[name], grads[name][rows]), name


def test_shares_of_very_different_sequences(monkeypatch):
    """More work items than shares, and shares of one long tile, of many short ones, and of none."""
    case = RaggedCase((1, 900, *[3, 0, 17, 1] * 12), 2, 64, (2000, 900, *[3, 4, 0, 9] * 12), mask="causal")
    data = ragged_cases.inputs(case)
    monkeypatch.setattr(sequences, "MOST_SHARES", 16)
    few = attend(case, data, kernel("float32", runnable_isas()[0]))
    ragged_cases.check(case, data, *few)
    for a, b in zip(few, attend(case, data), strict=True):
        assert np.array_equal(a, b)


def test_nobody_asked_for_the_log_sum_exp():
    data = ragged_cases.inputs(_ONE)
    compute, params = core("float32")
    out, lse = ragged_cases.run(_ONE, data, compute, params, with_lse=False)
    assert np.array_equal(out, attend(_ONE, data)[0]) and np.isnan(lse).all()


@pytest.mark.parametrize("kind", (RAGGED, RAGGED_BACKWARD))
def test_starts_that_make_no_sense_are_refused_before_anything_is_written(kind):
    data, given = ragged_cases.inputs(_ONE), ragged_cases.outer(_ONE)
    compute, params = core("float32", kind)
    written = {}

    def spoilt(values, extents):
        written.update(values)
        for name in ragged_cases.STARTS:
            for bad in ([1, 3, 3, 4, 5, 6], [0, 3, 2, 4, 5, 6], [0, 1, 2, 3, 4, 10_000]):
                with pytest.raises(RuntimeError, match="never to fall"):
                    compute({**values, name: torch.tensor(bad, dtype=torch.int32)}, extents)

    if kind == RAGGED:
        ragged_cases.run(_ONE, data, spoilt, params)
        outputs = ("o", "lse")
    else:
        ragged_cases.run_backward(_ONE, data, given, spoilt, params)
        outputs = ("dq", "dk", "dv")
    assert all(written[name].isnan().all() for name in outputs)

"""Sums of shares in the gradients of tables on GPUs: exact, in any order, by their source run on the processor
(tests/simt)."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest

pytest.importorskip("tvm")
pytest.importorskip("torch")

import torch
from tvm.script import tirx as T

from schedules.builder.compile import export_cuda
from schedules.definition.attention import Attention
from schedules.definition.catalogue import FULL, ScoreModification
from schedules.families.interface import BACKWARD, Program, ScheduledLaunch, Target
from schedules.tile import table_gradients
from schedules.tile.geometry import flat, wide
from tests import tensor_trials
from tests.simt.simulate import Simulated
from tests.test_tensors_simulated import check, made
from tvm_flash.packs.manifest import Param, Workspace

TABLE = Param("table", "float32", rank=2, gradient=True)
SHAPE, SHARES = (3, 5), 4096


@pytest.fixture(scope="module")
def added(tmp_path_factory):
    """``(values, elements)``: what the gradient of a table of ``SHAPE`` is of shares."""

    @T.prim_func(check_well_formed=False)
    def add(values: T.handle, elements: T.handle, sums: T.handle):
        shares = T.match_buffer(values, (SHARES,), "float32")
        numbers = T.match_buffer(elements, (SHARES,), "int32")
        length = T.int32()
        memory = T.match_buffer(sums, (length,), "int32", align=8)
        T.device_entry()
        block = T.cta_id([SHARES // 128])
        thread = T.thread_id([128])
        number: T.int32 = numbers[block * 128 + thread]
        place = T.meta_var(flat(memory).ptr_to([wide(number) * T.int64(2)]))
        T.evaluate(table_gradients.add_share(place, math.prod(SHAPE), shares[block * 128 + thread]))

    (role,) = table_gradients.TableSums((TABLE,)).roles
    launches = (
        ScheduledLaunch(table_gradients.clear((TABLE,), "clear"), (role,)),
        ScheduledLaunch(add.with_attr("global_symbol", "add"), ("values", "elements", role)),
        ScheduledLaunch(table_gradients.finish(TABLE, "finish"), (role, "d_table")),
    )
    size = table_gradients.workspace(TABLE)
    assert isinstance(size, Workspace) and size.name == role
    program = Program("forward", launches, "tirx", alignment=16, index_bits=32, workspaces=(size,))
    simulated = Simulated(program, export_cuda(program, Target("sm_80")), tmp_path_factory.mktemp("added"))

    def run(values, elements, order=0):
        simulated.configure(order)
        apart = torch.full((*SHAPE, 2), torch.nan)
        rows = {x: torch.zeros(1, 1, 1, 16, dtype=torch.float16) for x in "qkv"}
        given = {"values": torch.from_numpy(values), "elements": torch.from_numpy(elements), "d_table": apart[..., 1]}
        simulated(rows | given)
        assert apart[..., 0].isnan().all()
        return apart[..., 1].numpy()

    return run


def test_sums_are_exact_in_any_order(added):
    rng = np.random.default_rng(0)
    values = np.ldexp(rng.standard_normal(SHARES), rng.integers(-70, 46, SHARES)).astype(np.float32)
    elements = rng.integers(0, math.prod(SHAPE), SHARES).astype(np.int32)
    values[elements == 4] = -np.abs(values[elements == 4])  # carries through all limbs
    values[elements == 7] = 0
    cancelling = np.flatnonzero(elements == 9)
    cancelling = cancelling[: len(cancelling) // 2 * 2]
    values[elements == 9] = 0
    values[cancelling[::2]] = rng.standard_normal(len(cancelling) // 2) * 2.0**40
    values[cancelling[1::2]] = -values[cancelling[::2]]
    values[cancelling[0]] += 2.0**20
    found = added(values, elements)
    want = [math.fsum(values[elements == n].tolist()) for n in range(math.prod(SHAPE))]
    assert np.array_equal(found.reshape(-1), np.float32(want))
    turned = rng.permutation(SHARES)
    assert np.array_equal(added(values[turned], elements[turned], order=3), found)


def test_what_is_too_small_or_too_large(added):
    """What is below a unit is cut off; what isn't finite, or has no limb, spoils its own element."""
    values, elements = np.zeros(SHARES, np.float32), np.zeros(SHARES, np.int32)
    shares = {0: (2.0**-100, 1.75 * 2.0**-100), 1: (2.0**-120, 2.0**-149), 2: (-(2.0**-100), -(2.0**-101))}
    shares |= {
        3: (math.inf, 1.0),
        4: (math.nan,),
        5: (-(2.0**51),),
        6: (2.0**51 - 2.0**28, -1.0),
        7: (-math.inf, math.inf),
    }
    given = [(n, x) for n, xs in shares.items() for x in xs]
    elements[: len(given)], values[: len(given)] = zip(*given, strict=True)
    found = added(values, elements).reshape(-1)
    np.testing.assert_array_equal(found[:3], np.float32([2 * 2.0**-100, 0, -(2.0**-100)]))
    assert np.isnan(found[[3, 4, 5, 7]]).all() and found[6] == np.float32(2.0**51 - 2.0**28) and not found[8:].any()


# ---------------------------------------------------------------- in kernels


def _several(s, at):
    """Two tables, one of 16 bits; one of them is read twice, and stands in a function of the score."""
    near = at.table["near"](at.h, at.j - at.i + 6)
    return 4 * T.tanh((s * at.table["near"](at.b, 3) + near) / 4) + at.table["far"](T.floordiv(at.i, 9), at.j, at.h)


def _several_twin(s, at):
    near, far = (np.asarray(at.params[n], np.float64) for n in ("near", "far"))
    column = np.clip(at.j - at.i + 6, 0, near.shape[1] - 1)
    rows = np.clip(at.b, 0, near.shape[0] - 1), np.clip(at.h, 0, near.shape[0] - 1)
    given = np.clip(at.i // 9, 0, far.shape[0] - 1), np.clip(at.j, 0, far.shape[1] - 1)
    return 4 * np.tanh((s * near[rows[0], 3] + near[rows[1], column]) / 4) + far[(*given, at.h)]


def example(batch, heads, seqlen_q, seqlen_kv):
    rng = np.random.default_rng(5)
    near, far = rng.standard_normal((heads, 13)), rng.standard_normal((7, 90, heads))
    return {"near": near.astype(np.float32), "far": far.astype(np.float16)}


PARAMS = (Param("near", "float32", rank=2, gradient=True), Param("far", "float16", rank=3, gradient=True))
several = Attention(ScoreModification("several", _several, _several_twin, PARAMS), FULL, example=example)


@pytest.fixture(scope="module")
def kernel_of(tmp_path_factory):
    """A function that makes the kernel of an arch, once."""
    return functools.cache(
        lambda arch: made(several, arch, "v1", BACKWARD, 64, "float16", tmp_path_factory.mktemp(arch))
    )


@pytest.mark.parametrize("arch", ("sm_80", "sm_90a"))
def test_several_tables_that_are_read_several_times(arch, kernel_of):
    found = kernel_of(arch)
    check(found, tensor_trials.backward(found.kernel, (((2, 1, 140, 136), "whole"), ((2, 2, 65, 97), "whole"))))


def test_a_gradient_that_nobody_asks_for(kernel_of):
    """A target of one element stays as small, and the other table's gradient is what it is."""
    found = kernel_of("sm_80")
    problem = tensor_trials.Problem(found.kernel, (2, 1, 140, 136), "whole")
    results = []
    for asked in (True, False):
        taken = {}

        def compute(values, extents, asked=asked, taken=taken):
            if not asked:
                values = values | {"d_near": torch.full((1, 1), torch.nan)}
            found.compute(values, extents)
            taken.update({n: values[n].clone() for n in ("d_near", "d_far", "dq")})

        run, _ = tensor_trials._backward(problem)
        run(compute, "cpu")
        results.append(taken)
    assert torch.equal(results[0]["d_far"], results[1]["d_far"]) and torch.equal(results[0]["dq"], results[1]["dq"])
    assert results[0]["d_far"].isfinite().all() and results[1]["d_near"] == 0

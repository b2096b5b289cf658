"""Sequences that processes of this machine share: results and gradients against float64 and one process; errors."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.context_parallel_cases import CASES, Case
from tests.context_parallel_ranks import EVERYWHERE, MESHES, READ, RUNS, SHARED, TIMEOUT
from tests.shared import HANGS
from tvm_flash.distributed.kernels import has_accumulate, has_partial
from tvm_flash.machine.device import Device

pytestmark = pytest.mark.usefixtures("trains")

#: Of the largest exact number, in float32: some roundings of sums over all keys.
TOLERANCE = 4e-6


def run(folder, ranks, *tasks):
    """What the first of some processes found, by task."""
    command = [sys.executable, "-m", "tests.context_parallel_ranks", str(folder), str(ranks), *tasks]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(folder / "found.pt", weights_only=False)


@pytest.fixture(scope="module")
def found(cpu_pack, tmp_path_factory):
    """What eight processes found."""
    return run(
        tmp_path_factory.mktemp("ranks"),
        8,
        *("results", "reads", "obstacles", "other_orders", "errors", "batches", "empty_batches"),
        "torch_rings",
    )


@pytest.fixture(scope="module")
def exact():
    """Exact results by case and dtype."""
    known = {}

    def of(name, dtype):
        if (name, dtype) not in known:
            known[name, dtype] = CASES[name].exact(CASES[name].inputs(dtype))
        return known[name, dtype]

    return of


def difference(got, exact):
    """By which a result is off, equal infinities by nothing."""
    return torch.where(got.double() == exact, 0.0, got.double() - exact)


def check(found, exact):
    assert found.keys() == exact.keys()
    for name, x in exact.items():
        largest = x[x.isfinite()].abs().max()
        assert difference(found[name], x).abs().max() <= TOLERANCE * largest, name


@pytest.mark.parametrize("mesh", MESHES)
def test_float32_against_float64(found, exact, mesh):
    runs = [case for case, on, dtype in RUNS if on == mesh and dtype == torch.float32]
    assert len(runs) >= 2
    for case in runs:
        check(found["results"][case, mesh, torch.float32], exact(case, torch.float32))


@pytest.mark.parametrize("mesh", READ)
def test_ranks_that_read_each_others_memory(found, exact, mesh):
    for case in READ[mesh]:
        check(found["reads"]["found"][mesh, case], exact(case, torch.float32))


def test_memory_is_read_where_all_ranks_have_room(found, exact):
    *copies, without = found["reads"]["copies"]
    assert copies and all(copies) and not without
    check(found["reads"]["found"]["no room"], exact("causal", torch.float32))


def test_a_gpu_that_fails_while_it_waits_for_another_is_explained(found):
    failed, other = found["reads"]["told"]
    assert failed == (
        "ProcessGroupError: mesh: the GPU of rank 0 failed, as it does if another of the ranks [0, 1] is gone, or "
        "wasn't there within the group's timeout (then a line on standard error names it): CUDA error: unspecified "
        "launch failure"
    )
    assert other == "RuntimeError: out of memory"


OBSTACLES = {
    "refused and asked": "TVM_FLASH_PEER_MEMORY is 0 on rank 1",
    "host": "on rank 0: rank 1 is on another host",
    "container": "on rank 0: rank 2 is in another container, or another user's",
    "unseen": "on rank 0: this process doesn't see the GPU of rank 2",
    "no access": "on rank 1: cuda:1 has no access to the memory of cuda:0, the GPU of rank 0",
    "P2P": "on rank 1: NCCL_P2P_DISABLE is 1",
    "captures": "on rank 1: the first call on the mesh is captured in a graph",
    "makes": f"on rank 1: PyTorch {torch.__version__} has no such memory here: RuntimeError: out of luck",
    "meets": f"on rank 1: PyTorch {torch.__version__} has no such memory here: RuntimeError: out of luck",
    "old PyTorch": f"on rank 0: PyTorch {torch.__version__} has no such memory here: ModuleNotFoundError: import of "
    "torch.distributed._symmetric_memory halted; None in sys.modules",
}


@pytest.mark.parametrize("name", OBSTACLES)
def test_only_who_asks_for_memory_that_cant_be_read_hears_why(found, name):
    text = "TVM_FLASH_PEER_MEMORY is 1, but ranks don't read each other's memory, and send messages: "
    assert found["obstacles"][name] == [(None, [text + OBSTACLES[name]])] * 3
    silent = "refused by one" if name == "refused and asked" else f"{name}, told nothing"
    assert found["obstacles"][silent] == [(None, [])] * 3


def test_memory_is_read_unless_some_rank_is_told_not_to(found):
    """As much as the rank with the smallest GPU keeps."""
    for name in ("told nothing", "asked by all", "asked by one"):
        assert found["obstacles"][name] == [((1 << 20) // 16, [])] * 3
    assert found["obstacles"]["refused by all"] == [(None, [])] * 3
    own, told = "TVM_FLASH_PEER_MEMORY: is 'yes', expected 0 or 1, or unset", "on rank 1: "
    assert found["obstacles"]["no number"] == [(told * (rank != 1) + own, []) for rank in range(3)]


@pytest.mark.parametrize("mesh", ["8 gather", "8 ring"])
@pytest.mark.parametrize("case", EVERYWHERE)
def test_eight_ranks_err_as_one_does(found, exact, case, mesh):
    """In 16 bits: no more than 1.1 of its error, of all numbers together, and nowhere much more."""
    expected = exact(case, torch.bfloat16)
    alone, together = (found["results"][case, m, torch.bfloat16] for m in ("1", mesh))
    for name in ("out", "dq", "dk", "dv"):
        one, all_ = (difference(x[name], expected[name]) for x in (alone, together))
        assert all_.pow(2).mean() <= 1.1**2 * one.pow(2).mean(), name
        assert all_.abs().max() <= 1.5 * one.abs().max(), name


def test_kernels_that_leave_and_add_to_float32(cpu_pack):
    for dtype in ("float32", "float16", "bfloat16"):
        for head_dim in (32, 128, 256):
            assert has_partial(Device("cpu"), dtype, head_dim, head_dim)
            assert has_accumulate(Device("cpu"), dtype, head_dim, head_dim, ("alibi_slopes",))


def test_the_same_bits_on_every_run(found):
    one, two, gathered, again = found["other_orders"]["again"]
    for a, b in ((one, two), (gathered, again)):
        assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("order", ["bshd", "contiguous"])
def test_another_layout_and_another_order(found, exact, order):
    check(found["other_orders"][order], exact("causal", torch.float32))


def test_errors_on_every_rank(found):
    errors = found["errors"]
    everywhere = {
        "heads": "heads: is 4 on rank 0, but 8 on rank 1; expected the same on all ranks of the mesh",
        "rows": "q: has 10 rows on rank 0, expected 9 of 28 positions in all; use tvm_flash.distributed.shard_sequence",
        "causal": "causal: is True on rank 0, but False on rank 1",
        "documents": "cu_seqlens: is [30] on rank 0, but [31] on rank 1",
        "documents fall": "cu_seqlens: falls from 9 to 3 after sequence 1, expected numbers that never fall",
        "keys": "k: has 9 rows, but q has 10; expected keys and queries of the same positions",
        "exchange": "exchange: is 'by pigeon', expected one of 'auto', 'gather', 'ring', 'heads'",
        "a batch of documents": "cu_seqlens: is given, and q has batch 2; expected a batch of one",
        "heads among ranks": "q: has 4 heads, expected a multiple of the 3 ranks",
        "other slopes": "alibi_slopes: is float32 (4,) with sha256 ",
        "other sinks": "sinks: is float32 (4,) with sha256 ",
        "sinks that learn": "requires_grad: is [] on rank 0, but ['sinks'] on rank 1",
        "a number for documents": "cu_seqlens: is 30, expected whole numbers",
    }
    for name, text in everywhere.items():
        assert all(said.startswith(f"InvalidArgumentError: {text}") for said in errors[name]), errors[name]
    first, second, third = errors["dtype"]
    assert third.startswith("ArgumentTypeError: k: has dtype float16, but q has float32")
    assert first == second == third.replace("ArgumentTypeError: ", "InvalidArgumentError: on rank 2: ")
    first, second, third = errors["whatever happens"]
    assert second == "ZeroDivisionError: bad luck"
    assert first == third == "InvalidArgumentError: on rank 1: ZeroDivisionError('bad luck')"
    fine = ("no heads", "no gradients of what has none")
    assert all(errors[name] == ["nothing"] * 3 for name in fine)
    assert errors.keys() == {*everywhere, *fine, "dtype", "whatever happens"}


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_order_of_parts_is_what_a_call_takes_it_for(cpu_pack, tmp_path, ranks):
    """By default whatever is exchanged; another one, where all sizes are the same, is refused on every rank."""
    told = run(tmp_path, ranks, "orders")["orders"]
    for name, case in SHARED.items():
        one, again = told.pop(name)
        check(one, case.exact(case.inputs(torch.float32)))
        assert all(torch.equal(one[n], again[n]) for n in one)
    words = f"over {ranks} ranks, but shard_sequence on rank "
    refused = f"balance: is 'contiguous' {words}0 has dealt out by balance='zigzag' over {ranks} ranks; expected"
    mixed = {"one rank": ranks - 1, "keys": 0}
    for name, said in told.items():
        expected = refused
        if name in mixed:
            expected = f"balance: is 'zigzag' {words}{mixed[name]} has dealt out by balance='contiguous'"
        assert all(x.startswith(expected) for x in said), (name, said)
    assert len(told) == 7


def test_a_rank_that_dies_is_told_of(cpu_pack, tmp_path):
    """In the midst of a call, and before the next; sooner than the timeout, since its connections are closed."""
    told = run(tmp_path, 3, "deaths")["deaths"]
    assert len(told["said"]) == 2 and told["seconds"] < TIMEOUT.total_seconds()
    assert all("rank 0 had no answer from another of the ranks [0, 1, 2]" in said for said in told["said"])


def test_a_batch_without_entries_has_results_and_gradients(found):
    """With sinks for each entry it was an error, and its log-sum-exp was no function of anything."""
    of_inputs = {
        "bhsd": ((0, 4, 6, 8), (0, 2, 6, 8), (0, 2, 6, 16)),
        "bshd": ((0, 6, 4, 8), (0, 6, 2, 8), (0, 6, 2, 16)),
    }
    results = {"bhsd": ((0, 4, 6, 16), (0, 4, 6)), "bshd": ((0, 6, 4, 16), (0, 4, 6))}
    assert found["empty_batches"] == {x: [*results[x], *of_inputs[x], (0, 1), (4,)] for x in results}


def test_batches_are_dealt_out_and_put_together(found):
    ids = torch.arange(34).view(2, 17)
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], 1)
    for whole in found["batches"].values():
        assert torch.equal(whole["input_ids"], ids) and torch.equal(whole["labels"], ids)
        assert torch.equal(whole["shift_labels"], shifted)
        assert torch.equal(whole["position_ids"], torch.arange(17)[None])
    assert len(found["batches"]) == 2


@pytest.mark.parametrize("causal", [True, False])
def test_rings_of_torch_on_the_functions_of_its_registry(found, causal):
    """torch's ``context_parallel`` has operators of CUDA alone; its rings call them here on the processor."""
    rings = found["torch_rings"]
    assert rings["called"] == [
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_backward",
    ]
    case = Case("", {"causal": causal}, kv_heads=8, length=96)
    inputs = case.inputs(torch.float32)
    exact = case.exact({**inputs, "dlse": torch.zeros_like(inputs["dlse"])})
    check(rings["found"][causal], {name: x for name, x in exact.items() if name != "lse"})

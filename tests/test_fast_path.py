"""The fast path of a repeated call: it answers what the slow path would, and leaves to it what it can't answer.

Long because each thing that it looks at in a call, and each that it must leave alone, has a test.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import random
import sys
from functools import partial

import numpy as np
import pytest
import torch

from schedules.toolchain.call_path import build_call_path
from tests.test_interface import FUNCTIONS, PUBLIC_CASES, inputs, need, options, tensors
from tvm_flash import (
    BackendSelector,
    InvalidArgumentError,
    LayoutWarning,
    NotSupportedError,
    TvmFlashError,
    flash_attention,
    flash_attention_backward,
    flash_attention_v2,
    flash_attention_v2_backward,
)
from tvm_flash.call import eager, fast, plan, suspicion
from tvm_flash.machine import ffi
from tvm_flash.packs import registry
from tvm_flash.packs.manifest import CALL_STEM

pytestmark = pytest.mark.usefixtures("fast_path")


@pytest.fixture(scope="module")
def fast_path(cpu_pack, tmp_path_factory):
    """The library is loaded: that of the installed pack, or one that is made here if the pack has none."""
    flash_attention(*(np.zeros((1, 1, 1, 64), np.float32) for _ in range(3)))
    if not fast.is_loaded():
        library = tmp_path_factory.mktemp("fast") / "call.so"
        build_call_path(library)
        with pytest.MonkeyPatch.context() as environment:
            environment.delenv(fast.VARIABLE, raising=False)
            fast.load(library)
    yield
    eager.forget()


@pytest.fixture
def slow_calls(monkeypatch):
    """What the slow path is called with."""
    found, attention = [], eager.attention
    monkeypatch.setattr(eager, "attention", lambda *a: found.append(a) or attention(*a))
    return found


def three(*shape, dtype=torch.float32):
    shape = shape or (2, 3, 17, 64)
    return [torch.randn(shape).to(dtype) for _ in range(3)]


def numpy_three():
    return [np.random.default_rng(i).standard_normal((2, 3, 17, 64), np.float32) for i in range(3)]


def bits(result):
    """Shapes, dtypes and bytes of results of any framework, to be compared."""
    results = result if isinstance(result, tuple) else (result,)
    arrays = (x.detach().view(torch.uint8).numpy() if isinstance(x, torch.Tensor) else x for x in results)
    return [
        (type(x), tuple(x.shape), str(x.dtype), a.tobytes() if isinstance(a, np.ndarray) else None)
        for x, a in zip(results, arrays, strict=True)
    ]


# ---------------------------------------------------------------- the same answers


@pytest.mark.filterwarnings("ignore::tvm_flash.LayoutWarning")
@pytest.mark.parametrize("layout", FUNCTIONS)
@pytest.mark.parametrize("case", PUBLIC_CASES, ids=lambda c: c.id)
def test_both_paths_answer_the_same(case, layout):
    need(case.dtype, case.head_dim)
    data = inputs(case)
    arguments = tensors(case, data, layout)
    for return_lse in (False, True):
        asked = {**options(case, data), "return_lse": return_lse}
        slowly = FUNCTIONS[layout](*arguments, **asked)
        again = FUNCTIONS[layout](*arguments, **asked)
        with fast.switched_off():
            assert bits(again) == bits(slowly) == bits(FUNCTIONS[layout](*arguments, **asked))


#: What makes a call's tensors and gives the call: an alignment that differs is another call to the fast path.
CALLS = {
    "plain": lambda: partial(flash_attention, *three()),
    "v2": lambda: partial(flash_attention_v2, *three(2, 17, 3, 64), causal=True),
    "bfloat16": lambda: partial(flash_attention, *three(dtype=torch.bfloat16)),
    "a scale of NumPy": lambda: partial(flash_attention, *three(), softmax_scale=1 / np.sqrt(64)),
    "window": lambda: partial(flash_attention, *three(), window_size=(5, 0), softcap=3.0),
    "alibi": lambda: partial(flash_attention, *three(), alibi_slopes=torch.rand(3)),
    "lse": lambda: partial(flash_attention, *three(), return_lse=True),
    "out": lambda: partial(flash_attention, *three(), out=torch.empty(2, 3, 17, 64)),
    "variant": lambda: partial(flash_attention, *three(), variant="".join(["a", "uto"])),
    "one row": lambda: partial(flash_attention, *three(1, 1, 1, 64)),
    "one row with lse": lambda: partial(flash_attention, *three(1, 1, 1, 64), return_lse=True),
    "transposed": lambda: partial(flash_attention, *(x.transpose(1, 2) for x in three(2, 17, 3, 64))),
    "parameters": lambda: partial(flash_attention, *(torch.nn.Parameter(x, requires_grad=False) for x in three())),
    "numpy": lambda: partial(flash_attention, *numpy_three(), causal=True, return_lse=True),
    "numpy out": lambda: partial(flash_attention, *numpy_three(), out=np.empty((2, 3, 17, 64), np.float32)),
    "selected": lambda: partial(BackendSelector("cpu").select_attention(2, 3, 17, 64), *three(), causal=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_repeated_call_is_fast(name, slow_calls):
    eager.forget()
    attend = CALLS[name]()
    for _ in range(3):
        attend()
        assert len(slow_calls) == 1


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("rows", [(1, 1), (1, 16), (2, 2), (9, 33)])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
def test_gradients_of_few_rows_and_heads_are_fast(heads, rows, layout, slow_calls):
    """Tensors of all in all one element are made too, since a kernel takes a shorter one for none."""
    forward, backward = {
        "bhsd": (flash_attention, flash_attention_backward),
        "bshd": (flash_attention_v2, flash_attention_v2_backward),
    }[layout]
    rng = np.random.default_rng(0)
    shapes = [(1, h, n, 64) for h, n in zip((heads[0], *heads[1:] * 2), (rows[0], *rows[1:] * 2), strict=True)]
    q, k, v = (rng.standard_normal(s if layout == "bhsd" else (s[0], s[2], s[1], s[3]), np.float32) for s in shapes)
    eager.forget()
    found = []
    for _ in range(3):
        out, lse = forward(q, k, v, return_lse=True)
        found.append(backward(out, q, k, v, out, lse))
    assert len(slow_calls) == 2  # each function's first
    assert all(map(np.array_equal, found[0], found[2]))


def test_equal_options_are_the_same_call(slow_calls):
    q, k, v = three()
    eager.forget()
    for _ in range(3):
        flash_attention(q, k, v, window_size=tuple(int(x) for x in "53"), variant="".join(["v", "1"]))
        BackendSelector("cpu").select_attention(2, 3, 17, 64)(q, k, v)
        assert len(slow_calls) == 2


class Number:
    """What has an ``__index__``, and may become another number."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


@pytest.mark.parametrize("needs_gradients", (False, True))
def test_options_that_have_become_others_are_another_call(needs_gradients):
    """A plan that was made for what a tensor held served for what it holds now."""
    q, k, v = (x.requires_grad_(needs_gradients) for x in three())
    want = [flash_attention(q, k, v, window_size=(left, 0)) for left in (2, 5)]
    whole, side, number = torch.tensor([2, 0]), torch.tensor(2), Number(2)
    windows = whole, (side, 0), (number, 0)
    for window in windows:
        assert torch.equal(flash_attention(q, k, v, window_size=window), want[0])
    whole[0], number.value = 5, 5
    side.fill_(5)
    for window in windows:
        assert torch.equal(flash_attention(q, k, v, window_size=window), want[1])


def test_options_of_numpy_have_a_plan():
    q, k, v = three()
    eager.forget()
    for _ in range(3):
        flash_attention(q, k, v, causal=np.bool_(True), window_size=(np.int64(5), np.int32(0)))
    assert len(eager._plans) == 1


def test_bfloat16_of_numpy_is_fast(slow_calls):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    q, k, v = (x.astype(ml_dtypes.bfloat16) for x in numpy_three())
    eager.forget()
    results = [flash_attention(q, k, v) for _ in range(3)]
    assert len(slow_calls) == 1 and results[2].dtype == q.dtype
    assert np.array_equal(results[0].view(np.uint16), results[2].view(np.uint16))
    with pytest.raises(TvmFlashError):
        flash_attention(*(x.view("V2") for x in (q, k, v)))


def test_random_calls_answer_as_the_slow_path_does():
    """Shapes, strides, dtypes, options and alignments in random order, most of them several times."""
    rng = random.Random(0)
    room = torch.randn(40_000)

    def view(shape):
        start, gap = rng.choice((0, 4, 16, 64)), rng.choice((0, 0, 8))
        size = (*shape[:-1], shape[-1] + gap)
        return room[start : start + int(np.prod(size))].view(size)[..., : shape[-1]]

    for _ in range(300):
        heads, kv_heads = rng.choice(((2, 2), (2, 1)))
        dtype = rng.choice((torch.float32, torch.bfloat16))
        q, k, v = (view((1, h, n, 64)).to(dtype) for h, n in zip((heads, kv_heads, kv_heads), (5, 6, 6), strict=True))
        asked = {
            "causal": rng.choice((False, True)),
            "softmax_scale": rng.choice((None, 0.5, np.float64(0.5), 1)),
            "window_size": rng.choice(((-1, -1), (2, 1), [2, 1])),
            "return_lse": rng.choice((False, True, 1)),
            "variant": rng.choice(("v1", "v2", "auto")),
            "alibi_slopes": rng.choice((None, torch.rand(heads))),
        }
        found = flash_attention(q, k, v, **asked)
        with fast.switched_off():
            assert bits(found) == bits(flash_attention(q, k, v, **asked)), asked


# ---------------------------------------------------------------- what is looked at in every call


def test_gradients_without_kernels(without_backward):
    q, k, v = three()
    want = flash_attention(q, k, v)
    assert torch.equal(flash_attention(q, k, v), want)
    for x in (q, k, v):
        x.requires_grad_()
        with pytest.raises(NotSupportedError, match="gradient is required"):
            flash_attention(q, k, v)
        for without in (torch.no_grad(), torch.inference_mode()):
            with without:
                assert torch.equal(flash_attention(q, k, v), want)
        x.requires_grad_(False)


def test_overlap_with_out(slow_calls):
    q, k, v, out = torch.randn(2, 17, 4, 3, 64).transpose(1, 3).unbind(2)  # they lie between one another
    want = flash_attention(q.contiguous(), k.contiguous(), v.contiguous())
    slow_calls.clear()
    for _ in range(3):
        assert torch.equal(flash_attention(q, k, v, out=out), want)
    assert len(slow_calls) == 3, "what interleaves needs a closer look"
    apart = torch.empty(2, 3, 17, 64)
    flash_attention(*three(), out=apart)
    for name, x in zip("qkv", (arguments := three()), strict=True):
        with pytest.raises(InvalidArgumentError, match=f"^out: shares memory with {name}"):
            flash_attention(*arguments, out=x)


def test_an_array_that_has_become_read_only():
    arguments, out = numpy_three(), np.empty((2, 3, 17, 64), np.float32)
    for _ in range(2):
        flash_attention(*arguments, out=out)
    out.flags.writeable = False
    with pytest.raises(InvalidArgumentError, match=r"^out: is read-only"):
        flash_attention(*arguments, out=out)


def test_misaligned_data(slow_calls):
    room = torch.zeros(3 * 2 * 17 * 64 + 1)
    q, k, v = three()
    eager.forget()
    for start in (0, 1, 0, 1):
        moved = room[start : start + q.numel()].view(q.shape).copy_(q)
        assert torch.equal(flash_attention(moved, k, v), flash_attention(q, k, v))
    assert len(slow_calls) == 2


def test_a_suspicious_layout_still_warns():
    q, k, v = three(1, 9, 4, 64)
    for _ in range(2):
        suspicion._warned.clear()
        with pytest.warns(LayoutWarning):
            flash_attention(q, k, v)


@pytest.mark.parametrize("wrong", (torch.float64, "device", "rank", "sparse", "list"))
def test_other_tensors_of_the_same_shapes(wrong):
    q, k, v = three()
    flash_attention(q, k, v)
    bad = {
        "device": lambda: k.to("meta"),
        "rank": lambda: k[None],
        "sparse": lambda: k.to_sparse(),
        "list": lambda: k.tolist(),
    }.get(wrong, lambda: k.to(wrong))()
    for _ in range(2):
        with pytest.raises(TvmFlashError, match=r"^k: "):
            flash_attention(q, bad, v)


def test_frameworks_are_not_mixed():
    arguments = numpy_three()
    q, k, v = (torch.from_numpy(x) for x in arguments)
    for _ in range(2):
        assert np.array_equal(flash_attention(q, k, v).numpy(), flash_attention(*arguments))
        with pytest.raises(TypeError, match=r"^k: is a numpy tensor, but q is one of torch"):
            flash_attention(q, arguments[1], v)


def test_subclasses_are_left_alone(slow_calls):
    class Other(torch.Tensor):
        pass

    q, k, v = three()
    want = flash_attention(q, k, v)
    slow_calls.clear()
    for _ in range(2):
        assert torch.equal(flash_attention(q.as_subclass(Other), k, v), want)
    assert len(slow_calls) == 2


# ---------------------------------------------------------------- failures, memory, the switch


def test_a_kernel_that_fails_is_reported_by_the_slow_path(monkeypatch, slow_calls):
    def refuse(*_):
        raise ValueError("no")

    function = ffi.tvm_ffi().convert(refuse)
    recipe = plan.Plan.recipe

    def with_refusal(self, *arguments):
        made = recipe(self, *arguments)
        made[1][0].launches[0].function = function.__chandle__()
        return made

    q, k, v = three()
    want = flash_attention(q, k, v)
    eager.forget()
    monkeypatch.setattr(plan.Plan, "recipe", with_refusal)
    slow_calls.clear()
    for _ in range(3):
        assert torch.equal(flash_attention(q, k, v), want)
    assert len(slow_calls) == 3
    eager.forget()


def test_an_allocation_that_fails(monkeypatch):
    def fail():
        raise MemoryError("no room")

    recipe = plan.Plan.recipe
    monkeypatch.setattr(plan.Plan, "recipe", lambda *a: (*recipe(*a)[:2], (fast.ways(fail, fail), None)))
    q, k, v = three()
    eager.forget()
    flash_attention(q, k, v)
    with pytest.raises(MemoryError, match="no room"):
        flash_attention(q, k, v)
    eager.forget()


def test_a_result_is_made_on_the_tensors_device(monkeypatch, slow_calls):
    """The quick way serves on the current device alone, and only if it made a tensor there."""
    current, recipe, used = [0], plan.Plan.recipe, []

    @ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.POINTER(ctypes.c_int32))
    def current_device(answer):
        answer[0] = max(current[0], 0)
        return current[0] < 0

    def way(name, device):
        return lambda: used.append(name) or torch.empty(2, 3, 17, 64, device=device)

    q, k, v = three()
    want = flash_attention(q, k, v)
    for quick, here, expected in (
        ("cpu", 0, ["quick"]),
        ("cpu", 1, ["sure"]),
        ("cpu", -1, ["sure"]),
        ("meta", 0, ["quick", "sure"]),
    ):

        def counted(self, *arguments, quick=quick):
            made = recipe(self, *arguments)
            made[1][0].current_device = ctypes.cast(current_device, ctypes.c_void_p).value
            return *made[:2], (fast.ways(way("quick", quick), way("sure", "cpu")), None)

        monkeypatch.setattr(plan.Plan, "recipe", counted)
        eager.forget()
        flash_attention(q, k, v)
        current[0] = here
        used.clear()
        slow_calls.clear()
        assert torch.equal(flash_attention(q, k, v), want)
        assert used == expected and not slow_calls
    eager.forget()


def test_nothing_leaks():
    q, k, v = three(1, 1, 1, 64)
    out, window, scale = torch.empty_like(q), (3, 4), 0.123
    held = [q, k, v, out, window, scale, None, torch.Tensor]

    def calls(count):
        for _ in range(count):
            flash_attention(q, k, v, window_size=window, softmax_scale=scale)
            flash_attention(q, k, v, window_size=window, softmax_scale=scale, out=out, return_lse=True)
            with contextlib.suppress(InvalidArgumentError):
                flash_attention(q, k, v, window_size=window, out=q)

    def counted():
        gc.collect()
        return [sys.getrefcount(x) for x in held]

    # What leaks, or is released too often, changes by thousands each time; other tests' threads refer to None as well.
    calls(10)
    counts = [counted()]
    for _ in range(3):
        calls(1000)
        counts.append(counted())
    changes = [[abs(b - a) for a, b in itertools.pairwise(of_one)] for of_one in zip(*counts, strict=True)]
    assert max(min(each) for each in changes) < 100, counts


def test_what_is_kept_is_bounded_and_forgotten(slow_calls):
    q, k, v = three(1, 1, 1, 64)
    eager.forget()
    for n in range(1100):
        flash_attention(q, k, v, softmax_scale=1 + n / 4096)
    slow_calls.clear()
    flash_attention(q, k, v, softmax_scale=1 + 1099 / 4096)
    assert not slow_calls
    flash_attention(q, k, v, softmax_scale=1.0)
    assert len(slow_calls) == 1, "the oldest should have gone"
    registry.refresh()
    assert fast._forget() == 0


@pytest.mark.parametrize("switch", ("0", "1"))
def test_the_switch(python, switch):
    program = """
import numpy as np, tvm_flash.call.fast
from tvm_flash.call import eager
from tvm_flash import flash_attention
q, k, v = (np.random.default_rng(i).standard_normal((1, 2, 9, 64), np.float32) for i in range(3))
print(flash_attention(q, k, v).tobytes() == flash_attention(q, k, v).tobytes(), not tvm_flash.call.fast.is_loaded())
"""
    has = any(f.file.startswith(CALL_STEM) for p in registry.registry().packs for f in p.manifest.support_files)
    assert python(program, **{fast.VARIABLE: switch}).split() == ["True", str(switch == "0" or not has)]


def test_a_library_of_another_version_is_left_alone(monkeypatch, tmp_path):
    library = tmp_path / "call.so"
    build_call_path(library)
    monkeypatch.delenv(fast.VARIABLE, raising=False)
    for change in ({"_ABI": fast._ABI + 1}, {"_supported": lambda: False}):
        with monkeypatch.context() as other:
            for name, value in {"_bind": None, **change}.items():
                other.setattr(fast, name, value)
            fast.load(library)
            assert not fast.is_loaded()


def test_interpreters_without_a_global_lock_are_refused(monkeypatch):
    assert fast._supported()
    monkeypatch.setattr(sys, "abiflags", "t")
    assert not fast._supported()

"""A call that somebody watches says what the same call says when nobody does."""

from __future__ import annotations

import contextlib
import re
import warnings

import pytest

torch = pytest.importorskip("torch")

from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from tvm_flash import (  # noqa: E402
    InvalidArgumentError,
    LayoutWarning,
    TvmFlashError,
    flash_attention,
    flash_attention_backward,
    flash_attention_paged,
    flash_attention_varlen,
    padded_attention,
)
from tvm_flash.call import suspicion  # noqa: E402
from tvm_flash.machine.device import Device  # noqa: E402
from tvm_flash.nn import scaled_dot_product_attention  # noqa: E402
from tvm_flash.selector import SelectedKernel  # noqa: E402

pytestmark = pytest.mark.usefixtures("cpu_pack")

Q = torch.randn(1, 2, 20, 32)

#: What is changed of a good call: tensors by position, options by name.
WRONG = {
    "causal": {"causal": "yes"},
    "window_size": {"window_size": 3},
    "window_size, negative": {"window_size": (-2, 0)},
    "window_size, a fraction": {"window_size": (1.5, 0)},
    "softmax_scale": {"softmax_scale": "1"},
    "softmax_scale, 0": {"softmax_scale": 0.0},
    "softmax_scale, a tensor": {"softmax_scale": torch.tensor(1.0)},
    "softcap": {"softcap": None},
    "softcap, negative": {"softcap": -1.0},
    "variant": {"variant": "v3"},
    "variant, a number": {"variant": 1},
    "return_lse": {"return_lse": 2},
    "alibi_slopes": {"alibi_slopes": [0.1, 0.2]},
    "alibi_slopes, shape": {"alibi_slopes": torch.rand(3)},
    "alibi_slopes, dtype": {"alibi_slopes": torch.rand(2).double()},
    "out, shape": {"out": torch.empty(3)},
    "out, dtype": {"out": torch.empty(1, 2, 20, 32, dtype=torch.float16)},
    "rank": {0: Q[0], 1: Q[0], 2: Q[0]},
    "float64": {0: Q.double(), 1: Q.double(), 2: Q.double()},
    "two dtypes": {1: Q.half()},
    "no tensor": {1: None},
    "lengths": {1: Q[:, :, :5]},
    "heads": {1: Q.repeat(1, 2, 1, 1), 2: Q.repeat(1, 2, 1, 1)},
    "head_dim": {0: Q[..., :31], 1: Q[..., :31], 2: Q[..., :31]},
    "strides": {0: Q.transpose(2, 3).contiguous().transpose(2, 3)},
}


def attend(changes, put=lambda x: x):
    given = [put(changes.get(i, Q)) for i in range(3)]
    return flash_attention(*given, **{name: put(x) for name, x in changes.items() if isinstance(name, str)})


def profiled(changes):
    with torch.profiler.profile():
        return attend(changes)


def in_a_mode(changes):
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            return function(*arguments, **(options or {}))

    with Mode():
        return attend(changes)


def fake(changes):
    with FakeTensorMode() as mode:
        return attend(changes, lambda x: mode.from_tensor(x) if _is_big(x) else x)


def on_meta(changes):
    return attend(changes, lambda x: x.to("meta") if _is_big(x) else x)


def traced(changes):
    return make_fx(lambda x: attend({**changes, 2: changes.get(2, x)}))(Q)


def mapped(changes):
    def call(x):
        return attend({**changes, 2: changes.get(2, x)})

    return torch.vmap(call)(Q[None])


def compiled(changes):
    torch._dynamo.reset()
    return torch.compile(lambda: attend(changes), backend="eager")()


def _is_big(x):
    return isinstance(x, torch.Tensor) and x.ndim > 0


WATCHERS = (profiled, in_a_mode, fake, on_meta, traced, mapped)


def said(way, changes):
    with pytest.raises(TvmFlashError) as caught:
        way(changes)
    return type(caught.value), re.sub("FakeTensor|Tensor", "tensor", str(caught.value))


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.filterwarnings("ignore")
def test_the_same_error(wrong):
    plain = said(attend, WRONG[wrong])
    for way in WATCHERS:
        assert said(way, WRONG[wrong]) == plain, way.__name__


COMPILED = ("causal", "softmax_scale, a tensor", "rank", "lengths", "heads", "no tensor")


def test_a_program_that_is_compiled_is_no_way_round(python):
    """In a process of its own: what others have compiled before leaves TorchDynamo less room to recurse."""
    python("from tests import test_torch_watched_errors as here\nhere.try_compiled()")


def try_compiled():
    for wrong in COMPILED:
        kind, _ = said(attend, WRONG[wrong])
        with pytest.raises(Exception) as caught, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compiled(WRONG[wrong])
        message = str(caught.value)
        assert isinstance(caught.value, kind) or kind.__name__ in message or wrong.split(",")[0] in message, wrong


@contextlib.contextmanager
def warned():
    """The warnings of layouts in a block."""
    suspicion._warned.clear()
    found: list = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield found
    found += [x for x in caught if x.category is LayoutWarning]


@pytest.mark.parametrize("way", (attend, *WATCHERS, compiled), ids=lambda way: way.__name__)
def test_the_same_warning(way):
    wide = torch.zeros(1, 20, 4, 32)
    changes = dict.fromkeys(range(3), wide)
    with warned() as found:
        way(changes)
    assert len(found) == 1 and "flash_attention_v2" in str(found[0].message)
    if way is not compiled:
        assert found[0].filename == __file__
    with warned() as found:
        way({i: wide.transpose(1, 2) for i in range(3)})
    assert not found


@pytest.mark.parametrize("way", ("profiled", "compiled"))
def test_who_is_sure_of_the_layout_isnt_warned(way):
    wide = torch.zeros(1, 20, 4, 32)

    def both():
        padded_attention(wide, wide, wide, torch.tensor([[0, 4]], dtype=torch.int32))
        scaled_dot_product_attention(wide, wide, wide)

    with warned() as found:
        if way == "compiled":
            torch.compile(both, backend="eager")()
        else:
            with torch.profiler.profile():
                both()
    assert not found


@pytest.mark.parametrize("way", (attend, profiled, in_a_mode, traced), ids=lambda way: way.__name__)
def test_out_that_is_an_input(way):
    with pytest.raises(InvalidArgumentError, match="out: shares memory with q"):
        way({0: Q, "out": Q})


def test_a_kernel_that_was_selected_for_another_device():
    kernel = SelectedKernel("v2", "bhsd", "sm_90a", "", Device("cuda", 0))
    for watch in (contextlib.nullcontext, torch.profiler.profile):
        with watch(), pytest.raises(InvalidArgumentError, match=r"^q: is on cpu, .*selected for cuda:0"):
            kernel(Q, Q, Q)
    selected = SelectedKernel("v2", "bhsd", "cpu", "", Device("cpu", 0))
    assert selected(*[Q.to("meta")] * 3).shape == Q.shape


STARTS = torch.tensor([0, 20], dtype=torch.int32)
ROWS, LSE = Q[0].transpose(0, 1), torch.zeros(1, 2, 20)
PAGES, TABLE, LENGTHS = torch.randn(3, 8, 2, 32), torch.tensor([[2, 0, 1]], dtype=torch.int32), STARTS[1:]


@pytest.mark.parametrize(
    ("function", "tensors", "options"),
    [
        (
            flash_attention,
            (Q, Q, Q),
            {"alibi_slopes": torch.rand(2), "sinks": torch.rand(2), "out": torch.empty_like(Q)},
        ),
        (padded_attention, (Q, Q, Q, torch.tensor([[0, 9]], dtype=torch.int32)), {"query_start": LENGTHS}),
        (flash_attention_varlen, (ROWS, ROWS, ROWS, STARTS, STARTS), {"alibi_slopes": torch.rand(2)}),
        (flash_attention_paged, (ROWS, PAGES, PAGES, STARTS, LENGTHS, TABLE), {"sinks": torch.rand(2)}),
        (flash_attention_backward, (Q, Q, Q, Q, Q, LSE), {"dlse": LSE, "dq": torch.empty_like(Q)}),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_tensor_without_memory_among_others_is_refused(function, tensors, options):
    """Nothing is computed of one, so that the result would be what happened to be in memory."""
    function(*tensors, **options)
    for i in range(len(tensors)):
        with pytest.raises(TvmFlashError, match=r"is on (meta|cpu)"):
            function(*tensors[:i], tensors[i].to("meta"), *tensors[i + 1 :], **options)
    for name, x in options.items():
        with pytest.raises(TvmFlashError, match=f"{name}: is on meta"):
            function(*tensors, **{**options, name: x.to("meta")})


def test_a_mask_without_memory_is_refused_by_the_drop_in():
    for mask in (torch.ones(20, 20, dtype=torch.bool, device="meta"), torch.zeros(20, 20, device="meta")):
        with pytest.raises(TvmFlashError, match="attn_mask: is on meta"):
            scaled_dot_product_attention(Q, Q, Q, mask)


def test_a_tensor_without_memory_is_refused_by_the_operators_themselves():
    operators = torch.ops.tvm_flash
    with pytest.raises(TvmFlashError, match="is on meta"):
        operators.attention(Q, Q, Q, torch.rand(2, device="meta"))
    with pytest.raises(TvmFlashError, match="is on meta"):
        operators.attention_varlen(ROWS, ROWS, ROWS, STARTS.to("meta"), STARTS)
    with pytest.raises(TvmFlashError, match="is on meta"):
        operators.attention_paged(ROWS, PAGES, PAGES, STARTS, LENGTHS, TABLE.to("meta"))

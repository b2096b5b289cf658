"""Wrong calls: the type of the error, the argument and the remedy in its message, and nothing written."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tvm_flash import (
    ArgumentTypeError,
    BackendSelector,
    InvalidArgumentError,
    KernelNotFoundError,
    LayoutError,
    LayoutWarning,
    NotSupportedError,
    TvmFlashError,
    custom_attention,
    flash_attention,
    flash_attention_backward,
    flash_attention_v2,
    flash_attention_varlen,
    flash_attention_with_kvcache,
    padded_attention,
)
from tvm_flash.call import eager

pytestmark = pytest.mark.usefixtures("cpu_pack")


def good() -> dict:
    """A call that works: grouped heads, bhsd."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, n, 64, generator=generator) for h, n in ((4, 17), (2, 23), (2, 23)))
    return {"q": q, "k": k, "v": v}


@dataclass(frozen=True)
class Wrong:
    """What is changed of the good call, which error is expected, and what its message says."""

    name: str
    change: dict
    error: type
    builtin: type
    says: tuple[str, ...]


g = good()
q, k, v = g["q"], g["k"], g["v"]
buffer = torch.zeros(2 * 4 * 17 * 64 * 2)

WRONG = [
    # Not tensors, wrong rank, wrong dtype, mixed.
    Wrong("list", {"q": [1.0]}, ArgumentTypeError, TypeError, ("q: is a builtins.list", "torch.as_tensor")),
    Wrong("none", {"k": None}, ArgumentTypeError, TypeError, ("k: is a builtins.NoneType", "torch.as_tensor")),
    Wrong("rank 3", {"q": q[0]}, InvalidArgumentError, ValueError, ("q: has shape", "rank 3", "q[None]")),
    Wrong("rank 5", {"v": v[None]}, InvalidArgumentError, ValueError, ("v: has shape", "rank 5", "4 dimensions")),
    Wrong("rank 0", {"k": torch.tensor(1.0)}, InvalidArgumentError, ValueError, ("k: has shape ()", "rank 0")),
    Wrong("float64", {"q": q.double()}, ArgumentTypeError, TypeError, ("q: has dtype float64", "torch.float32")),
    Wrong("int32", {"k": k.int()}, ArgumentTypeError, TypeError, ("k: has dtype int32", "convert")),
    Wrong("bool", {"v": v > 0}, ArgumentTypeError, TypeError, ("v: has dtype bool", "convert")),
    Wrong("complex", {"q": q + 0j}, ArgumentTypeError, TypeError, ("q: has dtype complex64", "convert")),
    Wrong("mixed dtypes", {"k": k.half()}, ArgumentTypeError, TypeError, ("k: has dtype float16, but q", "convert")),
    Wrong("mixed dtypes v", {"v": v.bfloat16()}, ArgumentTypeError, TypeError, ("v: has dtype bfloat16", "convert")),
    Wrong("mixed frameworks", {"k": k.numpy()}, ArgumentTypeError, TypeError, ("k: is a numpy tensor", "convert")),
    Wrong("sparse", {"q": q.to_sparse()}, ArgumentTypeError, TypeError, ("q: has the layout", ".to_dense()")),
    Wrong("meta", {"q": q.to("meta")}, ArgumentTypeError, TypeError, ("is on cpu, expected meta, where q is", "move")),
    # Shapes.
    Wrong("batch", {"k": k[:1], "v": v[:1]}, InvalidArgumentError, ValueError, ("k: has batch 1, but q has 2",)),
    Wrong("batch of v", {"v": v[:1]}, InvalidArgumentError, ValueError, ("v: has batch 1, but q has 2",)),
    Wrong("head_dim", {"k": k[..., :32]}, InvalidArgumentError, ValueError, ("k: has head_dim 32, but q has 64",)),
    Wrong("head_dim 60", {"q": q[..., :60], "k": k[..., :60]}, InvalidArgumentError, ValueError,
          ("q: has head_dim 60", "multiple of 8", "zeros to 64")),
    Wrong("head_dim 0", {"q": q[..., :0], "k": k[..., :0]}, InvalidArgumentError, ValueError,
          ("q: has head_dim 0", "multiple of 8")),
    Wrong("head_dim_v 12", {"v": v[..., :12]}, InvalidArgumentError, ValueError,
          ("v: has head_dim 12", "zeros to 16")),
    Wrong("head_dim too large", {n: torch.zeros(1, 1, 9, 1024) for n in "qkv"}, KernelNotFoundError,
          NotImplementedError, ("no cpu kernel for head_dim 1024", "tvm_flash build --arch cpu --head-dim 1024")),
    Wrong("head_dim_v too large", {"v": torch.zeros(2, 2, 23, 1024)}, KernelNotFoundError,
          NotImplementedError, ("head_dim 64:1024", "tvm_flash build --arch cpu --head-dim 64:1024")),
    Wrong("kv_heads", {"k": k[:, :1].expand(-1, 3, -1, -1), "v": v[:, :1].expand(-1, 3, -1, -1)},
          InvalidArgumentError, ValueError, ("k: has 3 heads", "divisor of q's 4", "flash_attention")),
    Wrong("no kv heads", {"k": k[:, :0], "v": v[:, :0]}, InvalidArgumentError, ValueError, ("k: has 0 heads",)),
    Wrong("heads of v", {"v": v[:, :1]}, InvalidArgumentError, ValueError, ("v: has 1 heads, but k has 2",)),
    Wrong("length of v", {"v": v[:, :, :20]}, InvalidArgumentError, ValueError, ("v: has length 20, but k has 23",)),
    # Memory.
    Wrong("last dimension", {"q": torch.zeros(2, 4, 64, 17).transpose(2, 3)}, InvalidArgumentError, ValueError,
          ("q: has strides", "contiguous last dimension", "q.contiguous()")),
    Wrong("every second", {"v": torch.zeros(2, 2, 23, 128)[..., ::2]}, InvalidArgumentError, ValueError,
          ("v: has strides", "v.contiguous()")),
    Wrong("expanded last", {"k": k[..., :1].expand(-1, -1, -1, 64)}, InvalidArgumentError, ValueError,
          ("k: has strides", "k.contiguous()")),
    Wrong("too many bytes", {n: torch.zeros(1, 1, 1, 64).expand(2**19, 2**19, 2**18, 64) for n in "qkv"},
          InvalidArgumentError, ValueError, ("q: the result would have shape",)),
    # Options.
    Wrong("causal", {"causal": "yes"}, ArgumentTypeError, TypeError, ("causal: is 'yes'", "True or False")),
    Wrong("causal tensor", {"causal": torch.ones(2)}, ArgumentTypeError, TypeError, ("causal: is", "True or False")),
    Wrong("return_lse", {"return_lse": 2}, ArgumentTypeError, TypeError, ("return_lse: is 2", "True or False")),
    Wrong("window below", {"window_size": (-2, 0)}, InvalidArgumentError, ValueError,
          ("window_size: is (-2, 0)", "(-1, -1)")),
    Wrong("window number", {"window_size": 5}, ArgumentTypeError, TypeError, ("window_size: is 5", "two integers")),
    Wrong("window three", {"window_size": (1, 2, 3)}, ArgumentTypeError, TypeError, ("window_size:", "two integers")),
    Wrong("window floats", {"window_size": (1.5, 2)}, ArgumentTypeError, TypeError, ("window_size:", "two integers")),
    Wrong("scale nan", {"softmax_scale": float("nan")}, InvalidArgumentError, ValueError,
          ("softmax_scale: is nan", "1/sqrt(head_dim)")),
    Wrong("scale 0", {"softmax_scale": 0.0}, InvalidArgumentError, ValueError, ("softmax_scale: is 0.0", "positive")),
    Wrong("scale negative", {"softmax_scale": -1}, InvalidArgumentError, ValueError, ("softmax_scale: is -1.0",)),
    Wrong("scale infinite", {"softmax_scale": float("inf")}, InvalidArgumentError, ValueError,
          ("softmax_scale: is inf",)),
    Wrong("scale beyond float32", {"softmax_scale": 1e-60}, InvalidArgumentError, ValueError,
          ("softmax_scale: is 1e-60",)),
    Wrong("scale beyond floats", {"softmax_scale": 10**400}, InvalidArgumentError, ValueError,
          ("softmax_scale: is larger than any float",)),
    Wrong("scale text", {"softmax_scale": "1"}, ArgumentTypeError, TypeError, ("softmax_scale: is a str", "float(")),
    Wrong("scale tensor", {"softmax_scale": torch.tensor(0.1)}, ArgumentTypeError, TypeError,
          ("softmax_scale: is a Tensor", "float(softmax_scale)")),
    Wrong("softcap negative", {"softcap": -1.0}, InvalidArgumentError, ValueError,
          ("softcap: is -1.0", "0 for no soft cap")),
    Wrong("softcap nan", {"softcap": float("nan")}, InvalidArgumentError, ValueError, ("softcap: is nan",)),
    Wrong("variant", {"variant": "v3"}, InvalidArgumentError, ValueError, ("variant: is 'v3'", "'v1', 'v2', 'auto'")),
    Wrong("variant list", {"variant": ["v1"]}, InvalidArgumentError, ValueError, ("variant: is ['v1']",)),
    # Slopes.
    Wrong("slopes shape", {"alibi_slopes": torch.zeros(3)}, InvalidArgumentError, ValueError,
          ("alibi_slopes: has shape (3,)", "(4,) or (2, 4)")),
    Wrong("slopes dtype", {"alibi_slopes": torch.zeros(4).double()}, ArgumentTypeError, TypeError,
          ("alibi_slopes: has dtype float64", "float32")),
    Wrong("slopes list", {"alibi_slopes": [0.1] * 4}, ArgumentTypeError, TypeError,
          ("alibi_slopes: is a builtins.list",)),
    Wrong("slopes numpy", {"alibi_slopes": np.zeros(4, np.float32)}, ArgumentTypeError, TypeError,
          ("alibi_slopes: is a numpy tensor",)),
    # Results.
    Wrong("out shape", {"out": torch.zeros(2, 4, 17, 32)}, InvalidArgumentError, ValueError,
          ("out: has shape (2, 4, 17, 32)", "expected (2, 4, 17, 64)")),
    Wrong("out layout", {"out": torch.zeros(2, 17, 4, 64)}, InvalidArgumentError, ValueError, ("out: has shape",)),
    Wrong("out dtype", {"out": torch.zeros(2, 4, 17, 64).half()}, ArgumentTypeError, TypeError,
          ("out: has dtype float16", "float32 as q has")),
    Wrong("out framework", {"out": np.zeros((2, 4, 17, 64), np.float32)}, ArgumentTypeError, TypeError,
          ("out: is a numpy tensor",)),
    Wrong("out strides", {"out": torch.zeros(2, 4, 64, 17).transpose(2, 3)}, InvalidArgumentError, ValueError,
          ("out: has strides", "contiguous last dimension")),
    Wrong("out expanded", {"out": torch.zeros(1, 4, 17, 64).expand(2, -1, -1, -1)}, InvalidArgumentError, ValueError,
          ("out: has strides", "share memory")),
    Wrong("out is q", {"q": q, "out": q}, InvalidArgumentError, ValueError,
          ("out: shares memory with q", "leave it out")),
    Wrong("out overlaps k", {"k": buffer[: 2 * 2 * 23 * 64].view(2, 2, 23, 64),
                              "out": buffer[64 : 64 + q.numel()].view(q.shape)},
          InvalidArgumentError, ValueError, ("out: shares memory with k",)),
]  # fmt: skip


@pytest.mark.parametrize("case", WRONG, ids=lambda c: c.name)
def test_a_wrong_call(case):
    arguments = {**good(), **case.change}
    if "out" not in arguments:
        q, v = arguments["q"], arguments["v"]
        plain = all(isinstance(x, torch.Tensor) and x.ndim == 4 and x.numel() < 2**20 for x in (q, v))
        arguments["out"] = torch.full((*q.shape[:3], v.shape[3]) if plain else (2, 4, 17, 64), torch.nan)
    before = arguments["out"].copy() if isinstance(arguments["out"], np.ndarray) else arguments["out"].clone()
    plans = len(eager._plans)
    for _ in range(2):  # the second time, nothing that was remembered lets it through
        with pytest.raises(case.error) as caught:
            flash_attention(**arguments)
        assert isinstance(caught.value, TvmFlashError) and isinstance(caught.value, case.builtin)
        for part in case.says:
            assert part in str(caught.value)
    assert len(eager._plans) <= plans + 1
    after = arguments["out"]
    assert np.array_equal(np.asarray(after), np.asarray(before), equal_nan=True)
    flash_attention(**good())


def test_the_good_call_then_a_wrong_one_of_the_same_shapes():
    flash_attention(**good(), softmax_scale=0.5)
    for scale in (np.array(0.5), torch.tensor(0.5)):
        with pytest.raises(ArgumentTypeError, match=r"^softmax_scale"):
            flash_attention(**good(), softmax_scale=scale)


def test_overlap_is_looked_for_in_every_call():
    arguments = {**good(), "k": good()["q"].clone(), "v": good()["q"].clone()}
    flash_attention(**arguments, out=torch.empty(2, 4, 17, 64))
    for name in ("q", "k", "v"):
        before = arguments[name].clone()
        with pytest.raises(InvalidArgumentError, match=rf"^out: shares memory with {name}"):
            flash_attention(**arguments, out=arguments[name])
        assert torch.equal(arguments[name], before)


def zeros(*shape) -> np.ndarray:
    return np.zeros(shape, np.float32)


def test_overlap_is_looked_for_where_there_are_no_keys():
    """Results are zeros then, which nobody may write into the queries either."""
    q, none = np.ones((2, 4, 17, 64), np.float32), zeros(2, 2, 0, 64)
    rows, no_rows, starts = q[0], zeros(0, 17, 64), np.array([0, 4], np.int32)
    with pytest.raises(InvalidArgumentError, match=r"^out: shares memory with q"):
        flash_attention(q, none, none, out=q)
    with pytest.raises(InvalidArgumentError, match=r"^out: shares memory with q"):
        flash_attention_varlen(rows, no_rows, no_rows, starts, 0 * starts, out=rows)
    with pytest.raises(InvalidArgumentError, match=r"^dq: shares memory with q"):
        flash_attention_backward(zeros(*q.shape), q, none, none, zeros(*q.shape), zeros(2, 4, 17), dq=q)
    assert (q == 1).all()


def test_overlap_is_looked_for_where_there_are_no_queries():
    k, none = np.ones((2, 2, 23, 64), np.float32), zeros(2, 4, 0, 64)
    call = none, none, k, zeros(*k.shape), none, zeros(2, 4, 0)
    with pytest.raises(InvalidArgumentError, match=r"^dk: shares memory with k"):
        flash_attention_backward(*call, dk=k)
    both = np.ones_like(k)
    with pytest.raises(InvalidArgumentError, match=r"^dv: shares memory with dk, which is written too"):
        flash_attention_backward(*call, dk=both, dv=both)
    assert (k == 1).all() and (both == 1).all()


def test_misaligned_data():
    """float32 data at an odd address: no kernel takes it."""
    raw = np.zeros(2 * 4 * 17 * 64 * 4 + 1, np.uint8)
    odd = raw[1:].view(np.float32).reshape(2, 4, 17, 64)
    k, v = (x.numpy() for x in (good()["k"], good()["v"]))
    out = np.full((2, 4, 17, 64), np.nan, np.float32)
    flash_attention(good()["q"].numpy(), k, v, out=out.copy())
    for _ in range(2):
        with pytest.raises(InvalidArgumentError, match=r"multiple of 1 bytes.*copy"):
            flash_attention(odd, k, v, out=out)
    assert np.isnan(out).all()


def test_names_of_gradients_and_layouts_that_are_none():
    q, k, v = good().values()
    out, lse = flash_attention(q, k, v, return_lse=True)
    for gradients in (3, None, float("nan"), "sinks"):
        with pytest.raises(ArgumentTypeError, match=r"^gradients: is .*, expected a tuple of names"):
            flash_attention_backward(out, q, k, v, out, lse, gradients=gradients)
    for layout in (np.zeros(3), None, ["bhsd"]):
        with pytest.raises(InvalidArgumentError, match=r"^layout: is .*, expected one of 'bhsd', 'bshd'"):
            padded_attention(q, k, v, torch.zeros(2, 2, dtype=torch.int32), layout=layout)


@pytest.mark.parametrize("name", ("q", "v", "alibi_slopes", "sinks", "out", "cu_seqlens_q", "lse", "k_cache"))
def test_tensors_whose_memory_was_given_back(name):
    """As parameters of a module that is sharded have none outside of its forward; a call before had some."""
    q, k, v = good().values()
    rows = [x[0].transpose(0, 1) for x in (q, k, v)]
    starts, ends = (torch.tensor([0, n], dtype=torch.int32) for n in (17, 23))
    cache = torch.zeros(2, 32, 2, 64)
    of_heads = {"alibi_slopes": torch.rand(4), "sinks": torch.rand(4)}
    result, lse = flash_attention(q, k, v, return_lse=True)
    given = {"q": q, "k": k, "v": v, "out": torch.full_like(q, torch.nan), **of_heads}
    attend = flash_attention
    if name == "cu_seqlens_q":
        attend, out = flash_attention_varlen, torch.full_like(rows[0], torch.nan)
        given = {**dict(zip("qkv", rows, strict=True)), "cu_seqlens_q": starts, "cu_seqlens_k": ends, "out": out}
    elif name == "lse":
        attend, given = flash_attention_backward, {"dout": result, **good(), "out": result, "lse": lse}
    elif name == "k_cache":
        attend, new = flash_attention_with_kvcache, k[:, :, :1].transpose(1, 2)
        given = {"q": q[:, :, :1].transpose(1, 2), "k_cache": cache, "v_cache": cache.clone(), "k": new, "v": new}
        given |= {"cache_seqlens": 3, **of_heads}
    for _ in range(2):
        attend(**given)
    given[name].untyped_storage().resize_(0)
    if name not in ("out", "lse", "k_cache"):
        given["out"].fill_(torch.nan)
    for _ in range(2):
        with pytest.raises(InvalidArgumentError, match=rf"^{name}: has no memory, .*; give it some before the call"):
            attend(**given)
    assert name in ("out", "lse", "k_cache") or given["out"].isnan().all()
    if name == "k_cache":
        given["k_cache"] = cache = torch.zeros(2, 32, 2, 64)
        given["sinks"].untyped_storage().resize_(0)
        with pytest.raises(InvalidArgumentError, match=r"^sinks: has no memory"):
            attend(**given)
        assert not cache.any()


def test_a_read_only_result():
    arguments = {name: x.numpy() for name, x in good().items()}
    out = np.full((2, 4, 17, 64), np.nan, np.float32)
    out.flags.writeable = False
    with pytest.raises(InvalidArgumentError, match=r"^out: is read-only; leave it out"):
        flash_attention(**arguments, out=out)
    assert np.isnan(out).all()


def test_gradients(without_backward):
    arguments = good()
    for name in "qkv":
        needs = {**arguments, name: arguments[name].clone().requires_grad_()}
        with pytest.raises(NotSupportedError, match=rf"^{name}: a gradient .*torch\.no_grad") as caught:
            flash_attention(**needs)
        assert isinstance(caught.value, NotImplementedError)
        with torch.no_grad():
            assert torch.equal(flash_attention(**needs), flash_attention(**arguments))


def test_swapped_layouts_that_make_no_sense():
    q, k = torch.zeros(2, 8, 512, 64), torch.zeros(2, 8, 500, 64)
    with pytest.raises(
        LayoutError, match=r"\(batch, heads, seq, head_dim\).*call flash_attention, or transpose"
    ) as caught:
        flash_attention_v2(q, k, k)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(LayoutError, match=r"\(batch, seq, heads, head_dim\).*call flash_attention_v2"):
        flash_attention(q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2))


def test_one_tensor_in_the_other_layout():
    q, k, v = good()["q"], good()["k"].transpose(1, 2), good()["v"].transpose(1, 2)
    with pytest.raises(InvalidArgumentError, match=r"^k: has 23 heads, expected a divisor of q's 4; the layout of"):
        flash_attention(q, k, v)


def test_suspicious_layouts_warn_once_a_place():
    x, y = torch.zeros(1, 64, 4, 64), torch.zeros(1, 65, 4, 64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for tensor in (x, y, x):
            flash_attention(tensor, tensor, tensor)  # one place, two shapes
        flash_attention_v2(x.transpose(1, 2), x.transpose(1, 2), x.transpose(1, 2))  # swapped on purpose: a view
        flash_attention(*(torch.zeros(1, 8, 1, 64) for _ in range(3)))  # a decoder's first step
    assert [w.category for w in caught] == [LayoutWarning]
    assert "call flash_attention_v2" in str(caught[0].message) and caught[0].filename == __file__


def test_the_selector():
    selector = BackendSelector("cpu")
    for change, says in (
        ({"batch": 0}, "batch: is 0"),
        ({"heads": 2.5}, "heads: is 2.5"),
        ({"head_dim": 60}, "head_dim: is 60, expected a multiple of 8"),
        ({"kv_heads": 3}, "kv_heads: is 3, expected a divisor"),
        ({"dtype": "float64"}, "dtype: is 'float64', expected one of"),
        ({"layout": "sbhd"}, "layout: is 'sbhd', expected one of"),
        ({"causal": "no"}, "causal: is 'no'"),
    ):
        with pytest.raises(TvmFlashError, match=says):
            selector.select_attention(**{"batch": 2, "heads": 4, "seq_len": 9, "head_dim": 64, **change})
    with pytest.raises(ArgumentTypeError, match=r"^device: is 'tpu', expected"):
        BackendSelector("tpu")
    with pytest.raises(InvalidArgumentError, match=r"^device: is 'cuda:99', but this machine has"):
        BackendSelector("cuda:99")
    with pytest.raises(InvalidArgumentError, match=r"^prefer: is 'size', expected"):
        BackendSelector("cpu", prefer="size")


def test_custom_attention():
    with pytest.raises(InvalidArgumentError, match=r"definition 'nobody'.*--definition <file.py>:nobody"):
        custom_attention("nobody")


def test_each_place_is_warned_of_the_same_shapes():
    x = torch.zeros(1, 66, 4, 64)
    with pytest.warns(LayoutWarning):
        flash_attention(x, x, x)
    with pytest.warns(LayoutWarning):
        flash_attention(x, x, x)

"""Definitions that read tensors over any axes of scores, or tables; masks that are joined; their kernels, gradients."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import s_tir
from tvm.ir.expr import TensorLoad
from tvm.script import tirx as T
from tvm.tirx import BufferStore, PrimFunc

from schedules.definition.attention import AXES, Attention
from schedules.definition.catalogue import FULL, MASKS, Mask, ScoreModification
from schedules.definition.derive import derive
from schedules.definition.pattern import DefinitionError, match
from schedules.families import schedule
from schedules.families.interface import DECODE, PARTIAL, Rejected, Target
from schedules.templates import v2
from tests import oracle
from tests.built import build_kernels
from tests.definitions.with_tensors import documents, learnt_relative, own_sink, relative
from tvm_flash import reference
from tvm_flash.packs.manifest import Param

ROOT = Path(__file__).resolve().parent.parent
BATCH, HEADS, KV_HEADS, SCALE = 2, 4, 2, 0.2


def axes_of(attention):
    return {p.name: p.axes for p in attention.params}


def problem(attention, seqlen_q, seqlen_kv, head_dim, seed=0):
    """q, k, v, the gradient of the output, and parameters, some with a size of 1 where they are the same for all."""
    rng = np.random.default_rng(seed)
    sizes = ((HEADS, seqlen_q), (KV_HEADS, seqlen_kv), (KV_HEADS, seqlen_kv), (HEADS, seqlen_q))
    tensors = [rng.standard_normal((BATCH, *n, head_dim), np.float32) for n in sizes]
    values = {
        "bias": rng.standard_normal((HEADS, seqlen_q, seqlen_kv), np.float32),
        "key_bias": rng.standard_normal((BATCH, seqlen_kv)).astype(np.float16),
        "gate": rng.random((BATCH, seqlen_q), np.float32),
        "q_document": np.sort(rng.integers(0, 4, (BATCH, seqlen_q))).astype(np.int32),
        "k_document": np.sort(rng.integers(0, 4, (BATCH, seqlen_kv))).astype(np.int32),
        "positions": rng.standard_normal((HEADS, 41), np.float32),
        "allowed": rng.random((BATCH, 1, seqlen_q, seqlen_kv)) < 0.4,
    }
    values["logit"] = rng.standard_normal(HEADS, np.float32)
    values["allowed"][0, 0, :, : seqlen_kv // 2] = False  # tiles in which nobody sees anything
    values["allowed"][1, 0, seqlen_q // 2] = False  # and a row
    return (*tensors, {p.name: values[p.name] for p in attention.params})


def whole(attention, params, seqlen_q, seqlen_kv):
    """Tensors with all sizes, as the oracles take them."""
    sizes = {"b": BATCH, "h": HEADS, "i": seqlen_q, "j": seqlen_kv}
    return {
        p.name: np.broadcast_to(params[p.name], [sizes[a] for a in p.axes]).copy() if p.axes else params[p.name]
        for p in attention.params
    }


def twins(attention):
    return {
        "softmax_scale": SCALE,
        "mask": attention.mask.twin,
        "score": attention.score.twin,
        "axes": axes_of(attention),
    }


@pytest.mark.parametrize("attention", (documents, relative), ids=("documents", "relative"))
def test_the_oracle_agrees_with_the_twin(attention):
    q, k, v, _, params = problem(attention, 9, 13, 8)
    given = whole(attention, params, 9, 13)
    found = oracle.operator(attention, "forward", 8, 8)(q=q, k=k, v=v, softmax_scale=SCALE, **given)
    want, want_lse = reference.attention(q, k, v, params=params, **twins(attention))
    np.testing.assert_allclose(found.o, want, atol=2e-6, rtol=0)
    np.testing.assert_allclose(found.lse, want_lse, atol=2e-6, rtol=0)


def test_what_is_read_of_a_definition_is_what_was_written():
    for attention in (documents, relative):
        pattern = match(attention(8, "float32"))
        assert pattern.params == attention.params and pattern.is_opaque
        assert match(derive(pattern, "partial")).params == attention.params
    assert [p.name for p in match(documents(8, "float32")).of_mask] == ["q_document", "k_document"]


def test_the_gradient_of_a_table_by_the_oracle():
    """Each element has the sum over all scores that read it, those of indices beyond the ends included."""
    q, k, v, dout, params = problem(learnt_relative, 9, 43, 8)
    given = {"axes": axes_of(learnt_relative), "softmax_scale": SCALE, "score": learnt_relative.score.twin}
    positions = {"positions": params["positions"]}
    unmasked = Attention(learnt_relative.score)
    found = oracle.gradients(unmasked, dout, q, k, v, SCALE, positions)
    exact = reference.attention_backward(dout, q, k, v, params=positions, gradients=("positions",), **given)
    np.testing.assert_allclose(found.d_positions, exact.params["positions"], atol=5e-6, rtol=0)
    assert np.abs(exact.params["positions"][:, -1]).min() > 1e-3  # what is beyond the end, too
    np.testing.assert_allclose(found.dq, exact.dq, atol=5e-6, rtol=0)


def test_tables_that_make_no_sense_are_refused():
    learnt = Param("positions", "float32", rank=2, gradient=True)
    by_score = ScoreModification(
        "by_score", lambda s, at: s + at.table["positions"](at.h, T.Cast("int32", s)), relative.score.twin, (learnt,)
    )
    with pytest.raises(DefinitionError, match="no derivative with respect to s is known of positions"):
        derive(match(Attention(by_score)(8, "float32")), "backward")
    wrong = ScoreModification("wrong", lambda s, at: s + at.table["positions"](at.h), relative.score.twin, (learnt,))
    with pytest.raises(tvm.error.DiagnosticError, match="'positions': has rank 2, and 1 indices"):
        Attention(wrong)(8, "float32")


def test_parameters_that_make_no_sense_are_refused():
    for arguments, text in (
        ({"axes": "ji"}, "expected some of 'bhij' in this order"),
        ({"axes": "ij", "rank": 2}, "expected one"),
        ({"dtype": "bool"}, "dtype: is 'bool', expected one of float32, int32"),
        ({"dtype": "float64", "axes": "ij"}, "dtype: is 'float64'"),
    ):
        with pytest.raises(ValueError, match=text):
            Param("x", **{"dtype": "float32", **arguments})


def test_other_kernels_refuse_what_they_do_not_know():
    pattern = match(documents(64, "float16", index_dtype="int32"))
    refusal = v2.apply(pattern, Target("sm_80"), "x", kind=DECODE)
    assert isinstance(refusal, Rejected) and "those of forward, backward read tensors" in refusal.reason
    refusal = schedule(v2.TRAVERSAL, match(documents(64, "float32")), Target("cpu", "avx2"), "x", kind=PARTIAL)
    assert isinstance(refusal, Rejected) and "a value for each head only" in refusal.reason


# ---------------------------------------------------------------- what the matcher refuses


def edited(func, edit):
    """``func`` with what ``edit`` makes of each of its nodes."""
    return PrimFunc(func.params, tvm_ffi.structural_map(func.body, edit, order="post"), func.ret_type, func.attrs)


def test_a_tensor_that_is_read_elsewhere_is_refused():
    def first_key(node):
        if isinstance(node, TensorLoad) and node.source.name == "bias":
            h, i, j = node.indices
            return node.source[h, i, j * 0]
        return node

    with pytest.raises(DefinitionError, match=r"block 'score': parameter 'bias' is read elsewhere than at \[h, i, j\]"):
        match(edited(documents(8, "float32"), first_key))


def test_axes_that_a_tensor_does_not_have_are_refused():
    wrong = documents(8, "float32").with_attr(AXES, ["bias:hi", "key_bias:bj", "gate:bi"])
    with pytest.raises(DefinitionError, match="argument 'bias': has rank 3; a tensor parameter has the shape"):
        match(wrong)


def test_another_gradient_of_a_table_is_refused():
    def twice(node):
        if not (isinstance(node, s_tir.SBlock) and node.name_hint == "d_positions"):
            return node
        body = BufferStore(node.body.buffer, node.body.value * 2, node.body.indices)
        return s_tir.SBlock(node.iter_vars, node.reads, node.writes, node.name_hint, body, node.init)

    func = derive(match(learnt_relative(8, "float32")), "backward")
    assert match(func).params == learnt_relative.params
    with pytest.raises(DefinitionError, match="block 'd_positions': is not the step of attention"):
        match(edited(func, twice))


# ---------------------------------------------------------------- masks that are joined


EVEN = Mask("even", lambda at: T.floormod(at.j, 2) == 0, lambda at: at.j % 2 == 0)


@pytest.mark.parametrize("other", ("causal", "full", "window"))
def test_joined_masks(other):
    """With their twins and parameters, and by the oracle."""
    for joined, word in ((EVEN & MASKS[other], np.logical_and), (EVEN | MASKS[other], np.logical_or)):
        q, k, v, _, _ = problem(Attention(), 9, 13, 8)
        params = {p.name: 3 for p in joined.params}
        assert joined.params == MASKS[other].params and joined.twin.__name__ == joined.name
        found = oracle.operator(Attention(mask=joined), "forward", 8, 8)(q=q, k=k, v=v, softmax_scale=SCALE, **params)
        at = reference.Positions(np.arange(9)[:, None], np.arange(13)[None], 9, 13, params)
        np.testing.assert_array_equal(joined.twin(at), word(EVEN.twin(at), MASKS[other].twin(at)))
        want, _ = reference.attention(q, k, v, softmax_scale=SCALE, mask=joined.twin, params=params)
        np.testing.assert_allclose(found.o, want, atol=2e-6, rtol=0)


def test_joined_masks_keep_what_templates_know_of_them():
    assert not match(Attention(mask=MASKS["causal"] & MASKS["window"])(8, "float32")).is_opaque
    assert match(Attention(mask=EVEN | MASKS["causal"])(8, "float32")).is_opaque
    assert match(Attention(mask=EVEN | FULL)(8, "float32")).is_unmasked
    other = Mask("other", EVEN.expr, EVEN.twin, (Param("window_left", "float32"),))
    with pytest.raises(DefinitionError, match="mean different parameters by 'window_left'"):
        MASKS["window"] & other


# ---------------------------------------------------------------- kernels


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    packs = tmp_path_factory.mktemp("packs")
    for name in ("documents", "learnt_relative"):
        definition = f"{ROOT / 'tests/definitions/with_tensors.py'}:{name}"
        of = ("--arch", "cpu", "--dtype", "float32", "--head-dim", 32, "--template", "v2")
        build_kernels(*of, "--output", packs, "--definition", definition)
    return packs


PROGRAM = """
import sys
import numpy as np
import torch
from tvm_flash import InvalidArgumentError, custom_attention

for number in range({count}):
    data = dict(np.load(f"{{number}}.npz"))
    name, asked = str(data.pop("name")), list(data.pop("asked"))
    dout = torch.from_numpy(data.pop("dout"))
    leaves = {{n: torch.from_numpy(x) for n, x in data.items()}}
    for n in ("q", "k", "v", *asked):
        leaves[n].requires_grad_()
    attention = custom_attention(name)
    params = {{n: x for n, x in leaves.items() if n not in "qkv"}}
    out, lse = attention(*(leaves[n] for n in "qkv"), softmax_scale={scale}, return_lse=True, **params)
    (out * dout).sum().backward()
    found = {{f"d_{{n}}": leaves[n].grad.numpy() for n in ("q", "k", "v", *asked)}}
    np.savez(f"result{{number}}.npz", out=out.detach().numpy(), lse=lse.detach().numpy(), **found)
    first = next(n for n in params if params[n].ndim > 1)
    try:
        attention(*(leaves[n] for n in "qkv"), **{{**params, first: params[first][..., :-1, :, None]}})
    except InvalidArgumentError as e:
        assert str(e).startswith(f"{{first}}: has shape"), e
    else:
        raise AssertionError("a wrong shape was taken")
assert "tvm" not in sys.modules and "schedules" not in sys.modules
"""


def test_kernels_read_tensors_and_learn_them(pack):
    """Long and short, few queries, tiles and rows that see nothing; against float64, by PyTorch's autograd."""
    problems = [(a, n, m) for a in (documents, learnt_relative) for n, m in ((150, 200), (5, 300), (90, 40))]
    names = {id(documents): "documents", id(learnt_relative): "learnt_relative"}
    for number, (attention, seqlen_q, seqlen_kv) in enumerate(problems):
        q, k, v, dout, params = problem(attention, seqlen_q, seqlen_kv, 32, number)
        asked = [p.name for p in attention.params if p.gradient]
        np.savez(
            pack / f"{number}.npz",
            q=q,
            k=k,
            v=v,
            dout=dout,
            name=names[id(attention)],
            asked=np.array(asked, str),
            **params,
        )
    program = PROGRAM.format(count=len(problems), scale=SCALE)
    environment = {"TVM_FLASH_PACKS": str(pack), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=pack, env=environment)
    assert done.returncode == 0, done.stderr
    for number, (attention, seqlen_q, seqlen_kv) in enumerate(problems):
        q, k, v, dout, params = problem(attention, seqlen_q, seqlen_kv, 32, number)
        asked = [p.name for p in attention.params if p.gradient]
        found = np.load(pack / f"result{number}.npz")
        want, want_lse = reference.attention(q, k, v, params=params, **twins(attention))
        exact = reference.attention_backward(dout, q, k, v, params=params, gradients=asked, **twins(attention))
        np.testing.assert_allclose(found["out"], want, atol=3e-6, rtol=0)
        np.testing.assert_allclose(found["lse"], want_lse, atol=3e-6, rtol=0)
        gradients = {"q": exact.dq, "k": exact.dk, "v": exact.dv, **exact.params}
        for name, x in gradients.items():
            rounding = 1e-3 if params.get(name, q).dtype == np.float16 else 0
            allowed = max(5e-6, rounding) * max(1.0, np.abs(x).max())
            np.testing.assert_allclose(found[f"d_{name}"], x, atol=allowed, rtol=0, err_msg=name)


SINK = """
import numpy as np
from tvm_flash import NotSupportedError, custom_attention

data = dict(np.load("sink.npz"))
attention = custom_attention("own_sink")
given = [data.pop(n) for n in "qkv"]
dout = data.pop("dout")
out, lse = attention(*given, softmax_scale={scale}, return_lse=True, **data)
np.savez("result.npz", out=out, lse=lse)
none = [x[:, :, :0] for x in given[1:]]
data["allowed"] = data["allowed"][..., :0]
for call, first in ((attention, ()), (attention.backward, (dout,))):
    try:
        call(*first, given[0], *none, *((out, lse) if first else ()), **data)
    except NotSupportedError as e:
        assert str(e).startswith("k: has no keys, which nothing can compute for the definition 'own_sink'"), e
    else:
        raise AssertionError("rows without keys see their sink, which wasn't computed")
assert not attention(given[0][:, :, :0], *none, **{{**data, "allowed": data["allowed"][..., :0, :]}}).size
"""


def test_a_sink_of_a_users_own(tmp_path):
    """Rows that see no key see the sink; where there are no keys at all, a call says that it can't."""
    of = ("--arch", "cpu", "--dtype", "float32", "--head-dim", 32, "--template", "v1")
    which = ("--kind", "forward", "--kind", "backward", "--output", tmp_path)
    build_kernels(*of, *which, "--definition", f"{ROOT / 'tests/definitions/with_tensors.py'}:own_sink")
    q, k, v, dout, params = problem(own_sink, 45, 70, 32)
    np.savez(tmp_path / "sink.npz", q=q, k=k, v=v, dout=dout, **params)
    environment = {"TVM_FLASH_PACKS": str(tmp_path), "PYTHONPATH": str(ROOT)}
    program = SINK.format(scale=SCALE)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "result.npz")
    want, want_lse = reference.attention(q, k, v, params=params, **twins(own_sink))
    np.testing.assert_allclose(found["out"], want, atol=3e-6, rtol=0)
    np.testing.assert_allclose(found["lse"], want_lse, atol=3e-6, rtol=0)

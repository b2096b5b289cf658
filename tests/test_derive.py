"""The operators that are derived from a definition, compiled naively, against float64 and against torch's autograd."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import tvm_ffi
from tvm import s_tir, tirx
from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import FULL, MASKS, SCORES, ScoreModification
from schedules.definition.derive import OPERATORS, derive
from schedules.definition.pattern import DefinitionError, match
from tests import append_trials, oracle
from tests.pairs import some_pairs
from tvm_flash import dequantise_cache, reference
from tvm_flash.catalogue import OF_16_BITS
from tvm_flash.operators import SCALES
from tvm_flash.packs.manifest import APPEND_ROLES, Param

SCALE = 0.3
#: (batch, heads, kv_heads, seqlen_q, seqlen_kv); of the second, the first rows see nothing under a causal mask.
SHAPES = ((2, 4, 2, 7, 15), (1, 3, 1, 13, 6), (1, 2, 2, 1, 9))
HEAD_DIM, HEAD_DIM_V = 8, 12


def asking(score: ScoreModification) -> ScoreModification:
    """The same with float parameters that all ask for their gradients."""
    return dataclasses.replace(score, params=tuple(dataclasses.replace(p, gradient=is_float(p)) for p in score.params))


def is_float(param: Param) -> bool:
    return param.dtype.startswith("float")


def problem(attention, shape, seed=5):
    """q, k, v, gradients of the output and of lse, and the parameters."""
    batch, heads, kv_heads, seqlen_q, seqlen_kv = shape
    rng = np.random.default_rng(seed)

    def normal(*sizes):
        return rng.standard_normal(sizes, dtype=np.float32)

    q, dout = normal(batch, heads, seqlen_q, HEAD_DIM), normal(batch, heads, seqlen_q, HEAD_DIM_V)
    k, v = normal(batch, kv_heads, seqlen_kv, HEAD_DIM), normal(batch, kv_heads, seqlen_kv, HEAD_DIM_V)
    values = {"window_left": 3, "window_right": 1, "sink_tokens": 2, "softcap": 1.5}
    values |= {name: rng.random((batch, heads), dtype=np.float32) for name in ("alibi_slopes", "sinks")}
    values |= {"visible": rng.random((batch, heads, seqlen_q, seqlen_kv)) < 0.7}
    values |= {"bias": normal(batch, heads, seqlen_q, seqlen_kv)}
    placed = ("kv_start", "kv_end", "query_start")
    values |= {name: rng.integers(0, seqlen_kv + 3, (batch, heads), np.int32) for name in placed}
    values |= {"has_query_start": 1, "has_alibi_slopes": 1, "has_sinks": 1}
    params = {p.name: values[p.name] for p in attention.params}
    return q, k, v, dout, normal(batch, heads, seqlen_q), params


def twins(attention):
    return {"mask": attention.mask.twin, "score": attention.score.twin}


#: Scores as torch computes them: an answer that owes nothing to the twins' differences.
TORCH_SCORES = {
    "identity": lambda s, p, distance: s,
    "softcap": lambda s, p, distance: p["softcap"] * (s / p["softcap"]).tanh(),
    "alibi": lambda s, p, distance: s - p["alibi_slopes"][..., None, None] * distance,
    "softcap_alibi": lambda s, p, distance: (
        p["softcap"] * (s / p["softcap"]).tanh() - p["alibi_slopes"][..., None, None] * distance
    ),
}
TORCH_SCORES["identity_sinks"] = TORCH_SCORES["identity"]
TORCH_SCORES["biased"] = lambda s, p, distance: s + p["bias"]
TORCH_SCORES["optional"] = TORCH_SCORES["optional_sinks"] = TORCH_SCORES["softcap_alibi"]  # with all options given


def autograd(attention, q, k, v, dout, dlse, params):
    """Gradients by torch in float64, by role."""
    torch = pytest.importorskip("torch")
    asked = [p.name for p in attention.score.params if is_float(p)]
    leaves = {"dq": q, "dk": k, "dv": v, **{f"d_{name}": params[name] for name in asked}}
    leaves = {name: torch.tensor(np.float64(x), requires_grad=True) for name, x in leaves.items()}
    i, j = np.arange(q.shape[2])[:, None], np.arange(k.shape[2])[None]
    wide = {n: x[..., None, None] if np.ndim(x) == 2 else x for n, x in params.items()}
    at = reference.Positions(i, j, q.shape[2], k.shape[2], wide)
    group = q.shape[1] // k.shape[1]
    keys, values = (leaves[n].repeat_interleave(group, dim=1) for n in ("dk", "dv"))
    s = leaves["dq"] @ keys.transpose(-1, -2) * SCALE
    mods = {name: leaves[f"d_{name}"] for name in asked}
    s = TORCH_SCORES[attention.score.name](s, mods, torch.tensor(np.abs(at.diagonal - at.j)).double())
    visible = torch.tensor(np.broadcast_to(attention.mask.twin(at), s.shape).copy())
    if "d_sinks" in leaves:  # a key more, whose value is 0
        s = torch.cat([s, leaves["d_sinks"][..., None, None].expand(*s.shape[:3], 1)], -1)
        visible = torch.nn.functional.pad(visible, (0, 1), value=True)
        values = torch.nn.functional.pad(values, (0, 0, 0, 1))
    seen = visible.any(-1)
    x = s.masked_fill(~visible, -torch.inf).masked_fill(~seen[..., None], 0.0)  # no NaN in torch where nothing is seen
    out = torch.softmax(x, -1) @ values
    loss = (out * torch.tensor(dout))[seen].sum() + (torch.logsumexp(x, -1) * torch.tensor(dlse))[seen].sum()
    loss.backward()
    return {name: np.zeros(x.shape) if x.grad is None else x.grad.numpy() for name, x in leaves.items()}


@pytest.mark.parametrize(
    ("score", "mask"),
    some_pairs((x for x in SCORES if x not in OF_16_BITS), MASKS, whole=("optional_sinks", "positioned")),
)
def test_gradients_against_float64_and_autograd(score, mask):
    attention = Attention(asking(SCORES[score]), MASKS[mask])
    names = [p.name for p in attention.score.params if is_float(p)]
    for shape in SHAPES:
        q, k, v, dout, dlse, params = problem(attention, shape)
        want = reference.attention_backward(
            dout, q, k, v, softmax_scale=SCALE, dlse=dlse, params=params, gradients=names, **twins(attention)
        )
        want = {"dq": want.dq, "dk": want.dk, "dv": want.dv, **{f"d_{n}": want.params[n] for n in names}}
        by_torch = autograd(attention, q, k, v, dout, dlse, params)
        got = vars(oracle.gradients(attention, dout, q, k, v, SCALE, params, dlse))
        assert set(got) == set(want) == set(by_torch)
        for name, x in got.items():
            size = max(1.0, np.abs(by_torch[name]).max())
            np.testing.assert_allclose(want[name], by_torch[name], atol=2e-9 * size, rtol=0, err_msg=name)
            np.testing.assert_allclose(x.reshape(want[name].shape), want[name], atol=1e-5 * size, rtol=0, err_msg=name)


def test_a_row_that_sees_nothing_has_no_gradient():
    attention = Attention(SCORES["softcap"], MASKS["causal"])
    q, k, v, dout, dlse, params = problem(attention, SHAPES[1])
    poisoned = dout.copy(), dlse.copy()
    for x in poisoned:
        x[:, :, :7] = 1e30  # of rows that see nothing
    clean, got = (oracle.gradients(attention, do, q, k, v, SCALE, params, dl) for do, dl in ((dout, dlse), poisoned))
    assert not got.dq[:, :, :7].any()
    for name in ("dq", "dk", "dv"):
        np.testing.assert_array_equal(getattr(got, name), getattr(clean, name))


@pytest.mark.parametrize("mask", ("full", "causal", "sink_window", "padded"))
def test_parts_combine_to_the_whole(mask):
    attention = Attention(SCORES["alibi"], MASKS[mask])
    partial, combine = (oracle.operator(attention, op, HEAD_DIM, HEAD_DIM_V) for op in ("partial", "combine"))
    for shape in SHAPES[:2]:
        q, k, v, _, _, params = problem(attention, shape)
        bounds = (0, 0, 1, 4, shape[4] + 5)  # the first part is empty, the last one ends past the last key
        parts = [
            partial(q=q, k=k, v=v, softmax_scale=SCALE, first_key=first, last_key=last, **params)
            for first, last in itertools.pairwise(bounds)
        ]
        keys = np.arange(shape[4])
        for part, (first, last) in zip(parts, itertools.pairwise(bounds), strict=True):
            inside = (keys >= first) & (keys < last)
            o, lse = reference.attention(
                q,
                k,
                v,
                softmax_scale=SCALE,
                params=params,
                score=attention.score.twin,
                mask=lambda at, inside=inside: attention.mask.twin(at) & inside,
            )
            assert part.o.dtype == np.float32
            np.testing.assert_allclose(part.o, o, atol=2e-6, rtol=0)
            np.testing.assert_allclose(part.lse, lse, atol=3e-6, rtol=0)
        os, lses = (np.stack([getattr(part, name) for part in parts]) for name in ("o", "lse"))
        os[np.isneginf(lses)] = np.nan  # whoever saw nothing need not have written anything
        got = combine(o_parts=os, lse_parts=lses)
        o, lse = reference.attention(q, k, v, softmax_scale=SCALE, params=params, **twins(attention))
        np.testing.assert_allclose(got.o, o, atol=2e-6, rtol=0)
        np.testing.assert_allclose(got.lse, lse, atol=3e-6, rtol=0)


#: Of queries and of keys: an empty sequence, more queries than keys and the reverse, rows and keys after the last one.
LENGTHS = ((3, 7, 0, 5), (6, 4, 2, 0), 2, 3)


@pytest.mark.parametrize(
    ("score", "mask"),
    some_pairs(("identity", "softcap_alibi"), ("full", "causal", "window", "padded"), whole=("softcap_alibi",)),
)
def test_sequences_of_different_lengths_are_attended_to_as_if_alone(score, mask):
    attention = Attention(asking(SCORES[score]), MASKS[mask])
    names = [p.name for p in attention.score.params if is_float(p)]
    queries, keys, more_queries, more_keys = LENGTHS
    shape = (len(queries), 4, 2, sum(queries) + more_queries, sum(keys) + more_keys)
    q, k, v, dout, dlse, params = problem(attention, shape)
    starts = [np.int32([0, *itertools.accumulate(x)]) for x in (queries, keys)]
    rows = [np.ascontiguousarray(x[0].swapaxes(0, 1)) for x in (q, k, v, dout)]
    given = {**dict(zip(("q", "k", "v"), rows, strict=False)), "cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1]}
    ahead = oracle.operator(attention, "ragged", HEAD_DIM, HEAD_DIM_V)(**given, softmax_scale=SCALE, **params)
    delta = (ahead.o * rows[3]).sum(-1).T - dlse[0]
    back = {"do": rows[3], "lse": ahead.lse, "delta": np.ascontiguousarray(delta), "softmax_scale": SCALE}
    got = oracle.operator(attention, "ragged_backward", HEAD_DIM, HEAD_DIM_V)(**given, **back, **params)
    want = {"o": np.zeros_like(ahead.o), "lse": np.full_like(ahead.lse, -np.inf)}
    want |= {f"d{n}": np.zeros(x.shape) for n, x in zip("qkv", rows, strict=False)}
    want |= {f"d_{n}": np.zeros(shape[:2]) for n in names}
    for b in range(len(queries)):
        i, j = (slice(*x[b : b + 2]) for x in starts)
        if i.start == i.stop or j.start == j.stop:
            continue
        own = {n: x[b : b + 1] if np.ndim(x) else x for n, x in params.items()}
        alone = (q[:1, :, i], k[:1, :, j], v[:1, :, j])
        what = {"softmax_scale": SCALE, "params": own, **twins(attention)}
        o, want["lse"][:, i] = (x[0] for x in reference.attention(*alone, **what))
        want["o"][i] = o.swapaxes(0, 1)
        found = reference.attention_backward(dout[:1, :, i], *alone, dlse=dlse[:1, :, i], gradients=names, **what)
        want["dq"][i], want["dk"][j], want["dv"][j] = (x[0].swapaxes(0, 1) for x in (found.dq, found.dk, found.dv))
        for n in names:
            want[f"d_{n}"][b] = np.broadcast_to(found.params[n], (1, shape[1]))
    results = {**vars(ahead), **vars(got)}
    assert set(results) == set(want) | {f"d_{n}" for n in names}
    for name, x in want.items():
        if name == "d_softcap":  # one number for all
            x = want[name][:, :1].sum(keepdims=True).reshape(1)
        np.testing.assert_allclose(results[name], x, atol=2e-5, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("page_size", (1, 3, 16))
def test_keys_on_pages_are_those_of_their_sequence(page_size):
    """The same as with the keys one after the other; what no sequence needs may hold anything."""
    attention = Attention(SCORES["optional_sinks"], MASKS["padded"])
    queries, keys, more_queries, _ = LENGTHS
    shape = (len(queries), 4, 2, sum(queries) + more_queries, sum(keys))
    q, k, v, _, _, params = problem(attention, shape)
    q, k, v = (np.ascontiguousarray(x[0].swapaxes(0, 1)) for x in (q, k, v))
    starts = [np.int32([0, *itertools.accumulate(x)]) for x in (queries, keys)]
    given = {"q": q, "cu_seqlens_q": starts[0], "softmax_scale": SCALE, **params}
    most = max(keys) // page_size + 2
    order = np.random.default_rng(0).permutation(len(keys) * most)
    table = np.full((len(keys), most), -7, np.int32)
    pages = {n: np.full((len(order), page_size, *x.shape[1:]), np.nan, np.float32) for n, x in (("k", k), ("v", v))}
    for b, length in enumerate(keys):
        for j in range(length):
            at = table[b, j // page_size] = order[b * most + j // page_size]
            for name, rows in (("k", k), ("v", v)):
                pages[name][at, j % page_size] = rows[starts[1][b] + j]
    lengths = {"seqlens_k": np.int32(keys), "page_table": table}
    got = oracle.operator(attention, "paged", HEAD_DIM, HEAD_DIM_V)(**given, **pages, **lengths)
    want = oracle.operator(attention, "ragged", HEAD_DIM, HEAD_DIM_V)(**given, k=k, v=v, cu_seqlens_k=starts[1])
    for name in ("o", "lse"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))


@pytest.mark.parametrize("cache", ("float8_e4m3fn", "int8"))
def test_keys_in_8_bits_are_what_they_stand_for(cache):
    """The same bits as with keys and values that were multiplied with their scales before; every element is there."""
    attention, rng = Attention(SCORES["softcap"], MASKS["causal"]), np.random.default_rng(3)
    pages, size, heads = 8, 3, 2
    given = {"q": rng.normal(size=(9, 4, HEAD_DIM)).astype(np.float32), "softmax_scale": SCALE, "softcap": 2.0}
    given |= {"cu_seqlens_q": np.int32([0, 4, 9]), "seqlens_k": np.int32([10, 12])}
    given |= {"page_table": rng.permutation(pages).astype(np.int32).reshape(2, 4)}
    scaled, plain = {}, {}
    for name, width in (("k", HEAD_DIM), ("v", HEAD_DIM_V)):
        stored = rng.permutation(np.resize(np.arange(256, dtype=np.uint8), pages * size * heads * width))
        stored = stored.reshape(pages, size, heads, width)
        if cache == "float8_e4m3fn":
            stored[stored & 0x7F == 0x7F] = 0
        scale = rng.uniform(1e-3, 1e-2, (pages, heads)).astype(np.float32)
        plain[name] = dequantise_cache(torch.from_numpy(stored).view(getattr(torch, cache)), torch.from_numpy(scale),
                                       "float32").numpy()  # fmt: skip
        scaled |= {name: stored.view(np.int8) if cache == "int8" else stored, f"{name}_scale": scale}
    got = oracle.operator(attention, "paged_scaled", HEAD_DIM, HEAD_DIM_V, cache)(**given, **scaled)
    want = oracle.operator(attention, "paged", HEAD_DIM, HEAD_DIM_V)(**given, **plain)
    assert np.isfinite(want.o).all()
    for name in ("o", "lse"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))


@pytest.mark.parametrize("label", dict(append_trials.problems("float32")))
def test_what_is_appended_is_in_its_place(label):
    """Every bit, of float32 and of 8 bits, against torch's operations a row at a time."""
    problem = dataclasses.replace(dict(append_trials.problems("float32", most=32))[label], heads=(2, 1))
    op = "append_scaled" if problem.cache else "append"
    append = oracle.operator(Attention(), op, *problem.head_dims, problem.cache)

    def compute(values, _):
        given = {role: x.contiguous().numpy() if torch.is_tensor(x) else x for role, x in values.items()}
        given |= {role: given[role].view(np.int8 if problem.cache == "int8" else np.uint8) for role in "kv"}
        if not problem.cache:
            given |= {role: given[role].view(np.float32) for role in "kv"}
        taken = [role for role in APPEND_ROLES[:-1] if problem.cache or role not in SCALES]
        found = append(**{role: given[role] for role in taken if role != "o"})
        for role in ("o", "k", "v"):
            bits = torch.from_numpy(getattr(found, role)).view(torch.uint8)
            values[role].view(torch.uint8).copy_(bits)

    problem.check(problem.run(compute, "cpu"), "cpu")


def test_a_part_far_below_another_does_not_overflow():
    combine = oracle.operator(Attention(), "combine", HEAD_DIM, HEAD_DIM_V)
    os = np.stack([np.full((1, 1, 1, HEAD_DIM_V), value, np.float32) for value in (1, 2, 3)])
    got = combine(o_parts=os, lse_parts=np.float32([500, -500, -np.inf]).reshape(3, 1, 1, 1))
    assert (got.o == 1).all()
    assert got.lse == 500


@pytest.mark.parametrize("op", OPERATORS)
@pytest.mark.parametrize("kind", (("identity", "full"), ("softcap_alibi", "padded")), ids="-".join)
def test_match_recognises_what_is_derived(kind, op):
    attention = Attention(asking(SCORES[kind[0]]), MASKS[kind[1]])
    pattern = match(attention(64, "bfloat16", head_dim_v=32, index_dtype="int32"))
    found = match(derive(pattern, op))
    assert found.op == op
    assert (found.head_dim_v, found.dtype, found.index_dtype) == (32, "bfloat16", "int32")
    assert found.params == (pattern.params if OPERATORS[op].has_scores else ())
    again = derive(found, op)
    assert tvm_ffi.structural_equal(again.body, found.func.body, map_free_vars=True)


def edited(func, name, edit):
    def replace(node):
        return edit(node) if isinstance(node, s_tir.SBlock) and node.name_hint == name else node

    body = tvm_ffi.structural_map(func.body, replace, order="post")
    return tirx.PrimFunc(func.params, body, func.ret_type, func.attrs)


def doubled(block):
    value = block.body.value
    body = tirx.BufferStore(block.body.buffer, value * tirx.const(2, value.ty.dtype), block.body.indices)
    return s_tir.SBlock(block.iter_vars, block.reads, block.writes, block.name_hint, body, block.init)


@pytest.mark.parametrize("op", [op for op in OPERATORS if op != "forward"])
def test_another_step_of_an_operator_is_refused_by_name(op):
    attention = Attention(asking(SCORES["alibi"]), MASKS["causal"])
    func = derive(match(attention(8, "float32")), op)
    own = {"score", "mask", "key_range"}
    blocks = [*OPERATORS[op].blocks, *(["d_alibi_slopes"] if OPERATORS[op].has_gradients else [])]
    for block in blocks:
        if block not in own:
            with pytest.raises(DefinitionError, match=f"block '{block}'"):
                match(edited(func, block, doubled))


def test_the_derivative_of_another_score_is_refused():
    """``ds`` must belong to the very score of its function."""
    capped, plain = (derive(match(Attention(SCORES[n])(8, "float32")), "backward") for n in ("softcap", "identity"))
    blocks = {}
    tvm_ffi.structural_walk(capped.body, [(s_tir.SBlock, lambda b: blocks.update({b.name_hint: b}))])
    with pytest.raises(DefinitionError, match="block 'ds'"):
        match(edited(plain, "ds", lambda b: blocks["ds"]))


def test_a_missing_gradient_of_a_parameter_is_refused():
    func = derive(match(Attention(asking(SCORES["alibi"]))(8, "float32")), "backward")
    with pytest.raises(DefinitionError, match="gradient"):
        match(func.without_attr("gradients"))


def test_only_what_has_a_derivative_can_be_derived():
    def score(s, at):
        return T.copysign(s, at.param["softcap"])

    param = Param("softcap", "float32", gradient=True)
    attention = Attention(ScoreModification("odd", score, reference.softcap, (param,)), FULL)
    pattern = match(attention(8, "float32"))
    derive(pattern, "partial")
    with pytest.raises(DefinitionError, match=r"no derivative with respect to s is known of T.copysign\(s, softcap\)"):
        derive(pattern, "backward")


def test_only_a_float_parameter_has_a_gradient():
    window = dataclasses.replace(
        MASKS["window"], params=tuple(dataclasses.replace(p, gradient=True) for p in MASKS["window"].params)
    )
    with pytest.raises(DefinitionError, match="'window_left': is int32"):
        derive(match(Attention(mask=window)(8, "float32")), "backward")

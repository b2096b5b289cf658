"""A user's own definition over sequences of different lengths, through the doors: kernels of the CPU, against float64.

One after the other with gradients, by NumPy, autograd and ``torch.compile``; with keys on pages; over a cache.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

import tvm_flash
from schedules.definition.gallery import token_tree
from schedules.definition.pattern import match
from schedules.families import FAMILY, kinds_of, schedule
from schedules.families.interface import RAGGED, RAGGED_BACKWARD, Rejected, Target
from schedules.templates import v1, v2
from tests import sequence_trials, tensor_trials
from tests.built import build_kernels
from tests.cpu_kernels import runnable_isas
from tests.definitions import flex_tables, of_sequences, with_numbers, with_tensors
from tests.sequence_trials import Sequences
from tvm_flash import reference
from tvm_flash.errors import ArgumentTypeError, InvalidArgumentError, KernelNotFoundError, NotSupportedError

SCALE = 0.2
PARAMS = of_sequences.of_sequences.params
GRADIENTS = tuple(p.name for p in PARAMS if p.gradient)


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """Kernels of four definitions: of the tree of tokens those over pages alone."""
    packs = tmp_path_factory.mktemp("packs")
    for definition, *which in (
        (f"{of_sequences.__file__}:of_sequences", "--form", "ragged,paged"),
        (f"{of_sequences.__file__}:of_sequences", "--kind", "paged_int8"),
        (f"{token_tree.__file__}:token_tree", "--form", "paged"),
        (f"{flex_tables.__file__}:flex_tables", "--form", "ragged"),
        (f"{with_numbers.__file__}:with_numbers", "--form", "ragged"),
    ):
        of = ("--arch", "cpu", "--isa", runnable_isas()[0], "--dtype", "float32", "--head-dim", 32, *which)
        build_kernels(*of, "--output", packs, "--definition", definition)
    return packs


@pytest.fixture(scope="module")
def pack_of_bfloat16(tmp_path_factory):
    """Kernels for the best instruction set here, whose products may be of pairs or tiles of 16 bits."""
    packs = tmp_path_factory.mktemp("packs")
    of = ("--arch", "cpu", "--isa", runnable_isas()[0], "--dtype", "bfloat16", "--head-dim", 32)
    which = ("--kind", "ragged,ragged_backward", "--definition", f"{of_sequences.__file__}:of_sequences")
    build_kernels(*of, *which, "--output", packs)
    return packs


@pytest.fixture
def attention(pack, use_packs):
    use_packs(pack)
    return tvm_flash.custom_attention("of_sequences")


@pytest.fixture
def tree(pack, use_packs):
    use_packs(pack)
    return tvm_flash.custom_attention("token_tree")


KERNEL = tensor_trials.Kernel(
    PARAMS,
    layout="bshd",
    dtype="float32",
    head_dim=32,
    head_dim_v=32,
    mask=of_sequences.prefix_or_shown_twin,
    score=of_sequences.mixed_twin,
    name="of_sequences",
)


def parameters(values, make=lambda x: x, params=PARAMS):
    """A definition's parameters out of what a kernel is given."""
    return {p.name: make(values[p.name]) if p.is_tensor else values[p.name] for p in params}


def array(x):
    return x.numpy()


def give(values, names, results):
    """Put what a door has answered where a kernel would have."""
    for name, x in zip(names, results, strict=True):
        values[name].copy_(torch.as_tensor(x).reshape(values[name].shape))


def by_numpy(attention):
    def compute(values, _):
        tensors = (array(values[n]) for n in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"))
        how = {"softmax_scale": SCALE, "return_lse": True}
        give(values, ("o", "lse"), attention.varlen(*tensors, **how, **parameters(values, array)))

    return compute


def by_torch(function):
    def compute(values, _):
        leaves = {n: values[n].clone().requires_grad_() for n in ("q", "k", "v", *GRADIENTS)}
        starts = values["cu_seqlens_q"], values["cu_seqlens_k"]
        params = parameters(values) | {n: leaves[n] for n in GRADIENTS}
        out = function(*(leaves[n] for n in "qkv"), *starts, softmax_scale=SCALE, **params)
        out.backward(values["do"])
        give(values, ("dq", "dk", "dv"), [leaves[n].grad for n in "qkv"])
        for n in GRADIENTS:  # of all sequences together, where it has no value of each
            x = values[f"d_{n}"]
            x.copy_(leaves[n].grad if leaves[n].ndim == 2 else torch.zeros_like(x))
            x[0] += 0 if leaves[n].ndim == 2 else leaves[n].grad

    return compute


def over_pages(attention, make=lambda x: x):
    def compute(values, _):
        tensors = (make(values[n]) for n in ("q", "k", "v", "cu_seqlens_q", "seqlens_k", "page_table"))
        how = {"softmax_scale": SCALE, "return_lse": True}
        how |= {n: make(values[n]) for n in ("k_scale", "v_scale") if n in values}
        give(values, ("o", "lse"), attention.paged(*tensors, **how, **parameters(values, make)))

    return compute


def check(trials, compute):
    for trial in trials:
        trial.check(trial.run(compute, "cpu"), "cpu")


def test_sequences_against_float64(attention):
    check(sequence_trials.forward(KERNEL, of_sequences.sample), by_numpy(attention))


def test_pages_against_float64(attention):
    check(sequence_trials.forward(KERNEL, of_sequences.sample, paged=True), over_pages(attention))
    check(sequence_trials.forward(KERNEL, of_sequences.sample, paged=True, few=True), over_pages(attention, array))


def test_caches_of_8_bits(attention):
    for few in (False, True):
        of_8_bits = {"paged": True, "few": few, "cache": "int8"}
        check(sequence_trials.forward(KERNEL, of_sequences.sample, **of_8_bits), over_pages(attention))


def by_backward(attention, make, params=PARAMS):
    learnt = tuple(p.name for p in params if p.gradient)

    def compute(values, problem):
        rows = [make(values[n]) for n in ("do", "q", "k", "v", "o")]
        lse = make(values["lse"]).reshape(problem["heads"], -1)
        starts = make(values["cu_seqlens_q"]), make(values["cu_seqlens_k"])
        how = {"softmax_scale": SCALE, "gradients": learnt}
        found = attention.varlen.backward(*rows, lse, *starts, **how, **parameters(values, make, params))
        give(values, ("dq", "dk", "dv", *(f"d_{n}" for n in learnt)), found)

    return compute


def test_gradients_without_autograd(attention):
    check(sequence_trials.backward(KERNEL, of_sequences.sample), by_backward(attention, array))


def test_sequences_of_bfloat16(pack_of_bfloat16, use_packs):
    """Whose products take more keys at once than a vector has lanes: those behind the last one count for nothing."""
    use_packs(pack_of_bfloat16)
    attention, kernel = tvm_flash.custom_attention("of_sequences"), dataclasses.replace(KERNEL, dtype="bfloat16")
    check(sequence_trials.backward(kernel, of_sequences.sample), by_backward(attention, lambda x: x))
    by_call = Sequences(kernel, of_sequences.sample, ((3, 40),), heads=4, kv_heads=2)
    by_call.check_backward(by_call.run_backward(by_torch(attention.varlen), "cpu"), "cpu")


def test_numbers_are_learnt_of_all_sequences(pack, use_packs):
    use_packs(pack)
    attention, own = tvm_flash.custom_attention("with_numbers"), with_numbers.with_numbers
    kernel = dataclasses.replace(KERNEL, params=own.params, mask=own.mask.twin, score=own.score.twin)
    check(sequence_trials.backward(kernel, with_numbers.sample), by_backward(attention, array, own.params))
    call = Sequences(kernel, with_numbers.sample, ((3, 40),))
    values, _ = call.given("cpu")
    tensors = [values[n] for n in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")]
    learnt = parameters(values, params=own.params) | {"cap": torch.tensor(1.5, requires_grad=True)}
    with pytest.raises(ArgumentTypeError, match=r"^cap: is a Tensor, expected a number"):
        attention.varlen(*tensors, **learnt)


def one_sequence():
    """A call whose gradients by autograd are those of a sequence: what is learnt by head is summed over them."""
    return Sequences(KERNEL, of_sequences.sample, ((70, 130),), heads=4, kv_heads=2)


@pytest.mark.parametrize("how", ("recorded", "compiled"))
def test_gradients_by_autograd(attention, how):
    function = attention.varlen
    if how == "compiled":
        function = torch.compile(lambda *x, **named: attention.varlen(*x, **named), fullgraph=True)
    call = one_sequence()
    call.check_backward(call.run_backward(by_torch(function), "cpu"), "cpu")


def test_what_is_learnt_by_head_is_summed_over_sequences(attention):
    """The gradient of a leaf is the sum of those that the kernel gives each sequence."""
    call = Sequences(KERNEL, of_sequences.sample, ((17, 40), (0, 5), (9, 9)), after=0)
    values, _ = call.given("cpu")
    q, starts = values["q"].requires_grad_(), (values["cu_seqlens_q"], values["cu_seqlens_k"])
    params = parameters(values) | {n: values[n].requires_grad_() for n in GRADIENTS}
    out, lse = attention.varlen(q, values["k"], values["v"], *starts, softmax_scale=SCALE, return_lse=True, **params)
    out.sum().backward()
    with torch.no_grad():
        rows = (torch.ones_like(out), q, values["k"], values["v"], out, lse)
        how = {"softmax_scale": SCALE, "gradients": GRADIENTS}
        *_, of_rate, of_strength, of_offsets = attention.varlen.backward(*rows, *starts, **how, **params)
    torch.testing.assert_close(params["fading_rate"].grad, of_rate)
    torch.testing.assert_close(params["strength"].grad, of_strength.sum(0))
    assert torch.equal(params["offsets"].grad, of_offsets)


def test_a_table_has_the_same_bits_with_any_threads(attention):
    """Its gradient is a sum over all sequences; of some a turn has more shares than lanes, of others fewer."""
    lengths = ((3, 40), (530, 515), (0, 9), (1, 1100), *((n, n) for n in range(5, 60)))
    call = Sequences(KERNEL, of_sequences.sample, lengths, heads=4, kv_heads=2)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(call.run_backward(by_backward(attention, lambda x: x), "cpu"))
    finally:
        torch.set_num_threads(before)
    call.check_backward(results[0], "cpu")
    for other in results[1:]:
        assert all(np.array_equal(x, y) for x, y in zip(results[0], other, strict=True))


def test_tables_of_a_function_of_flex_attention_are_learnt(pack, use_packs):
    """Against the function itself, sequence by sequence, in float64."""
    use_packs(pack)
    attention = tvm_flash.custom_attention("flex_tables").varlen
    lengths, generator = ((130, 280), (5, 3), (0, 7), (40, 40)), torch.Generator().manual_seed(1)
    starts = [torch.tensor(np.cumsum([0, *n]), dtype=torch.int32) for n in zip(*lengths, strict=True)]
    q, k, v, dout = (torch.randn(int(starts[n][-1]), 2, 32, generator=generator) for n in (0, 1, 1, 0))
    tables = [torch.randn(x.shape, generator=generator) for x in (flex_tables.RELATIVE, flex_tables.AT_KEYS)]
    own, exact = ([x.to(dtype, copy=True).requires_grad_() for x in tables] for dtype in (torch.float32, torch.float64))
    out = attention(q, k, v, *starts, softmax_scale=SCALE, RELATIVE=own[0], AT_KEYS=own[1])
    out.backward(dout)
    for b, (queries, keys) in enumerate(lengths):
        i, j = (slice(int(x[b]), int(x[b + 1])) for x in starts)
        rows = [x[at].double().transpose(0, 1) for x, at in ((q, i), (k, j), (v, j), (dout, i))]
        h, row, column = torch.meshgrid(*(torch.arange(n) for n in (2, queries, keys)), indexing="ij")
        distance = (row - column).clamp(-20, 20) + 20
        scores = rows[0] @ rows[1].mT * SCALE + exact[0][h, distance] * torch.tanh(exact[1][column])
        (torch.softmax(scores, -1) @ rows[2]).backward(rows[3])
    for found, want in zip(own, exact, strict=True):
        error = (found.grad - want.grad).abs().max() / want.grad.abs().max()
        assert error < 2e-5


@pytest.mark.parametrize("page_size", (0, 16))
def test_a_sequence_has_the_same_bits_in_any_batch(attention, page_size):
    lengths = ((3, 40), (70, 90), (1, 1100), (9, 9))
    call = Sequences(KERNEL, of_sequences.sample, lengths, heads=4, kv_heads=2, page_size=page_size)
    compute = over_pages(attention) if page_size else by_numpy(attention)
    out, lse = call.run(compute, "cpu")
    for b in range(len(lengths)):
        rows = call.rows(b)["q"]
        found = call.alone(b).run(compute, "cpu")
        assert np.array_equal(found[0], out[rows]) and np.array_equal(found[1], lse[:, rows])


def test_operators_of_pytorch(attention):
    """In compiled programs, and as the checks of PyTorch want them."""
    paged = Sequences(KERNEL, of_sequences.sample, ((3, 40), (20, 33)), page_size=8)
    values, _ = paged.given("cpu")
    where = [values[n] for n in ("q", "k", "v", "cu_seqlens_q", "seqlens_k", "page_table")]
    params, compiled = (
        parameters(values),
        torch.compile(lambda *x, **named: attention.paged(*x, **named), fullgraph=True),
    )
    assert torch.equal(compiled(*where, **params), attention.paged(*where, **params))
    ragged, _ = Sequences(KERNEL, of_sequences.sample, ((3, 40), (20, 33))).given("cpu")
    starts = [ragged[n] for n in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")]
    starts[0].requires_grad_()
    tensors, numbers = ([p.name for p in PARAMS if p.is_tensor == kind] for kind in (True, False))
    named = {"name": "of_sequences", "parameter_names": tensors, "number_names": numbers, "return_lse": True}
    for operator, given, own in (
        (torch.ops.tvm_flash.custom_attention_varlen, starts, {}),
        (torch.ops.tvm_flash.custom_attention_paged, where, {"max_seqlen_q": 20}),
    ):
        given = (*given, [params[n] for n in tensors], [params[n] for n in numbers])
        found = torch.library.opcheck(operator.default, given, named | own)
        assert set(found.values()) == {"SUCCESS"}, found


def test_programs_of_jax(attention):
    jax = pytest.importorskip("jax")
    pytest.importorskip("jax_tvm_ffi")
    call = one_sequence()
    values, _ = call.given("cpu")
    names = ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", *(p.name for p in PARAMS if p.is_tensor))
    arrays = {n: jax.numpy.asarray(array(values[n])) for n in names}
    numbers = {p.name: values[p.name] for p in PARAMS if not p.is_tensor}
    rows, end = ("q", "k", "v", *GRADIENTS), call.lengths[0][0]
    dout = jax.numpy.asarray(call.arrays["dout"][:end])

    def loss(*learnt):
        given = arrays | dict(zip(rows, learnt, strict=True))
        params = {p.name: given[p.name] for p in PARAMS if p.is_tensor} | numbers
        out = attention.varlen(*(given[n] for n in names[:5]), softmax_scale=SCALE, **params)
        return (out[:end] * dout).sum()

    found = jax.jit(jax.grad(loss, argnums=tuple(range(len(rows)))))(*(arrays[n] for n in rows))
    call.check_backward([np.float64(x)[None] if x.ndim == 1 else np.float64(x) for x in found], "cpu")


# ---------------------------------------------------------------- a tree of tokens over a cache


def test_a_tree_of_tokens_is_appended_and_attends(tree):
    """Each token has what its own line of tokens gives, one after the other behind the context."""
    parents, cached = ([-1, 0, 0, 1, 1], [-1, 0, 1, 1, -1, 4, 5, 5, 5]), [30, 9]
    starts = torch.tensor([0, 5, 14], dtype=torch.int32)
    sees = torch.zeros(2, 9, 9, dtype=torch.bool)
    for b, of in enumerate(parents):
        sees[b, : len(of), : len(of)] = torch.from_numpy(token_tree.sees_of(of))
    generator = torch.Generator().manual_seed(0)
    caches = torch.randn(2, 12, 8, 2, 32, generator=generator)
    q, k, v = (torch.randn(14, heads, 32, generator=generator) for heads in (4, 2, 2))
    table = torch.tensor([[7, 2, 10, 3, 5], [11, 0, 1, 6, 4]], dtype=torch.int32)
    where = {"page_table": table, "cu_seqlens_q": starts, "cu_seqlens_k_new": starts, "sees": sees}
    out, lse = tree.with_kvcache(q, *caches, k, v, cache_seqlens=torch.tensor(cached).int(), return_lse=True, **where)
    for b, of in enumerate(parents):
        rows = slice(int(starts[b]), int(starts[b + 1]))
        keys, values = (x[table[b].long()].flatten(0, 1)[: cached[b] + len(of)] for x in caches)
        assert torch.equal(keys[cached[b] :], k[rows]) and torch.equal(values[cached[b] :], v[rows])
        for token in range(len(of)):
            line = [*range(cached[b]), *(cached[b] + np.flatnonzero(sees[b, token]))]
            row = int(starts[b]) + token
            given = (x.transpose(0, 1)[None].numpy() for x in (q[row : row + 1], keys[line], values[line]))
            want, want_lse = reference.attention(*given, softmax_scale=32**-0.5)
            np.testing.assert_allclose(out[row], want[0, :, 0], atol=2e-6, rtol=0)
            np.testing.assert_allclose(lse[:, row], want_lse[0, :, 0], atol=4e-6, rtol=0)


def test_a_batch_of_trees_of_one_size(tree):
    """Without starts, and in a cache without pages: (batch, tokens, heads, head_dim)."""
    sees = torch.from_numpy(token_tree.sees_of([-1, 0, 0])).expand(2, 3, 3)
    caches = torch.randn(2, 2, 40, 2, 32)
    q, k, v = torch.randn(2, 3, 4, 32), *torch.randn(2, 2, 3, 2, 32)
    given = tuple(x.clone() for x in caches)
    out = tree.with_kvcache(q, *given, k, v, cache_seqlens=11, sees=sees)
    for b in range(2):
        keys, values = (x[b, :14].transpose(0, 1)[None].numpy() for x in given)
        mask = {"mask": token_tree.line_twin, "params": {"sees": sees[b : b + 1].numpy()}, "axes": {"sees": ""}}
        rows = q[b : b + 1].transpose(1, 2).numpy()
        want, _ = reference.attention(rows, keys, values, softmax_scale=32**-0.5, **mask)
        np.testing.assert_allclose(out[b].transpose(0, 1), want[0], atol=2e-6, rtol=0)


# ---------------------------------------------------------------- errors


def usual(call):
    """The arguments of a call over sequences."""
    values, _ = call.given("cpu")
    return [values[n] for n in ("q", "k", "v", "cu_seqlens_q", "cu_seqlens_k")], parameters(values)


def test_what_is_wrong_is_named(attention):
    call = Sequences(KERNEL, of_sequences.sample, ((3, 5), (4, 4)), after=0)
    tensors, params = usual(call)
    for change, error, text in (
        (
            {"fading_rate": params["fading_rate"][:, :1, None]},
            InvalidArgumentError,
            r"^fading_rate: has shape .*\(2, 2\)",
        ),
        ({"shift": params["shift"].repeat(3)}, InvalidArgumentError, r"^shift: has shape \(6,\), expected \(2,\)"),
        ({"shown": params["shown"][0]}, InvalidArgumentError, "^shown: has shape .* a table with 3 dimensions"),
        ({"shown": params["shown"].int()}, ArgumentTypeError, "^shown: has dtype int32, expected bool"),
        ({"prefix_length": 1.5}, InvalidArgumentError, "^prefix_length: is 1.5, expected a whole number"),
        ({"causal": True}, ArgumentTypeError, "^causal: missing or unknown; the definition 'of_sequences' takes"),
    ):
        with pytest.raises(error, match=text):
            attention.varlen(*tensors, **{**params, **change})
    with pytest.raises(ArgumentTypeError, match=r"^strength: missing or unknown"):
        attention.varlen(*tensors, **{n: x for n, x in params.items() if n != "strength"})
    starts = torch.tensor([0, 9, 7], dtype=torch.int32)
    with pytest.raises(InvalidArgumentError, match=r"^cu_seqlens_q: falls from 9 to 7"):
        attention.varlen(*tensors[:3], starts, tensors[4], **params)
    with pytest.raises(InvalidArgumentError, match=r"^max_seqlen_k: is -1"):
        attention.varlen(*tensors, 4, -1, **params)


def test_there_are_no_gradients_over_pages(attention):
    call = Sequences(KERNEL, of_sequences.sample, ((3, 5),), page_size=8)
    values, _ = call.given("cpu")
    tensors = [values[n] for n in ("q", "k", "v", "cu_seqlens_q", "seqlens_k", "page_table")]
    params = parameters(values) | {"strength": values["strength"].requires_grad_()}
    with pytest.raises(NotSupportedError, match=r"^strength: a gradient is required, and of keys on pages"):
        attention.paged(*tensors, **params)
    q, *caches = tensors[:3]
    with pytest.raises(NotSupportedError, match=r"^strength: a gradient is required, and of keys in a cache"):
        attention.with_kvcache(q[None, :3], *caches, cache_seqlens=3, page_table=tensors[5], **params)


def test_forms_that_were_not_built_are_named_with_the_command(tree):
    x, starts = torch.randn(8, 2, 32), torch.tensor([0, 3, 8], dtype=torch.int32)
    sees = torch.ones(2, 5, 5, dtype=torch.bool)
    with pytest.raises(KernelNotFoundError, match=r"--definition <file.py>:token_tree --form ragged"):
        tree.varlen(x, x, x, starts, starts, sees=sees)
    rows = torch.randn(1, 2, 8, 32)
    with pytest.raises(KernelNotFoundError, match=r"--definition <file.py>:token_tree"):
        tree(rows, rows, rows, sees=sees)


def test_parameters_over_queries_or_keys_are_refused(monkeypatch):
    """By the doors, and by every family, with what to do."""
    params = {p.name: p for p in with_tensors.documents.params}
    monkeypatch.setattr(tvm_flash.custom, "params_of", lambda name: params)
    attention = tvm_flash.custom_attention("documents")
    text = r"^q_document: .* \(axes 'bi'\).* at\.table\['q_document'\]\(at\.b, at\.i\)$"
    for door, count in ((attention.varlen, 5), (attention.paged, 6), (attention.with_kvcache, 3)):
        with pytest.raises(NotSupportedError, match=text):
            door(*[None] * count, **dict.fromkeys(params, None))
    for arch in FAMILY:
        target = Target(arch, "baseline" if arch == "cpu" else "")
        pattern = match(with_tensors.documents(64, "float16", index_dtype="int64" if arch == "cpu" else "int32"))
        traversal = (v1 if arch in ("sm_70", "sm_75") else v2).TRAVERSAL
        for kind in kinds_of(target):
            if kind in (RAGGED, RAGGED_BACKWARD) or kind.startswith("paged"):
                refusal = schedule(traversal, pattern, target, "x", kind=kind)
                assert isinstance(refusal, Rejected) and "q_document" in refusal.reason

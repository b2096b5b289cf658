"""Definitions made of FlexAttention's functions, beside PyTorch's own ``flex_attention`` in float64."""

import functools

import numpy as np
import pytest

from schedules.definition.check import check
from schedules.definition.errors import DefinitionError
from schedules.definition.flex import from_flex
from schedules.definition.pattern import match
from schedules.families import cpu
from schedules.families.interface import Target
from schedules.templates import v2
from tests import oracle
from tests.cpu_kernels import compile_for, runnable_isas
from tvm_flash import reference

torch = pytest.importorskip("torch")
flex = pytest.importorskip("torch.nn.attention.flex_attention")

BATCH, HEADS, HEAD_DIM, SCALE = 2, 4, 16, 0.25
HIDDEN = -float("inf")


# ---------------------------------------------------------------- masks


def causal(b, h, q_idx, kv_idx):
    return q_idx >= kv_idx


def prefix(b, h, q_idx, kv_idx):
    return (kv_idx < 7) | (q_idx >= kv_idx)


def window(b, h, q_idx, kv_idx):
    return (q_idx >= kv_idx) & (q_idx - kv_idx <= 4)


def dilated(b, h, q_idx, kv_idx):
    return ((q_idx - kv_idx) % 3 == 0) & (q_idx >= kv_idx)


def neighbourhood(b, h, q_idx, kv_idx):
    return (q_idx // 5 - kv_idx // 5).abs().le(1) & ((q_idx % 5) - (kv_idx % 5)).abs().le(2)


def by_batch_and_head(b, h, q_idx, kv_idx):
    return (kv_idx >= b * 2) & ~((h == 1) & (kv_idx > 9))


def joined(b, h, q_idx, kv_idx):
    return flex.or_masks(flex.and_masks(causal, dilated), window)(b, h, q_idx, kv_idx)


DOCUMENTS = torch.tensor([0] * 6 + [1] * 4 + [2] * 7)
DOCUMENTS_OF = torch.stack([DOCUMENTS, DOCUMENTS.flip(0)]).int()
VISIBLE = torch.rand(HEADS, 13, 17, generator=torch.Generator().manual_seed(5)) < 0.6
LIMIT = torch.tensor(5)
LAST = torch.randint(0, 17, (17,), generator=torch.Generator().manual_seed(4))


def documents(b, h, q_idx, kv_idx):
    return (DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]) & (q_idx >= kv_idx)


def documents_of_each_entry(b, h, q_idx, kv_idx):
    return DOCUMENTS_OF[b, q_idx] == DOCUMENTS_OF[b, kv_idx]


def given_mask(b, h, q_idx, kv_idx):
    return VISIBLE[h, q_idx, kv_idx]


def up_to_a_limit(b, h, q_idx, kv_idx):
    return kv_idx < q_idx + LIMIT


HALVES = (torch.arange(17) % 4 / 10).half()
TABLES = [DOCUMENTS, torch.arange(17) // 4]


def truth_values_computed_with(b, h, q_idx, kv_idx):
    one, other = q_idx >= kv_idx, kv_idx > 3
    return (((one + other) * (other != (kv_idx > 9))) | (one < other)) ^ torch.maximum(one, kv_idx % 2 == 0)


def whole_powers_and_truth_of_integers(b, h, q_idx, kv_idx):
    return ((q_idx - kv_idx) ** 3 <= 8) & torch.logical_xor(q_idx // 5, kv_idx // 5 - 1)


def negative_numbers(b, h, q_idx, kv_idx):
    return (DOCUMENTS[q_idx.clamp(max=-2)] <= DOCUMENTS[kv_idx]) & ((q_idx - kv_idx) % (-h - 1) > -2)


def sixteen_bits_beside_a_number(b, h, q_idx, kv_idx):
    return (HALVES[kv_idx] == 0.1) | (HALVES[q_idx] > 0.15)


def tables_of_a_list(b, h, q_idx, kv_idx):
    return (TABLES[0][q_idx] == TABLES[0][kv_idx]) | (TABLES[1][q_idx] == TABLES[1][kv_idx])


class UpTo:
    """A mask with what it knows of its own."""

    def __init__(self):
        self.own_limit, self.own_ids = LIMIT, DOCUMENTS

    def __call__(self, b, h, q_idx, kv_idx):
        return (kv_idx < q_idx + self.own_limit) & (self.own_ids[kv_idx] >= 1)


up_to = UpTo()

HOLDER = [UpTo()]


def last_key_or_own(b, h, q_idx, kv_idx):
    return (LAST[q_idx] == kv_idx) | (q_idx - kv_idx == LIMIT) | ((LAST[kv_idx] != q_idx) & (kv_idx < q_idx))


def differing_twice(b, h, q_idx, kv_idx):
    near = (q_idx - kv_idx).clamp(-3, 3) == h
    return ((kv_idx * 2 != 8) ^ near) ^ ((torch.minimum(q_idx - 8, b) == h) | (kv_idx == 11))


def spread(x):
    """The even bits of a number, one beside another (Morton's order of a picture)."""
    x = (x | (x << 8)) & 0x00FF00FF
    x = (x | (x << 4)) & 0x0F0F0F0F
    return ((x >> 2) | x) & 0x33333333


def bits_of_integers(b, h, q_idx, kv_idx):
    near = (spread(q_idx) ^ spread(kv_idx)) < 20
    return near & ((q_idx & 3) >= (kv_idx & 1)) | (~(q_idx - kv_idx) >> 2 == (DOCUMENTS[kv_idx] | 1)) & (
        (h - 3) & 7 == 6
    )


MASKS = (causal, prefix, window, dilated, neighbourhood, by_batch_and_head, joined)
MASKS += (documents, documents_of_each_entry, given_mask, up_to_a_limit)
MASKS += (truth_values_computed_with, whole_powers_and_truth_of_integers, negative_numbers)
MASKS += (sixteen_bits_beside_a_number, tables_of_a_list, up_to, last_key_or_own, differing_twice)
MASKS += (bits_of_integers,)

# ---------------------------------------------------------------- scores


def softcap(score, b, h, q_idx, kv_idx):
    return 20 * torch.tanh(score / 20)


def alibi(score, b, h, q_idx, kv_idx):
    return score - torch.exp2(-8.0 * (h + 1) / HEADS) * (q_idx - kv_idx).abs()


def relative(score, b, h, q_idx, kv_idx):
    return score + (q_idx - kv_idx)


def causal_by_score(score, b, h, q_idx, kv_idx):
    return torch.where(q_idx >= kv_idx, score, HIDDEN)


def causal_by_the_other_branch(score, b, h, q_idx, kv_idx):
    return torch.where(q_idx < kv_idx, HIDDEN, score * 2)


def composed(score, b, h, q_idx, kv_idx):
    return causal_by_score(softcap(alibi(score, b, h, q_idx, kv_idx), b, h, q_idx, kv_idx), b, h, q_idx, kv_idx)


def clamped(score, b, h, q_idx, kv_idx):
    return score.clamp(-1.5, 1.0) + torch.nn.functional.relu(score) * torch.sigmoid(score)


def arithmetic(score, b, h, q_idx, kv_idx):
    distance = torch.add(score, kv_idx - q_idx, alpha=0.5) - torch.floor_divide(q_idx, 3)
    return torch.maximum(distance, torch.tensor(0.3)) - torch.remainder(score, 0.7) / (1 + score.square())


SLOPES = torch.rand(HEADS, generator=torch.Generator().manual_seed(6))
BIAS = torch.randn(BATCH, HEADS, 13, 17, generator=torch.Generator().manual_seed(7))
RELATIVE = torch.randn(HEADS, 29, generator=torch.Generator().manual_seed(8)).double()


def learnt_slopes(score, b, h, q_idx, kv_idx):
    return score - SLOPES[h] * (q_idx - kv_idx).abs()


def biased(score, b, h, q_idx, kv_idx):
    return score + BIAS[b, h, q_idx, kv_idx]


def relative_table(score, b, h, q_idx, kv_idx):
    return score + RELATIVE[h, kv_idx - q_idx + 12]


def from_the_end(score, b, h, q_idx, kv_idx):
    return score + RELATIVE[h, kv_idx - q_idx - 3]  # a negative index counts from the end


def inner_infinities(score, b, h, q_idx, kv_idx):
    return torch.relu(causal_by_score(score, b, h, q_idx, kv_idx)) + torch.rsub(score, 1.0, alpha=2)


def table_of_a_table(score, b, h, q_idx, kv_idx):
    return score + HALVES[TABLES[1][kv_idx]] * score


def one_index_after_another(score, b, h, q_idx, kv_idx):
    return score + BIAS[b][h][q_idx, kv_idx] + RELATIVE[1][kv_idx]


SHARED = torch.randn(1, HEADS, 1, 17, generator=torch.Generator().manual_seed(9))


def expanded(score, b, h, q_idx, kv_idx):
    once = SHARED.expand(BATCH, -1, 13, -1)[b, h, q_idx, kv_idx]
    return score + once + SLOPES.expand(BATCH, HEADS)[b][h].expand_as(score)


def filled(score, b, h, q_idx, kv_idx):
    return (score + score.masked_fill(kv_idx % 3 == 0, 0.5)).masked_fill(q_idx < kv_idx, HIDDEN)


def activated(score, b, h, q_idx, kv_idx):
    f = torch.nn.functional
    return f.gelu(score) + f.gelu(2 * score, approximate="tanh") - f.silu(score) + torch.erf(score * 0.7)


def further_functions(score, b, h, q_idx, kv_idx):
    f = torch.nn.functional
    bent = f.leaky_relu(score, 0.1) + f.elu(score, 0.7) + f.hardtanh(score, -0.8, 1.2)
    return bent + f.softplus(score, 2, 3) + torch.expm1(score * 0.3) + torch.tan(score * 0.1)


def hidden_by_batch_and_key(score, b, h, q_idx, kv_idx):
    return torch.where(DOCUMENTS_OF[b, kv_idx] > 0, score, HIDDEN)


SCORES = (softcap, alibi, relative, causal_by_score, causal_by_the_other_branch, composed, clamped, arithmetic)
SCORES += (learnt_slopes, biased, relative_table, from_the_end, inner_infinities, table_of_a_table)
SCORES += (one_index_after_another, expanded, filled, activated)
SCORES += (further_functions,)
PAIRS = [*((None, m) for m in MASKS), *((s, None) for s in SCORES), (softcap, prefix), (composed, window)]
PAIRS += [(hidden_by_batch_and_key, prefix)]  # two masks of other axes


def tensors(lengths=(13, 17)):
    rng = np.random.default_rng(3)
    return [rng.standard_normal((BATCH, HEADS, n, HEAD_DIM), np.float32) for n in (lengths[0], lengths[1], lengths[1])]


def of_flex_attention(q, k, v, score, mask):
    """PyTorch's own, in float64."""
    q, k, v = (torch.from_numpy(x).double() for x in (q, k, v))
    block = None
    if mask is not None:
        block = flex.create_block_mask(mask, BATCH, HEADS, q.shape[2], k.shape[2], device="cpu")
    out, lse = flex.flex_attention(q, k, v, score_mod=score, block_mask=block, scale=SCALE, return_lse=True)
    return out.numpy(), lse.numpy()


def values_of(definition):
    """The tensors that the functions hold on to, as the definition's parameters want them; numbers as numbers."""
    known = {**globals(), "TABLES_0": TABLES[0], "TABLES_1": TABLES[1], "own_limit": LIMIT, "own_ids": DOCUMENTS}
    found = {p.name: known[p.name] for p in definition.params}
    return {
        p.name: found[p.name].to(getattr(torch, p.dtype)).numpy() if found[p.name].ndim else found[p.name].item()
        for p in definition.params
    }


@pytest.mark.parametrize(("score", "mask"), PAIRS, ids=lambda f: getattr(f, "__name__", "none"))
def test_a_definition_says_what_flex_attention_does(score, mask):
    q, k, v = tensors()
    want, want_lse = of_flex_attention(q, k, v, score, mask)
    definition = from_flex(score, mask)
    values = values_of(definition)
    what = {"mask": definition.mask.twin, "score": definition.score.twin, "params": values}
    what["axes"] = {p.name: p.axes for p in definition.params}
    twin, twin_lse = reference.attention(q, k, v, softmax_scale=SCALE, **what)
    np.testing.assert_allclose(twin, want, atol=1e-6 if definition.params else 1e-12, rtol=0)
    np.testing.assert_allclose(twin_lse, want_lse, atol=1e-6 if definition.params else 1e-12, rtol=0)
    got = oracle.operator(definition, "forward", HEAD_DIM, HEAD_DIM)(q=q, k=k, v=v, softmax_scale=SCALE, **values)
    np.testing.assert_allclose(got.o, want, atol=2e-6, rtol=0)
    np.testing.assert_allclose(got.lse, want_lse, atol=4e-6, rtol=0)


def test_whole_powers_of_negative_numbers():
    """As PyTorch has them; ``flex_attention`` itself takes other scores for these, without a word."""
    definition = from_flex(None, lambda b, h, q_idx, kv_idx: ((-1.0) ** (q_idx - kv_idx) > 0) | ((-0.9) ** h < -0.1))
    assert "pow(T.float32(-" not in str(definition(HEAD_DIM, "float32"))  # which GPUs have no number for
    q, k, v = tensors()
    want, _ = reference.attention(
        q, k, v, softmax_scale=SCALE, mask=lambda at: ((at.i - at.j) % 2 == 0) | (at.h % 2 == 1)
    )
    twin, _ = reference.attention(q, k, v, softmax_scale=SCALE, mask=definition.mask.twin)
    got = oracle.operator(definition, "forward", HEAD_DIM, HEAD_DIM)(q=q, k=k, v=v, softmax_scale=SCALE)
    np.testing.assert_allclose(twin, want, atol=1e-12, rtol=0)
    np.testing.assert_allclose(got.o, want, atol=2e-6, rtol=0)


def test_sixteen_bits_are_computed_with_in_float32():
    """As FlexAttention's compiled kernels do; PyTorch rounds what it computes one operation after another."""

    def score_of(gates):
        def score(score, b, h, q_idx, kv_idx):
            gate = torch.sigmoid(gates[kv_idx] * 0.7 + gates[q_idx])
            return torch.where(gates[kv_idx] > 0.1, score * gate, score - torch.maximum(gates[q_idx], gate))

        return score

    gates = torch.randn(17, generator=torch.Generator().manual_seed(3)).half()
    (q, k, v), definition = tensors(), from_flex(score_of(gates.clone().requires_grad_()))
    assert [(p.name, p.dtype, p.gradient) for p in definition.params] == [("gates", "float16", True)]
    want, _ = of_flex_attention(q, k, v, score_of(gates.double()), None)
    what = {"score": definition.score.twin, "params": {"gates": gates.numpy()}, "axes": {"gates": ""}}
    twin, _ = reference.attention(q, k, v, softmax_scale=SCALE, **what)
    np.testing.assert_allclose(twin, want, atol=1e-12, rtol=0)
    compute = oracle.operator(definition, "forward", HEAD_DIM, HEAD_DIM)
    np.testing.assert_allclose(
        compute(q=q, k=k, v=v, softmax_scale=SCALE, gates=gates.numpy()).o, want, atol=2e-6, rtol=0
    )
    check(definition)


@pytest.mark.parametrize("isa", runnable_isas())
def test_masks_that_differ_from_one_another_are_vectors_on_processors(isa):
    """TVM's analysis of integers fails at vectors of bools that were cast to them."""
    pattern, target = (
        match(from_flex(None, differing_twice)(64, "float32", index_dtype=cpu.INDEX_DTYPE)),
        Target("cpu", isa),
    )
    (config, *_) = cpu.default_configs("v2", pattern, target).values()
    assert compile_for(isa, cpu.program(pattern, config, target, v2.TRAVERSAL, "kernel"))


def test_a_tensor_read_where_the_score_is_has_axes_and_others_are_tables():
    axes = {p.name: (p.axes, p.rank) for f in (biased, learnt_slopes, relative_table) for p in from_flex(f).params}
    assert axes == {"BIAS": ("bhij", 0), "SLOPES": ("h", 0), "RELATIVE": ("", 2)}
    assert {p.name: p.rank for p in from_flex(None, documents).params} == {"DOCUMENTS": 1}
    assert from_flex(None, given_mask).params[0].dtype == "bool"
    learnt = RELATIVE.clone().requires_grad_()
    (table,) = from_flex(lambda s, b, h, q, k: s + learnt[h, k - q + 12]).params
    assert table.rank == 2 and table.gradient
    bias = BIAS.clone().requires_grad_()
    (param,) = from_flex(lambda s, b, h, q, k: s + bias[b, h, q, k]).params
    assert param.gradient and param.name == "bias"


@pytest.mark.parametrize(
    "score", [softcap, composed, clamped, filled, activated, further_functions], ids=lambda f: f.__name__
)
def test_its_gradients_are_those_of_the_function(score):
    q, k, v = tensors()
    leaves = [torch.from_numpy(x).double().requires_grad_() for x in (q, k, v)]
    places = torch.meshgrid(*(torch.arange(n) for n in (BATCH, HEADS, q.shape[2], k.shape[2])), indexing="ij")
    prob = torch.softmax(score(leaves[0] @ leaves[1].mT * SCALE, *places), dim=-1)
    out = prob.nan_to_num() @ leaves[2]
    dout = np.random.default_rng(4).standard_normal(out.shape)
    out.backward(torch.from_numpy(dout))
    definition = from_flex(score)
    found = reference.attention_backward(
        dout, q, k, v, softmax_scale=SCALE, mask=definition.mask.twin, score=definition.score.twin
    )
    for got, leaf in zip((found.dq, found.dk, found.dv), leaves, strict=True):
        np.testing.assert_allclose(got, leaf.grad.numpy(), atol=1e-8, rtol=0)
    assert oracle.operator(definition, "backward", HEAD_DIM, HEAD_DIM)


LEARNT = [
    lambda s, x: x * torch.tanh(s / x),
    lambda s, x: s * torch.sigmoid(x),
    lambda s, x: s * torch.exp(-x) + torch.sqrt(x),
]


@pytest.mark.parametrize("of", LEARNT, ids=["soft cap", "sigmoid", "exp and sqrt"])
def test_gradients_of_what_is_learnt_inside_of_functions(of):
    """Of whose results autograd keeps one for itself while PyTorch traces them."""
    learnt = (0.5 + torch.rand(HEADS, generator=torch.Generator().manual_seed(2))).requires_grad_()
    definition = from_flex(lambda s, b, h, q_idx, kv_idx: of(s, learnt[h]))
    (param,) = definition.params
    assert (param.name, param.axes, param.gradient) == ("learnt", "h", True)
    q, k, v = tensors()
    want = learnt.detach().double().requires_grad_()
    scores = of(torch.from_numpy(q).double() @ torch.from_numpy(k).double().mT * SCALE, want[:, None, None])
    out = torch.softmax(scores, -1) @ torch.from_numpy(v).double()
    dout = np.random.default_rng(4).standard_normal(out.shape)
    out.backward(torch.from_numpy(dout))
    what = {"mask": definition.mask.twin, "score": definition.score.twin, "softmax_scale": SCALE}
    what |= {"params": {"learnt": learnt.detach().numpy()}, "axes": {"learnt": "h"}, "gradients": ["learnt"]}
    found = reference.attention_backward(dout, q, k, v, **what).params["learnt"]
    np.testing.assert_allclose(np.reshape(found, (-1, HEADS)).sum(0), want.grad.numpy(), atol=1e-6, rtol=0)


def test_a_sigmoid_of_large_scores_has_no_gradient_and_no_nan():
    q, k, v = tensors()
    definition = from_flex(lambda s, b, h, q, k: s * torch.sigmoid(300 * s))
    forward, backward = (oracle.operator(definition, op, HEAD_DIM, HEAD_DIM) for op in ("forward", "backward"))
    given = {"q": q, "k": k, "v": v, "softmax_scale": SCALE}
    out = forward(**given)
    dout = np.random.default_rng(4).standard_normal(out.o.shape, np.float32)
    found = backward(**given, do=dout, lse=out.lse, delta=(dout * out.o).sum(-1))
    what = {"mask": definition.mask.twin, "score": definition.score.twin}
    want = reference.attention_backward(dout, q, k, v, softmax_scale=SCALE, **what)
    np.testing.assert_allclose(found.dq, want.dq, atol=1e-4, rtol=0)
    np.testing.assert_allclose(found.dk, want.dk, atol=1e-4, rtol=0)


def masks_of(*tables):
    def mask_of(ids):
        return lambda b, h, q_idx, kv_idx: ids[q_idx] == ids[kv_idx]

    return [mask_of(x) for x in tables]


def test_two_tensors_of_one_name_are_not_one_parameter():
    same, other = masks_of(*TABLES), masks_of(DOCUMENTS)[0]
    with pytest.raises(DefinitionError, match="two tensors in variables named 'ids'"):
        from_flex(None, flex.and_masks(*same))
    with pytest.raises(DefinitionError, match="two tensors in variables named 'ids'"):
        from_flex(lambda s, b, h, q, k: torch.where(same[1](b, h, q, k), s, HIDDEN), other)
    assert [p.name for p in from_flex(None, flex.and_masks(same[0], other)).params] == ["ids"]


def test_a_score_of_minus_infinity_becomes_a_mask_that_skips_tiles():
    definition = from_flex(causal_by_score)
    assert definition.score.name == "identity"
    assert definition.mask.params == ()
    assert from_flex(causal_by_the_other_branch).mask.name == "causal_by_the_other_branch_mask"


def test_nothing_given_is_plain_attention():
    definition = from_flex()
    assert (definition.score.name, definition.mask.name) == ("identity", "full")


def test_tensors_over_queries_or_keys_can_be_tables():
    """As kernels of sequences of different lengths want them; what a head or a sequence has stays what it is."""
    before, tree = torch.tensor([4, 7], dtype=torch.int32), torch.ones(2, 5, 5, dtype=torch.bool)
    ids, slopes = torch.zeros(2, 9, dtype=torch.int32), torch.ones(3)

    def mask(b, h, q, k):
        return ((k < before[b]) | tree[b, q, k - before[b]]) & (ids[b, k] >= 0)

    def score(s, b, h, q, k):
        return s * slopes[h]

    plain, of_tables = (from_flex(score, mask, tables=x) for x in (False, True))
    assert {p.name: p.axes or p.rank for p in plain.params} == {"before": "b", "tree": 3, "ids": "bj", "slopes": "h"}
    assert {p.name: p.axes or p.rank for p in of_tables.params} == {"before": "b", "tree": 3, "ids": 2, "slopes": "h"}
    check(of_tables)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"score_mod": lambda s, b, h, q, k: s.erfinv()}, "erfinv"),
        ({"score_mod": lambda s, b, h, q, k: s.half()}, "float16"),
        ({"score_mod": lambda s, b, h, q, k: (q << h) + s}, "shifts by a number from 0 to 30"),
        ({"score_mod": lambda s, b, h, q, k: s + torch.floor(HALVES[k] * 2)}, "computed in 16 bits"),
        ({"mask_mod": lambda b, h, q, k: (HALVES[k] + HALVES[q]).float() > 0.3}, "computed in 16 bits"),
        ({"mask_mod": lambda b, h, q, k: DOCUMENTS[(HALVES[k] * 2).int()] == 0}, "computed in 16 bits"),
        ({"score_mod": lambda s, b, h, q, k: s if q > k else s * 2}, "branches on their values"),
        ({"score_mod": lambda s, b, h, q, k: torch.where(s > 0, s, HIDDEN)}, "by the value of the score"),
        ({"score_mod": lambda s, b, h, q: s}, r"\(score, b, h, q_idx, kv_idx\)"),
        ({"score_mod": lambda s, b, h, q, k: None}, "NoneType"),
        ({"score_mod": lambda s, b, h, q, k: q >= k}, "expected float"),
        ({"score_mod": lambda s, b, h, q, k: s + torch.tensor([1.0, 2.0])[h]}, "hold it in a variable"),
        ({"score_mod": 3}, "score_mod is int"),
        ({"score_mod": lambda s, b, h, q, k: s.detach() * s}, "detaches what has a gradient"),
        ({"score_mod": lambda s, b, h, q, k: q * 1.0}, "never uses its score"),
        ({"score_mod": lambda s, b, h, q, k: s + 2**h}, r"2\.0\*\*h"),
        ({"mask_mod": lambda b, h, q, k: HALVES[k] < q}, r"by \.float\(\)"),
        ({"mask_mod": lambda b, h, q, k: k < HOLDER[0].own_limit}, "where its name isn't known"),
        ({"mask_mod": lambda b, h, q, k, lse=DOCUMENTS: lse[k] == 0}, "named 'lse'"),
        ({"mask_mod": lambda b, h, q, k: q - k}, "expected bool"),
        ({"mask_mod": lambda b, h, q, k: VISIBLE[h][q]}, "a tensor of several values"),
        ({"mask_mod": lambda b, h, q, k: VISIBLE[h][:, k][q]}, "by :, a position; single elements"),
        ({"mask_mod": lambda b, h, q, k: VISIBLE[h, ..., 1:4].any()}, r"\(4, 13, 17\) by a position, \.\.\., 1:4"),
        ({"mask_mod": functools.partial(torch.add)}, "can't be traced"),
    ],
)
def test_what_isnt_known_is_refused_by_name(given, message):
    with pytest.raises(DefinitionError, match=message):
        from_flex(**given)

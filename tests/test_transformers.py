"""Models of transformers with our attention give what they give with torch's."""

from __future__ import annotations

import inspect
import re
import warnings
from pathlib import Path

import pytest

from tests.test_torch_program import DEVICES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402

from tests import architectures, transformers_models  # noqa: E402
from tests.transformers_models import SENTENCES, config, falls_back, minilm  # noqa: E402
from tvm_flash import ArgumentTypeError, InvalidArgumentError, NotSupportedError  # noqa: E402
from tvm_flash.integrations import transformers as integration  # noqa: E402
from tvm_flash.integrations.transformers import attention, registration  # noqa: E402
from tvm_flash.nn import FallbackWarning  # noqa: E402

pytestmark = [pytest.mark.usefixtures("cpu_pack"), pytest.mark.filterwarnings("error::tvm_flash.nn.FallbackWarning")]
registered = transformers_models.registered


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("side", ("right", "left"))
def test_a_real_model_gives_the_same_embeddings(side, device, registered):
    folder = minilm()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side=side)
    batch = tokenizer(list(SENTENCES), padding=True, return_tensors="pt").to(device)
    weights = batch["attention_mask"][..., None]
    dtype = torch.float32 if device == "cpu" else torch.float16
    found = {}
    for name in ("sdpa", integration.NAME):
        model = transformers.AutoModel.from_pretrained(folder, attn_implementation=name, dtype=dtype).to(device).eval()
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state.float()
        found[name] = torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)
    assert len(registered) == 6
    difference = (found["sdpa"] - found[integration.NAME]).abs().max().item()
    assert difference < (1e-6 if device == "cpu" else 2e-3)


@pytest.mark.parametrize("device", DEVICES)
def test_an_encoder_with_padding(device, registered):
    sizes = {"hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    torch.manual_seed(1)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=100, **sizes), add_pooling_layer=False)
    model = model.to(device, torch.float32 if device == "cpu" else torch.float16).eval()
    tokens = torch.randint(5, 90, (3, 150), device=device)
    lengths = torch.tensor([[150], [7], [90]], device=device)
    mask = (torch.arange(150, device=device) < lengths).long()
    hidden = {}
    for name in ("sdpa", integration.NAME):
        model.set_attn_implementation(name)
        with torch.no_grad():
            hidden[name] = model(tokens, attention_mask=mask).last_hidden_state
    assert len(registered) == 2
    difference = (hidden["sdpa"] - hidden[integration.NAME])[mask.bool()].abs().max().item()
    assert difference < (1e-5 if device == "cpu" else 1e-2)


def generate(kind: str, implementation: str, device: str, padded: bool, **options):
    torch.manual_seed(1)
    dtype = torch.float32 if device == "cpu" else torch.float16
    model = transformers.AutoModelForCausalLM.from_config(config(kind), attn_implementation=implementation)
    model = model.to(device, dtype).eval()
    tokens = torch.randint(5, 90, (3, 17), device=device)
    attention_mask = torch.ones_like(tokens)
    if padded:
        attention_mask[1, :6] = attention_mask[2, :1] = 0
    return model.generate(
        tokens,
        attention_mask=attention_mask,
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache", (None, "static"))
@pytest.mark.parametrize("padded", (False, True))
@pytest.mark.parametrize("kind", ("llama", "mistral", "gpt2"))
def test_the_same_tokens(kind, padded, cache, device, registered):
    options = {"cache_implementation": cache, "disable_compile": True} if cache else {}
    want = generate(kind, "sdpa", device, padded, **options)
    got = generate(kind, integration.NAME, device, padded, **options)
    assert len(registered) == 2 * 20
    assert torch.equal(got.sequences, want.sequences)
    difference = max((a - b).abs().max().item() for a, b in zip(got.logits, want.logits, strict=True))
    assert difference < (1e-5 if device == "cpu" else 5e-3)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_the_same_tokens_from_a_compiled_decoder(device):
    want = generate("llama", "sdpa", device, padded=True)
    got = generate("llama", integration.NAME, device, padded=True, cache_implementation="static")
    assert torch.equal(got.sequences, want.sequences)


@falls_back
def test_a_soft_cap():
    """Gemma 2, whose window is shorter than the text, with padding; sdpa has no soft cap, so eager is the measure."""
    tokens = torch.randint(5, 90, (2, 18))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    for given in ({}, {"attention_mask": mask}):
        logits = {}
        for name in ("eager", integration.NAME):
            torch.manual_seed(1)
            model = transformers.AutoModelForCausalLM.from_config(config("gemma2"), attn_implementation=name).eval()
            with torch.no_grad():
                logits[name] = model(tokens, **given).logits[given.get("attention_mask", mask | 1).bool()]
        assert (logits["eager"] - logits[integration.NAME]).abs().max() < 1e-5


def masks(kind, q_length, kv_length, q_offset, attention_mask, kv_offset=0):
    """transformers' boolean mask, its mask for eager attention, and ours, of one kind of layer."""
    function = {
        "causal": masking_utils.causal_mask_function,
        "full": masking_utils.bidirectional_mask_function,
        "sliding": masking_utils.sliding_window_causal_mask_function(6),
        "sliding both ways": masking_utils.sliding_window_bidirectional_mask_function(2),
        "chunked": masking_utils.chunked_causal_mask_function(4, torch.zeros(3, dtype=torch.int)),
    }[kind]
    given = {"batch_size": 3, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset}
    given |= {"kv_offset": kv_offset, "mask_function": function, "attention_mask": attention_mask}
    whole = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False)
    return whole, masking_utils.eager_mask(**given), integration.make_mask(**given)


@pytest.mark.parametrize("kind", ("causal", "full", "sliding", "sliding both ways", "chunked"))
@pytest.mark.parametrize("room", (0, 5))
@pytest.mark.parametrize(("q_length", "q_offset"), ((9, 0), (1, 8), (4, 5)))
@pytest.mark.parametrize("padding", (None, "ones", "left", "right"))
def test_key_ranges_say_what_the_boolean_mask_says(kind, room, q_length, q_offset, padding):
    seen = q_length + q_offset
    attention_mask = None if padding is None else torch.ones(3, seen, dtype=torch.bool)
    if padding == "left":
        attention_mask[1, :4] = attention_mask[2, :1] = False
    if padding == "right":
        attention_mask[1, 6:] = attention_mask[0, 8:] = False
    whole, eager, ours = masks(kind, q_length, seen + room, q_offset, attention_mask)
    assert ours.shape == eager.shape and ours.dtype == eager.dtype
    assert (ours.ranges is None) == (kind == "chunked" or (kind == "sliding both ways" and room > 0))
    if ours.ranges is not None:
        visible = ours.ranges.visible(q_length, torch.device("cpu"))
        visible = torch.nn.functional.pad(visible, (0, seen + room - visible.shape[-1]))
        assert torch.equal(visible.expand_as(whole), whole)
    assert torch.equal(ours.visible().expand_as(whole), whole)
    assert torch.equal(ours + 0, eager)  # what somebody sees who looks into it


@pytest.mark.parametrize("kind", ("causal", "sliding"))
@pytest.mark.parametrize("padding", (False, True))
def test_what_changes_after_a_mask_is_made_does_not_change_it(kind, padding):
    """A static cache counts its tokens in the tensor that a mask gets as its offset, before a layer looks into it."""
    offset = torch.tensor(4)
    attention_mask = torch.ones(3, 5, dtype=torch.bool) if padding else None
    whole, eager, ours = masks(kind, 1, 9, offset, attention_mask)
    offset += 1
    if padding:
        attention_mask[:, :3] = False
    assert torch.equal(ours.visible().expand_as(whole), whole)
    assert torch.equal(ours + 0, eager)


def test_padding_of_more_rows_than_the_batch_has():
    """As MusicGen's, whose decoder has a row of tokens for each codebook: transformers reads the first ones."""
    attention_mask = torch.ones(5, 9, dtype=torch.bool)
    attention_mask[1, 7:] = attention_mask[3, 2:] = False
    whole, _, ours = masks("causal", 9, 9, 0, attention_mask)
    assert torch.equal(ours.ranges.visible(9, torch.device("cpu")), whole)


@pytest.mark.parametrize("kind", ("causal", "sliding", "sliding both ways"))
def test_queries_that_stand_beyond_the_keys(kind):
    whole, _, ours = masks(kind, 4, 6, 5, None)
    assert ours.ranges is None and torch.equal(ours.visible(), whole)


def test_a_mask_that_is_written_into_is_that_from_then_on():
    _, eager, ours = masks("causal", 9, 9, 0, None)
    ours[:, :, :, 3] = torch.finfo(torch.float32).min
    eager = eager.clone()
    eager[:, :, :, 3] = torch.finfo(torch.float32).min
    assert ours.ranges is None and torch.equal(ours.visible(), eager)
    _, eager, ours = masks("causal", 9, 9, 0, None)
    ours += 1.0
    assert ours.ranges is None and torch.equal(ours.visible(), eager + 1.0)
    _, _, ours = masks("causal", 9, 9, 0, None)
    assert ours[:, :, :, :9].ranges == ours.detach().ranges == ours.ranges is not None


def test_what_is_packed_for_compiled_programs_is_what_was_packed():
    ends = torch.tensor([[0, 7], [2, 9]], dtype=torch.int32)
    for window in ((-1, -1), (-1, 0), (5, 0)):
        packed = integration.KeyRanges(9, ends, window).pack()
        again = integration.KeyRanges.unpack(packed)
        assert (again.keys, again.window) == (9, window) and torch.equal(again.ends, ends)
        with pytest.raises(RuntimeError):
            torch.zeros(2, 1, 9, 9) + packed


def test_masks_of_another_kind_are_computed_as_they_are():
    holes = torch.ones(3, 9, dtype=torch.bool)
    holes[0, 4] = False
    whole, _, ours = masks("causal", 9, 9, 0, holes)
    assert ours.ranges is None and torch.equal(ours.visible(), whole)
    tokens, options = torch.randint(5, 90, (3, 9)), {"attention_mask": holes.long()}
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config("llama"), attn_implementation=integration.NAME).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        got = model(tokens, **options).logits
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        assert torch.allclose(got, model(tokens, **options).logits, atol=1e-5)


def test_training_goes_through_torch():
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config("llama"), attn_implementation=integration.NAME)
    tokens = torch.randint(5, 90, (3, 9))
    losses = []
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [1] * 9])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        for name in (integration.NAME, "sdpa"):
            model.set_attn_implementation(name)
            model.zero_grad()
            loss = model(tokens, attention_mask=mask, labels=tokens).loss
            loss.backward()
            losses.append((loss.item(), model.lm_head.weight.grad.clone()))
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-6)
    assert torch.allclose(losses[0][1], losses[1][1], atol=1e-6)


LAYER = {"batch": 1, "tokens": 30, "heads": 4, "kv_heads": 2, "head_dim": 20}


def layer():
    """Tensors of one layer, with a size that is no multiple of 8, in float64 for the reference."""
    generator = torch.Generator().manual_seed(0)
    b, t, h, k, d = LAYER.values()
    return [torch.randn(b, x, t, d, generator=generator) for x in (h, k, k)]


def reference(q, k, v, visible, softcap=None, sink=None, bias=None):
    """In float64; ``visible`` and ``bias`` are broadcast over ``(batch, heads, seqlen_q, seqlen_kv)``."""
    q, k, v = (x.double() for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores if bias is None else scores + bias.double()
    scores = scores.masked_fill(~visible, -torch.inf)
    if sink is not None:
        sink = sink.double().reshape(1, -1, 1, 1) if sink.ndim == 1 else sink.double()
        scores = torch.cat((scores, sink.expand(*scores.shape[:3], 1)), -1)
    weights = scores.softmax(-1)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2)


def causal(tokens: int, window: int = 0) -> torch.Tensor:
    i = torch.arange(tokens)
    seen = i[:, None] >= i
    return seen & (i[:, None] - i < window) if window else seen


MODULE = torch.nn.Module()
MODULE.is_causal = True


@pytest.mark.parametrize("gradient", (False, True))
@pytest.mark.parametrize("window", (None, 4))
@pytest.mark.parametrize("option", ("plain", "softcap", "s_aux", "sinks", "position_bias", "indices", "packed"))
@falls_back
def test_every_option_is_heard(option, window, gradient):
    """By our kernels, and by torch where a gradient is required."""
    q, k, v = layer()
    generator = torch.Generator().manual_seed(4)
    given = {"sliding_window": window}
    visible, expected = causal(30, window or 0), {}
    if option == "softcap":
        given["softcap"] = expected["softcap"] = 0.7
    if option in ("s_aux", "sinks"):
        shape = (4,) if option == "s_aux" else (1, 4, 30, 1)
        given[option] = expected["sink"] = torch.randn(shape, generator=generator)
    if option == "position_bias":
        given[option] = expected["bias"] = torch.randn(1, 4, 30, 30, generator=generator)
    if option == "indices":
        given[option] = torch.stack((torch.arange(30), torch.full((30,), -1), torch.full((30,), 40)), -1)[None]
        visible = visible & torch.eye(30, dtype=torch.bool)
    if option == "packed":
        starts = torch.tensor([0, 12, 12, 30], dtype=torch.int32)
        given |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 18, "max_length_k": 18}
        part = torch.arange(30) >= 12
        visible = visible & (part[:, None] == part)
    out, weights = integration.attention_forward(MODULE, q.requires_grad_(gradient), k, v, None, **given)
    assert weights is None and out.shape == (1, 30, 4, 20)
    assert (out - reference(q, k, v, visible, **expected)).abs().max() < 1e-5


@pytest.mark.parametrize("sink", (False, True))
def test_packed_sequences_are_compiled(sink):
    q, k, v = layer()
    starts = torch.tensor([0, 12, 12, 30], dtype=torch.int32)
    packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 18, "max_length_k": 18}
    packed |= {"s_aux": torch.randn(4)} if sink else {}
    program = torch.compile(integration.attention_forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(
        program(MODULE, q, k, v, None, **packed)[0], integration.attention_forward(MODULE, q, k, v, None, **packed)[0]
    )


@falls_back
def test_dropout_and_weights_are_heard():
    q, k, v = layer()
    starts = torch.tensor([0, 12, 30], dtype=torch.int32)
    packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 18, "max_length_k": 18}
    for given in ({}, packed):
        plain, _ = integration.attention_forward(MODULE, q, k, v, None, **given)
        torch.manual_seed(0)
        many = [integration.attention_forward(MODULE, q, k, v, None, dropout=0.5, **given)[0] for _ in range(120)]
        assert not torch.allclose(many[0], plain, atol=1e-2)
        assert (torch.stack(many).mean(0) - plain).abs().max() < 1.0
    _, weights = integration.attention_forward(MODULE, q, k, v, None, output_attentions=True)
    assert weights.shape == (1, 4, 30, 30) and torch.allclose(weights.sum(-1), torch.ones(1, 4, 30))
    assert torch.equal(weights[0, 0] == 0, ~causal(30))


@pytest.mark.parametrize("kind", ("llama", "gpt2"))
@falls_back
def test_weights_of_models_that_do_not_tell_their_layers(kind):
    """transformers takes them from the layers' results; of its models llama also hands on that they are asked for."""
    found = {}
    for name in ("eager", integration.NAME):
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config(kind), attn_implementation=name).eval()
        with torch.no_grad():
            found[name] = model(torch.arange(5, 17)[None], output_attentions=True).attentions
    for ours, theirs in zip(*found.values(), strict=True):
        assert (ours - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("shape", ((2, 1, 1, 7), (2, 4, 7, 7)))
def test_a_mask_is_learnt(shape):
    """Also one that hides nothing yet."""
    q, k, v = (torch.randn(2, 4, 7, 16) for _ in range(3))
    mask = torch.zeros(shape, requires_grad=True)
    weights = torch.randn(2, 4, 7, 16)
    out, _ = attention.attention_forward(torch.nn.Module(), q, k, v, mask)
    (found,) = torch.autograd.grad((out.transpose(1, 2) * weights).sum(), mask)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)
    (want,) = torch.autograd.grad((want * weights).sum(), mask)
    assert (found - want).abs().max() < 1e-5 and want.any()


def test_masks_of_integers_are_refused():
    q, k, v = (torch.randn(2, 4, 7, 16) for _ in range(3))
    with pytest.raises(ArgumentTypeError, match=r"^attention_mask: has dtype torch.int64, expected torch.bool"):
        attention.attention_forward(torch.nn.Module(), q, k, v, torch.ones(2, 1, 1, 7, dtype=torch.int64))


def test_arguments_that_are_not_known_are_refused():
    q, k, v = layer()
    for name in ("layer_head_mask", "something_new"):
        with pytest.raises(NotSupportedError, match=rf"^{name}: .*attn_implementation='eager'"):
            integration.attention_forward(MODULE, q, k, v, None, **{name: torch.zeros(4)})
        integration.attention_forward(MODULE, q, k, v, None, **{name: None})
    starts = torch.tensor([0, 30], dtype=torch.int32)
    with pytest.raises(InvalidArgumentError, match=r"^cu_seq_lens_k: is None"):
        integration.attention_forward(MODULE, q, k, v, None, cu_seq_lens_q=starts)


@pytest.mark.parametrize("compiled", (False, True))
def test_arguments_that_go_through_a_layer_which_never_asks_for_them(compiled):
    """Models hand theirs on to every layer (Janus ``vision_feature_layer``, ColPali ``labels``)."""
    tokens, found = torch.randint(5, 90, (1, 9)), {}
    for name in ("eager", integration.NAME):
        torch.manual_seed(1)
        model = transformers.LlamaForCausalLM._from_config(config("llama"), attn_implementation=name).eval()
        run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
        with torch.no_grad():
            found[name] = run(tokens, use_cache=False, vision_feature_layer=-1, note=torch.ones(1)).logits
    assert (found["eager"] - found[integration.NAME]).abs().max() < 1e-5


def eager_attention_forward(module, query, key, value, attention_mask, scaling, extra=None, **kwargs):
    return query * kwargs.get("gain", 1.0)


class Layer(torch.nn.Module):
    """Of a file whose eager attention asks for ``extra``, and may look for anything."""

    def forward(self, *tensors):
        return tensors


def test_arguments_that_a_layers_own_attention_may_ask_for(monkeypatch):
    q, k, v = (torch.randn(2, heads, 30, 64) for heads in (4, 2, 2))
    for name in ("extra", "gain", "another"):
        with pytest.raises(NotSupportedError, match=rf"^{name}: isn't known"):
            integration.attention_forward(Layer(), q, k, v, None, **{name: torch.zeros(4)})


def test_every_name_that_models_pass_is_known():
    """The keywords of each call of the attention interface in the installed transformers, read from their source."""
    known = set(inspect.signature(integration.attention_forward).parameters) | attention.HARMLESS
    found = set()
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for call in re.findall(r"= attention_interface\w*\((.*?)\n\s*\)\n", file.read_text(), re.DOTALL):
            found |= set(re.findall(r"^\s*(\w+)=", call, re.MULTILINE))
    assert {"scaling", "sliding_window"} < found <= known


# ---------------------------------------------------------------- models and names


def test_models_with_attention_of_their_own_run_with_it():
    """Bloom makes its masks by transformers' functions, and attends by itself: nothing may be lost of the mask."""
    small = transformers.BloomConfig(vocab_size=100, hidden_size=64, n_layer=2, n_head=4)
    with pytest.warns(FallbackWarning, match="BloomForCausalLM never asks .*BloomAttention"):
        registration._told.clear()
        model = transformers.BloomForCausalLM._from_config(small, attn_implementation=integration.NAME).eval()
    assert model.config._attn_implementation == "eager"
    tokens = torch.randint(5, 90, (1, 12))
    with torch.no_grad():
        one, other = model(tokens).logits, model(torch.cat((tokens[:, :-1], tokens[:, :1]), 1)).logits
    assert torch.equal(one[:, :-1], other[:, :-1])


class OwnAttention(torch.nn.Module):
    """Attention as a user writes it into a subclass, with the mask of eager attention."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, position_embeddings, attention_mask=None, **_):
        q, k, v = (
            f(hidden_states).unflatten(-1, (-1, 64)).transpose(1, 2)
            for f in (self.layer.q_proj, self.layer.k_proj, self.layer.v_proj)
        )
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        scores = q @ k.mT / 8
        scores = scores if attention_mask is None else scores + attention_mask
        out = torch.softmax(scores, -1) @ v
        return self.layer.o_proj(out.transpose(1, 2).flatten(2)), None


class OwnLlama(transformers.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].self_attn = OwnAttention(self.model.layers[0].self_attn)


@pytest.mark.parametrize("compiled", (False, True))
@falls_back
def test_a_layer_of_a_users_own_gets_the_mask_of_eager_attention(compiled):
    found = {}
    tokens = torch.randint(5, 90, (2, 9))
    for name in ("eager", integration.NAME):
        torch.manual_seed(1)
        model = OwnLlama._from_config(config("llama"), attn_implementation=name).eval()
        run = torch.compile(model, backend="eager") if compiled else model
        with torch.no_grad():
            found[name] = run(tokens, use_cache=False).logits
    assert (found["eager"] - found[integration.NAME]).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ("llama", "mistral", "gpt2"))
@falls_back
def test_compiled_models(kind):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config(kind), attn_implementation=integration.NAME).eval()
    tokens = torch.randint(5, 90, (2, 20))
    mask = torch.ones_like(tokens)
    mask[1, :6] = 0
    for given in ({}, {"attention_mask": mask}):
        with torch.no_grad():
            want = model(tokens, use_cache=False, **given).logits
            torch._dynamo.reset()
            got = torch.compile(model, backend="aot_eager")(tokens, use_cache=False, **given).logits
        seen = given.get("attention_mask", torch.ones_like(tokens)).bool()
        assert (got - want)[seen].abs().max() < 1e-5


def test_continuous_batching():
    """transformers' own batching, over packed sequences with a paged cache and a window."""
    tokens = torch.randint(5, 90, (2, 20), generator=torch.Generator().manual_seed(1))
    options = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config("mistral"), attn_implementation=integration.NAME)
    found = model.eval().generate_batch(tokens.tolist(), generation_config=options)
    model.set_attn_implementation("sdpa")
    want = model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert [x.generated_tokens for _, x in sorted(found.items())] == want[:, 20:].tolist()


@pytest.mark.parametrize(
    "model_type", ("gemma2", "bert", "t5", "vit", "modernbert", "falcon", "gpt_neo", "xglm", "doge")
)
@falls_back
def test_an_architecture_is_the_same(model_type):
    """A few of those that scripts/compare_models.py runs."""
    pytest.importorskip("transformers", "5.0")
    outcome = architectures.compare(model_type)
    assert outcome.state in ("same", "falls back"), str(outcome)
    assert len(outcome.ways) >= (1 if model_type == "vit" else 3)

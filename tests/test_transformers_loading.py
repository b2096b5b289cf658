"""Every way in which a model of transformers comes to have our attention, and every process that it comes to."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests import transformers_models  # noqa: E402
from tests.transformers_models import SENTENCES, config, falls_back, minilm  # noqa: E402
from tvm_flash.integrations import transformers as integration  # noqa: E402

pytestmark = [pytest.mark.usefixtures("cpu_pack"), pytest.mark.filterwarnings("error::tvm_flash.nn.FallbackWarning")]
registered = transformers_models.registered


@pytest.mark.parametrize("name", (integration.NAME, integration.OLD_NAME))
@pytest.mark.parametrize("way", ("from_config", "set", "parts"))
def test_both_names_load_in_every_way(name, way, registered):
    torch.manual_seed(1)
    if way == "from_config":
        model = transformers.AutoModelForCausalLM.from_config(config("llama"), attn_implementation=name)
    else:
        model = transformers.AutoModelForCausalLM.from_config(config("llama"), attn_implementation="eager")
        model.set_attn_implementation(name if way == "set" else {"": name})
    with torch.no_grad():
        model.eval()(torch.randint(5, 90, (1, 9)))
    assert model.config._attn_implementation == name and len(registered) == 2


@pytest.mark.parametrize("head", ("SequenceClassification", "TokenClassification", "QuestionAnswering"))
@pytest.mark.parametrize("way", ("from_config", "set"))
def test_a_head_on_whichever_model_its_configuration_is_of(head, way, registered):
    """These classes have no attention in their own code: they make the model below by ``AutoModel``."""
    kind, found = getattr(transformers, f"AutoModelFor{head}"), {}
    tokens = torch.randint(5, 90, (2, 9))
    for name in ("eager", integration.NAME):
        torch.manual_seed(1)
        small = config("llama")
        small.pad_token_id = 0
        model = kind.from_config(small, attn_implementation=name if way == "from_config" else "eager").eval()
        model.set_attn_implementation(name)
        with torch.no_grad():
            found[name] = model(tokens)[0]
    assert len(registered) == 2 and model.config._attn_implementation == integration.NAME
    assert (found["eager"] - found[integration.NAME]).abs().max() < 1e-5


def test_a_codec_made_of_an_encoder_and_a_decoder(registered):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    sizes |= {"head_dim": 16, "intermediate_size": 32, "num_filters": 4, "codebook_size": 16, "codebook_dim": 16}
    sizes |= {"vector_quantization_hidden_dimension": 16, "upsample_groups": 16, "upsampling_ratios": [4, 2]}
    small = transformers.MimiConfig(**sizes)
    model = transformers.MimiModel._from_config(small, attn_implementation=integration.NAME).eval()
    with torch.no_grad():
        model(torch.randn(1, 1, 2000))
    assert len(registered) == 2


def test_sinks_are_computed():
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    found, tokens = {}, torch.randint(5, 90, (2, 20))
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    for name in ("eager", integration.OLD_NAME):
        torch.manual_seed(1)
        small = transformers.GptOssConfig(**sizes, sliding_window=8)
        model = transformers.GptOssForCausalLM._from_config(small, attn_implementation=name).eval()
        for layer in model.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
        with torch.no_grad():
            found[name] = model(tokens, attention_mask=mask).logits[mask.bool()]
    assert (found["eager"] - found[integration.OLD_NAME]).abs().max() < 1e-5


@pytest.mark.parametrize("way", ("from_pretrained", "config", "pipeline"))
def test_a_model_on_disk(way, tmp_path, registered):
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config("llama"), attn_implementation="sdpa").eval()
    model.save_pretrained(tmp_path)
    tokens = torch.randint(5, 90, (1, 9))
    with torch.no_grad():
        want = model(tokens).logits
        if way == "config":
            own = transformers.AutoConfig.from_pretrained(tmp_path, attn_implementation=integration.NAME)
            loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, config=own)
        else:
            loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=integration.NAME)
        if way == "pipeline":
            folder = minilm()
            found = {}
            for name in ("sdpa", integration.NAME):
                pipe = transformers.pipeline(
                    "feature-extraction", str(folder), device="cpu", model_kwargs={"attn_implementation": name}
                )
                found[name] = torch.tensor(pipe(SENTENCES[0]))
            assert (found["sdpa"] - found[integration.NAME]).abs().max() < 1e-5
        assert (loaded.eval()(tokens).logits - want).abs().max() < 1e-5
    assert registered


@falls_back
def test_training_with_a_trainer(tmp_path):
    pytest.importorskip("accelerate")
    found = {}
    data = torch.randint(5, 90, (8, 16), generator=torch.Generator().manual_seed(1))
    for name in ("sdpa", integration.NAME):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config("llama"), attn_implementation=name)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            disable_tqdm=True,
        )
        rows = [{"input_ids": x, "labels": x} for x in data]
        transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
        found[name] = torch.cat([x.detach().flatten() for x in model.parameters()])
    assert (found["sdpa"] - found[integration.NAME]).abs().max() < 1e-5


def test_a_process_that_a_model_is_sent_to_knows_its_attention():
    torch.manual_seed(1)
    integration.register("named_by_me")
    model = transformers.AutoModelForCausalLM.from_config(config("llama"), attn_implementation="named_by_me").eval()
    tokens = torch.randint(5, 90, (1, 9))
    code = "import sys, pickle, torch; model, tokens = pickle.load(sys.stdin.buffer)\nwith torch.no_grad():\n"
    code += " sys.stdout.buffer.write(pickle.dumps(model(tokens).logits.numpy()))"
    sent = pickle.dumps((model, tokens))
    answer = subprocess.run([sys.executable, "-c", code], input=sent, stdout=subprocess.PIPE, check=True).stdout
    with torch.no_grad():
        assert (model(tokens).logits - torch.from_numpy(pickle.loads(answer))).abs().max() < 1e-5


def test_sentence_transformers():
    library = pytest.importorskip("sentence_transformers")
    found = {}
    for name in ("sdpa", integration.NAME, integration.OLD_NAME):
        model = library.SentenceTransformer(str(minilm()), device="cpu", model_kwargs={"attn_implementation": name})
        found[name] = torch.from_numpy(model.encode(list(SENTENCES), show_progress_bar=False))
    assert (found["sdpa"] - found[integration.NAME]).abs().max() < 1e-6
    assert torch.equal(found[integration.NAME], found[integration.OLD_NAME])


def test_sentence_transformers_in_processes_that_are_spawned():
    library = pytest.importorskip("sentence_transformers")
    model = library.SentenceTransformer(
        str(minilm()), device="cpu", model_kwargs={"attn_implementation": integration.NAME}
    )
    want = model.encode(list(SENTENCES), show_progress_bar=False)
    pool = model.start_multi_process_pool(["cpu"])
    try:
        found = model.encode(list(SENTENCES), pool=pool, show_progress_bar=False)
    finally:
        model.stop_multi_process_pool(pool)
    assert abs(found - want).max() < 1e-5

"""transformers' continuous batching on these kernels: every token that of the plain model."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers", "5.0")

from tvm_flash.integrations import transformers as integration  # noqa: E402
from tvm_flash.integrations.transformers import attention, batching  # noqa: E402

pytestmark = pytest.mark.usefixtures("cpu_pack")


def model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=integration.NAME).eval()


PLAIN = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def steps_on_pages(monkeypatch) -> list[int]:
    """A list that gets the number of sequences of each step whose keys stay on their pages."""
    steps, once = [], attention.flash_attention_with_kvcache
    monkeypatch.setattr(
        attention, "flash_attention_with_kvcache", lambda q, *a, **b: steps.append(q.shape[0]) or once(q, *a, **b)
    )
    return steps


def answers(batched) -> dict[tuple[int, ...], list[int]]:
    """What a model goes on with, batched continuously, by prompt: of different lengths, in chunks."""
    prompts = [torch.randint(5, 90, (n,)).tolist() for n in (20, 3, 37, 11)]
    options = transformers.GenerationConfig(**PLAIN, eos_token_id=-1)
    given = transformers.ContinuousBatchingConfig(max_blocks_per_request=16, num_blocks=64, max_batch_tokens=32)
    found = batched.generate_batch(prompts, generation_config=options, continuous_batching_config=given)
    assert len(found) == len(prompts)
    return {tuple(x.prompt_ids): x.generated_tokens for x in found.values()}


@pytest.mark.parametrize("tables", (True, False), ids=("block tables", "gathered keys"))
def test_every_token_is_that_of_the_plain_model(tables, monkeypatch):
    """Prompts of different lengths in chunks, and steps of decoding in which keys stay on their pages."""
    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip("this transformers has no continuous batching")
    steps = steps_on_pages(monkeypatch)
    if not tables:
        monkeypatch.setattr(batching, "_has_kernels", lambda config: False)
    batched = model()
    found = answers(batched)
    batched.set_attn_implementation("sdpa")
    for prompt, tokens in found.items():
        want = batched.generate(torch.tensor([prompt]), eos_token_id=None, **PLAIN)[0, len(prompt) :]
        assert tokens == want.tolist()
    assert bool(steps) == tables

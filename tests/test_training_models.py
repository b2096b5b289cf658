"""Models that learn with our attention lose what they lose with torch's, step by step.

python -m tests.test_training_models 200    # more steps than the suite takes: the largest difference of each model
"""

from __future__ import annotations

import sys
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tvm_flash.integrations import transformers as integration  # noqa: E402
from tvm_flash.nn import FallbackWarning  # noqa: E402

pytestmark = pytest.mark.usefixtures("trains")

#: How far apart two curves of losses may be, in float32.
TOLERANCE = 1e-4
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(generator):
    """Next words, with grouped heads."""
    config = transformers.LlamaConfig(vocab_size=96, num_key_value_heads=2, max_position_embeddings=64, **SIZES)
    ids = torch.randint(0, 96, (4, 48), generator=generator)
    return transformers.LlamaForCausalLM, config, {"input_ids": ids, "labels": ids}


def bert(generator):
    """Words that are hidden, in sentences of different lengths."""
    config = transformers.BertConfig(
        vocab_size=96,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SIZES,
    )
    ids = torch.randint(5, 96, (4, 40), generator=generator)
    seen = torch.arange(40) < torch.tensor([40, 25, 7, 33])[:, None]
    labels = torch.where(seen & (torch.rand(4, 40, generator=generator) < 0.3), ids, -100)
    given = {"input_ids": torch.where(labels >= 0, 1, ids), "attention_mask": seen.long(), "labels": labels}
    return transformers.BertForMaskedLM, config, given


def vit(generator):
    """Classes of images."""
    config = transformers.ViTConfig(
        image_size=32,
        patch_size=8,
        num_labels=5,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SIZES,
    )
    images = torch.randn(6, 3, 32, 32, generator=generator)
    return transformers.ViTForImageClassification, config, {"pixel_values": images, "labels": torch.arange(6) % 5}


MODELS = {"llama": llama, "bert": bert, "vit": vit}


def losses(name: str, implementation: str, steps: int, device: str = "cpu") -> torch.Tensor:
    """The loss of each step of a model that learns, on a GPU in bfloat16 by autocast."""
    cls, config, given = MODELS[name](torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    config._attn_implementation = implementation
    model = cls(config).train().to(device)
    given = {key: x.to(device) for key, x in given.items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for _ in range(steps):
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            loss = model(**given).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


def difference(name: str, steps: int) -> tuple[float, torch.Tensor]:
    """The largest difference of a model's losses from those with torch's attention, and its losses."""
    integration.register()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        ours = losses(name, integration.NAME, steps)
    return (ours - losses(name, "sdpa", steps)).abs().max().item(), ours


@pytest.mark.parametrize("name", MODELS)
def test_losses_follow_those_with_torchs_attention(name):
    worst, ours = difference(name, 20)
    assert ours[-1] < ours[0] - 0.1
    assert worst <= TOLERANCE


def main() -> int:
    steps, failed = int(sys.argv[1]), 0
    for name in MODELS:
        worst, ours = difference(name, steps)
        failed |= not worst <= TOLERANCE
        print(f"{name}: {steps} steps, loss {ours[0]:.3f} to {ours[-1]:.4f}, differs by at most {worst:.2e}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

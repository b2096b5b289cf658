"""Models on a GPU: losses of those that learn in bfloat16, and continuous batching."""

from __future__ import annotations

import warnings

import pytest

from tvm_flash.machine import cuda

torch = pytest.importorskip("torch")
pytest.importorskip("transformers", "5.0")

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cuda.device_count(), reason="there is no CUDA device")]

import transformers  # noqa: E402
from packaging import version  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from tests import test_training_models as training  # noqa: E402
from tests import test_transformers_batching as continuous  # noqa: E402
from tests.test_operators_gpu import of_kind  # noqa: E402
from tvm_flash.integrations import transformers as integration  # noqa: E402
from tvm_flash.nn import FallbackWarning  # noqa: E402


@of_kind("backward")
@pytest.mark.parametrize("name", training.MODELS)
def test_losses_in_bfloat16_follow_torchs_as_closely_as_two_of_its_backends(name):
    integration.register()
    steps = 100
    with sdpa_kernel(SDPBackend.MATH):
        want = training.losses(name, "sdpa", steps, "cuda")
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):  # the former has no masks
        other = training.losses(name, "sdpa", steps, "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        ours = training.losses(name, integration.NAME, steps, "cuda")
    assert ours[-1] < ours[0] - 0.1
    # A loss of bfloat16 logits is off by a rounding of them, whatever computes the attention.
    assert (ours - want).abs().max() <= 2 * (other - want).abs().max() + 2.0**-8 * want.max()


@of_kind("paged")
def test_every_batched_token_is_one_that_the_plain_model_may_take(monkeypatch):
    """The plain model's own, or one that it finds as likely but for rounding."""
    if version.parse(transformers.__version__) < version.parse("5.19"):
        pytest.skip("continuous batching of transformers before 5.19 takes no other attention than its own")
    steps = continuous.steps_on_pages(monkeypatch)
    model = continuous.model().to("cuda", torch.bfloat16)
    found = continuous.answers(model)
    assert steps
    model.set_attn_implementation("sdpa")
    same = 0
    for prompt, tokens in found.items():
        assert len(tokens) == continuous.PLAIN["max_new_tokens"]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens[:-1]]], device="cuda")).logits[0, len(prompt) - 1 :].float()
        best, taken = logits.max(-1), logits.gather(-1, torch.tensor(tokens, device="cuda")[:, None])[:, 0]
        assert (best.values - taken <= 2.0**-6 * logits.abs().amax(-1)).all()
        same += best.indices.tolist() == tokens
    assert same >= len(found) // 2

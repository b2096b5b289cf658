"""Models of transformers in programs that are traced: their masks are tensors there, and mean the same."""

from __future__ import annotations

import pickle
import warnings

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch.utils.flop_counter import FlopCounterMode  # noqa: E402
from transformers import masking_utils  # noqa: E402

from tests import architectures, transformers_models  # noqa: E402
from tests.transformers_models import falls_back  # noqa: E402
from tvm_flash.integrations import transformers as integration  # noqa: E402
from tvm_flash.integrations.transformers import models  # noqa: E402

pytestmark = pytest.mark.usefixtures("cpu_pack")
registered = transformers_models.registered

TOKENS = torch.randint(5, 90, (2, 21), generator=torch.Generator().manual_seed(3))


def pair(model_type: str):
    """A small model with eager attention, and the same with ours."""
    found = architectures.build(model_type)
    if isinstance(found, str):
        pytest.skip(f"{model_type}: {found}")
    eager, ours = (architectures._make(*found, name) for name in ("eager", integration.NAME))
    architectures._randomise(eager)
    ours.load_state_dict(eager.state_dict())
    for to, x in zip(ours.buffers(), eager.buffers(), strict=True):
        to.data.copy_(x.data)
    return eager, ours


def traced(model, tokens):
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, tokens):
            return self.model(input_ids=tokens, use_cache=False).logits

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        return torch.jit.trace(Logits(), (tokens,), check_trace=False)(tokens)


def compiled(model, tokens):
    return torch.compile(model, backend="eager")(input_ids=tokens, use_cache=False).logits


def counted(model, tokens):
    with FlopCounterMode(display=False):
        return model(input_ids=tokens, use_cache=False).logits


@pytest.mark.parametrize("way", (compiled, counted), ids=lambda way: way.__name__)
@falls_back
def test_layers_that_make_another_mask_of_theirs_get_numbers(way):
    """DeepSeek's fourth adds keys, and for each a 0 to its mask: among numbers, what shows a key."""
    eager, ours = pair("deepseek_v4")
    with torch.no_grad():
        want = eager(input_ids=TOKENS, use_cache=False).logits
        assert (way(ours, TOKENS) - want).abs().max() < 1e-4 * want.abs().max()


@falls_back
def test_a_compiled_step_of_layers_that_look_into_their_masks():
    found = []
    for model in pair("glm_moe_dsa"):
        cache = transformers.StaticCache(config=model.config, max_cache_len=32)
        run = torch.compile(model, backend="eager") if found else model
        with torch.no_grad():
            model(input_ids=TOKENS[:, :20], past_key_values=cache, use_cache=True)
            found.append(run(input_ids=TOKENS[:, 20:], past_key_values=cache, use_cache=True).logits)
    assert (found[1] - found[0]).abs().max() < 1e-4 * found[0].abs().max()


def test_a_process_that_a_model_is_sent_to_knows_that_it_looks_into_its_masks(monkeypatch):
    sent = pickle.dumps(pair("doge")[1])
    monkeypatch.setattr(models, "_READERS", set())
    assert models.reads_masks(pickle.loads(sent).config)


def test_which_layers_look_into_their_masks():
    reads = {
        name: models.findings(getattr(transformers, f"{name}Model")).reads
        for name in ("Llama", "GPT2", "Doge", "Gemma2")
    }
    assert reads == {"Llama": False, "GPT2": False, "Doge": True, "Gemma2": False}


@falls_back
def test_windows_in_a_program_that_is_traced_by_running_it():
    eager, ours = pair("gpt_oss")
    with torch.no_grad():
        want = eager(input_ids=TOKENS, use_cache=False).logits
        assert (traced(ours, TOKENS) - want).abs().max() < 1e-4 * want.abs().max()


@pytest.mark.parametrize("kind", ("window", "queries beyond the keys"))
def test_rows_of_some_queries_are_those_of_their_queries(kind):
    """Models that compute logits of the last tokens alone take their rows of the mask."""
    window, first, keys = masking_utils.sliding_window_causal_mask_function(4), 0, 9
    given = {"batch_size": 2, "q_length": 9, "kv_length": keys, "q_offset": first, "mask_function": window}
    if kind == "queries beyond the keys":
        given |= {"q_offset": 5, "mask_function": masking_utils.causal_mask_function, "allow_is_causal_skip": True}
    whole = masking_utils.sdpa_mask(**{**given, "allow_is_causal_skip": False})
    with FlopCounterMode(display=False):
        mask = integration.make_mask(**given)
    assert torch.equal(mask[:, :, -2:], whole[:, :, -2:])

"""What hides keys from a layer of transformers' models hides them whoever computes the layer, and together."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from transformers import masking_utils  # noqa: E402

from tests import transformers_models  # noqa: E402
from tests.test_transformers import MODULE, causal, reference  # noqa: E402
from tests.transformers_models import falls_back  # noqa: E402
from tvm_flash.errors import NotSupportedError  # noqa: E402
from tvm_flash.integrations import transformers as integration  # noqa: E402

pytestmark = pytest.mark.usefixtures("cpu_pack")
registered = transformers_models.registered

#: Tokens of a batch entry, of which each has two sequences, and where these start in the row of all.
TOKENS, FIRST = 16, 5


def tensors(dtype=torch.float32, batch: int = 2):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, heads, TOKENS, 16, generator=generator, dtype=dtype) for heads in (4, 2, 2)]


def same_sequence() -> torch.Tensor:
    part = torch.arange(TOKENS) >= FIRST
    return part[:, None] == part


def packed(batch: int) -> dict:
    starts = torch.tensor([0, *(i * TOKENS + x for i in range(batch) for x in (FIRST, TOKENS))], dtype=torch.int32)
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": TOKENS, "max_length_k": TOKENS}


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
@falls_back
def test_keys_that_a_mask_hides_in_between_are_those_that_torch_hides(dtype):
    """Kernels get such keys in another order; torch, which computes float64, must not."""
    q, k, v = tensors(dtype)
    mask = torch.rand(2, 1, 1, TOKENS, generator=torch.Generator().manual_seed(1)) > 0.4
    out, _ = integration.attention_forward(MODULE, q, k, v, mask)
    assert (out - reference(q, k, v, mask)).abs().max() < 1e-5


@pytest.mark.parametrize("numbers", (False, True))
@pytest.mark.parametrize("softcap", (None, 0.7))
@pytest.mark.parametrize("batch", (1, 2))
@falls_back
def test_a_mask_beside_sequences_one_after_another(batch, softcap, numbers):
    q, k, v = tensors(batch=batch)
    mask = torch.rand(batch, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(1)) > 0.3
    mask |= torch.eye(TOKENS, dtype=torch.bool)
    given = torch.where(mask, 0.0, torch.finfo(torch.float32).min) if numbers else mask
    out, _ = integration.attention_forward(MODULE, q, k, v, given, softcap=softcap, **packed(batch))
    assert (out - reference(q, k, v, mask & same_sequence(), softcap=softcap)).abs().max() < 1e-5


def test_a_mask_that_shows_keys_of_no_sequence_is_refused():
    """DeepSeek's fourth puts keys made of all tokens after those of the sequences."""
    q, k, v = tensors(batch=1)
    k, v = (torch.cat((x, x[:, :, :3]), 2) for x in (k, v))
    mask = torch.ones(1, 1, TOKENS, TOKENS + 3, dtype=torch.bool)
    with pytest.raises(NotSupportedError, match="cu_seq_lens_k: ends at 16 of 19 keys"):
        integration.attention_forward(MODULE, q, k, v, mask, **packed(1))
    mask[..., TOKENS:] = False  # a cache with room
    out, _ = integration.attention_forward(MODULE, q, k, v, mask, **packed(1))
    assert (out - reference(q, k[:, :, :TOKENS], v[:, :, :TOKENS], same_sequence())).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ("causal", "sliding", "chunked", "images"))
@falls_back
def test_the_mask_of_packed_positions_beside_sequences(kind):
    """transformers finds packed sequences by their positions, and may hide more than those by the same mask."""
    config = transformers.LlamaConfig(vocab_size=9, hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
    config._attn_implementation, config.sliding_window, config.attention_chunk_size = integration.NAME, 3, 4
    positions = torch.cat((torch.arange(FIRST), torch.arange(TOKENS - FIRST)))[None]
    given = {"inputs_embeds": torch.zeros(1, TOKENS, 64), "attention_mask": None, "position_ids": positions}
    distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
    visible = same_sequence() & (distance >= 0)
    make = masking_utils.create_causal_mask
    if kind == "sliding":
        make, visible = masking_utils.create_sliding_window_causal_mask, visible & (distance < 3)
    if kind == "chunked":
        chunk = positions[0] // 4
        make, visible = masking_utils.create_chunked_causal_mask, visible & (chunk[:, None] == chunk)
    if kind == "images":  # tokens that see each other both ways
        ids = torch.full((1, TOKENS), -1)
        ids[0, FIRST + 1 : FIRST + 5] = 0
        given["block_sequence_ids"] = ids
        inside = ids[0] == 0
        visible = visible | (inside[:, None] & inside)
    mask = make(config, cache=None, **given)
    assert (mask.of_each_sequence is None) == (kind in ("chunked", "images"))
    q, k, v = tensors(batch=1)
    out, _ = integration.attention_forward(MODULE, q, k, v, mask, **packed(1))
    assert (out - reference(q, k, v, visible)).abs().max() < 1e-5
    alone, _ = integration.attention_forward(MODULE, q, k, v, mask)
    assert (alone - reference(q, k, v, visible)).abs().max() < 1e-5


@pytest.mark.parametrize("count", (1, TOKENS))
@falls_back
def test_a_sink_that_is_none_beside_a_row_without_keys(count):
    q, k, v = tensors()
    mask = causal(TOKENS)[None, None].repeat(2, 1, 1, 1)
    mask[1, :, 3] = False
    sink = torch.full((2, 4, TOKENS, 1), -torch.inf)
    out, _ = integration.attention_forward(MODULE, q, k, v, mask if count > 1 else mask[:, :, 3:4], sinks=sink)
    assert not out.isnan().any()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16))
@pytest.mark.parametrize("option", ("softcap", "position_bias", "s_aux"))
@falls_back
def test_rows_without_keys_have_no_nan_by_torch_either(option, dtype):
    q, k, v = (x.requires_grad_() for x in tensors(dtype))
    options = {"softcap": 0.7, "position_bias": torch.full((1, 4, TOKENS, TOKENS), -100.0, dtype=dtype)}
    options["s_aux"] = torch.randn(4)
    mask = causal(TOKENS)[None, None].repeat(2, 1, 1, 1)
    mask[1, :, :, :FIRST] = False
    given = {option: options[option]} | ({"softcap": 30.0} if option == "position_bias" else {})
    if dtype != torch.float32:  # numbers beyond which there is infinity, or infinity itself
        mask = torch.where(mask, 0.0, torch.finfo(dtype).min if dtype == torch.float16 else -torch.inf).to(dtype)
    out, _ = integration.attention_forward(MODULE, q, k, v, mask, **given)
    out[0].square().sum().backward()
    assert out.isfinite().all() and all(x.grad.isfinite().all() for x in (q, k, v))

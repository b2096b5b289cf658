"""transformers: small models with random weights give what they give with eager attention, with padding too."""

import json
import warnings

import torch
import transformers

import tvm_flash.integrations.transformers as integration
from tvm_flash.integrations.transformers import attention

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
computed = []
compute = attention._compute
attention._compute = lambda *given: computed.append(given) or compute(*given)
sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
sizes["num_attention_heads"] = 4
tokens = torch.randint(5, 90, (2, 17), generator=torch.Generator().manual_seed(1))
padding = torch.ones_like(tokens)
padding[1, :6] = 0
found = {}
for name in ("eager", integration.NAME):
    torch.manual_seed(2)
    decoder = transformers.AutoModelForCausalLM.from_config(
        transformers.MistralConfig(**sizes, num_key_value_heads=2, sliding_window=8, eos_token_id=None),
        attn_implementation=name,
    )
    encoder = transformers.AutoModel.from_config(transformers.BertConfig(**sizes), attn_implementation=name)
    with torch.no_grad():
        text = decoder.eval().generate(
            tokens, attention_mask=padding, max_new_tokens=8, do_sample=False, pad_token_id=0
        )
        scores = decoder(tokens, attention_mask=padding).logits[padding.bool()]
        hidden = encoder.eval()(tokens, attention_mask=padding).last_hidden_state[padding.bool()]
    found[name] = text, scores, hidden
(text, *numbers), (own_text, *own_numbers) = found.values()
assert torch.equal(text, own_text) and len(computed) >= 20, len(computed)
print(json.dumps({"error": max((a - b).abs().max().item() for a, b in zip(numbers, own_numbers))}))  # noqa: B905

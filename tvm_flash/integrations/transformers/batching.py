"""transformers' continuous batching: whether a step of decoding may go by a table of blocks."""

from __future__ import annotations

import functools
import sys
from collections.abc import Collection
from typing import Any

import torch

from tvm_flash.nn.sdpa import no_kernel
from tvm_flash.operators import PAGED

_PACKAGE = "transformers.generation.continuous_batching."


def settle_in(names: Collection[str]) -> None:
    """Have transformers' batching keep its table of blocks for attention of these names, where there are kernels."""
    module = sys.modules.get(f"{_PACKAGE}initialization")
    original = getattr(module, "ensure_decode_fast_path_is_available", None)
    if original is None or getattr(original, "of_tvm_flash", False):
        return

    @functools.wraps(original)
    def ensure_decode_fast_path_is_available(config: Any, cb_config: Any, *args: Any, **kwargs: Any) -> Any:
        types = module.group_layers_by_attn_type(config)
        tables = all(module.ATTN_TYPE_TO_ALLOCATOR[kind].supports_block_table for kind in types)
        if config._attn_implementation in names and tables and _has_kernels(config):
            return None
        return original(config, cb_config, *args, **kwargs)

    ensure_decode_fast_path_is_available.of_tvm_flash = True
    for name, x in list(sys.modules.items()):
        if name.startswith(_PACKAGE) and vars(x).get(original.__name__) is original:
            setattr(x, original.__name__, ensure_decode_fast_path_is_available)


def _has_kernels(config: Any) -> bool:
    """Whether there are kernels for a model's heads on the device that batching takes."""
    config = config.get_text_config(decoder=True)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    device = "cuda" if torch.cuda.is_available() else "cpu"
    row = torch.empty(1, 1, 1, width, dtype=config.dtype or torch.float32, device=device)
    return not width % 8 and no_kernel("window", row, row, row, ops=(PAGED,)) is None

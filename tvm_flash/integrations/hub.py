"""What a kernel of the Hugging Face Hub offers, under the names that its users look for.

``scripts/build_wheel.py --hub FOLDER`` lays out the folder, whose variants re-export this module.
"""

from tvm_flash import (
    flash_attention,
    flash_attention_backward,
    flash_attention_v2,
    flash_attention_v2_backward,
    padded_attention,
)
from tvm_flash.nn import flash_attn_func, flash_attn_varlen_func, scaled_dot_product_attention

__all__ = [
    "flash_attention",
    "flash_attention_backward",
    "flash_attention_v2",
    "flash_attention_v2_backward",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "padded_attention",
    "scaled_dot_product_attention",
]

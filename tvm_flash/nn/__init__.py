"""Functions with the signatures that models already call: change the import, and nothing else.

* :func:`scaled_dot_product_attention` as in ``torch.nn.functional``;
* :func:`flash_attn_func`, :func:`flash_attn_varlen_func`, :func:`flash_attn_with_kvcache`, and those of packed
  tensors, as in the package ``flash_attn``;
* :func:`flash_mla_with_kvcache` and :func:`get_mla_metadata`, as in the package ``flash_mla``.

Importing this imports torch.
"""

from tvm_flash.nn.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from tvm_flash.nn.flash_mla import flash_mla_with_kvcache, get_mla_metadata
from tvm_flash.nn.kvcache import flash_attn_with_kvcache
from tvm_flash.nn.sdpa import FallbackWarning, scaled_dot_product_attention

__all__ = [
    "FallbackWarning",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "scaled_dot_product_attention",
]

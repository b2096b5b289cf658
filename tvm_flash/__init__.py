"""FlashAttention written once in TensorIR, compiled ahead of time for every arch.

``flash_attention`` takes tensors ``(batch, heads, seq, head_dim)``, ``flash_attention_v2`` takes
``(batch, seq, heads, head_dim)``; torch, NumPy, CuPy, JAX and DLPack tensors, each answered in kind.
"""

from tvm_flash.backward import (
    flash_attention_backward,
    flash_attention_v2_backward,
    flash_attention_varlen_backward,
    padded_attention_backward,
)
from tvm_flash.custom import custom_attention
from tvm_flash.errors import (
    ArgumentTypeError,
    InvalidArgumentError,
    KernelError,
    KernelNotFoundError,
    LayoutError,
    LayoutWarning,
    NotSupportedError,
    PackError,
    PeerMemoryWarning,
    ProcessGroupError,
    TvmFlashError,
)
from tvm_flash.interface import flash_attention, flash_attention_v2
from tvm_flash.kvcache import flash_attention_with_kvcache
from tvm_flash.latent import flash_attention_latent
from tvm_flash.merge import merge_attention
from tvm_flash.padded import padded_attention
from tvm_flash.paged import check_pages, flash_attention_paged
from tvm_flash.quantised import dequantise_cache, quantise_cache
from tvm_flash.selector import BackendSelector
from tvm_flash.varlen import flash_attention_varlen

__version__ = "0.1.0"

__all__ = [
    "ArgumentTypeError",
    "BackendSelector",
    "InvalidArgumentError",
    "KernelError",
    "KernelNotFoundError",
    "LayoutError",
    "LayoutWarning",
    "NotSupportedError",
    "PackError",
    "PeerMemoryWarning",
    "ProcessGroupError",
    "TvmFlashError",
    "__version__",
    "check_pages",
    "custom_attention",
    "dequantise_cache",
    "flash_attention",
    "flash_attention_backward",
    "flash_attention_latent",
    "flash_attention_paged",
    "flash_attention_v2",
    "flash_attention_v2_backward",
    "flash_attention_varlen",
    "flash_attention_varlen_backward",
    "flash_attention_with_kvcache",
    "merge_attention",
    "padded_attention",
    "padded_attention_backward",
    "quantise_cache",
]

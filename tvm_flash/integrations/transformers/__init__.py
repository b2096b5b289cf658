"""Hugging Face transformers: importing this makes ``attn_implementation="tvm"`` known.

* ``registration``: the names, and what transformers does with them;
* ``models``: what a model's code asks for;
* ``masks``: the mask that a model makes once in each forward pass;
* ``attention``: one layer's attention on our kernels; ``by_torch``: what they don't compute.
"""

from tvm_flash.integrations.transformers.attention import attention_forward
from tvm_flash.integrations.transformers.masks import KeyRanges, Mask, make_mask
from tvm_flash.integrations.transformers.registration import NAME, OLD_NAME, register

__all__ = ["NAME", "OLD_NAME", "KeyRanges", "Mask", "attention_forward", "make_mask", "register"]

register()

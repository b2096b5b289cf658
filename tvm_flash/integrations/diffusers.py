"""Hugging Face diffusers: an attention processor for its ``Attention`` layers, as UNets and many transformers have."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from tvm_flash.nn.sdpa import scaled_dot_product_attention


def use(model: Any) -> int:
    """Have every plain attention layer of a model (a UNet, say) computed here; how many there are.

    Layers with a processor of another kind (LoRA, image prompts, …) keep it.
    """
    processors = dict(model.attn_processors)
    plain = [name for name, processor in processors.items() if type(processor) in (AttnProcessor, AttnProcessor2_0)]
    model.set_attn_processor({**processors, **{name: TvmFlashAttnProcessor() for name in plain}})
    return len(plain)


class TvmFlashAttnProcessor:
    """One attention layer: projections, attention, output projection, as ``AttnProcessor2_0`` computes them."""

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Self-attention of ``hidden_states``, or cross-attention to ``encoder_hidden_states``.

        ``hidden_states`` and the result are ``(batch, seq, channels)`` or images ``(batch, channels, height, width)``.
        """
        x = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        image = x.shape[2:] if x.ndim == 4 else None
        x = x.flatten(2).transpose(1, 2) if image else x  # (batch, seq, channels)
        batch = x.shape[0]
        if attn.group_norm is not None:
            x = attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        if attention_mask is not None:  # comes as (batch * heads, 1 or seq, keys), the same for all heads
            attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], batch)
            attention_mask = attention_mask.unflatten(0, (batch, attn.heads))[:, :1]
        q, k, v = (
            projection(source).unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # (batch, heads, seq, head_dim)
            for projection, source in ((attn.to_q, x), (attn.to_k, context), (attn.to_v, context))
        )
        q = q if attn.norm_q is None else attn.norm_q(q)
        k = k if attn.norm_k is None else attn.norm_k(k)
        out = scaled_dot_product_attention(q, k, v, attention_mask).transpose(1, 2).flatten(2).to(q.dtype)
        for layer in attn.to_out:  # projection, dropout
            out = layer(out)
        if image:
            out = out.transpose(1, 2).unflatten(2, image)
        if attn.residual_connection:
            out = out + hidden_states
        return out / attn.rescale_output_factor

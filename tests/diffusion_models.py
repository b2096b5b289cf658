"""Small models of diffusers with random weights: how each is made, and inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch

#: heads, head_dim, and their product.
_SIZES = {"num_attention_heads": 2, "attention_head_dim": 16}


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def _unet(**others: Any):
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "block_out_channels": (32, 64)}
    blocks |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "layers_per_block": 1, "norm_num_groups": 8}
    sizes = {"sample_size": 16, "cross_attention_dim": 24, "attention_head_dim": 4}
    return diffusers.UNet2DConditionModel(**{**blocks, **sizes, **others})


def _added_unet():
    blocks = {"down_block_types": ("SimpleCrossAttnDownBlock2D",), "up_block_types": ("SimpleCrossAttnUpBlock2D",)}
    return _unet(**blocks, mid_block_type="UNetMidBlock2DSimpleCrossAttn", block_out_channels=(32,))


_IMAGE, _TEXT, _TIME = _random(2, 4, 16, 16), _random(2, 7, 24), torch.tensor([3.0, 3.0])
_MASK = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
_POSITIONS = torch.stack(torch.meshgrid(torch.zeros(1), torch.arange(4.0), torch.arange(4.0), indexing="ij"), -1)
_IMAGE_IDS, _TEXT_IDS = _POSITIONS.reshape(16, 3), torch.zeros(7, 3)
_FLUX = {"patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 24}
_FLUX |= {"axes_dims_rope": [4, 4, 8], **_SIZES}
_VIDEO = _random(2, 4, 2, 8, 8)
_SIZE = torch.tensor([[16, 16], [16, 16]])

#: By name: how a model is made, and its arguments.
MODELS: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[], dict[str, Any]]]] = {
    "UNet2DConditionModel": (_unet, lambda: {"sample": _IMAGE, "timestep": 3, "encoder_hidden_states": _TEXT}),
    "UNet2DConditionModel, masked text": (
        _unet,
        lambda: {"sample": _IMAGE, "timestep": 3, "encoder_hidden_states": _TEXT, "encoder_attention_mask": _MASK},
    ),
    "UNet2DConditionModel, added keys": (
        _added_unet,
        lambda: {"sample": _IMAGE, "timestep": 3, "encoder_hidden_states": _TEXT},
    ),
    "UNet2DModel": (
        lambda: diffusers.UNet2DModel(
            block_out_channels=(32, 64),
            layers_per_block=1,
            sample_size=16,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
            norm_num_groups=8,
        ),
        lambda: {"sample": _random(2, 3, 16, 16), "timestep": 3},
    ),
    "VQModel": (
        lambda: diffusers.VQModel(block_out_channels=(32,), norm_num_groups=8),
        lambda: {"sample": _random(1, 3, 16, 16)},
    ),
    "AutoencoderKL": (
        lambda: diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8),
        lambda: {"sample": _random(1, 3, 16, 16)},
    ),
    "AutoencoderKLWan": (
        lambda: diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        lambda: {"sample": _random(1, 3, 1, 16, 16)},
    ),
    "DiTTransformer2DModel": (
        lambda: diffusers.DiTTransformer2DModel(
            **_SIZES, in_channels=4, out_channels=8, num_layers=1, sample_size=8, patch_size=2, num_embeds_ada_norm=10
        ),
        lambda: {"hidden_states": _random(2, 4, 8, 8), "timestep": _TIME.long(), "class_labels": torch.tensor([1, 2])},
    ),
    "PixArtTransformer2DModel": (
        lambda: diffusers.PixArtTransformer2DModel(
            **_SIZES, in_channels=4, num_layers=1, cross_attention_dim=32, sample_size=8, caption_channels=24
        ),
        lambda: {
            "hidden_states": _random(2, 4, 8, 8),
            "encoder_hidden_states": _TEXT,
            "timestep": _TIME.long(),
            "encoder_attention_mask": _MASK,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "FluxTransformer2DModel": (
        lambda: diffusers.FluxTransformer2DModel(**_FLUX, pooled_projection_dim=32),
        lambda: {
            "hidden_states": _random(2, 16, 4),
            "encoder_hidden_states": _TEXT,
            "pooled_projections": _random(2, 32),
            "timestep": _TIME,
            "img_ids": _IMAGE_IDS,
            "txt_ids": _TEXT_IDS,
        },
    ),
    "Flux2Transformer2DModel": (
        lambda: diffusers.Flux2Transformer2DModel(**{**_FLUX, "axes_dims_rope": [4, 4, 4, 4]}, guidance_embeds=False),
        lambda: {
            "hidden_states": _random(2, 16, 4),
            "encoder_hidden_states": _TEXT,
            "timestep": _TIME,
            "img_ids": torch.cat((_IMAGE_IDS, torch.zeros(16, 1)), -1),
            "txt_ids": torch.zeros(7, 4),
        },
    ),
    "SD3Transformer2DModel": (
        lambda: diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            num_layers=2,
            **_SIZES,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            out_channels=4,
        ),
        lambda: {
            "hidden_states": _random(2, 4, 8, 8),
            "encoder_hidden_states": _TEXT,
            "pooled_projections": _random(2, 64),
            "timestep": _TIME,
        },
    ),
    "WanTransformer3DModel": (
        lambda: diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            **_SIZES,
            in_channels=4,
            out_channels=4,
            text_dim=24,
            freq_dim=64,
            ffn_dim=32,
            num_layers=1,
            rope_max_seq_len=32,
        ),
        lambda: {"hidden_states": _VIDEO, "encoder_hidden_states": _TEXT, "timestep": _TIME},
    ),
    "QwenImageTransformer2DModel": (
        lambda: diffusers.QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=1, **_SIZES, joint_attention_dim=24, axes_dims_rope=(4, 6, 6)
        ),
        lambda: {
            "hidden_states": _random(2, 16, 16),
            "encoder_hidden_states": _TEXT,
            "encoder_hidden_states_mask": _MASK,
            "timestep": _TIME,
            "img_shapes": [[(1, 4, 4)]] * 2,
        },
    ),
    "SanaTransformer2DModel": (
        lambda: diffusers.SanaTransformer2DModel(
            in_channels=4,
            out_channels=4,
            **_SIZES,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=16,
            cross_attention_dim=32,
            caption_channels=24,
            sample_size=8,
        ),
        lambda: {
            "hidden_states": _random(2, 4, 8, 8),
            "encoder_hidden_states": _TEXT,
            "timestep": _TIME,
            "encoder_attention_mask": _MASK,
        },
    ),
    "StableAudioDiTModel": (
        lambda: diffusers.StableAudioDiTModel(
            sample_size=16,
            in_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            num_key_value_attention_heads=1,
            out_channels=4,
            cross_attention_dim=16,
            time_proj_dim=16,
            global_states_input_dim=32,
            cross_attention_input_dim=24,
        ),
        lambda: {
            "hidden_states": _random(2, 4, 16),
            "timestep": _TIME,
            "encoder_hidden_states": _TEXT,
            "global_hidden_states": _random(2, 1, 32),
            "rotary_embedding": (_random(17, 8), _random(17, 8)),
        },
    ),
    "LTXVideoTransformer3DModel": (
        lambda: diffusers.LTXVideoTransformer3DModel(
            in_channels=4, out_channels=4, **_SIZES, cross_attention_dim=32, num_layers=1, caption_channels=24
        ),
        lambda: {
            "hidden_states": _random(2, 32, 4),
            "encoder_hidden_states": _TEXT,
            "timestep": _TIME,
            "encoder_attention_mask": _MASK,
            "num_frames": 2,
            "height": 4,
            "width": 4,
        },
    ),
    "HunyuanVideoTransformer3DModel": (
        lambda: diffusers.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            **_SIZES,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            guidance_embeds=False,
            text_embed_dim=24,
            pooled_projection_dim=32,
            rope_axes_dim=(4, 6, 6),
        ),
        lambda: {
            "hidden_states": _VIDEO,
            "timestep": _TIME.long(),
            "encoder_hidden_states": _TEXT,
            "encoder_attention_mask": _MASK,
            "pooled_projections": _random(2, 32),
        },
    ),
    "CogVideoXTransformer3DModel": (
        lambda: diffusers.CogVideoXTransformer3DModel(
            **_SIZES,
            in_channels=4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=24,
            num_layers=1,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            max_text_seq_length=7,
        ),
        lambda: {"hidden_states": _random(2, 2, 4, 8, 8), "encoder_hidden_states": _TEXT, "timestep": _TIME.long()},
    ),
    "CogView4Transformer2DModel": (
        lambda: diffusers.CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            **_SIZES,
            text_embed_dim=24,
            time_embed_dim=8,
            condition_dim=4,
            rope_axes_dim=(8, 8),
        ),
        lambda: {
            "hidden_states": _random(2, 4, 8, 8),
            "encoder_hidden_states": _TEXT,
            "timestep": _TIME.long(),
            "original_size": _SIZE,
            "target_size": _SIZE,
            "crop_coords": _SIZE,
        },
    ),
    "AuraFlowTransformer2DModel": (
        lambda: diffusers.AuraFlowTransformer2DModel(
            sample_size=8,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            **_SIZES,
            joint_attention_dim=24,
            caption_projection_dim=32,
            pos_embed_max_size=64,
        ),
        lambda: {"hidden_states": _random(2, 4, 8, 8), "encoder_hidden_states": _TEXT, "timestep": _TIME},
    ),
    "Lumina2Transformer2DModel": (
        lambda: diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=32,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(32, 16, 16),
            cap_feat_dim=24,
        ),
        lambda: {
            "hidden_states": _random(2, 4, 8, 8),
            "timestep": _TIME,
            "encoder_hidden_states": _TEXT,
            "encoder_attention_mask": _MASK.bool(),
        },
    ),
    "MochiTransformer3DModel": (
        lambda: diffusers.MochiTransformer3DModel(
            **_SIZES,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=4,
            text_embed_dim=24,
            time_embed_dim=8,
            max_sequence_length=16,
        ),
        lambda: {
            "hidden_states": _VIDEO,
            "encoder_hidden_states": _TEXT,
            "timestep": _TIME.long(),
            "encoder_attention_mask": _MASK.bool(),
        },
    ),
    "ChromaTransformer2DModel": (
        lambda: diffusers.ChromaTransformer2DModel(
            **_FLUX, approximator_num_channels=8, approximator_hidden_dim=16, approximator_layers=1
        ),
        lambda: {
            "hidden_states": _random(2, 16, 4),
            "encoder_hidden_states": _TEXT,
            "timestep": _TIME,
            "img_ids": _IMAGE_IDS,
            "txt_ids": _TEXT_IDS,
        },
    ),
}


def run(model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        torch.manual_seed(5)
        result = model(**inputs, return_dict=False)[0]
    return result[0] if isinstance(result, (list, tuple)) else result


def make(name: str) -> torch.nn.Module:
    """Some layers begin with zeros, which would hide their attention."""
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=1 / p[0].numel() ** 0.5)
    return model

"""diffusers: small models with random weights give what they give with torch's attention."""

import json
import warnings

import diffusers
import torch

import tvm_flash.integrations.diffusers as integration

warnings.simplefilter("ignore")
torch.manual_seed(0)
unet = diffusers.UNet2DConditionModel(
    sample_size=8,
    block_out_channels=(32, 64),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    cross_attention_dim=32,
    attention_head_dim=8,
    norm_num_groups=8,
)
models = [(unet, {"sample": torch.randn(1, 4, 8, 8), "timestep": 3, "encoder_hidden_states": torch.randn(1, 7, 32)})]
if hasattr(diffusers, "FluxTransformer2DModel"):
    flux = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    given = {"hidden_states": torch.randn(1, 16, 4), "encoder_hidden_states": torch.randn(1, 7, 32)}
    given |= {"pooled_projections": torch.randn(1, 16), "timestep": torch.tensor([0.5])}
    given |= {"txt_ids": torch.zeros(7, 3), "img_ids": torch.zeros(16, 3)}
    models.append((flux, given))
errors, layers = [], {}
for model, given in models:
    with torch.no_grad():
        want = model.eval()(**given).sample
        layers[type(model).__name__] = integration.use(model)
        errors.append((model(**given).sample - want).abs().max().item())
print(json.dumps({"error": max(errors), "layers": layers}))

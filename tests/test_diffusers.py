"""A UNet of diffusers with our attention gives what it gives with torch's."""

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from tvm_flash.integrations import diffusers as integration  # noqa: E402

pytestmark = [pytest.mark.usefixtures("cpu_pack"), pytest.mark.filterwarnings("error::tvm_flash.nn.FallbackWarning")]


def test_a_small_unet(monkeypatch):
    torch.manual_seed(0)
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    blocks |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "block_out_channels": (32, 64)}
    sizes = {"sample_size": 16, "cross_attention_dim": 24, "attention_head_dim": 4, "layers_per_block": 1}
    model = diffusers.UNet2DConditionModel(norm_num_groups=8, **sizes, **blocks).eval()
    image, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 24)
    with torch.no_grad():
        want = model(image, 3, text).sample
        count = integration.use(model)
        calls = []
        attend = integration.scaled_dot_product_attention
        monkeypatch.setattr(integration, "scaled_dot_product_attention", lambda *a: calls.append(a) or attend(*a))
        got = model(image, 3, text).sample
    assert count == len(calls) > 4
    assert (got - want).abs().max() < 1e-5


def test_images_and_masks():
    """A layer that takes images, with normalisation and a residual connection; one with a mask over the text."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    torch.manual_seed(0)
    options = {"heads": 4, "dim_head": 8}
    image = Attention(32, norm_num_groups=8, residual_connection=True, rescale_output_factor=2.0, **options).eval()
    cross = Attention(32, cross_attention_dim=24, **options).eval()
    mask = torch.where(torch.arange(9) < torch.tensor([[9], [4]]), 0.0, -torch.inf)[:, None]
    for layer, inputs in (
        (image, (torch.randn(2, 32, 6, 5),)),
        (cross, (torch.randn(2, 11, 32), torch.randn(2, 9, 24))),
        (cross, (torch.randn(2, 11, 32), torch.randn(2, 9, 24), mask)),
    ):
        layer.set_processor(AttnProcessor2_0())
        with torch.no_grad():
            want = layer(*inputs)
            layer.set_processor(integration.TvmFlashAttnProcessor())
            assert (layer(*inputs) - want).abs().max() < 1e-5

"""Models of diffusers with our attention give what they give with torch's."""

import copy
import pickle
import warnings

import pytest

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

from tests.diffusion_models import MODELS, make, run  # noqa: E402
from tvm_flash import NotSupportedError  # noqa: E402
from tvm_flash.integrations import diffusers as integration  # noqa: E402
from tvm_flash.nn import FallbackWarning, sdpa  # noqa: E402

pytestmark = [pytest.mark.usefixtures("cpu_pack"), pytest.mark.filterwarnings("error::tvm_flash.nn.FallbackWarning")]

#: Of these, masks that transformers' layers expand over their heads, and linear attention, are torch's.
PARTLY = ("SanaTransformer2DModel", "LTXVideoTransformer3DModel", "HunyuanVideoTransformer3DModel")


@pytest.fixture
def calls(monkeypatch):
    """The calls that our kernels compute."""
    found, compute = [], sdpa._compute
    monkeypatch.setattr(sdpa, "_compute", lambda *a: found.append(a) or compute(*a))
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_model_gives_the_same(name, calls):
    model, inputs = make(name), MODELS[name][1]()
    want = run(model, inputs)
    with warnings.catch_warnings():
        if name in PARTLY:
            warnings.simplefilter("ignore", FallbackWarning)
        count = integration.use(model)
        got = run(model, inputs)
    assert count and (got - want).abs().max() < 1e-5 * want.abs().max().clamp(min=1)
    assert name in PARTLY or len(calls) >= count
    assert integration.use(copy.deepcopy(model)) == count if name not in PARTLY else True


@pytest.mark.parametrize("name", ("FluxTransformer2DModel", "WanTransformer3DModel", "QwenImageTransformer2DModel"))
@pytest.mark.parametrize("way", ("model", "context"))
def test_the_dispatcher_knows_us(name, way, calls):
    model, inputs = make(name), MODELS[name][1]()
    want = run(model, inputs)
    if way == "model":
        model.set_attention_backend(integration.NAME)
        try:
            got = run(model, inputs)
        finally:
            model.set_attention_backend("native")
    else:
        with diffusers.attention_backend(integration.NAME):
            got = run(model, inputs)
    assert calls and (got - want).abs().max() < 1e-5
    calls.clear()
    assert torch.equal(run(model, inputs), want) and not calls


@pytest.mark.usefixtures("trains")
def test_a_model_learns_what_it_learns_with_torchs_attention(calls):
    """The losses of a UNet's steps, its text's gradient, and every call computed here."""

    def losses(ours: bool) -> tuple[list[float], torch.Tensor]:
        model, inputs = make("UNet2DConditionModel").train(), MODELS["UNet2DConditionModel"][1]()
        if ours:
            assert integration.use(model) == 8
        text = inputs["encoder_hidden_states"].clone().requires_grad_()
        noise = torch.randn(inputs["sample"].shape, generator=torch.Generator().manual_seed(3))
        optimizer, found = torch.optim.SGD(model.parameters(), lr=0.05), []
        for _ in range(5):
            loss = (model(**inputs | {"encoder_hidden_states": text}).sample - noise).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found, text.grad

    want, want_text = losses(False)
    assert not calls
    found, found_text = losses(True)
    assert len(calls) == 5 * 8
    assert found[-1] < found[0] - 0.05 and max(abs(x - y) for x, y in zip(found, want, strict=True)) < 1e-5
    assert (found_text - want_text).abs().max() < 1e-4 * want_text.abs().max()


def test_after_attention_slicing(calls):
    model, inputs = make("UNet2DConditionModel"), MODELS["UNet2DConditionModel"][1]()
    want = run(model, inputs)
    model.set_attention_slice("max")
    count = integration.use(model)
    assert (run(model, inputs) - want).abs().max() < 1e-5 and len(calls) == count == 8


def test_a_model_that_was_changed_can_be_pickled():
    for name in ("AuraFlowTransformer2DModel", "VQModel", "UNet2DConditionModel"):
        model, inputs = make(name), MODELS[name][1]()
        integration.use(model)
        want = run(model, inputs)
        assert torch.equal(run(pickle.loads(pickle.dumps(model)), inputs), want)


def test_a_model_without_attention_is_refused():
    model = diffusers.UNet2DModel(
        block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False
    )
    with pytest.raises(NotSupportedError, match=r"^model: UNet2DModel has no attention layer"):
        integration.use(model)
    with pytest.raises(NotSupportedError, match=r"^return_lse: .*set_attention_backend"):
        integration.attention(*[torch.randn(1, 8, 2, 16)] * 3, return_lse=True)


def test_processors_for_other_backends_alone_keep_them(calls):
    """As those of AnyFlow and of LTX-2's decoder, which make a mask of FlexAttention's."""

    class ForFlex:
        _attention_backend, _SUPPORTED_BACKENDS = "flex", ("flex", "_native_flex")

        def __call__(self, layer, x):
            if self._attention_backend not in self._SUPPORTED_BACKENDS:
                raise ValueError(f"got {self._attention_backend}")
            return x

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.processor = ForFlex()

    model = torch.nn.ModuleList([Layer(), make("UNet2DConditionModel")])
    with pytest.warns(FallbackWarning, match="ForFlex of ModuleList keep their own attention"):
        assert integration.use(model) == 8
    assert model[0].processor(model[0], 5) == 5
    with pytest.raises(NotSupportedError, match=r"no attention layer .*\(ForFlex\)"):
        integration.use(model[0])


@pytest.mark.parametrize("options", ({"scale_qk": False}, {"qk_norm": "layer_norm"}, {"scale_qk": False, "bias": True}))
@pytest.mark.parametrize("kind", ("AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor"))
def test_what_processors_ask_their_layers(options, kind, calls):
    """The older ones for the scale, torch's for normalisations of queries and keys."""
    from diffusers.models import attention_processor as processors

    torch.manual_seed(0)
    layer = processors.Attention(64, heads=4, dim_head=16, **options)
    layer.set_processor(getattr(processors, kind)(*(1,) * (kind == "SlicedAttnProcessor")))
    x = torch.randn(2, 9, 64)
    want = layer(x)
    assert integration.use(layer) == 1
    assert (layer(x) - want).abs().max() < 1e-5 and len(calls) == 1


@pytest.mark.parametrize("other", ({"scale_qk": False}, {"dim_head": 32}), ids=str)
def test_what_no_processor_of_ours_knows(other, calls):
    """Keys of a text beside another scale, or heads that are wider in all than the channels."""
    from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor

    options = {"heads": 4, "dim_head": 16, "added_kv_proj_dim": 24, "norm_num_groups": 8, "bias": True}
    plain, own = (Attention(64, processor=AttnAddedKVProcessor(), **options | x) for x in ({}, other))
    x, text = torch.randn(2, 64, 3, 3), torch.randn(2, 7, 24)
    with pytest.warns(FallbackWarning, match="AttnAddedKVProcessor of ModuleList keep their own"):
        want = plain(x, text), own(x, text)
        assert integration.use(torch.nn.ModuleList((plain, own))) == 1
    assert (plain(x, text) - want[0]).abs().max() < 1e-5 and torch.equal(own(x, text), want[1]) and len(calls) == 1


def test_images_and_masks():
    """A layer that takes images, with normalisation and a residual connection; one with masks over the text."""
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    torch.manual_seed(0)
    options = {"heads": 4, "dim_head": 8}
    image = Attention(32, norm_num_groups=8, residual_connection=True, rescale_output_factor=2.0, **options).eval()
    cross = Attention(32, cross_attention_dim=24, **options).eval()
    mask = torch.where(torch.arange(9) < torch.tensor([[9], [4]]), 0.0, -torch.inf)[:, None]
    each = torch.randn(8, 11, 9)  # another one for each head
    viewed = torch.randn(1, 22, 9)  # which diffusers' processor repeats and then views as one of each head
    for layer, inputs in (
        (image, (torch.randn(2, 32, 6, 5),)),
        (cross, (torch.randn(2, 11, 32), torch.randn(2, 9, 24))),
        (cross, (torch.randn(2, 11, 32), torch.randn(2, 9, 24), mask)),
        (cross, (torch.randn(2, 11, 32), torch.randn(2, 9, 24), each)),
        (cross, (torch.randn(2, 11, 32), torch.randn(2, 9, 24), viewed)),
    ):
        layer.set_processor(AttnProcessor2_0())
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FallbackWarning)
            want = layer(*inputs)
            layer.set_processor(integration.TvmFlashAttnProcessor())
            assert (layer(*inputs) - want).abs().max() < 1e-5

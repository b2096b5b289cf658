"""Causal masks of the drop-in: programs for any lengths, and torch's ``CausalBias``, wherever the drop-in stands."""

import pytest

torch = pytest.importorskip("torch")

from torch.nn.attention import bias as biases  # noqa: E402
from torch.nn.functional import scaled_dot_product_attention as torch_sdpa  # noqa: E402

from tests.nn_cases import tensors  # noqa: E402
from tvm_flash.nn import scaled_dot_product_attention as ours  # noqa: E402

pytestmark = pytest.mark.usefixtures("cpu_pack")


@pytest.mark.parametrize("lengths", ((8, 8), (8, 20), (20, 8)))
@pytest.mark.parametrize("variant", ("causal_upper_left", "causal_lower_right"))
@pytest.mark.filterwarnings("error::tvm_flash.nn.FallbackWarning", "ignore:Lower right causal bias will produce NaNs")
def test_causal_biases_of_torch(variant, lengths):
    bias = getattr(biases, variant)(*lengths)
    q, k, v = tensors(lengths)
    want = torch_sdpa(q.double(), k.double(), v.double(), bias._materialize())
    compiled = torch.compile(lambda q, k, v: ours(q, k, v, bias), fullgraph=True, backend="aot_eager")
    for function in (ours, compiled):
        torch.testing.assert_close(function(q, k, v, bias) if function is ours else function(q, k, v), want.float())


@pytest.mark.filterwarnings("ignore::tvm_flash.nn.FallbackWarning")
def test_causal_biases_of_torch_where_the_drop_in_is_in_the_place_of_torchs(monkeypatch):
    """The bias answers the function that ``torch.nn.functional`` has, which is the drop-in then."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", ours)
    bias = biases.causal_lower_right(8, 20)
    q, k, v = (x.double() for x in tensors((8, 20)))
    want = torch_sdpa(q, k, v, bias._materialize())
    torch.testing.assert_close(torch.nn.functional.scaled_dot_product_attention(q, k, v, bias), want)
    with pytest.raises(ValueError, match="CausalBias"):
        ours(q, k, v, bias, is_causal=True)
    with pytest.raises(RuntimeError, match="size"):
        ours(q[:, :, :7], k, v, bias)


@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.filterwarnings("error::tvm_flash.nn.FallbackWarning")
def test_a_program_for_any_lengths(strict):
    class Causal(torch.nn.Module):
        def forward(self, q, k, v):
            return ours(q, k, v, is_causal=True)

    sizes = [{2: torch.export.Dim(name, min=2, max=99)} for name in ("rows", "keys")]
    program = torch.export.export(
        Causal(), tuple(tensors((9, 13))), dynamic_shapes=(sizes[0], sizes[1], sizes[1]), strict=strict
    ).module()
    for lengths in ((9, 13), (40, 7), (8, 8)):
        q, k, v = tensors(lengths)
        want = torch_sdpa(q.double(), k.double(), v.double(), is_causal=True)
        torch.testing.assert_close(program(q, k, v), want.float())

"""The central promise: change the definition, and the kernels of both templates change, with no other edit.

``definitions/prefix_attention.py`` adds a score modification and a mask that the catalogue doesn't have.  Its kernels,
in both directions, are built by the public command and called through the public interface.  The operators that have no
kernels yet are derived from it and compiled as they stand.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from schedules.definition.catalogue import MASKS, SCORES
from tests import oracle
from tests.definitions.prefix_attention import fading_twin, prefix_attention, prefix_or_causal_twin
from tvm_flash import reference

ROOT = Path(__file__).resolve().parent.parent
SCALE = 0.125
PREFIX = 40


@pytest.fixture(scope="module")
def prefix_pack(tmp_path_factory):
    """A pack that holds the kernels of the outside definition and nothing else."""
    packs = tmp_path_factory.mktemp("packs")
    command = [sys.executable, ROOT / "scripts" / "build_kernels.py", "--arch", "cpu", "--dtype", "float32"]
    command += ["--head-dim", "64", "--template", "v1,v2", "--jobs", "1", "--output", packs]
    command += ["--definition", f"{ROOT / 'tests/definitions/prefix_attention.py'}:prefix_attention"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return packs


def run(packs, program):
    """Run a program in a process of its own that sees these packs only; what it saved as ``result.npz``."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=packs,
        env={"TVM_FLASH_PACKS": str(packs), "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return np.load(packs / "result.npz")


def test_the_definition_is_not_in_the_catalogue():
    assert prefix_attention.mask.name not in MASKS
    assert prefix_attention.score.name not in SCORES


@pytest.mark.parametrize("variant", ("v1", "v2"))
@pytest.mark.parametrize("layout", ("bhsd", "bshd"))
def test_both_templates_compute_the_definition(prefix_pack, variant, layout):
    rng = np.random.default_rng(11)
    q, k, v = (rng.standard_normal((2, h, n, 64), dtype=np.float32) for h, n in ((4, 133), (2, 170), (2, 170)))
    rates = rng.random(4, dtype=np.float32)
    np.savez(prefix_pack / "inputs.npz", q=q, k=k, v=v, rates=rates)
    order = (0, 1, 2, 3) if layout == "bhsd" else (0, 2, 1, 3)
    result = run(
        prefix_pack,
        f"""
import numpy as np
import sys
from tvm_flash import custom_attention

data = np.load("inputs.npz")
attention = custom_attention("prefix_attention", layout="{layout}", variant="{variant}")
q, k, v = (data[n].transpose{order} for n in "qkv")
out, lse = attention(q, k, v, softmax_scale={SCALE}, return_lse=True, prefix_length={PREFIX}, fading_rate=data["rates"])
assert "tvm" not in sys.modules and "schedules" not in sys.modules
np.savez("result.npz", out=out.transpose{order}, lse=lse)
""",
    )
    want, want_lse = reference.attention(
        q,
        k,
        v,
        softmax_scale=SCALE,
        mask=prefix_or_causal_twin,
        score=fading_twin,
        params={"prefix_length": PREFIX, "fading_rate": np.broadcast_to(rates, (2, 4))},
    )
    plain, _ = reference.attention(q, k, v, softmax_scale=SCALE, mask=reference.causal)
    np.testing.assert_allclose(result["out"], want, atol=2e-6, rtol=0)
    np.testing.assert_allclose(result["lse"], want_lse, atol=4e-6, rtol=0)
    assert abs(want - plain).max() > 0.1  # the definition says something else than plain causal attention


def test_both_templates_learn_by_the_definition(prefix_pack):
    """A training step through PyTorch, with the gradient of a parameter that nobody wrote a derivative for."""
    pytest.importorskip("torch")
    rng = np.random.default_rng(14)
    q, k, v = (rng.standard_normal((2, h, n, 64), dtype=np.float32) for h, n in ((4, 133), (2, 170), (2, 170)))
    dout, dlse = rng.standard_normal(q.shape, np.float32), rng.standard_normal(q.shape[:3], np.float32)
    rates = rng.random((2, 4), dtype=np.float32)
    np.savez(prefix_pack / "step.npz", q=q, k=k, v=v, dout=dout, dlse=dlse, rates=rates)
    result = run(
        prefix_pack,
        f"""
import sys
import numpy as np
import torch
from tvm_flash import custom_attention

data = np.load("step.npz")
found = {{}}
for variant in ("v1", "v2"):
    attention = custom_attention("prefix_attention", layout="bhsd", variant=variant)
    leaves = [torch.from_numpy(data[n]).requires_grad_() for n in ("q", "k", "v", "rates")]
    q, k, v, rates = leaves
    parameters = {{"prefix_length": {PREFIX}, "fading_rate": rates}}
    out, lse = attention(q, k, v, softmax_scale={SCALE}, return_lse=True, **parameters)
    ((out * torch.from_numpy(data["dout"])).sum() + (lse * torch.from_numpy(data["dlse"])).sum()).backward()
    found |= {{f"{{variant}}_{{n}}": x.grad.numpy() for n, x in zip(("dq", "dk", "dv", "fading_rate"), leaves)}}
assert "tvm" not in sys.modules and "schedules" not in sys.modules
np.savez("result.npz", **found)
""",
    )
    params = {"prefix_length": PREFIX, "fading_rate": rates}
    want = reference.attention_backward(
        dout, q, k, v, dlse=dlse, gradients=("fading_rate",), **{**OUTSIDE, "params": params}
    )
    for name in ("dq", "dk", "dv", "fading_rate"):
        exact = want.params[name] if name == "fading_rate" else getattr(want, name)
        for variant in ("v1", "v2"):
            tolerance = 5e-6 * np.abs(exact).max()
            np.testing.assert_allclose(result[f"{variant}_{name}"], exact, atol=tolerance, rtol=0, err_msg=name)


def outside_problem():
    rng = np.random.default_rng(12)
    q, k, v = (rng.standard_normal((2, h, n, d), dtype=np.float32) for h, n, d in ((4, 13, 8), (2, 60, 8), (2, 60, 12)))
    dout, dlse = rng.standard_normal((2, 4, 13, 12), np.float32), rng.standard_normal((2, 4, 13), np.float32)
    return q, k, v, dout, dlse, {"prefix_length": PREFIX, "fading_rate": rng.random((2, 4), dtype=np.float32)}


OUTSIDE = {"softmax_scale": SCALE, "mask": prefix_or_causal_twin, "score": fading_twin}


def test_the_gradients_of_the_definition_against_autograd():
    """The derivative is derived too: nobody wrote that of ``fading``, nor its rate's."""
    q, k, v, dout, dlse, params = outside_problem()
    got = oracle.gradients(prefix_attention, dout, q, k, v, SCALE, params, dlse)
    torch = pytest.importorskip("torch")
    tq, tk, tv, rate = leaves = [
        torch.tensor(np.float64(x), requires_grad=True) for x in (q, k, v, params["fading_rate"])
    ]
    i, j = torch.arange(13)[:, None], torch.arange(60)[None]
    s = tq @ tk.repeat_interleave(2, dim=1).transpose(-1, -2) * SCALE
    s = s / (1 + rate[..., None, None] * (i + 60 - 13 - j).abs())
    s = s.masked_fill(~((j < PREFIX) | (j <= i + 60 - 13)), -torch.inf)
    out = torch.softmax(s, -1) @ tv.repeat_interleave(2, dim=1)
    ((out * torch.tensor(dout)).sum() + (torch.logsumexp(s, -1) * torch.tensor(dlse)).sum()).backward()
    for name, leaf in zip(("dq", "dk", "dv", "d_fading_rate"), leaves, strict=True):
        want = leaf.grad.numpy()
        assert np.abs(want).max() > 0.05
        np.testing.assert_allclose(getattr(got, name), want, atol=5e-6 * max(1, np.abs(want).max()), rtol=0)


def test_the_gradients_of_the_definition_against_finite_differences():
    """Of the whole of attention, along one direction of all inputs at once."""
    q, k, v, dout, dlse, params = outside_problem()
    got = oracle.gradients(prefix_attention, dout, q, k, v, SCALE, params, dlse)
    rng = np.random.default_rng(13)
    inputs = [np.float64(x) for x in (q, k, v, params["fading_rate"])]
    ways = [rng.standard_normal(x.shape) for x in inputs]

    def loss(step):
        *moved, rate = (x + step * way for x, way in zip(inputs, ways, strict=True))
        out, lse = reference.attention(*moved, **OUTSIDE, params={**params, "fading_rate": rate})
        return (out * dout).sum() + (lse * dlse).sum()

    found = [got.dq, got.dk, got.dv, got.d_fading_rate]
    want = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert sum((g * way).sum() for g, way in zip(found, ways, strict=True)) == pytest.approx(want, rel=1e-5)


def test_parts_of_the_definition_combine_to_the_whole():
    q, k, v, _, _, params = outside_problem()
    partial, combine = (oracle.operator(prefix_attention, op, 8, 12) for op in ("partial", "combine"))
    parts = [
        partial(q=q, k=k, v=v, softmax_scale=SCALE, first_key=first, last_key=last, **params)
        for first, last in ((0, 17), (17, 50), (50, 64))
    ]
    got = combine(o_parts=np.stack([p.o for p in parts]), lse_parts=np.stack([p.lse for p in parts]))
    want, want_lse = reference.attention(q, k, v, **OUTSIDE, params=params)
    np.testing.assert_allclose(got.o, want, atol=2e-6, rtol=0)
    np.testing.assert_allclose(got.lse, want_lse, atol=4e-6, rtol=0)

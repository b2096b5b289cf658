"""The central promise: change the definition, and the kernels of both templates change, with no other edit.

``definitions/prefix_attention.py`` adds a score modification and a mask that the catalogue doesn't have.  Its kernels
are built by the public command and called through the public interface.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from schedules.definition.catalogue import MASKS, SCORES
from tests.definitions.prefix_attention import fading_twin, prefix_attention, prefix_or_causal_twin
from tvm_flash import reference

ROOT = Path(__file__).resolve().parent.parent
SCALE = 0.125
PREFIX = 40


@pytest.fixture(scope="module")
def prefix_pack(tmp_path_factory):
    """A pack that holds the kernels of the outside definition and nothing else."""
    packs = tmp_path_factory.mktemp("packs")
    command = [sys.executable, ROOT / "scripts" / "build_kernels.py", "--arch", "cpu", "--dtype", "float32,bfloat16"]
    command += ["--head-dim", "64", "--output", packs]
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

"""The folder for the Hugging Face Hub, loaded by its own package as a user's program would, without this checkout."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from schedules.builder import hub
from tvm_flash import __version__

pytest.importorskip("torch")
kernels = pytest.importorskip("kernels")

PROGRAM = """
import sys
from pathlib import Path

import numpy as np
import torch
from kernels import get_local_kernel

kernel = get_local_kernel(Path(sys.argv[1]), backend="cpu")
import tvm_flash

assert Path(tvm_flash.__file__).is_relative_to(sys.argv[1]), tvm_flash.__file__
torch.manual_seed(0)
q, k, v = (torch.randn(2, 33, 4, 64, requires_grad=True) for _ in range(3))
swapped = [x.transpose(1, 2) for x in (q, k, v)]
want = torch.nn.functional.scaled_dot_product_attention(*swapped, is_causal=True).transpose(1, 2)
found = kernel.flash_attn_func(q, k, v, causal=True)
assert (found - want).abs().max() < 1e-5
gradients = [torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (found, want)]
for a, b in zip(*gradients, strict=True):
    assert (a - b).abs().max() < 1e-4
starts = torch.tensor([0, 33, 66], dtype=torch.int32)
packed = [x.detach().flatten(0, 1) for x in (q, k, v)]
ragged = kernel.flash_attn_varlen_func(*packed, starts, starts, 33, 33, causal=True)
assert (ragged - want.flatten(0, 1)).abs().max() < 1e-5
print("right")
"""


@pytest.fixture(scope="module")
def folder(cpu_pack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    (variant,) = (x for x in hub.lay_out(folder) if "-cpu-" in x.name)
    assert variant == folder / "build" / "tvm-ffi01-cpu-x86_64-linux"
    return folder


def run(program, *arguments, site=()):
    """A program in an interpreter that finds what is installed, and not what is only linked to (this checkout)."""
    paths = {
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        *map(str, Path(kernels.__file__).parents[1:2]),
    }
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((*map(str, site), *sorted(paths))),
        "HF_HUB_OFFLINE": "1",
    }
    for name in ("TVM_FLASH_PACKS", "LOCAL_KERNELS"):
        environment.pop(name, None)
    command = (sys.executable, "-S", "-c", program, *map(str, arguments))
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(sys.executable).parent)


def test_the_hubs_package_loads_it(folder):
    done = run(PROGRAM, folder)
    assert done.stdout == "right\n", done.stderr


def test_another_version_beside_it_is_refused(folder, tmp_path):
    (tmp_path / "tvm_flash").mkdir()
    (tmp_path / "tvm_flash" / "__init__.py").write_text('__version__ = "0.0.1"\n')
    load = "import sys, pathlib, kernels; kernels.get_local_kernel(pathlib.Path(sys.argv[1]))"
    done = run(load, folder, site=(tmp_path,))
    assert f"tvm_flash {__version__} of the Hub can't be loaded beside tvm_flash 0.0.1" in done.stderr


def test_it_holds_what_a_wheel_does(folder):
    (variant,) = (folder / "build").glob("*-cpu-*")
    about = json.loads((variant / "metadata.json").read_text())
    assert about["id"] == f"_tvm_flash_cpu_{__version__.replace('.', '_')}"  # of each variant its own
    suffixes = {x.suffix for x in variant.rglob("*") if x.is_file()}
    assert suffixes == {".py", ".so", ".json"}
    assert {x.name for x in (variant / "tvm_flash" / "packs").iterdir() if x.is_dir()} == {
        x.parent.name for x in (hub.PACKS).glob("cpu*/manifest.json")
    }


def test_capabilities():
    assert [hub._capability(x) for x in ("sm_70", "sm_90a", "sm_120")] == ["7.0", "9.0a", "12.0"]

"""The definitions to copy: against their twins, their pictures, the originals' own formulas, and as kernels."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from schedules.commands import show
from schedules.definition.check import check
from schedules.definition.definition_file import DefinitionFile
from schedules.definition.gallery import speculative_tree, t5_bias
from schedules.definition.picture import Picture
from schedules.definition.sample import parameters_of
from tests.built import build_kernels
from tvm_flash import reference

ROOT = Path(__file__).resolve().parent.parent
GALLERY = ROOT / "schedules" / "definition" / "gallery"
NAMES = sorted(file.stem for file in GALLERY.glob("*.py") if file.stem != "__init__")
MASKS = sorted(file.stem for file in (ROOT / "docs" / "images" / "definitions").glob("*.png"))
#: Of which there are kernels here: one that reads ids, and a table that is learnt.
BUILT = ("documents", "t5_bias")
SCALE = 0.2


def definition_of(name):
    return DefinitionFile.parse(f"{GALLERY / name}.py:{name}").load()


def seen_by(name, seqlen_q, seqlen_kv):
    return Picture.of(definition_of(name), seqlen_q, seqlen_kv, 1, 1).seen


@pytest.mark.parametrize("name", NAMES)
def test_each_is_what_its_twin_says(name):
    check(definition_of(name))


def test_the_page_has_all_of_them():
    page = (ROOT / "docs" / "definitions.md").read_text()
    assert {name for name in NAMES if f"[{name}](" in page} == set(NAMES)
    assert set(re.findall(r"images/definitions/(\w+)\.png", page)) == set(MASKS) <= set(NAMES)


# ---------------------------------------------------------------- what masks and buckets are in the originals


def test_neighbourhoods_have_as_many_keys_everywhere():
    assert (seen_by("neighbourhood_1d", 100, 100).sum(axis=1) == 20).all()
    seen = seen_by("neighbourhood_2d", 256, 256).reshape(16, 16, 16, 16)
    assert (seen.sum(axis=(2, 3)) == 49).all()
    assert seen[5, 9, 2:9, 6:13].all() and seen[0, 15, :7, 9:].all()


def test_a_tree_shows_ancestors():
    parents = [-1, 0, 0, 1, 3, 2, -1, 6]
    params = speculative_tree.numbers_of(parents, 20)
    params = {
        n: reference.beside_scores({n: x[None]}, {n: a})[n]
        for (n, x), a in zip(params.items(), ("bi", "bj", "bj"), strict=True)
    }
    seen = speculative_tree.ancestors_twin(reference.positions(1, 1, 8, 20, params))[0, 0]
    for token, parent in enumerate(parents):
        line, at = {token}, parent
        while at >= 0:
            line.add(at)
            at = parents[at]
        assert set(np.flatnonzero(seen[token])) == {*range(12), *(12 + x for x in line)}


def test_buckets_are_those_of_t5():
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    torch = pytest.importorskip("torch")
    offsets = np.arange(-300, 301)
    want = t5.T5Attention._relative_position_bucket(torch.from_numpy(offsets), True, 32, 128)
    np.testing.assert_array_equal(t5_bias.bucket_of(offsets), want.numpy())


def test_offsets_are_those_of_swin():
    """``relative_position_index`` as Swin computes it."""
    swin, side = definition_of("swin_bias"), 5
    coordinates = np.stack(np.meshgrid(*[np.arange(side)] * 2, indexing="ij")).reshape(2, -1)
    down, right = coordinates[:, :, None] - coordinates[:, None, :] + side - 1
    table = np.random.default_rng(0).standard_normal(((2 * side - 1) ** 2, 3))
    at = reference.positions(1, 3, 25, 25, {"side": side, "offset_bias": table})
    want = table[down * (2 * side - 1) + right].transpose(2, 0, 1)
    np.testing.assert_array_equal(swin.score.twin(np.zeros((1, 3, 25, 25)), at)[0], want)


# ---------------------------------------------------------------- pictures


def test_tiles_of_a_picture():
    seen = np.arange(10)[None] <= np.arange(6)[:, None]
    tiles = Picture(seen, 2, 4)
    np.testing.assert_array_equal(tiles.tiles, [[1, 0, 0], [1, 0, 0], [2, 1, 0]])
    assert tiles.text() == "▒··\n▒··\n█▒·\n1 of 9 tiles are seen whole (█), 3 in part (▒), 5 not at all (·)"
    pixels, scale = tiles.pixels(), 39
    assert pixels.shape == (6 * scale, 10 * scale)
    at = lambda i, j: pixels[i * scale + 5, j * scale + 5]  # noqa: E731
    assert [at(0, 0), at(0, 1), at(5, 0), at(5, 9), pixels[0, 0]] == [2, 1, 3, 0, 4]


@pytest.mark.parametrize("name", MASKS)
def test_the_pictures_are_up_to_date(name, tmp_path):
    """Drawn again by the command; what is compressed may differ."""
    lengths = "64x256" if name == "speculative_tree" else "256"
    options = ["--arch", "cpu", "--isa", "avx2", "--stage", "mask", "--lengths", lengths]
    drawn = tmp_path / "drawn.png"
    assert show.main([*options, "--definition", f"{GALLERY / name}.py:{name}", "--picture", str(drawn)]) == 0
    assert pixels_of(drawn) == pixels_of(ROOT / "docs" / "images" / "definitions" / f"{name}.png")


def pixels_of(file):
    """A PNG's size and rows."""
    data, at, found = file.read_bytes(), 8, {}
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        found[kind] = data[at + 8 : at + 8 + size]
        at += 12 + size
    return found[b"IHDR"][:8], found[b"PLTE"], zlib.decompress(found[b"IDAT"])


def test_lengths_that_are_none(capsys):
    assert show.main(["--arch", "cpu", "--mask", "causal", "--stage", "mask", "--lengths", "12x"]) == 2
    assert "--lengths 12x: expected 512, or 256x512" in capsys.readouterr().err


# ---------------------------------------------------------------- kernels


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    packs = tmp_path_factory.mktemp("packs")
    for name in BUILT:
        of = ("--arch", "cpu", "--dtype", "float32", "--head-dim", 32, "--template", "v2")
        build_kernels(*of, "--output", packs, "--definition", f"{GALLERY / name}.py:{name}")
    return packs


PROGRAM = """
import sys
import numpy as np
import torch
from tvm_flash import custom_attention

for name in {names}:
    data = dict(np.load(f"{{name}}.npz"))
    asked, dout = list(data.pop("asked")), torch.from_numpy(data.pop("dout"))
    attention = custom_attention(name)
    found = []
    for turn in range(2):
        leaves = {{n: torch.from_numpy(x) for n, x in data.items()}}
        for n in ("q", "k", "v", *asked):
            leaves[n].requires_grad_()
        params = {{n: x if x.ndim else x.item() for n, x in leaves.items() if n not in "qkv"}}
        out = attention(*(leaves[n] for n in "qkv"), softmax_scale={scale}, **params)
        (out * dout).sum().backward()
        found.append({{f"d_{{n}}": leaves[n].grad.numpy() for n in ("q", "k", "v", *asked)}})
    np.savez(f"{{name}}_result_{{sys.argv[1]}}.npz", out=out.detach().numpy(), **found[0])
    assert all(np.array_equal(found[0][n], found[1][n]) for n in found[0])
assert "tvm" not in sys.modules and "schedules" not in sys.modules
"""


def problem(name):
    rng, seqlen = np.random.default_rng(3), 700
    sizes = ((4, seqlen), (2, seqlen), (2, seqlen), (4, seqlen))
    tensors = [rng.standard_normal((2, *n, 32), np.float32) for n in sizes]
    return tensors, parameters_of(definition_of(name), 2, 4, seqlen, seqlen)


def test_kernels_and_their_gradients(pack):
    """Through autograd, the same bits with one thread and with several; lengths of several sections."""
    environment = {"TVM_FLASH_PACKS": str(pack), "PYTHONPATH": str(ROOT)}
    for name in BUILT:
        (q, k, v, dout), params = problem(name)
        asked = np.array([p.name for p in definition_of(name).params if p.gradient], str)
        np.savez(pack / f"{name}.npz", q=q, k=k, v=v, dout=dout, asked=asked, **params)
    program = PROGRAM.format(names=BUILT, scale=SCALE)
    for threads in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program, threads],
            capture_output=True,
            text=True,
            cwd=pack,
            env={**environment, "TVM_FLASH_NUM_THREADS": threads},
        )
        assert done.returncode == 0, done.stderr
    for name in BUILT:
        definition, ((q, k, v, dout), params) = definition_of(name), problem(name)
        found, again = (np.load(pack / f"{name}_result_{threads}.npz") for threads in "12")
        assert all(np.array_equal(found[n], again[n]) for n in found)
        what = {
            "softmax_scale": SCALE,
            "mask": definition.mask.twin,
            "score": definition.score.twin,
            "axes": {p.name: p.axes for p in definition.params},
        }
        want, _ = reference.attention(q, k, v, params=params, **what)
        np.testing.assert_allclose(found["out"], want, atol=3e-6, rtol=0)
        exact = reference.attention_backward(dout, q, k, v, params=params, **what)
        for n in "qkv":
            x = getattr(exact, f"d{n}")
            np.testing.assert_allclose(found[f"d_{n}"], x, atol=5e-6 * max(1, np.abs(x).max()), rtol=0)
        if name != "documents":
            want = gradient_of_t5(dout, q, k, v, params["relative_bias"])
            np.testing.assert_allclose(found["d_relative_bias"], want, atol=2e-5 * np.abs(want).max(), rtol=0)


def test_the_call_of_the_page(pack):
    text = (ROOT / "docs" / "definitions.md").read_text(encoding="utf-8")
    called, *_ = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    program = f"""
import torch

q, k, v = (torch.randn(2, 4, 90, 32) for _ in range(3))
ids = torch.arange(90, dtype=torch.int32).div(40, rounding_mode="floor").expand(2, -1)
{called}
mask = (ids[:, None, :, None] == ids[:, None, None]).tril()
assert torch.allclose(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, mask), atol=1e-5)
"""
    environment = {"TVM_FLASH_PACKS": str(pack), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=pack, env=environment)
    assert done.returncode == 0, done.stderr


def gradient_of_t5(dout, q, k, v, table):
    """By the sums over the scores of each offset, in float64: what autograd of a plain program would have."""
    torch = pytest.importorskip("torch")
    q, k, v, dout = (torch.from_numpy(x).double() for x in (q, k, v, dout))
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])[None]
    index = torch.from_numpy(t5_bias.bucket_of((j - i).numpy()))
    leaf = torch.from_numpy(table).double().requires_grad_()
    s = q @ k.repeat_interleave(2, dim=1).mT * SCALE + leaf[index].permute(2, 0, 1)
    (torch.softmax(s, -1) @ v.repeat_interleave(2, dim=1) * dout).sum().backward()
    return leaf.grad.numpy()

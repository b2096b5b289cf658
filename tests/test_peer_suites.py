"""The command that runs other projects' tests counts what came of them; the tests here are ours, in their places."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from tests.shared import HANGS

torch = pytest.importorskip("torch")

ROOT = Path(__file__).resolve().parent.parent

TORCHS = """
import unittest
import torch
from torch.nn.functional import scaled_dot_product_attention

class TestAttention(unittest.TestCase):
    def attend(self, dtype=torch.float32, **options):
        q = torch.randn(2, 3, 5, 8, dtype=dtype)
        return scaled_dot_product_attention(q, q, q, **options)

    def test_ours(self):
        self.attend()

    def test_parameters_one(self):
        self.attend(is_causal=True)

    def test_parameters_two(self):
        self.attend(is_causal=True)
        self.attend(torch.float64)

    def test_left(self):
        self.attend(torch.float64)

    @unittest.skip("no GPU with 7 arms")
    def test_skipped(self): ...

    def test_broken(self):
        self.assertEqual(1, 2)

    def test_broken_here(self):
        self.assertEqual(scaled_dot_product_attention.__name__, "scaled_dot_product_attention")
        self.assertNotIn("tvm_flash", scaled_dot_product_attention.__module__ or "")
"""

FLASH = """
import pytest
import torch
from flash_attn_interface import flash_attn_func

@pytest.mark.parametrize("d", [8, 16, 24])
def test_output(d):
    q = torch.randn(1, 5, 2, d, device="cuda")
    assert flash_attn_func(q, q, q, causal=True, num_splits=3, pack_gqa=None).shape == q.shape

def test_absorbed():
    q = torch.randn(1, 5, 2, 8, device="cuda")
    flash_attn_func(q, q, q, qv=q)

@pytest.mark.parametrize("seqlen_q", [5, 5000])
def test_lengths(seqlen_q):
    raise AssertionError("a result differs by 0.5")
"""


def run(checkout, *options):
    command = [sys.executable, ROOT / "scripts" / "peer_suites.py", checkout, *options, "--device", "cpu"]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS)


def rows(text, title):
    """Counts by test, in the order of ``OUTCOMES``, of the table with such a title."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|") and title in line)
    table = itertools.takewhile(lambda line: line.startswith("|"), lines[first + 2 :])
    cells = ([x.strip(" `*") for x in line.strip("|").split("|")] for line in table)
    return {name: [int(x) for x in counts] for name, *counts in cells}


def test_pytorchs(tmp_path, cpu_pack):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_transformers.py").write_text(TORCHS)
    found = run(tmp_path)
    assert found.returncode == 1, found.stdout + found.stderr
    ours = {"test_ours": [1, 0], "test_parameters_one": [1, 0], "test_parameters_two": [0, 1], "test_left": [0, 0, 1]}
    for door in ("registry", "drop-in"):
        table = rows(found.stdout, door)
        for name, counts in ours.items():
            assert table[f"TestAttention.{name}"][: len(counts)] == counts, (door, name)
        assert table["TestAttention.test_broken"][4:7] == [0, 0, 1]
        assert table["TestAttention.test_skipped"][7] == 1
    assert rows(found.stdout, "registry")["TestAttention.test_broken_here"][3] == 1
    assert rows(found.stdout, "drop-in")["TestAttention.test_broken_here"][5] == 1
    assert "there are no kernels for torch.floatN on cpu" in found.stdout
    assert "test_broken_here: AssertionError" in found.stdout


def test_flash_attentions(tmp_path, cpu_pack):
    (tmp_path / "hopper").mkdir()
    (tmp_path / "hopper" / "test_flash_attn.py").write_text(FLASH)
    found = run(tmp_path, "--sample", "2")
    assert found.returncode == 1, found.stdout + found.stderr
    table = rows(found.stdout, "FlashAttention 3")
    assert table["test_output"] == [2, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert table["test_absorbed"][4] == 1
    assert table["test_lengths"] == [0, 0, 0, 0, 0, 1, 0, 0, 1, 0]
    assert "1 × qv: isn't here" in found.stdout
    assert "has sequences of more than N positions" in found.stdout


def test_another_folder(tmp_path):
    found = run(tmp_path)
    assert found.returncode == 2 and "neither PyTorch's" in found.stderr

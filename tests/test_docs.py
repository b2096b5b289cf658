"""The code in the documents runs, block by block in one namespace, as a reader would type it."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tvm_flash.packs import registry as packs

ROOT = Path(__file__).resolve().parent.parent
PAGES = (
    *("README.md", "docs/layout_guide.md", "docs/layout_guide.zh.md"),
    *("docs/pytorch.md", "docs/models.md", "docs/frameworks.md", "docs/varlen.md", "docs/serving.md"),
    "docs/distributed.md",
)

#: What the code of a page needs beside torch.
NEEDS = {"docs/models.md": ("transformers",), "docs/frameworks.md": ("jax", "jax_tvm_ffi")}


def blocks_of(page, language="python"):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def built(cpu_pack, tmp_path, monkeypatch):
    """A function that carries out the builds of a page, in float32, and adds their pack to those that are found."""

    def build(page):
        text = (ROOT / page).read_text(encoding="utf-8")
        commands = re.findall(r"^python -m tvm_flash build (--arch native --definition .*)$", text, flags=re.MULTILINE)
        if not commands:
            return
        from tests.built import build_kernels  # needs TVM

        monkeypatch.chdir(ROOT)
        for command in commands:
            words = [*shlex.split(command), "--dtype", "float32", "--output", tmp_path]
            words[words.index("native")] = "cpu"
            build_kernels(*words)
        folders = map(str, (tmp_path, *packs.search_path()))
        monkeypatch.setenv(packs.PATH_VARIABLE, os.pathsep.join(folders))
        packs.refresh()

    yield build
    monkeypatch.undo()
    packs.refresh()


@pytest.mark.parametrize("page", PAGES)
def test_code_of_a_page_runs(page, built):
    for name in ("torch", *NEEDS.get(page, ())):
        pytest.importorskip(name)
    built(page)
    blocks = blocks_of(page)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)


#: What the page of FlexAttention calls its attention with, and what it should give.
CAPPED_PREFIX = """
import torch

q, k, v = (torch.randn(2, 4, 300, 64, requires_grad=True) for _ in range(3))
{}
i, j = torch.arange(300)[:, None], torch.arange(300)
scores = 20 * torch.tanh(q @ k.mT / 8 / 20)
want = scores.masked_fill((j >= 128) & (j > i), -torch.inf).softmax(-1) @ v
assert torch.allclose(out, want, atol=1e-5)
for ours, its in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (out, want)), strict=True):
    assert torch.allclose(ours, its, atol=1e-4)
"""


def test_the_page_of_flex_attention_says_how(tmp_path):
    """Its file, its command, with the options that it names for fewer kernels, and its call."""
    pytest.importorskip("torch")
    page = "docs/flex_attention.md"
    made, called = blocks_of(page)
    (command,) = blocks_of(page, "bash")
    (fewer,) = re.findall(r"`(--head-dim .*?)`", " ".join((ROOT / page).read_text(encoding="utf-8").split()))
    (tmp_path / made.split()[1]).write_text(made)
    python, *words = shlex.split(f"{command} {fewer} --output packs --jobs 1")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TVM_FLASH_PACKS": "packs"}
    assert python == "python"
    for arguments in (words, ["-c", CAPPED_PREFIX.format(called)]):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    (manifest,) = (tmp_path / "packs").glob("*/manifest.json")
    assert len(json.loads(manifest.read_text())["kernels"]) == 2  # as the page says


def test_messages_that_are_explained_exist():
    """Each message of the troubleshooting page stands in the source, but for what a call puts into it."""
    text = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tvm_flash").rglob("*.py")]
    # Adjacent string literals are one message.
    whole = "\n".join(re.sub(r'"\s*\n\s*f?"', "", source) for source in sources)
    assert len(messages) > 10
    for message in messages:
        assert message in whole, f"no error says {message!r}"


def test_translation_has_the_same_code():
    english, chinese = (
        [re.sub(r"#.*|AssertionError\(.*\)", "", b) for b in blocks_of(f"docs/layout_guide{x}.md")] for x in ("", ".zh")
    )
    assert english == chinese


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md")))]
)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (ROOT / page).parent.joinpath(target).exists(), target


def test_at_most_two_files_are_opened_first():
    """And all that are named are there."""
    text = (ROOT / "docs/where.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| ([^|]+) \|$", text, flags=re.MULTILINE)[1:]
    folders = ("schedules", "tvm_flash", "tests", "scripts", "tuning_logs", "docs")
    files = [f"/{path.relative_to(ROOT)}" for folder in folders for path in (ROOT / folder).rglob("*.*")]
    assert len(rows) > 30
    for change, first, then in rows:
        assert first.count("`") <= 4, change
        for name in re.findall(r"`([\w/]+\.\w+)`", first + then):
            assert any(file.endswith(f"/{name}") for file in files), (change, name)


def test_commands_are_understood():
    """By the parsers of the commands that the documents name."""
    pytest.importorskip("tvm")
    from schedules.commands import show, tune
    from tvm_flash.commands import cli

    parsers = {"-m tvm_flash": cli._parser(), "scripts/show.py": show._parser(), "scripts/tune.py": tune._parser()}
    lines = {
        line
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for line in re.findall(r"^(?:\$ )?python (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    }
    understood = dict.fromkeys(parsers, 0)
    for line in sorted(lines):
        for command, parser in parsers.items():
            words = shlex.split(line.removeprefix(command), comments=True)
            if line.startswith(f"{command} ") and words[:1] not in (["build"], ["merge"], ["diff"], ["report"]):
                parser.parse_args(words)
                understood[command] += 1
    assert min(understood.values()) >= 4, understood

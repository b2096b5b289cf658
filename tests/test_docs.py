"""The code in the documents runs, block by block in one namespace, as a reader would type it."""

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


def python_blocks(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def built(cpu_pack, tmp_path, monkeypatch):
    """A function that carries out the builds of a page, in float32, and adds their pack to those that are found."""

    def build(page):
        text = (ROOT / page).read_text(encoding="utf-8")
        commands = re.findall(r"^python -m tvm_flash build (--arch native --definition .*)$", text, flags=re.MULTILINE)
        for command in commands:
            words = [*shlex.split(command), "--dtype", "float32", "--output", tmp_path]
            words[words.index("native")] = "cpu"
            words = [sys.executable, "scripts/build_kernels.py", *words]
            done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
            assert done.returncode == 0, done.stdout + done.stderr
        if commands:
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
    blocks = python_blocks(page)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)


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
        [re.sub(r"#.*|AssertionError\(.*\)", "", b) for b in python_blocks(f"docs/layout_guide{x}.md")]
        for x in ("", ".zh")
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

"""Run the tests of the package ``flash_attn`` against this one, from a checkout of it that you name.

    python scripts/peer_suites.py ~/flash-attention --sample 300

Its tests compare results and gradients with a formula in PyTorch, and allow some multiple of what PyTorch's own
computation in the same dtype is off.  They ask for thousands of combinations; a sample of each test is taken, the same
every time.  On a machine without a GPU they run on the CPU.  Nothing of the checkout is copied into this one.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import random
import sys
import tempfile
import types
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

#: Words of what isn't here (splits that the caller counts, caches, pages, a generator of random numbers), as they stand
#: in names of tests and of their parameters.
MISSING = ("splitkv", "kvcache", "paged", "generator")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of the repository flash-attention")
    parser.add_argument("--sample", type=int, default=40, help="how many of each test (default: %(default)s)")
    parser.add_argument(
        "--longest", type=int, default=1100, help="no sequences longer than that (default: %(default)s)"
    )
    parser.add_argument("--only", default="", help="tests with this in their names")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    options = parser.parse_args()
    source = options.checkout / "tests" / "test_flash_attn.py"
    if not source.is_file():
        parser.error(f"checkout: has no {source.relative_to(options.checkout)}; name a clone of flash-attention")
    if importlib.util.find_spec("einops") is None:
        parser.error("the tests need einops; run pip install einops")
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    _stand_in(options.checkout)
    text = source.read_text()
    if device == "cpu":
        text = text.replace('"cuda"', '"cpu"')
        torch.cuda.get_device_capability = lambda *_: (8, 0)
        torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(total_memory=2**36)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test_flash_attn_of_the_checkout.py"
        path.write_text(text)
        tally = Tally(options.sample, options.longest, options.seed)
        quiet = ("-q", "-p", "no:cacheprovider", "--no-header", "-W", "ignore", "--tb=line")
        pytest.main([str(path), *quiet, "-k", options.only], [tally])
    return tally.show(device)


def _stand_in(checkout: Path) -> None:
    """Make ``flash_attn`` this package's functions, with the checkout's own helper for padding."""
    import tvm_flash.nn
    from tvm_flash.errors import NotSupportedError

    def not_here(*_, **__):
        raise NotSupportedError("isn't here")

    package = types.ModuleType("flash_attn")
    package.__path__ = []
    for name in tvm_flash.nn.__all__:
        setattr(package, name, getattr(tvm_flash.nn, name))
    package.flash_attn_with_kvcache = not_here
    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface._get_block_size_n, interface.USE_TRITON_ROCM = not_here, False
    rotary = types.ModuleType("flash_attn.layers.rotary")
    rotary.apply_rotary_emb = not_here
    spec = importlib.util.spec_from_file_location(
        "flash_attn.bert_padding", checkout / "flash_attn" / "bert_padding.py"
    )
    padding = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(padding)
    layers = types.ModuleType("flash_attn.layers")
    layers.__path__ = []
    for module in (package, interface, layers, rotary, padding):
        sys.modules[module.__name__] = module


class Tally:
    """A plugin of pytest that takes a sample and counts what came of it, by test."""

    def __init__(self, sample: int, longest: int, seed: int):
        self._sample, self._longest, self._random = sample, longest, random.Random(seed)
        self.counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
        self.failures: list[str] = []

    def pytest_collection_modifyitems(self, items):
        by_test = collections.defaultdict(list)
        for item in items:
            name = item.originalname
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            lengths = [x for k, x in parameters.items() if k.startswith("seqlen") and isinstance(x, int)]
            asked = (name, *(k for k, x in parameters.items() if x is not None))
            if any(word in text for word in MISSING for text in asked):
                self.counts[name]["not here"] += 1
            elif parameters.get("dropout_p"):
                self.counts[name]["dropout"] += 1
            elif max(lengths, default=0) > self._longest:
                self.counts[name]["too long"] += 1
            else:
                by_test[name].append(item)
        items[:] = []
        for name, found in by_test.items():
            taken = self._random.sample(found, min(self._sample, len(found)))
            self.counts[name]["left out"] = len(found) - len(taken)
            items += taken

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.failed or (report.when == "setup" and report.skipped):
            name = report.nodeid.partition("::")[2].partition("[")[0]
            self.counts[name][report.outcome] += 1
            if report.failed:
                self.failures.append(f"{report.nodeid.partition('::')[2]}: {str(report.longrepr).splitlines()[-1]}")

    def show(self, device: str) -> int:
        """Print the table, and what failed; the exit status."""
        outcomes = ("passed", "failed", "skipped", "left out", "too long", "dropout", "not here")
        print(f"\n| flash_attn's test, on {device} | {' | '.join(outcomes)} |\n|---|{'---|' * len(outcomes)}")
        for name, counts in self.counts.items():
            print(f"| `{name}` | {' | '.join(str(counts[x]) for x in outcomes)} |")
        print(*self.failures, sep="\n")
        return 1 if self.failures else 0


if __name__ == "__main__":
    sys.exit(main())

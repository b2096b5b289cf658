"""Run the tests of PyTorch or of flash-attn against this package, from a checkout of them that you name.

    python scripts/peer_suites.py ~/pytorch
    python scripts/peer_suites.py ~/flash-attention --sample 100

What is run is PyTorch's module of tests of attention, with these kernels below torch's own function and in the place of
it, and flash-attn's tests of versions 2 and 3.  They ask for thousands of combinations; a sample of each test is taken,
the same every time.  On a machine without a GPU they run on the CPU.  The counts are printed as tables; nothing of the
checkout is copied into this one.  The last results are in docs/peers.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

#: What stands in a file of tests, and the packages that it needs then.
_NEEDS = {"einops": ("einops",), "torch.testing._internal": ("expecttest", "hypothesis")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="of PyTorch or of flash-attention")
    parser.add_argument("--sample", type=int, default=40, help="how many of each test (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: %(default)s)")
    parser.add_argument(
        "--longest", type=int, default=1100, help="flash-attn: no sequences longer than that (default: %(default)s)"
    )
    parser.add_argument("--only", default="", help="suites with this in their names, as the tables say them")
    parser.add_argument("-k", default="", help="tests that pytest selects by this expression")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="the GPU if there is one, else the CPU")
    parser.add_argument("--broken", type=Path, help=argparse.SUPPRESS)  # cases that fail without this package
    options = parser.parse_args()
    import torch

    from tests.peer_suites import flash_attn, pytorch

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: torch sees no GPU; leave it out, or give cpu")
    found = [*pytorch.suites(options.checkout, device), *flash_attn.suites(options.checkout, device, options.longest)]
    if not found:
        parser.error(f"checkout: {options.checkout} has neither PyTorch's tests of attention nor flash-attention's")
    suites = [x for x in found if options.only in x.name]
    if not suites:
        names = "; ".join(x.name for x in found)
        parser.error(f"--only: nothing is called so; there are: {names}")
    needed = {
        package for suite in suites for word, packages in _NEEDS.items() if word in suite.text for package in packages
    }
    if missing := sorted(x for x in needed if importlib.util.find_spec(x) is None):
        parser.error(f"the tests need {', '.join(missing)}; run pip install {' '.join(missing)}")
    if len(suites) == 1:
        return _run(suites[0], options)
    with tempfile.TemporaryDirectory() as folder:
        broken = Path(folder) / "broken.json"
        return max(_apart(suite, broken) for suite in suites)


def _apart(suite, broken: Path) -> int:
    """Run one suite in a process of its own, as the tests change settings of torch's for good; its exit status."""
    status = subprocess.run([sys.executable, *sys.argv, "--only", suite.name, "--broken", str(broken)]).returncode
    return 0 if suite.baseline else status


def _run(suite, options) -> int:
    """Run one suite and print what came of it; its exit status."""
    from tests.peer_suites.tally import Tally

    known = options.broken.is_file() and not suite.baseline if options.broken else False
    tally = Tally(
        suite, options.sample, options.seed, frozenset(json.loads(options.broken.read_text()) if known else ())
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test_of_the_checkout.py"
        path.write_text(suite.text)
        quiet = ("-q", "-p", "no:cacheprovider", "--no-header", "-W", "ignore", "--tb=no", "--rootdir", folder)
        with suite.stand_in():
            pytest.main([str(path), *quiet, "-k", options.k], [tally])
    if suite.baseline and options.broken:
        options.broken.write_text(json.dumps(tally.failed))
    print(f"\n{suite.source.name}, {tally.collected} cases\n", *tally.table(), *tally.failures, sep="\n", flush=True)
    return tally.status


if __name__ == "__main__":
    sys.exit(main())

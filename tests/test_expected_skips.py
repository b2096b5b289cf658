"""A run with ``--strict-skips`` fails if a test is skipped for a reason that isn't on the list."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.expected_skips import EXPECTED, is_expected
from tests.shared import HANGS

PROGRAM = """
import pytest

def test_one():
    pytest.skip({reason!r})
"""


@pytest.mark.parametrize("workers", ([], ["-n", "1"]), ids=("alone", "xdist"))
@pytest.mark.parametrize(
    ("reason", "strict", "status"),
    [
        ("no CUDA compiler: nvcc is gone", True, 1),
        ("no CUDA compiler: nvcc is gone", False, 0),
        ("modified scores are bounded, or grow with the distance", True, 0),
    ],
)
def test_a_skip_that_nobody_expects_fails_the_run(tmp_path, reason, strict, status, workers):
    (tmp_path / "test_one.py").write_text(PROGRAM.format(reason=reason))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.conftest", tmp_path]
    command += [*workers, *(["--strict-skips"] if strict else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=HANGS)
    assert done.returncode == status, done.stdout + done.stderr
    assert ("nobody expects" in done.stdout) is bool(status)


def test_a_missing_module_that_the_tests_install_is_not_expected():
    for name in ("torch", "tvm", "jax", "transformers", "ml_dtypes"):
        assert not is_expected(f"Skipped: could not import '{name}': No module named '{name}'")
    assert EXPECTED

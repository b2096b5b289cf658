"""The package in a process: what it imports, beside what it lives, threads, forks."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest

from tvm_flash import flash_attention

pytestmark = pytest.mark.usefixtures("cpu_pack")

CALL = """
import numpy as np, sys
from tvm_flash import flash_attention
q, k, v = (np.random.default_rng(i).standard_normal((1, 2, 200, 64), np.float32) for i in range(3))
out = flash_attention(q, k, v, causal=True)
s = np.einsum("bhid,bhjd->bhij", q, k) / 8 + np.triu(np.full((200, 200), -np.inf), 1)
p = np.exp(s - s.max(-1, keepdims=True))
assert abs(out - (p / p.sum(-1, keepdims=True)) @ v).max() < 1e-5
"""


def test_import_is_light(python, tmp_path):
    """Once it is compiled: seconds of the processor, of which others on the machine take none."""
    program = """
import sys, time
start = time.process_time()
import tvm_flash
print(time.process_time() - start)
print(sorted({m.partition(".")[0] for m in sys.modules} & {"numpy", "torch", "jax", "cupy", "tvm", "tvm_ffi"}))
"""
    kept = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    runs = [python(program, **kept).splitlines() for _ in range(4)]
    assert runs[0][1] == "[]"
    assert min(float(seconds) for seconds, _ in runs) < 0.15


def test_a_call_imports_neither_tvm_nor_torch(python):
    python(CALL + "assert not {'torch', 'tvm', 'schedules'} & set(sys.modules)")


def test_torch_may_come_later(python):
    pytest.importorskip("torch")
    python(CALL + "import torch; t = flash_attention(*map(torch.from_numpy, (q, k, v)), causal=True)\n"
           "assert np.array_equal(t.numpy(), out)")  # fmt: skip


@pytest.mark.parametrize("order", ("tvm first", "tvm last"))
def test_tvm_in_the_same_process(python, order):
    pytest.importorskip("tvm")
    use = "import tvm; assert tvm.get_global_func('runtime.NumThreads')() >= 1\n"
    python(use + CALL if order == "tvm first" else CALL + use + CALL)


def test_the_callers_thread_keeps_its_processors(python):
    python("import os; before = os.sched_getaffinity(0)\n" + CALL + "assert os.sched_getaffinity(0) == before")


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("TVM_FLASH_NUM_THREADS", "four", "a whole number from 1 on, or unset"),
        ("TVM_FLASH_NUM_THREADS", "0", "a whole number from 1 on, or unset"),
        ("TVM_FLASH_FAST_PATH", "false", "0 or 1, or unset"),
    ],
)
def test_a_variable_without_meaning_is_an_error(python, variable, value, expected):
    """As they were, the calls took all processors, or the fast path."""
    program = f"""
from tvm_flash import InvalidArgumentError
try:
    exec({CALL!r})
except InvalidArgumentError as e:
    assert str(e) == "{variable}: is '{value}', expected {expected}", e
else:
    raise AssertionError("no error")
"""
    python(program, **{variable: value})


@pytest.mark.parametrize("used_before", (False, True))
def test_fork(python, used_before):
    program = f"""
import os, signal
import tvm_flash
{CALL if used_before else ""}
child = os.fork()
if child == 0:
    signal.alarm(60)
    exec({CALL!r})
    raise SystemExit(0)
assert os.waitpid(child, 0)[1] == 0
exec({CALL!r})
"""
    python(program, TVM_FLASH_NUM_THREADS="4")


TORCHS_THREADS = """
import os
import torch
torch.ones(1 << 20).exp().sum()
"""


def test_torchs_threads_do_the_work(python):
    """No threads of our own beside those that torch has, and that spin for a while after each of its calls."""
    pytest.importorskip("torch")
    count = "len(os.listdir('/proc/self/task'))"
    python(f"{TORCHS_THREADS}before = {count}\n{CALL}assert {count} == before", OMP_NUM_THREADS="3")


@pytest.mark.parametrize("used_before", (False, True))
def test_fork_after_torchs_threads(python, used_before):
    """Torch's threads don't exist in the child, and waiting for them would never end."""
    pytest.importorskip("torch")
    program = f"""{TORCHS_THREADS}
import signal
exec({CALL if used_before else ""!r})
child = os.fork()
if child == 0:
    signal.alarm(60)
    exec({CALL!r})
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
exec({CALL!r})
"""
    python(program, TVM_FLASH_NUM_THREADS="4")


def test_multiprocessing_children(python):
    program = f"""
import multiprocessing
def work(i):
    exec({CALL!r}, {{}})
    return i
if __name__ == "__main__":
    exec({CALL!r}, {{}})
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map(work, range(6)) == list(range(6))
"""
    python(program)


def test_threads():
    rng = np.random.default_rng(0)
    problems = [
        [rng.standard_normal((1, 2, n, 64), np.float32) for n in (20 + i, 50, 50)] for i in range(4)
    ]  # fmt: skip
    want = [flash_attention(*p, causal=True) for p in problems]
    wrong = []
    start = threading.Barrier(4)

    def work(i):
        start.wait()
        for turn in range(100):
            at = (i + turn) % len(problems)
            if not np.array_equal(flash_attention(*problems[at], causal=True), want[at]):
                wrong.append((i, turn))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_results_do_not_depend_on_the_number_of_threads(python):
    found = {
        python(CALL + "import hashlib; print(hashlib.sha256(out.tobytes()).hexdigest())", TVM_FLASH_NUM_THREADS=str(n))
        for n in (1, 2, 5)
    }
    assert len(found) == 1


def test_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "tvm_flash", "info"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0 and "tvm_flash" in done.stdout

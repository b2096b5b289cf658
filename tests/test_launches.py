"""Kernels of several launches with workspaces: in a pack, called by both paths, by threads at once, and when one fails.

The kernel stands for attention whose queries are zeros: the mean of the values, in two launches with the keys split.
"""

from __future__ import annotations

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import tvm
from tvm.script import tirx as T

from schedules.builder import pack
from schedules.builder.support import support_files
from schedules.families.interface import Program, ScheduledLaunch
from schedules.toolchain import cpu as toolchain
from tests import entries
from tvm_flash import InvalidArgumentError, KernelError, flash_attention
from tvm_flash.call import checks, eager, fast
from tvm_flash.frameworks import TensorView
from tvm_flash.packs.manifest import MANIFEST_NAME, Launch, Manifest, Scalar, Workspace
from tvm_flash.packs.registry import registry


@T.prim_func(s_tir=True)
def partial(q: T.handle, v: T.handle, sums: T.handle, count: T.handle, split_length: T.int64):
    """The sum of the values of each split, and the number of keys added to what is in ``count``."""
    T.func_attr({"global_symbol": "mean_decode"})
    batch, heads, keys, dim, splits = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
    rows, width = T.int64(), T.int64()
    Q = T.match_buffer(q, (batch, heads, rows, width), "float32")
    V = T.match_buffer(v, (batch, heads, keys, dim), "float32")
    S = T.match_buffer(sums, (batch, heads, splits, dim), "float32")
    N = T.match_buffer(count, (batch, heads), "float32")
    with T.sblock("all"):
        T.reads()
        T.writes()
        for b, h, s, e in T.grid(batch, heads, splits, dim):
            S[b, h, s, e] = Q[b, h, 0, 0]
        for b, h, j in T.grid(batch, heads, keys):
            N[b, h] = N[b, h] + T.float32(1)
            for e in range(dim):
                S[b, h, j // split_length, e] = S[b, h, j // split_length, e] + V[b, h, j, e]


@T.prim_func(s_tir=True)
def combine(sums: T.handle, count: T.handle, o: T.handle, lse: T.handle):
    """The mean for every row, and the logarithm of the number of keys."""
    T.func_attr({"global_symbol": "mean_decode_combine"})
    batch, heads, rows, dim, splits, length = T.int64(), T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
    S = T.match_buffer(sums, (batch, heads, splits, dim), "float32")
    N = T.match_buffer(count, (batch, heads), "float32")
    O = T.match_buffer(o, (batch, heads, rows, dim), "float32")
    L = T.match_buffer(lse, (length,), "float32")
    with T.sblock("all"):
        T.reads()
        T.writes()
        for b, h, i in T.grid(batch, heads, rows):
            for e in range(dim):
                O[b, h, i, e] = T.float32(0)
                for s in range(splits):
                    O[b, h, i, e] = O[b, h, i, e] + S[b, h, s, e] / N[b, h]
            if length >= batch * heads * rows:
                L[(b * heads + h) * rows + i] = T.log(N[b, h])


@T.prim_func(s_tir=True)
def replace(o: T.handle, value: T.int64):
    """Another value for every element."""
    T.func_attr({"global_symbol": "mean_decode_replace"})
    batch, heads, rows, dim = T.int64(), T.int64(), T.int64(), T.int64()
    O = T.match_buffer(o, (batch, heads, rows, dim), "float32")
    with T.sblock("all"):
        T.reads()
        T.writes()
        for b, h, i, e in T.grid(batch, heads, rows, dim):
            O[b, h, i, e] = T.Cast("float32", value)


#: Keys from which on there is another value.
MANY = 100

PROGRAM = Program(
    "forward",
    (
        ScheduledLaunch(partial, ("q", "v", "sums", "count", "split_length")),
        ScheduledLaunch(combine, ("sums", "count", "o", "lse")),
        ScheduledLaunch(replace, ("o", "value"), when="value"),
    ),
    "s_tir",
    alignment=4,
    index_bits=64,
    workspaces=(
        Workspace("sums", "float32", ("batch", "heads", "splits", "head_dim_v")),
        Workspace("count", "float32", ("batch", "heads"), zeroed=True),
    ),
    scalars=(
        Scalar("split_length", ("steps", "seqlen_kv", (0, 4), (16, 8))),
        Scalar("splits", ("ceildiv", "seqlen_kv", "split_length")),
        Scalar("value", ("steps", "seqlen_kv", (0, 0), (MANY, 7))),
    ),
    max_rows=8,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the kernel in a pack."""
    folder = tmp_path_factory.mktemp("packs") / "cpu"
    folder.mkdir()
    work = tmp_path_factory.mktemp("work")
    compiled = tvm.compile(tvm.IRModule(PROGRAM.functions), target="llvm", tir_pipeline="s_tir")
    compiled.mod.write_to_file(str(work / "mean.o"), "o")
    support = support_files("cpu", folder, work, ())
    toolchain.link_module([work / "mean.o"], work / "mean.so", folder / support[0].file)
    module = pack.store(work / "mean.so", folder, "mean")
    entry = entries.forward("mean_decode", "float32", template="v1", arch="cpu", head_dim=64, head_dim_v=64)
    entry = dataclasses.replace(
        entry,
        module=module.file,
        alignment=PROGRAM.alignment,
        index_bits=PROGRAM.index_bits,
        launches=(*(Launch(x.symbol, x.arguments, x.when) for x in PROGRAM.launches),),
        workspaces=PROGRAM.workspaces,
        scalars=PROGRAM.scalars,
        max_rows=PROGRAM.max_rows,
    )
    manifest = Manifest("cpu", {}, (module,), (entry,), support_files=support)
    (folder / MANIFEST_NAME).write_text(manifest.to_json())
    return folder


@pytest.fixture
def installed(built, use_packs):
    use_packs(built)
    yield built
    eager.forget()


def inputs(keys: int, rows: int = 2, batch: int = 2):
    rng = np.random.default_rng(keys)
    q = np.zeros((batch, 2, rows, 64), np.float32)
    return q, *(rng.standard_normal((batch, 2, keys, 64), np.float32) for _ in range(2))


def assert_right(results, v, rows: int = 2):
    out, lse = (np.asarray(x) for x in results)
    want = v.astype(np.float64).mean(axis=2, keepdims=True).repeat(rows, axis=2)
    assert np.abs(out - want).max() < 1e-6
    assert np.abs(lse - math.log(v.shape[2])).max() < 1e-6


@pytest.mark.parametrize("keys", (1, 3, 4, 15, 16, 33))
@pytest.mark.parametrize("framework", (np.asarray, torch.from_numpy))
def test_both_paths(installed, keys, framework):
    q, k, v = inputs(keys)
    arguments = [framework(x) for x in (q, k, v)]
    for _ in range(3):  # the second and third by the fast path; a workspace that isn't zeroed anew would show
        assert_right(flash_attention(*arguments, return_lse=True), v)
    with fast.switched_off():
        assert_right(flash_attention(*arguments, return_lse=True), v)
    assert np.array_equal(np.asarray(flash_attention(*arguments)), np.asarray(flash_attention(*arguments)))


@pytest.mark.parametrize("keys", (MANY - 1, MANY))
@pytest.mark.parametrize("framework", ("numpy", "torch", "jax"))
def test_a_launch_is_left_out_where_its_number_is_0(installed, keys, framework):
    q, k, v = inputs(keys)
    convert = {"numpy": np.asarray, "torch": torch.from_numpy}
    if framework == "jax":
        convert["jax"] = pytest.importorskip("jax").numpy.asarray
    arguments = [convert[framework](x) for x in (q, k, v)]
    want = v.astype(np.float64).mean(axis=2, keepdims=True).repeat(2, axis=2) if keys < MANY else 7
    for _ in range(3):
        assert np.abs(np.asarray(flash_attention(*arguments)) - want).max() < 1e-6
    with fast.switched_off():
        assert np.abs(np.asarray(flash_attention(*arguments)) - want).max() < 1e-6


def test_the_fast_path_knows_it(installed, monkeypatch):
    q, k, v = map(torch.from_numpy, inputs(20))
    flash_attention(q, k, v)
    if not fast.is_loaded():
        pytest.skip("no fast path in this process")
    monkeypatch.setattr(eager, "attention", lambda *_: pytest.fail("the slow path was taken"))
    flash_attention(q, k, v)


def test_jax(installed):
    jax = pytest.importorskip("jax")
    q, k, v = inputs(20)
    results = flash_attention(*map(jax.numpy.asarray, (q, k, v)), return_lse=True)
    assert_right(results, v)


def test_threads_have_workspaces_of_their_own(installed):
    problems = [inputs(keys) for keys in (5, 20, 40, 64)]

    def call(n):
        q, k, v = problems[n % len(problems)]
        assert_right(flash_attention(q, k, v, return_lse=True), v)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(call, range(200)))


def test_more_rows_than_it_is_meant_for(installed):
    with pytest.raises(NotImplementedError, match="is for 8 query rows a key or fewer, not 9, at 20 keys"):
        flash_attention(*inputs(20, rows=9))


@pytest.mark.parametrize("broken", (0, 1))
def test_a_launch_that_fails(built, use_packs, tmp_path, broken):
    """The first launch, or the second after the first has run: an error that names it, from both paths."""
    folder = tmp_path / "cpu"
    folder.mkdir()
    for file in built.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    manifest = Manifest.from_json((folder / MANIFEST_NAME).read_text())
    (entry,) = manifest.kernels
    launches = list(entry.launches)
    launches[broken] = Launch(launches[broken].symbol, launches[broken].arguments[:-1])
    bad = dataclasses.replace(entry, launches=tuple(launches))
    (folder / MANIFEST_NAME).write_text(dataclasses.replace(manifest, kernels=(bad,)).to_json())
    use_packs(folder)
    for _ in range(3):
        with pytest.raises(KernelError, match=rf"^kernel {launches[broken].symbol} failed"):
            flash_attention(*inputs(20))
    eager.forget()


def test_the_manifest_says_it_all(installed):
    (kernel,) = registry().kernels("cpu")
    entry = kernel.entry
    assert [x.role for x in entry.arguments] == ["q", "v", "sums", "count", "split_length", "o", "lse", "value"]
    text = Manifest("cpu", {}, (), (entry,)).to_json()
    assert Manifest.from_json(text).kernels == (entry,)
    assert [x.when for x in entry.launches] == ["", "", "value"]
    with pytest.raises(ValueError, match="no expression of sizes"):
        Manifest.from_json(text.replace('"ceildiv"', '"divide"'))


@pytest.mark.parametrize(("strides", "taken"), [((-64, 64, 64, 1), True), ((64, 64, -64, 1), False)])
def test_strides_of_a_gpus_tensors(strides, taken):
    x = TensorView((1, 1, 8, 64), strides, "float16", "cuda", 0, pointer=0)
    if taken:  # there is nothing to step to
        checks.check_strides("q", x)
    else:
        with pytest.raises(InvalidArgumentError, match="q: has negative strides"):
            checks.check_strides("q", x)

"""What processes that share sequences do in ``tests/test_context_parallel.py``: in a world of several, on CPUs or GPUs.

``python -m tests.context_parallel_ranks FILE RANKS TASK …`` has so many processes of this machine do some of ``TASKS``,
each of which gives something, and saves what the first process was given, by task.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import time
import traceback
import types
import warnings
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tests.context_parallel_cases import CASES, NAMES, Case
from tests.context_parallel_memory import FileMemory
from tvm_flash import InvalidArgumentError, PeerMemoryWarning, ProcessGroupError
from tvm_flash.distributed import (
    agreement,
    context_parallel_attention,
    launches,
    peers,
    shard_batch,
    shard_sequence,
    unshard_sequence,
)
from tvm_flash.distributed.agreement import axes_of

#: How long a process that is gone may keep the others.
TIMEOUT = timedelta(seconds=300)

#: Meshes by name: their shape, and how keys are exchanged.
MESHES = {
    "1": ((1,), "gather"),
    "2 gather": ((2,), "gather"),
    "2 ring": ((2,), "ring"),
    "2 heads": ((2,), "heads"),
    "3 gather": ((3,), "gather"),
    "3 ring": ((3,), "ring"),
    "4 gather": ((4,), "gather"),
    "4 heads": ((4,), "heads"),
    "8 gather": ((8,), "gather"),
    "8 ring": ((8,), "ring"),
    "2 × 4 ring": ((2, 4), "ring"),
    "4 × 2 gather": ((4, 2), "gather"),
}

#: Meshes on which heads are split as those of long sequences are.
AS_IF_LONG = ("8 gather", "4 × 2 gather")
LONG = {"_MANY_KEYS": 1, "_FEW": 1, "_READ_IN_FORWARD": 2}

#: What is computed by ranks that read each other's memory, on a few meshes.
READ = {
    "2 gather": ("causal", "window", "documents"),
    "3 ring": ("full", "sinks", "causal documents"),
    "8 gather": ("causal", "slopes", "fewer positions than ranks", "documents with a window"),
    "8 ring": ("window", "values of another size"),
    "4 × 2 gather": ("causal", "causal documents"),
}

#: What is computed on a GPU: in 16 bits, of what its kernels take.
ON_GPUS = ("1", "2 gather", "2 ring", "2 heads")
#: What is computed on each mesh: of every case a few, and a few on every mesh.
EVERYWHERE = ("causal", "causal documents")
OF_ALL = ("3 ring", "8 gather", "2 × 4 ring")
IN_16_BITS = ("1", "8 gather", "8 ring")
RUNS = {
    (case, mesh, dtype)
    for case in CASES
    for mesh in MESHES
    for dtype in (torch.float32, torch.bfloat16)
    if (mesh in OF_ALL or case in EVERYWHERE if dtype == torch.float32 else mesh in IN_16_BITS and case in EVERYWHERE)
}
RUNS_ON_GPUS = {(case, mesh, torch.bfloat16) for case in CASES for mesh in ON_GPUS}


@functools.cache
def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    """The first ranks of the world in a mesh; all of the world ask for the same meshes in one order."""
    count = torch.Size(shape).numel()
    return DeviceMesh(device().type, torch.arange(count).view(shape))


def device() -> torch.device:
    if dist.get_backend() == "nccl":
        return torch.device("cuda", dist.get_rank() % torch.cuda.device_count())
    return torch.device("cpu")


def together(case: Case, inputs: dict, mesh: DeviceMesh, **options) -> dict[str, torch.Tensor]:
    """Results and gradients by name, of the whole sequence in the layout bhsd, as the ranks of a mesh find them."""
    layout = options.get("layout", "bhsd")
    order = {"balance": options.get("balance", "zigzag")}
    swap = layout == "bshd"

    def seen(x):
        """A tensor in the layout of the call, or back."""
        return x.transpose(1, 2) if swap and x.ndim == 4 else x

    def axis(x):
        return 1 if swap and x.ndim == 4 else 2

    def own(name):
        x = seen(inputs[name].to(device()))
        return shard_sequence(x, mesh, dim=axis(x), **order)

    q, k, v = (own(n).requires_grad_() for n in "qkv")
    of_heads = {n: inputs[n] for n in ("slopes", "sinks") if inputs[n] is not None}
    of_heads = {n: x.to(device(), copy=True).requires_grad_() for n, x in of_heads.items()}
    parameters = {"alibi_slopes": of_heads.get("slopes"), "sinks": of_heads.get("sinks")}
    out, lse = context_parallel_attention(q, k, v, mesh, **parameters, return_lse=True, **case.options, **options)
    torch.autograd.backward([out, lse], [own("dout"), torch.where(lse > -torch.inf, own("dlse"), 0.0)])
    found = dict(zip(NAMES, (out.detach(), lse.detach(), q.grad, k.grad, v.grad), strict=False))
    found = {n: seen(unshard_sequence(x, mesh, dim=axis(x), **order)).cpu() for n, x in found.items()}
    for name, x in of_heads.items():
        for dim in range(mesh.ndim):
            dist.all_reduce(x.grad, group=mesh.get_group(dim))
        found[f"d_{name}"] = x.grad.cpu()
    return found


def results() -> dict:
    """Of each run the results; they must be the same on all ranks."""
    found = {}
    for name, (shape, exchange) in MESHES.items():
        if torch.Size(shape).numel() > dist.get_world_size():
            continue
        mesh = mesh_of(shape)
        if mesh.get_coordinate() is None:
            continue
        for run in sorted(RUNS if device().type == "cpu" else RUNS_ON_GPUS, key=str):
            if run[1] == name:
                case = CASES[run[0]]
                with patch.multiple(launches, **LONG) if name in AS_IF_LONG else contextlib.nullcontext():
                    found[run] = together(case, case.inputs(run[2]), mesh, exchange=exchange)
    return found


def reads(folder: Path) -> dict:
    """The same as ``results`` of some meshes whose ranks read each other's memory; how often they did, and where one of
    two has no room for it; and what ranks are told of a GPU that fails meanwhile."""
    found, memories, told = {}, [], []

    def memory(axes, device):
        memories.append(FileMemory(folder, axes, 1 << 20))
        return memories[-1]

    with patch.object(agreement, "_peers", memory):
        for name, cases in READ.items():
            shape, exchange = MESHES[name]
            count = torch.Size(shape).numel()
            mesh = DeviceMesh("cpu", torch.arange(count).view(shape))
            if mesh.get_coordinate() is None:
                continue
            for case in cases:
                inputs = CASES[case].inputs(torch.float32)
                with patch.multiple(launches, **LONG) if name in AS_IF_LONG else contextlib.nullcontext():
                    found[name, case] = together(CASES[case], inputs, mesh, exchange=exchange)
        copies = [x.copies for x in memories]
        mesh = DeviceMesh("cpu", torch.arange(2))
        if mesh.get_coordinate() is not None:
            memory, case = axes_of(mesh).peers, CASES["causal"]
            memory.is_full = dist.get_rank() == 1
            found["no room"] = together(case, case.inputs(torch.float32), mesh)
            copies.append(memory.copies)
            memory.is_full, memory.most = False, 1 << 20
            for error in (RuntimeError(f"CUDA error: {peers.FAILURES[0]}\nmore"), RuntimeError("out of memory")):
                with patch.object(memory, "put", side_effect=error):
                    try:
                        together(case, case.inputs(torch.float32), mesh)
                    except RuntimeError as e:
                        told.append(f"{type(e).__name__}: {e}")
    return {"found": found, "copies": copies, "told": told}


class Remembered:
    """What is made where ``PeerMemory`` would be, in two steps that may fail."""

    def __init__(self, group, device, most, fails):
        self.most, self._fails = most, fails
        self._do("made")

    def meet(self) -> None:
        self._do("met")

    def _do(self, step: str) -> None:
        if self._fails == step:
            raise RuntimeError("out of luck\nat line 3")


def obstacles() -> dict:
    """What three ranks are told, or have, of memory that they can read or can't, as if they had GPUs."""
    mesh, rank = DeviceMesh("cpu", torch.arange(3)), dist.get_rank()
    if mesh.get_coordinate() is None:
        return {}
    axes, found, made = axes_of(mesh), {}, peers.PeerMemory

    def told(name, wanted=None, host="a", container="c", gpus=("0", "1", "2"), fails=None, reached=True, **more):
        environment = {k: v for k, v in os.environ.items() if k not in (peers.VARIABLE, "NCCL_P2P_DISABLE")}
        environment |= {} if wanted is None else {peers.VARIABLE: wanted}
        memory = types.SimpleNamespace(total_memory=(1 + rank) << 20)
        with contextlib.ExitStack() as stack:
            stack.enter_context(patch.dict(os.environ, environment | more.get("environment", {}), clear=True))
            stack.enter_context(patch.dict(sys.modules, more.get("modules", {})))
            for where, what, by in (
                (torch.cuda, "current_device", lambda: rank),
                (torch.cuda, "can_device_access_peer", lambda own, other: reached),
                (torch.cuda, "is_current_stream_capturing", lambda: more.get("captures", False)),
                (torch.cuda, "get_device_properties", lambda device: memory),
                (peers, "_gpus", lambda: [*gpus]),
                (peers, "_container", lambda: [container]),
                (peers.socket, "gethostname", lambda: host),
                (peers, "PeerMemory", made if "modules" in more else functools.partial(Remembered, fails=fails)),
            ):
                stack.enter_context(patch.object(where, what, by))
            caught = stack.enter_context(warnings.catch_warnings(record=True))
            warnings.simplefilter("always")
            try:
                got = agreement._peers(axes, "cuda")
                got = got and got.most
            except InvalidArgumentError as e:
                got = str(e)
        found[name] = [None] * 3
        said = [str(w.message) for w in caught if w.category is PeerMemoryWarning]
        dist.all_gather_object(found[name], (got, said), group=mesh.get_group())

    one = rank == 1
    told("told nothing")
    told("asked by all", "1")
    told("asked by one", "1" if one else None)
    told("refused by all", "0")
    told("refused by one", "0" if one else None)
    told("refused and asked", "0" if one else "1")
    told("no number", "yes" if one else "1")
    without = {"torch.distributed._symmetric_memory": None}
    for name, wanted, options in (
        ("host", "1", {"host": "b" if one else "a"}),
        ("container", "1", {"container": "d" if rank == 2 else "c"}),
        ("unseen", "1", {"gpus": ("0", "1", "9") if rank == 2 else ("0", "1", "2")}),
        ("no access", "1", {"reached": not one}),
        ("P2P", "1", {"environment": {"NCCL_P2P_DISABLE": "1"} if one else {}}),
        ("captures", "1", {"captures": one}),
        ("makes", "1", {"fails": "made" if one else None}),
        ("meets", "1", {"fails": "met" if one else None}),
        ("old PyTorch", "1", {"modules": without}),
    ):
        told(name, wanted, **options)
        told(f"{name}, told nothing", **options)
    return found


def reads_memory() -> bool:
    """Whether all of the world read each other's memory."""
    return axes_of(mesh_of((dist.get_world_size(),))).peers is not None


def other_orders() -> dict:
    """The same case in another layout, in chunks that follow each other, and again."""
    case, mesh = CASES["causal"], mesh_of((3,))
    if mesh.get_coordinate() is None:
        return {}
    inputs = case.inputs(torch.float32)
    return {
        "again": [together(case, inputs, mesh, exchange=e) for e in ("ring", "ring", "gather", "gather")],
        "bshd": together(case, inputs, mesh, layout="bshd"),
        "contiguous": together(case, inputs, mesh, balance="contiguous", exchange="ring"),
    }


class Unlucky:
    """What raises something of its own where numbers are expected."""

    def __iter__(self):
        raise ZeroDivisionError("bad luck")


def errors() -> dict:
    """What each rank is told of calls that are wrong on some of them."""
    mesh, rank = mesh_of((3,)), dist.get_rank()
    if mesh.get_coordinate() is None:
        return {}
    found = {}

    def told(name, **changed):
        q = k = v = torch.zeros(1, 4, 10, 32)
        options = {"causal": True}
        for argument, value in changed.items():
            if argument in "qkv":
                q, k, v = (value if n == argument else x for n, x in zip("qkv", (q, k, v), strict=True))
            else:
                options[argument] = value
        try:
            context_parallel_attention(q, k, v, mesh, **options)
            said = "nothing"
        except Exception as e:
            said = f"{type(e).__name__}: {e}"
        everything = [None] * 3
        dist.all_gather_object(everything, said, group=mesh.get_group())
        found[name] = everything

    one, last = rank == 1, rank == 2
    few = torch.zeros(1, 4, 8, 32)
    told("heads", q=torch.zeros(1, 8 if one else 4, 10, 32))
    told("rows", **(dict.fromkeys("qkv", few) if last else {}))
    told("dtype", k=torch.zeros(1, 4, 10, 32, dtype=torch.float16 if last else torch.float32))
    told("causal", causal=not one)
    told("documents", cu_seqlens=[0, 30 + one])
    told("documents fall", cu_seqlens=[0, 9, 3])
    told("keys", k=torch.zeros(1, 4, 9, 32), v=torch.zeros(1, 4, 9, 32))
    told("exchange", exchange="by pigeon")
    told("a batch of documents", cu_seqlens=[0, 30], **dict.fromkeys("qkv", torch.zeros(2, 4, 10, 32)))
    told("heads among ranks", exchange="heads")
    told("other slopes", alibi_slopes=torch.tensor([0.1, 0.2, 0.3, 0.5 if one else 0.4]))
    told("other sinks", sinks=torch.full((4,), float(one)))
    told("sinks that learn", sinks=torch.zeros(4, requires_grad=one))
    told("a number for documents", cu_seqlens=30)
    told("whatever happens", cu_seqlens=Unlucky() if one else [0, 30])
    told("no heads", **dict.fromkeys("qkv", torch.zeros(1, 0, 10, 32)))
    told("no gradients of what has none", causal=True, return_lse=one)
    return found


#: Problems whose heads two ranks and three can share, and of which any order gives ranks as many rows.
SHARED = {
    "causal": Case("", {"causal": True}, heads=6, length=96),
    "documents": Case("", {"causal": True, "cu_seqlens": [0, 10, 40, 41, 96]}, batch=1, heads=6, length=96),
}


def orders() -> dict:
    """Heads exchanged of what was dealt out by default, twice; and what ranks are told of another order, or find."""
    n, rank = dist.get_world_size(), dist.get_rank()
    mesh, found = mesh_of((n,)), {}
    for name, case in SHARED.items():
        inputs = case.inputs(torch.float32)
        found[name] = [together(case, inputs, mesh, exchange="heads") for _ in range(2)]

    def told(name, call):
        try:
            call()
            said = "nothing"
        except InvalidArgumentError as e:
            said = str(e)
        found[name] = [None] * n
        dist.all_gather_object(found[name], said, group=mesh.get_group())

    case = SHARED["causal"]
    whole = [case.inputs(torch.float32)[n] for n in "qkv"]
    parts = [shard_sequence(x, mesh, dim=2) for x in whole]
    computed = [x + 0 for x in parts]
    for exchange in ("gather", "heads"):
        options = {"causal": True, "exchange": exchange, "balance": "contiguous"}
        told(f"parts {exchange}", lambda o=options: context_parallel_attention(*parts, mesh, **o))
        told(f"computed {exchange}", lambda o=options: context_parallel_attention(*computed, mesh, **o))
    told("unshard", lambda: unshard_sequence(computed[0], mesh, dim=2, balance="contiguous"))
    one = [shard_sequence(x, mesh, dim=2, balance="contiguous" if rank == n - 1 else "zigzag") for x in whole]
    told("one rank", lambda: context_parallel_attention(*one, mesh, causal=True))
    mixed = [parts[0], shard_sequence(whole[1], mesh, dim=2, balance="contiguous"), parts[2]]
    told("keys", lambda: context_parallel_attention(*mixed, mesh, causal=True, exchange="heads"))
    return found


def batches() -> dict:
    """A batch dealt out, and its tensors put together again."""
    found = {}
    for shape in ((3,), (2, 2)):
        mesh = mesh_of(shape)
        if mesh.get_coordinate() is None:
            continue
        ids = torch.arange(34).view(2, 17)
        mine = shard_batch({"input_ids": ids, "labels": ids}, mesh)
        found[shape] = {name: unshard_sequence(x, mesh) for name, x in mine.items()}
    return found


def empty_batches() -> dict:
    """Of a batch without entries the shapes of results and gradients, by the layout."""
    found, mesh = {}, mesh_of((2, 1))
    for layout in ("bhsd", "bshd") if mesh.get_coordinate() is not None else ():
        shapes = ((0, 4, 6, 8), (0, 2, 6, 8), (0, 2, 6, 16))
        shapes = shapes if layout == "bhsd" else [(b, s, h, d) for b, h, s, d in shapes]
        q, k, v = (torch.zeros(shape, device=device(), requires_grad=True) for shape in shapes)
        sinks, slopes = (torch.ones(n, device=device(), requires_grad=True) for n in ((0, 1), (4,)))
        of_heads = {"sinks": sinks, "alibi_slopes": slopes}
        out, lse = context_parallel_attention(q, k, v, mesh, **of_heads, layout=layout, return_lse=True)
        given = (q, k, v, sinks, slopes)
        gradients = torch.autograd.grad([out.sum(), lse.sum()], given)
        assert not gradients[-1].any() and gradients[-1].is_contiguous()
        found[layout] = [tuple(x.shape) for x in (out, lse, *gradients)]
    return found


def deaths() -> dict:
    """What the others are told, and how soon, when the last rank is gone: before a call, and in its midst."""
    from tvm_flash.distributed import attention

    rank, last = dist.get_rank(), dist.get_world_size() - 1
    mesh = DeviceMesh("cpu", torch.arange(last + 1))
    case = CASES["causal"]
    inputs = case.inputs(torch.float32)
    together(case, inputs, mesh)
    if rank == last:
        attention._Attention.apply = lambda *_: os._exit(0)
    start, said = time.monotonic(), []
    for _ in range(2):
        try:
            together(case, inputs, mesh, exchange="ring")
        except ProcessGroupError as e:
            said.append(str(e))
    return {"said": said, "seconds": time.monotonic() - start}


def torch_rings() -> dict:
    """PyTorch's own rings on the functions that its registry gets from this package, here on the processor."""
    from torch.distributed.tensor.experimental._context_parallel import _attention as rings

    from tvm_flash.integrations import pytorch

    mesh = mesh_of((4,))
    if mesh.get_coordinate() is None:
        return {}
    library, called = torch.library.Library("aten", "IMPL", "CPU"), []
    for name in ("_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"):
        function = pytorch._CUDA[name]

        def replacement(*args, function=function, name=name, **kwargs):
            called.append(name)
            with torch.no_grad():
                return function(*args, **kwargs)

        library.impl(name, replacement)
    found = {}
    for causal in (True, False):
        case = Case("", {"causal": causal}, kv_heads=8, length=96)
        inputs = case.inputs(torch.float32)
        balance = {"balance": "zigzag" if causal else "contiguous"}
        q, k, v, dout = (shard_sequence(inputs[n], mesh, dim=2, **balance) for n in ("q", "k", "v", "dout"))
        rings._cp_options.enable_load_balance = causal
        out, lse, *rest = rings._scaled_dot_product_ring_flash_attention(mesh, q, k, v, is_causal=causal)
        starts = rest[:4]
        given = (dout, q, k, v, out, lse, *starts, 0.0, causal, *rest[4:6])
        gradients = rings._scaled_dot_product_ring_flash_attention_backward(mesh, *given)[:3]
        whole = [unshard_sequence(x, mesh, dim=2, **balance) for x in (out, *gradients)]
        found[causal] = dict(zip(("out", "dq", "dk", "dv"), whole, strict=True))
    library._destroy()
    return {"found": found, "called": sorted(set(called))}


TASKS = {
    f.__name__: f
    for f in (
        *(results, reads, reads_memory, obstacles, other_orders, errors, orders, batches, empty_batches, deaths),
        torch_rings,
    )
}


def work(rank: int, world: int, folder: str, tasks: list[str]) -> None:
    """What one process does: the tasks in order, with NCCL where each process has a GPU of its own, else with gloo."""
    store, backend = dist.FileStore(os.path.join(folder, "store"), world), "gloo"
    if torch.cuda.device_count() >= world:
        backend = "nccl"
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=TIMEOUT)
    found = {task: TASKS[task](Path(folder)) if task == "reads" else TASKS[task]() for task in tasks}
    if rank == 0:
        torch.save(found, os.path.join(folder, "found.pt"))
    if "deaths" not in tasks:
        dist.barrier()
        dist.destroy_process_group()


def main(folder: str, world: str, *tasks: str) -> int:
    """Fork the processes, which so have all modules already, and wait for them."""
    torch.set_num_threads(1)
    children = []
    for rank in range(int(world)):
        child = os.fork()
        if child == 0:
            try:
                work(rank, int(world), folder, list(tasks))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(child)
    while children:
        child, status = os.wait()
        children.remove(child)
        if status:  # the others would wait for it
            for other in children:
                os.kill(other, signal.SIGKILL)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

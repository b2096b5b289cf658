"""What a process keeps of the memory that ranks of a host read of each other, as if it had GPUs."""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tvm_flash.distributed import peers
from tvm_flash.distributed.agreement import Axes, with_room
from tvm_flash.distributed.exchange import first_line

symmetric = pytest.importorskip("torch.distributed._symmetric_memory")

VARIABLE = "TORCH_SYMM_MEM_DISABLE_MULTICAST"
MOST = 100 << 20


class Machine:
    """In place of CUDA's memory: how much is free, and what was met with which variable."""

    def __init__(self, monkeypatch):
        self.free, self.signals, self.captures, self.multicast = 1 << 40, 2048, False, []
        nothing = SimpleNamespace(wait=lambda: None, record=lambda: None)
        for where, name, by in (
            (symmetric, "get_backend", lambda device: "CUDA"),
            (symmetric._SymmetricMemory, "empty_strided_p2p", self._allocated),
            (symmetric, "rendezvous", self._met),
            (torch.cuda, "Stream", lambda device, priority: None),
            (torch.cuda, "Event", lambda: nothing),
            (torch.cuda, "synchronize", lambda device: None),
            (torch.cuda, "is_current_stream_capturing", lambda: self.captures),
        ):
            monkeypatch.setattr(where, name, by)

    def _allocated(self, size, stride, dtype, device):
        if size[0] > self.free:
            raise RuntimeError("out of memory")
        return torch.empty(size, dtype=dtype)

    def _met(self, tensor, group):
        self.multicast.append(os.environ.get(VARIABLE))
        return SimpleNamespace(rank=0, world_size=1, signal_pad_size=self.signals)


@pytest.fixture
def machine(monkeypatch):
    monkeypatch.setattr(peers, "_made", [])
    monkeypatch.setattr(peers, "_gone", set())
    monkeypatch.delenv(VARIABLE, raising=False)
    return Machine(monkeypatch)


@contextlib.contextmanager
def world():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def met(group) -> peers.PeerMemory:
    memory = peers.PeerMemory(group, torch.device("cpu"), MOST)
    memory.meet()
    return memory


def axes_of(memory) -> Axes:
    """Of one rank, which so needs nobody's answer."""
    talk = dist.ProcessGroupGloo(dist.HashStore(), 0, 1)
    return Axes((1, 1), (1, 1), (0, 0), None, None, talk, (0,), memory)


def test_memory_grows_as_calls_need_it_and_never_above_its_most(machine):
    with world() as group:
        memory = met(group)
        axes = axes_of(memory)
        assert memory.size == 0 and with_room(axes, 10, can_grow=True)
        first = memory.buffers[0]
        assert memory.size == 32 << 20 and with_room(axes, memory.size, can_grow=False) and memory.buffers[0] is first
        assert not with_room(axes, memory.size + 1, can_grow=False) and not with_room(axes, MOST + 1, can_grow=True)
        assert with_room(axes, memory.size + 1, can_grow=True) and memory.size == 64 << 20
        machine.free = 0
        assert not with_room(axes, memory.size + 1, can_grow=True) and memory.most == memory.size == 64 << 20
    assert set(machine.multicast) == {"1"} and VARIABLE not in os.environ


def test_a_graph_keeps_what_it_was_captured_with(machine):
    with world() as group:
        memory = met(group)
        axes = axes_of(memory)
        assert with_room(axes, 10, can_grow=True)
        machine.captures = True
        assert memory.is_fixed
        memory.acquire()
        memory.release(failed=False)
        machine.captures, first = False, memory.buffers
        assert with_room(axes, memory.size + 1, can_grow=True)
        assert any(kept is first for _, kept in memory._kept)
    peers.drop_gone()
    assert memory.size == 64 << 20 and not peers._made


def test_memory_of_a_group_that_is_gone_is_given_back(machine, monkeypatch):
    names = {}
    monkeypatch.setattr(symmetric, "_group_name_to_store", names, raising=False)
    with world() as group:
        memory = met(group)
        assert with_room(axes_of(memory), 10, can_grow=True)
        peers.drop_gone()
        assert memory.size and peers._made == [memory]
    peers.drop_gone()
    assert memory.size == 0 and not peers._made
    with world() as group:
        met(group)
        names[group.group_name] = "a store of the first group"
        with pytest.raises(RuntimeError, match=f"still asks the processes of a group '{group.group_name}' that was"):
            met(group)


def test_signals_for_all_ranks_are_needed(machine):
    machine.signals = 4 * 11
    with world() as group, pytest.raises(RuntimeError, match="there are signals for fewer than 1 ranks"):
        met(group)


def test_a_variable_that_turns_multicast_on_is_put_back(machine, monkeypatch):
    monkeypatch.setenv(VARIABLE, "0")
    with world() as group:
        met(group)
    assert machine.multicast == ["1"] and os.environ[VARIABLE] == "0"


def test_errors_that_say_nothing():
    assert first_line(AttributeError()) == "" and first_line(RuntimeError("\n no memory\nat …")) == "no memory"

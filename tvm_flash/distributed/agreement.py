"""That all ranks of a mesh are about to do the same thing, asked before any of them sends a tensor."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from tvm_flash.distributed import peers
from tvm_flash.distributed.exchange import first_line, talking
from tvm_flash.errors import InvalidArgumentError, PeerMemoryWarning, TvmFlashError

#: Bytes that a rank says of a call.
_ROOM = 4096


@dataclass(frozen=True)
class Axes:
    """The place of this process in a mesh.

    Attributes
    ----------
    sizes: outer and inner ranks.
    dealt: outer and inner ranks as sequences are dealt out to them: on a mesh of one axis all of them are outer ones,
        whatever they exchange, so that the order of a sequence doesn't depend on that.
    place: the own outer and inner rank.
    outer, inner: the groups along the axes; None along one of a single rank.
    talk: connections of all ranks of the mesh, over which a few bytes go on the host.
    ranks: their numbers in the world, by place, the inner axis running fastest.
    peers: memory that the outer ranks read of each other; None where they send messages.
    """

    sizes: tuple[int, int]
    dealt: tuple[int, int]
    place: tuple[int, int]
    outer: dist.ProcessGroup | None
    inner: dist.ProcessGroup | None
    talk: dist.ProcessGroupGloo
    ranks: tuple[int, ...]
    peers: peers.Memory | None = None


def axes_of(mesh: DeviceMesh, heads: bool = False) -> Axes:
    """Where this process is; ``heads`` says of a mesh with one axis that it is the inner one.

    Raises
    ------
    InvalidArgumentError: it is no mesh of one or two axes with this process in it.
    """
    if not isinstance(mesh, DeviceMesh):
        raise InvalidArgumentError(
            f"mesh: is a {type(mesh).__qualname__}, expected a torch.distributed.DeviceMesh, as of init_device_mesh"
        )
    if mesh.get_coordinate() is None:
        raise InvalidArgumentError(f"mesh: rank {dist.get_rank()} isn't in {mesh}; call it on the ranks of the mesh")
    if mesh.ndim not in (1, 2):
        raise InvalidArgumentError(
            f"mesh: has {mesh.ndim} axes, expected one, or two: of ranks that exchange keys and of ranks that exchange "
            f"heads; take these of it, as with mesh['outer', 'inner']"
        )
    return _axes(mesh, tuple(mesh.get_all_groups()), heads)


@functools.lru_cache(maxsize=64)
def _axes(mesh: DeviceMesh, groups: tuple[dist.ProcessGroup, ...], heads: bool) -> Axes:
    """The same of a mesh and the groups along its axes, which no later mesh has again, be it equal to this one."""
    peers.drop_gone()
    shape, ranks = tuple(mesh.mesh.shape), tuple(mesh.mesh.flatten().tolist())
    sizes, place, device = shape, tuple(mesh.get_coordinate()), mesh.device_type
    if len(groups) == 1:
        sizes, place = ((1, *shape), (0, *place)) if heads else ((*shape, 1), (*place, 0))
    if device != "cpu":
        for group in groups:
            # Every rank of a group has to be there when its first messages go, and later not all may have some.
            dist.all_reduce(torch.zeros(1, device=device), group=group)
    outer = groups[0] if sizes[0] > 1 else None
    inner = groups[-1] if sizes[1] > 1 else None
    axes = Axes(sizes, (*shape, 1)[:2], place, outer, inner, _talk(groups, ranks, device), ranks)
    return axes if outer is None else dataclasses.replace(axes, peers=_peers(axes, device))


#: How often a private group of some ranks was made, by all of them.
_made: dict[tuple[int, ...], int] = {}


@functools.lru_cache(maxsize=64)
def _talk(groups: tuple[dist.ProcessGroup, ...], ranks: tuple[int, ...], device: str) -> dist.ProcessGroupGloo:
    """Connections among all ranks of a mesh for a few bytes on the host, with the timeout of the mesh's groups.

    They belong to no group that is known to others: ``new_group`` wants all of the world to call it.
    """
    _made[ranks] = _made.get(ranks, 0) + 1
    name = f"tvm_flash/{','.join(map(str, ranks))}/{_made[ranks]}"
    store = dist.PrefixStore(name, dist.distributed_c10d._get_default_store())
    timeout = max(group._get_backend(torch.device(device)).options._timeout for group in groups)
    with talking(ranks):
        return dist.ProcessGroupGloo(store, ranks.index(dist.get_rank()), len(ranks), timeout)


def _peers(axes: Axes, device: str) -> peers.Memory | None:
    """The memory of a mesh's outer ranks, where each reaches that of its axis, unless some rank is told not to.

    Raises
    ------
    InvalidArgumentError: a rank is told something without meaning.

    Warns
    -----
    PeerMemoryWarning: some rank is told to read it, and it can't be.
    """
    if device != "cuda":
        return None
    asked, device = Agreement(axes), torch.device("cuda", torch.cuda.current_device())
    with asked.checking():
        asked.says(told=peers.told(), **peers.about(device))
    said = asked.reach(differ=None)
    told = [x["told"] for x in said]
    memory, found = None, None
    if False in told:
        found = f"{peers.VARIABLE} is 0 on rank {axes.ranks[told.index(False)]}"
    else:
        of_axis = slice(axes.place[1], None, axes.sizes[1])
        found = _obstacles(axes, peers.obstacle(device, dict(zip(axes.ranks[of_axis], said[of_axis], strict=True))))
    if not found:
        most = min(x["most"] for x in said)
        memory, found = _tried(axes, lambda: peers.PeerMemory(axes.outer, device, most))
    if not found:
        _, found = _tried(axes, memory.meet)
    if not found:
        return memory
    if True in told:
        text = f"{peers.VARIABLE} is 1, but ranks don't read each other's memory, and send messages: {found}"
        warnings.warn(text, PeerMemoryWarning, stacklevel=2)
    return None


def _obstacles(axes: Axes, obstacle: str | None) -> str | None:
    """What is in the way on the first rank where something is, the same on all."""
    said = zip(axes.ranks, _all_say(axes, obstacle=obstacle and obstacle[: _ROOM // 8]), strict=True)
    return next((f"on rank {rank}: {what['obstacle']}" for rank, what in said if what["obstacle"]), None)


def _tried(axes: Axes, make: Callable[[], Any]) -> tuple[Any, str | None]:
    """What some of PyTorch's memory gives, and what is in the way if it fails on some rank, the same on all."""
    made = obstacle = None
    try:
        made = make()
    except (RuntimeError, ImportError, AttributeError, TypeError) as e:  # what PyTorch has no name for
        obstacle = f"PyTorch {torch.__version__} has no such memory here: {type(e).__name__}: {first_line(e)}"
    return made, _obstacles(axes, obstacle)


def with_room(axes: Axes, size: int, can_grow: bool) -> bool:
    """Whether ranks that read each other's memory have so many bytes of it, or now get them; the same on all.

    ``can_grow``: none of them captures a graph.
    """
    memory = axes.peers
    if size > memory.most or (size > memory.size and not can_grow):
        return False
    if size > memory.size:
        if not all(said["can"] for said in _all_say(axes, can=memory.allocate(size))):
            memory.refuse(size)
            return False
        memory.connect()
    return True


def _all_say(axes: Axes, **what: Any) -> list[dict[str, Any]]:
    """What each rank says, whatever it is."""
    asked = Agreement(axes)
    asked.says(**what)
    return asked.reach(differ=None)


class Agreement:
    """What this rank says of a call, and then what all say of it."""

    def __init__(self, axes: Axes):
        self._talk, self._ranks = axes.talk, axes.ranks
        self._said: dict[str, Any] = {}
        self._error: Exception | None = None

    def says(self, **what: Any) -> None:
        """Say something of a call: plain values by name."""
        self._said |= what

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """A block whose errors all ranks hear of, so that none waits for one that has left; its rest isn't done."""
        try:
            yield
        except Exception as e:  # whatever an argument raises that isn't what it should be
            self._error = e

    def reach(self, differ: Sequence[str] | None = ()) -> list[dict[str, Any]]:
        """What each rank says, by its place in the mesh, once all say the same but for the names in ``differ`` (None:
        whatever they say).

        Raises
        ------
        Exception: that of this rank.
        InvalidArgumentError: another rank has an error, or says something else.
        ProcessGroupError: a rank doesn't say anything.
        """
        words = self._said
        if self._error is not None:
            told = str(self._error) if isinstance(self._error, TvmFlashError) else repr(self._error)
            words = {"error": told[: _ROOM // 8]}
        everything = self._exchange(json.dumps(words).encode())
        if self._error is not None:
            raise self._error
        if all(said is everything[0] for said in everything) and "error" not in everything[0]:
            return everything
        said_by = dict(zip(self._ranks, everything, strict=True))
        for rank, said in said_by.items():
            if "error" in said:
                raise InvalidArgumentError(f"on rank {rank}: {said['error']}")
        first = self._ranks[0]
        for name, value in said_by[first].items():
            for rank, said in said_by.items():
                if differ is not None and name not in differ and said.get(name) != value:
                    raise InvalidArgumentError(
                        f"{name}: is {value} on rank {first}, but {said.get(name)} on rank {rank}; expected the same "
                        f"on all ranks of the mesh"
                    )
        return everything

    def _exchange(self, words: bytes) -> list[dict[str, Any]]:
        """What each rank says, one object where all say the same."""
        rooms = [bytearray(_ROOM) for _ in self._ranks]
        mine = torch.frombuffer(bytearray(words.ljust(_ROOM)), dtype=torch.uint8)
        with talking(self._ranks):
            self._talk.allgather([torch.frombuffer(room, dtype=torch.uint8) for room in rooms], mine).wait()
        texts = [bytes(room) for room in rooms]
        known = {text: json.loads(text) for text in dict.fromkeys(texts)}
        return [known[text] for text in texts]

"""What the run time has to know of a framework."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from tvm_flash.errors import ArgumentTypeError


@dataclass(frozen=True)
class TensorView:
    """A tensor as numbers: shape and strides in elements, dtype name, device, address of the first element."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device_kind: str
    device_index: int
    pointer: int
    writable: bool = True

    @property
    def device(self) -> str:
        """``"cpu"`` or ``"cuda:0"``."""
        return self.device_kind if self.device_kind == "cpu" else f"{self.device_kind}:{self.device_index}"


class Traced(ArgumentTypeError):
    """A tensor stands for others and has no memory: a program is being traced, or transformed."""

    def __init__(self, framework: Framework, message: str):
        super().__init__(message)
        self.framework = framework


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


class Framework(ABC):
    """How tensors of one framework are looked at and made.

    ``adopt`` and ``release`` stand at the two ends of a call: a framework whose arrays can't be used as they are swaps
    them for something that can, and turns results into its own arrays again.  All other methods see adopted tensors.
    """

    name: str

    #: Whether ``adopt`` does anything: the fast path leaves it out otherwise.
    adopts = False
    #: Whether arrays may be written: ``out=`` needs it.
    mutable = True
    #: Whether no tensor of this kind has memory, so that a call with one is always a step of a program; then ``adopts``
    #: is set too.
    traces = False

    def adopt(self, tensor: Any) -> Any:
        """A tensor in the form that the other methods take."""
        return tensor

    def release(self, result: Any, like: Any) -> Any:
        """``result`` of :meth:`empty` as the caller's framework has it; ``like`` is an argument before adoption."""
        return result

    @abstractmethod
    def key(self, tensor: Any) -> Hashable:
        """All that the choice of a kernel and the checks depend on, except the pointer; cheap, as every call makes
        some.

        May raise any error for something that isn't a tensor of this framework: :meth:`view` then says what is wrong.
        """

    def keys(self, tensors: Iterable[Any]) -> Hashable:
        """:meth:`key` of several tensors in one."""
        return tuple([self.key(x) for x in tensors])

    @abstractmethod
    def pointer(self, tensor: Any) -> int:
        """Address of the first element."""

    @abstractmethod
    def view(self, tensor: Any, name: str) -> TensorView:
        """Look at a tensor; ``name`` is that of the argument.

        Raises
        ------
        TvmFlashError: it is of a kind that can't be read.
        Traced: it has no memory yet.
        """

    @abstractmethod
    def allocator(self, shape: tuple[int, ...], dtype: str, like: TensorView) -> Callable[[], Any]:
        """Makes new contiguous tensors on the device of ``like``, their data undefined, aligned to 64 bytes."""

    def zeros_allocator(self, shape: tuple[int, ...], dtype: str, like: TensorView) -> Callable[[], Any]:
        """The same for tensors that are all zeros."""
        allocate = self.allocator(shape, dtype, like)

        def zeros():
            tensor = allocate()
            self.fill(tensor, 0.0)
            return tensor

        return zeros

    def allocates(self, device_kind: str) -> bool:
        """Whether :meth:`allocator` can make tensors on devices of a kind: workspaces need it."""
        return True

    def quick_allocator(self, shape: tuple[int, ...], dtype: str, like: TensorView) -> Callable[[], Any] | None:
        """The same, sooner, but on the framework's current device of that kind; None if there is no such way."""
        return None

    @abstractmethod
    def fill(self, tensor: Any, value: float) -> None:
        """Set every element."""

    def fast_reader(self, cls: type) -> tuple[Any, Callable[[], bool] | None, Any, tuple | None] | None:
        """How the fast path reads tensors of exactly the type ``cls``; None if it can't.

        The capsule of the type's ``DLPackExchangeAPI``, or None for ``__array_struct__``; what says whether gradients
        are recorded, if the framework has them; the one dtype of the kind "V" that is known, if any; and where the
        library sees that somebody watches (the fields of ``Watch`` in ``call_key.h``), if anybody can.
        """
        return None

    def differentiated(self, *tensors: Any) -> bool:
        """Whether the caller expects a derivative by one of the tensors."""
        return False

    def watched(self, tensors: tuple[Any, ...]) -> bool:
        """Whether a call with such tensors (None among them) must be an operator of the framework: because somebody
        traces, records or transforms the program, or a tensor isn't just memory."""
        return False

    def stream(self, device_index: int) -> int:
        """The current stream of a GPU as an integer; 0 is the default stream."""
        return 0

    def finish(self, device_index: int) -> None:  # noqa: B027, doing nothing is the default
        """Called after a kernel was launched on a GPU; frameworks that can't order streams wait here."""

"""Tensors beside memory that nobody may touch: a kernel that reads or writes outside of them is stopped there.

What a tensor's elements span, from its first to its last one, is copied to pages of its own; the page behind it can't
be read, or that before it, in turns.  An access there ends the process with a segmentation fault.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import torch

_PAGE = mmap.PAGESIZE
_PROT_NONE = 0
#: What kernels ask of the addresses of rows.
_ALIGNMENT = 16

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Guarded:
    """A launch on the processor, each of whose tensors has pages of its own while it runs."""

    def __init__(self, function: Callable):
        self.function, self.behind = function, True

    def __call__(self, *arguments: Any) -> None:
        places = [_Place(x, self.behind) for x in arguments if _is_spread(x)]
        copies = iter(places)
        self.function(*(next(copies).tensor if _is_spread(x) else x for x in arguments))
        for place in places:
            place.leave()
        self.behind = not self.behind


def _is_spread(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.numel() > 0


class _Place:
    """A copy of what a tensor spans, ``tensor``, before or ``behind`` which a page can't be read."""

    def __init__(self, x: torch.Tensor, behind: bool):
        steps = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        self.span = torch.as_strided(x, (steps + 1,), (1,), x.storage_offset()).view(torch.uint8)
        size, address = self.span.numel(), x.data_ptr()
        aligned = x.element_size() if x.dtype == torch.int32 else _ALIGNMENT
        pages = -(-(size + aligned) // _PAGE)
        memory = mmap.mmap(-1, (pages + 1) * _PAGE)
        begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        if _libc.mprotect(begin + (pages * _PAGE if behind else 0), _PAGE, _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
        offset = pages * _PAGE - size if behind else _PAGE + address % aligned
        offset -= (begin + offset - address) % aligned
        self.copy = torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=offset)
        self.copy.copy_(self.span)
        self.before = self.copy.clone()
        self.tensor = torch.as_strided(self.copy.view(x.dtype), x.shape, x.stride())

    def leave(self) -> None:
        """Write back what has changed: spans of several tensors may have one another's elements between theirs."""
        changed = self.copy != self.before
        self.span[changed] = self.copy[changed]

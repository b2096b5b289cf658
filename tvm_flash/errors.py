"""What can go wrong, as types: each is a ``TvmFlashError`` and the builtin exception that a caller would expect.

A message names the argument, what it was, what was expected, and the call or command that mends it.
"""

from __future__ import annotations


class TvmFlashError(Exception):
    """Base of every error that this package raises."""


class InvalidArgumentError(TvmFlashError, ValueError):
    """An argument has a value or a shape that attention isn't defined for, or that the other arguments contradict."""


class LayoutError(InvalidArgumentError):
    """The shapes only make sense in the other layout: heads and sequence are swapped."""


class ArgumentTypeError(TvmFlashError, TypeError):
    """An argument is of the wrong kind: not a tensor, a dtype without kernels, tensors of two frameworks or devices."""


class NotSupportedError(TvmFlashError, NotImplementedError):
    """A meaningful request that no kernel, or no kernel of the installed packs, can answer."""


class KernelNotFoundError(NotSupportedError):
    """The packs for this device have no kernel for the request; the message has the command that builds one."""


class PackError(TvmFlashError, RuntimeError):
    """There is no pack for this device, or a pack is damaged, foreign to this machine, or of another version."""


class KernelError(TvmFlashError, RuntimeError):
    """A kernel refused its arguments or failed to launch."""


class ProcessGroupError(TvmFlashError, RuntimeError):
    """Other processes of a group asked for something else, are gone, or didn't answer within the group's timeout."""


class LayoutWarning(UserWarning):
    """The shapes are legal but look as if heads and sequence were swapped."""


class PeerMemoryWarning(UserWarning):
    """Ranks were told to read each other's memory and can't, so that rows go as messages; the text says why."""


class FallbackWarning(UserWarning):
    """A drop-in left a call to the framework's own attention; the text says why.  ``warnings.simplefilter`` makes it an
    error."""

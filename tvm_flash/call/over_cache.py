"""Attention over a cache to which keys are appended first: what is computed once they are there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tvm_flash.call import checks
from tvm_flash.packs.manifest import BUILTIN_DEFINITION


@dataclass(frozen=True)
class OverCache:
    """What is computed of queries and a cache once new keys are there.

    Attributes
    ----------
    attend: a function as :func:`tvm_flash.flash_attention_paged`.
    parameters: of mask and score, those that are tensors, by name; None for one that isn't given.
    options: others of ``attend``, by name, ``return_lse`` among them.
    numbers: of a ``definition`` of the user's own the parameters that are numbers.
    """

    attend: Callable[..., Any]
    parameters: Mapping[str, Any]
    options: Mapping[str, Any]
    numbers: Mapping[str, Any] = field(default_factory=dict)
    definition: str = BUILTIN_DEFINITION

    @property
    def is_ordered(self) -> bool:
        """Whether what a query sees has to do with its position, by which it is turned then.

        Raises
        ------
        InvalidArgumentError, ArgumentTypeError: an option of the mask is wrong.
        """
        if self.definition != BUILTIN_DEFINITION:
            return True
        causal = checks.check_flag("causal", self.options["causal"])
        return checks.check_window(self.options["window_size"]) != (-1, -1) or causal

"""The operators that kernels compute: which tensors each takes and gives, by the names that callers use."""

from __future__ import annotations

from dataclasses import dataclass

#: The role (:mod:`tvm_flash.packs.manifest`) of a tensor that callers know by another name.
_ROLES = {"out": "o", "dout": "do"}


def role_of(name: str) -> str:
    """The role of a tensor that callers know by a name."""
    return _ROLES.get(name, name)


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes
    ----------
    inputs: the tensors that a call must give, in order.
    outputs: the results that a call may bring memory for, in order.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


OPERATORS = {"forward": Operator(inputs=("q", "k", "v"), outputs=("out",))}

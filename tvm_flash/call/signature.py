"""What a function of the package has decided before it is called: the operator, its tensors, its options."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from tvm_flash.call import fast
from tvm_flash.operators import FORWARD, OPERATORS, role_of
from tvm_flash.packs.manifest import BUILTIN_DEFINITION, PAGED

if TYPE_CHECKING:
    from tvm_flash.machine.device import Device


def accept_any(device: Device) -> None:
    """Tensors on whichever device will do."""


class Options(NamedTuple):
    """What a call asks for, apart from tensors; not yet checked.  A tuple, since it is the key of plans in every call.

    ``flag`` is the value of the operator's own option.  ``params`` are names and values of the numbers that a
    definition of the user's own takes.  ``accept`` may raise for the device that tensors are on.  ``layout_known`` says
    that no shape is to be taken for one of the other layout.  ``gradients`` names the parameters whose gradients are
    wanted.  ``longest`` is how many queries no sequence exceeds, where that may decide between kernels; ``head_dim_v``
    how many elements values have, where no tensor says so, and ``split_length`` how many keys a split has, if a call
    does.
    """

    layout: str
    variant: Any
    flag: Any
    softmax_scale: Any
    causal: Any = False
    window_size: Any = (-1, -1)
    softcap: Any = 0.0
    definition: str = BUILTIN_DEFINITION
    params: tuple[tuple[str, Any], ...] = ()
    accept: Callable[[Device], None] = accept_any
    layout_known: bool = False
    op: str = FORWARD
    gradients: tuple[str, ...] = ()
    longest: Any = None
    head_dim_v: Any = None
    split_length: Any = None


def never_change(options: Iterable[Any]) -> bool:
    """Whether options stay what they are: a tensor, or whatever else has an ``__index__``, equals itself when it has
    become another number."""
    return all(
        never_change(x) if isinstance(x, tuple) else isinstance(x, _CONSTANTS) or type(x).__module__ == "numpy"
        for x in options
    )


#: Types of what stays what it is; NumPy's truth values are no numbers, and its arrays no keys.
_CONSTANTS = (type(None), str, numbers.Number)


class Signature:
    """The tensors and options of a function's calls, in their order.

    Make it with :func:`signature`, which gives the same one for the same arguments: the fast path knows it by its
    address.

    Attributes
    ----------
    inputs: names of the tensors that must be given, those of the operator; ``starts`` of those that must be given too,
        but after the optional ones.
    parameters: names of the parameters of mask and score that are tensors; a call has None for one that it lacks.
    gradients: names of the parameters whose gradients are results too.
    outputs: names of the results that may be given, None in a call that doesn't.
    tensors: all of those, in the order of a call; ``roles`` are their roles in a kernel.
    scalars: for a definition of the user's own, the names of its parameters that are numbers.
    below: whether calls come from an operator of a framework, which whoever watches a program has seen.
    call: ``call(tensors …, options …)`` computes; the options are in the order of :meth:`options`.
    """

    def __init__(
        self,
        layout: str,
        definition: str = BUILTIN_DEFINITION,
        parameters: tuple[str, ...] = ("alibi_slopes",),
        scalars: tuple[str, ...] = (),
        accept: Callable[[Device], None] = accept_any,
        layout_known: bool = False,
        op: str = FORWARD,
        below: bool = False,
        gradients: tuple[str, ...] = (),
    ):
        self.layout, self.definition, self.accept, self.layout_known = layout, definition, accept, layout_known
        self.op, self.parameters, self.scalars, self.below, self.gradients = op, parameters, scalars, below, gradients
        operator = OPERATORS[op]
        self.inputs, self.starts, self.outputs = operator.inputs, operator.starts, operator.all_outputs(gradients)
        self.tensors = operator.tensors(parameters, gradients)
        self.roles = tuple(map(role_of, self.tensors))
        self.call: Callable[..., Any]
        self.fast_call: Callable[..., Any] | None
        fast.enter(self)

    def options(self, variant: Any, flag: Any, softmax_scale: Any, *rest: Any) -> Options:
        """The options of a call; ``rest`` is causal, window_size and softcap, or the values of ``scalars``.

        With keys on pages, ``longest`` follows, and ``head_dim_v`` and ``split_length`` where values are in keys.
        """
        builtin, longest, of_latents = self.definition == BUILTIN_DEFINITION, None, {}
        if OPERATORS[self.op].values_in_keys:
            *rest, head_dim_v, split_length = rest
            of_latents = {"head_dim_v": head_dim_v, "split_length": split_length}
        if OPERATORS[self.op].form == PAGED:
            *rest, longest = rest
        return Options(
            *(self.layout, variant, flag, softmax_scale),
            *(rest if builtin else ()),
            definition=self.definition,
            params=() if builtin else tuple(zip(self.scalars, rest, strict=True)),
            accept=self.accept,
            layout_known=self.layout_known,
            op=self.op,
            gradients=self.gradients,
            longest=longest,
            **of_latents,
        )


signature = functools.cache(Signature)

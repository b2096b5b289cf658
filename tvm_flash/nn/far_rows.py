"""Rows whose every visible score has a large number added, of either sign: float32 has few digits for scores there.

Kernels keep a row's log-sum-exp for the backward, and find weights again as ``exp(score - lse)``.  Beside 1e6 a
log-sum-exp is rounded to 1/16, so that all weights of the row, and with them its gradients, would be some per cent off;
beside 2**26 the logarithm of the number of keys is lost, and gradients would be as many times too large.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tvm_flash.frameworks.torch_watch import is_watched

#: A row is far from 0 from here on: beside it a log-sum-exp is rounded to 2**-16.
_FAR = 2.0**8

#: Beside this, float32 has no digits for a score of less than 16, nor has torch's attention in float32.
_ALL_THE_SAME = 2.0**29


@dataclass(frozen=True)
class Rows:
    """A bias as kernels have gradients with it, and what is to be done about its rows that are far from 0.

    What is added to a whole row changes nothing, and is taken off ``bias`` up to ``_ALL_THE_SAME``.  From there on the
    forward has one weight for all keys of the largest number, as torch's has in float32, and gradients, linear in that
    of the row's result, are ``share`` of what kernels make them.

    Attributes
    ----------
    bias: as it was given or with something taken off, in the same dtype: 16 bits hold the difference of two numbers of
        theirs, or else it is more than 100, and rounded as a score of such a size would be.
    moved: whether something may have been.
    even: boolean ``(…, seqlen_q, 1)``, the rows with one weight for all; None if there are none.
    share: float32 ``(…, seqlen_q, 1)``: of those one over the number of keys, else 1; None if there are none.
    """

    bias: torch.Tensor
    moved: bool = False
    even: torch.Tensor | None = None
    share: torch.Tensor | None = None

    def shared(self, dout: torch.Tensor) -> torch.Tensor:
        """The gradient of a result ``(batch, heads, seqlen_q, head_dim_v)`` as a backward is to have it."""
        return dout if self.share is None else (dout.float() * self.share).to(dout.dtype)

    def with_gradients(self, out: torch.Tensor, layout: str) -> torch.Tensor:
        """A result in a layout from which gradients flow back as they are to."""
        if self.even is None:
            return out
        even, share = self.even, self.share
        if layout == "bshd":
            even, share = even.transpose(1, 2), share.transpose(1, 2)
        fixed = out.detach()
        return torch.where(even, fixed + ((out - fixed).float() * share).to(out.dtype), out)


def rows_of(bias: torch.Tensor, keys: int) -> Rows:
    """The rows of a bias that broadcasts to ``(batch, heads, seqlen_q, keys)``.

    A bias on a GPU, or in a program, isn't read on the host: what might be needed is computed then.
    """
    if not bias.numel():
        return Rows(bias)
    readable = bias.device.type == "cpu" and not torch.compiler.is_compiling() and not is_watched((bias,))
    given = bias.detach()
    top = given.amax(-1, keepdim=True)
    size = top.abs()
    even = (size >= _ALL_THE_SAME) & (size < torch.inf)
    far = (size >= _FAR) & (size < _ALL_THE_SAME)
    moved = not readable or bool(far.any())
    if moved:
        bias = bias - torch.where(far, top, 0.0)
    if readable and not even.any():
        return Rows(bias, moved)
    count = (given == top).sum(-1, keepdim=True) * (keys if given.shape[-1] == 1 else 1)
    return Rows(bias, moved, even, torch.where(even, 1.0 / count.clamp(min=1), 1.0))

"""What ``torch.vmap`` makes of the operators of PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tvm_flash.call.prepare import params_of
from tvm_flash.errors import NotSupportedError


def larger_batch(operator: Callable[..., Any]) -> Callable[..., Any]:
    """A rule that makes one batch of the mapped and the own batch dimension."""

    def rule(info, in_dims, *arguments, **options):
        size = info.batch_size
        if "name" in options:
            declared = params_of(options["name"])
            if wide := [n for n in options["parameter_names"] if not declared[n].per_head]:
                raise NotSupportedError(
                    f"{', '.join(wide)}: the call is mapped by torch.vmap, and such parameters can't be; use the batch "
                    f"dimension of q, k and v"
                )

        def merged(x, dim):
            if isinstance(x, (list, tuple)):
                dims = dim if isinstance(dim, (list, tuple)) else [dim] * len(x)
                return [merged(*pair) for pair in zip(x, dims, strict=True)]
            if not isinstance(x, torch.Tensor):
                return x
            x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            if x.ndim < 4:  # one value a head, or also a batch entry
                x = (x[:, None] if x.ndim == 2 else x).expand(size, batch, -1)
            elif x.ndim == 5 and x.shape[1] != batch:  # a mask or a bias that is one for a batch
                x = x.expand(size, batch, *x.shape[2:])
            return x.flatten(0, 1)

        first, dim = arguments[0], in_dims[0]
        batch = first.movedim(dim, 0).shape[1] if dim is not None else first.shape[0]
        merged_arguments = [merged(x, dim) for x, dim in zip(arguments, in_dims, strict=True)]
        results = operator(*merged_arguments, **options)
        unmerged = [x.unflatten(0, (size, batch)) if x.ndim > 1 else x.expand(size, 0) for x in results]
        return (tuple(unmerged), (0, 0)) if isinstance(results, tuple) else (unmerged, [0] * len(unmerged))

    return rule


def larger_batch_of_gradients(operator: Callable[..., Any]) -> Callable[..., Any]:
    """The same for torch's older map, with which autograd maps gradients (``is_grads_batched``, ``vectorize``)."""
    rule = larger_batch(operator)

    def answer(*arguments, **options):
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        tensors = [x for x in pytree.tree_leaves(arguments) if isinstance(x, torch.Tensor)]
        size = max(torch._remove_batch_dim(x, level, 1, 0).shape[0] for x in tensors)

        def unwrapped(x):
            return torch._remove_batch_dim(x, level, size, 0) if isinstance(x, torch.Tensor) else x

        mapped = pytree.tree_map(unwrapped, arguments)
        results, _ = rule(SimpleNamespace(batch_size=size), [0] * len(mapped), *mapped, **options)
        return [torch._add_batch_dim(x, 0, level) for x in results]

    return answer

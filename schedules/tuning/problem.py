"""A timed problem on a device: tensors by role, calls of kernels with them, and some of the results against float64.

Runs in the measuring process.  Needs torch; no TVM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from schedules.tuning import exact
from schedules.tuning.check import WrongNumbersError
from schedules.tuning.exact import Exact, Group
from schedules.tuning.forms import FORMS, shape_of
from tvm_flash import numerics
from tvm_flash.catalogue import DEFAULTS
from tvm_flash.measure.workloads import Workload
from tvm_flash.operators import gradient_of
from tvm_flash.packs import by_role, sizes
from tvm_flash.packs.manifest import DENSE, KernelEntry, Param

#: What a problem computes, by whether it is a backward.
RESULTS = {False: ("o",), True: ("dq", "dk", "dv")}


class Problem:
    """A workload's tensors; all kernels of a layout share them.

    Of a backward's inputs, the output and the log-sum-exp of the last group of heads are what a forward leaves; of the
    others they are numbers of the usual size, which take as long.
    """

    def __init__(self, workload: Workload, device: str):
        self.workload, self.device, self.form = workload, device, FORMS[workload.form]
        torch.manual_seed(0)
        w, roles = workload, ("q", "k", "v", *(("o", "do") if workload.backward else ()))
        self.inputs = {role: self._random(role) for role in roles}
        self.slopes = torch.rand(w.batch, w.heads, device=device)
        self.results = RESULTS[w.backward]
        self.layouts: dict[str, dict[str, torch.Tensor]] = {}
        self.exact: dict[str, Exact] = self._backward() if w.backward else exact.forward(w, self._group())

    def _random(self, role: str) -> torch.Tensor:
        x = torch.randn(shape_of(role, self.workload), device=self.device)
        return x.to(getattr(torch, self.workload.dtype))

    def _group(self) -> Group:
        """The numbers of the last group of heads."""
        w, group = self.workload, self.workload.heads // self.workload.kv_heads

        def last(role: str, heads: int) -> np.ndarray:
            return self.form.last(w, role, self.inputs[role])[-heads:].double().cpu().numpy()

        dout = last("do", group) if w.backward else None
        slopes = self.slopes[-1, -group:].double().cpu().numpy()
        params = {**w.params(), "alibi_slopes": slopes}
        return Group(last("q", group), last("k", 1)[0], last("v", 1)[0], dout, params)

    def _backward(self) -> dict[str, Exact]:
        """Gradients that are compared; puts what belongs to them among the inputs."""
        w = self.workload
        found = exact.backward(w, self._group())
        self.inputs["o"] *= 0.1
        # The sum of n exponentials of normal numbers is about n times the root of e.
        self.inputs["lse"] = torch.full(shape_of("lse", w), math.log(w.seqlen_kv) + 0.5, device=self.device)
        for role, values in (("o", found.out), ("lse", found.lse)):
            place = self.form.last(w, role, self.inputs[role])[-len(values) :]
            place.copy_(torch.from_numpy(values))
        self.inputs["dlse"] = torch.empty(1, device=self.device)  # there is none
        return dict(found.gradients)

    def _laid_out(self, layout: str) -> dict[str, torch.Tensor]:
        """Inputs and results as kernels of a layout take them."""
        if layout not in self.layouts:
            self.layouts[layout] = self._tensors(layout)
        return self.layouts[layout]

    def _tensors(self, layout: str) -> dict[str, torch.Tensor]:
        like = self.inputs["q"]
        tensors = self.inputs | {role: like.new_empty(shape_of(role, self.workload)) for role in self.results}
        if self.workload.form == DENSE and layout == "bshd":
            tensors = {r: x.transpose(1, 2).contiguous() if x.ndim == 4 else x for r, x in tensors.items()}
        tensors.setdefault("lse", torch.empty(1, device=self.device))  # of a forward, nobody asked for it
        return tensors | self.form.starts(self.workload, self.device)

    def _parameter(self, p: Param, extents: dict[str, int]) -> Any:
        """The value of a parameter of a kernel that serves the workload, perhaps among others."""
        if not p.per_head:
            return self.workload.params().get(p.name, 0)
        if p.name == "alibi_slopes":
            return self.slopes
        value = sizes.evaluate(
            DEFAULTS.get(p.name, 0), {"seqlen_kv": max(k for _, k in self.workload.lengths), **extents}
        )
        return torch.full(self.slopes.shape, value, dtype=getattr(torch, p.dtype), device=self.device)

    def call(self, entry: KernelEntry, functions: Sequence[Callable]) -> Callable[[], None]:
        """A call of a kernel."""
        extents = self.workload.sizes
        values = {**self._laid_out(entry.layout), "softmax_scale": self.workload.softmax_scale}
        for p in entry.params:
            values[p.name] = x = self._parameter(p, extents)
            if p.gradient:
                values[gradient_of(p.name)] = torch.empty(x.shape if p.per_head else 1, device=self.device)

        def make(shape: tuple[int, ...], dtype: str, zeroed: bool) -> torch.Tensor:
            return (torch.zeros if zeroed else torch.empty)(shape, dtype=getattr(torch, dtype), device=self.device)

        return by_role.bind(entry, functions, values, extents, make)

    def check(self, entry: KernelEntry, call: Callable[[], None]) -> float:
        """Run a call of a kernel, results full of NaN before; the largest error as a share of what is allowed.

        Raises
        ------
        WrongNumbersError: a result is wrong.
        """
        tensors, worst = self._laid_out(entry.layout), 0.0
        for role in self.results:
            tensors[role].fill_(torch.nan)
        call()
        for role in self.results:
            x, wanted = tensors[role], self.exact[role]
            x = x.transpose(1, 2) if entry.form == DENSE and entry.layout == "bshd" else x
            last = self.form.last(self.workload, role, x)[-1]
            got = last[torch.from_numpy(wanted.at).to(self.device)].double().cpu().numpy()
            share = numerics.largest_error(got, wanted.values) / wanted.bound
            if not share <= 1:  # false for NaN
                raise WrongNumbersError(f"the error of {role} is {share:.3g} × what is allowed")
            worst = max(worst, share)
        return worst

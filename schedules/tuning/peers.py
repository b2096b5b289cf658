"""Somebody else's attention, to be timed beside ours: the peers of ``python -m tvm_flash bench``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from tvm_flash.measure import ragged_peers
from tvm_flash.measure.peers import contestants
from tvm_flash.measure.workloads import Workload
from tvm_flash.packs.manifest import DENSE, RAGGED


@dataclass(frozen=True)
class Peer:
    """One that can run a workload; ``about`` names its function."""

    about: str
    call: Callable[[], object]


def peers_of(workload: Workload, inputs: Mapping[str, torch.Tensor], kind: str) -> dict[str, Peer]:
    """Those that can run a workload, by name, each called once.

    ``inputs`` are by role, those of a batch ``(batch, heads, seq, dim)``.
    """
    w = workload
    square = w.mask == "full" or (w.mask == "causal" and w.seqlen_q == w.seqlen_kv)  # other causal masks differ
    if w.form not in _OF_FORM or w.head_dim != w.head_dim_v or not square or w.score != "identity":
        return {}
    found = {}
    for name, about, make in _OF_FORM[w.form](w, inputs, kind):
        try:
            call = make()
            call()
        except RuntimeError:  # this backend can't run the problem, or isn't there
            continue
        found[name] = Peer(about, call)
    return found


#: Name, function in words, and what makes a call of it.
_Found = Iterator[tuple[str, str, Callable[[], Callable[[], object]]]]


def _of_batch(w: Workload, inputs: Mapping[str, torch.Tensor], kind: str) -> _Found:
    if w.heads != w.kv_heads:
        return
    for contestant in contestants(kind):
        if not contestant.about.ours:

            def make(one=contestant):
                q, k, v = (_laid_out(inputs[role], one.layout) for role in "qkv")
                dout = {"dout": _laid_out(inputs["do"], one.result)} if w.backward else {}
                return one.call(q, k, v, w, **dout)

            yield contestant.about.key, contestant.about.about, make


def _laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    return x if layout == "bhsd" else x.transpose(1, 2).contiguous()


def _of_sequences(w: Workload, inputs: Mapping[str, torch.Tensor], kind: str) -> _Found:
    if w.seqlen_q != w.seqlen_kv:
        return
    leaves = [inputs[role].detach().requires_grad_(w.backward) for role in "qkv"]
    for name, call in ragged_peers.peers(*leaves, [queries for queries, _ in w.lengths], w.causal).items():

        def make(call=call):
            return ragged_peers.backward(call, leaves, inputs["do"]) if w.backward else call

        yield name, ragged_peers.ABOUT[name], make


_OF_FORM = {DENSE: _of_batch, RAGGED: _of_sequences}

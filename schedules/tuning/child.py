"""The process that runs candidates: ``python -m schedules.tuning.child``, started by :mod:`schedules.tuning.measure`.

It may hang or die at any moment, so before everything it does it says so, one JSON object a line, on the file
descriptor whose number is its argument.  The request comes as one line on standard input::

    {"device": "cuda:0", "candidates": [[id, module, entry], …], "workloads": […], "incumbents": {…},
     "skip": [[id, workload], …], "peers": true, "effort": {…}, "seed": 0, "peaks": {…}}

``peaks`` are those that an earlier process of the batch found, empty in the first.

Events: ``ready``, ``healthy``, ``begin`` (what comes next, and with which candidate), ``wrong``, ``fault``,
``figures``, ``peer``, ``measured`` (a workload), ``end``.  Needs torch; no TVM.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tvm_ffi

from schedules.toolchain.process import die_with_parent
from schedules.tuning import check, timing
from schedules.tuning.check import WrongNumbersError
from schedules.tuning.peers import peers_of
from schedules.tuning.problem import Problem
from tvm_flash.measure.peaks import matmul_peak
from tvm_flash.measure.timing import Rounds
from tvm_flash.measure.workloads import Workload
from tvm_flash.packs.manifest import KernelEntry


class Child:
    """One request, carried out."""

    def __init__(self, request: dict[str, Any], say):
        self.say, self.device = say, request["device"]
        self.kind = self.device.partition(":")[0]
        self.effort = timing.Effort(**request["effort"]) if request["effort"] else timing.EFFORT[self.kind]
        self.order = random.Random(request["seed"])
        self.workloads = [Workload.parse(text) for text in request["workloads"]]
        self.incumbents = request["incumbents"]
        self.skip = {tuple(pair) for pair in request["skip"]}
        self.with_peers, self.known_peaks = request["peers"], request["peaks"]
        self.entries = {id: KernelEntry.from_dict(entry) for id, _, entry in request["candidates"]}
        self.modules = {id: module for id, module, _ in request["candidates"]}
        self.functions: dict[str, tuple] = {}
        self.errors: dict[str, float] = {}

    def run(self) -> None:
        """Everything, or up to the first fault of a device."""
        # 1. The device must be well: another's kernel may just have been killed on it.
        self.say("begin", what="health")
        threads = torch.get_num_threads() if self.kind == "cpu" else 0  # kernels run on torch's own
        self.check_health()
        self.say("healthy", torch=torch.__version__, threads=threads, peaks=self.known_peaks or self.peaks())
        # 2. Right numbers first.
        for id, entry in self.entries.items():
            self.say("begin", what="check", id=id)
            try:
                self.errors[id] = check.check_small(entry, Path(self.modules[id]), self.device)
                module = tvm_ffi.load_module(self.modules[id])
                self.functions[id] = tuple(module[launch.symbol] for launch in entry.launches)
            except WrongNumbersError as e:
                self.say("wrong", id=id, reason=str(e))
        # 3. Then time, workload by workload.
        for workload in self.workloads:
            self.measure(workload)
        self.say("end")

    def check_health(self) -> None:
        """The device multiplies, and multiplies right."""
        if self.kind == "cuda":
            torch.cuda.set_device(self.device)
        ones = torch.ones(512, 512, device=self.device)
        if (ones @ ones).sum().item() != 512**3:
            raise RuntimeError("a product of matrices is wrong")

    def peaks(self) -> dict[str, float]:
        """Operations a second that the device has, by dtype."""
        return {
            dtype: matmul_peak(dtype, self.device, self._rounds)[1]["steady"]
            for dtype in dict.fromkeys(w.dtype for w in self.workloads)
        }

    def _rounds(self, calls) -> Rounds:
        """Times of products on a device that is warm; the fastest counts, so that further rounds tell nothing."""
        effort = replace(self.effort, rounds=min(self.effort.rounds, timing.EFFORT[self.kind].rounds))
        timing.keep_busy(next(iter(calls.values())), effort.warm_up, self.kind)
        return {"steady": timing.in_turn(calls, set(), effort, self.kind, self.order)}

    def measure(self, workload: Workload) -> None:
        """All candidates on one workload."""
        w, text = workload, str(workload)
        incumbents = {ids[text] for ids in self.incumbents.values() if text in ids}
        wanted = [id for id in self.functions if (id, text) not in self.skip or id in incumbents]
        if all((id, text) in self.skip for id in wanted):
            return
        self.say("begin", what=f"inputs of {text}")
        problem = Problem(w, self.device)
        calls, errors = {}, {}
        for id in wanted:
            entry = self.entries[id]
            call = problem.call(entry, self.functions[id])
            self.say("begin", what=f"first call on {text}", id=id, workload=text)
            try:
                share = problem.check(entry, call)
            except WrongNumbersError as e:
                self.say("wrong", id=id, workload=text, reason=str(e))
                continue
            calls[id], errors[id] = call, max(share, self.errors[id])
        ours = dict(calls)
        peers = peers_of(w, problem.inputs, self.kind) if self.with_peers else {}
        calls |= {name: peer.call for name, peer in peers.items()}
        if not ours:
            return
        first = next(iter(ours))
        self.say("begin", what=f"warming up on {text}", id=first, workload=text)
        timing.keep_busy(ours[first], self.effort.warm_up, self.device)

        def begins(name):
            self.say("begin", what=f"timing on {text}", **({"id": name, "workload": text} if name in ours else {}))

        always = incumbents | (calls.keys() - ours.keys())
        times = timing.in_turn(calls, always & calls.keys(), self.effort, self.kind, self.order, begins)
        for name, seconds in times.items():
            if name in ours:
                self.say("figures", id=name, workload=text, seconds=seconds, error=errors[name])
            else:
                self.say("peer", peer=name, about=peers[name].about, workload=text, seconds=seconds)
        self.say("measured", workload=text)


def main() -> None:
    """Say that all is imported, wait for the request, carry it out."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    out = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    state: dict[str, Any] = {}

    def say(event: str, **fields: Any) -> None:
        if event == "begin":
            state["at"] = fields
        out.write(json.dumps({"event": event, **fields}) + "\n")

    say("ready")
    request = sys.stdin.readline()
    if not request:
        return
    try:
        Child(json.loads(request), say).run()
    except Exception as e:  # a fault of the device ends this process; the parent knows by whom
        say("fault", **state.get("at", {}), reason=f"{type(e).__name__}: {e}".split("\n")[0])
        os._exit(1)


if __name__ == "__main__":
    main()

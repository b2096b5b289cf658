"""The processes that run kernels, seen from outside: what a device is, and a child that may hang or die."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tvm_flash.machine import cpu, cuda

ROOT = Path(__file__).resolve().parents[2]


def describe(device: str) -> dict[str, Any]:
    """Name, driver and compute capability of ``"cpu"`` or ``"cuda:0"``; threads are what a child has."""
    if device == "cpu":
        return {"name": cpu.name(), "driver": "", "threads": 0, "capability": None}
    gpu = cuda.gpu(int(device.partition(":")[2] or 0))
    return {"name": gpu.name, "driver": cuda.driver_version(), "threads": 0, "capability": gpu.capability}


class Process:
    """A child that has imported what it needs and waits for its request."""

    def __init__(self, log: Path):
        reader, writer = os.pipe()
        command = [sys.executable, "-m", "schedules.tuning.child", str(writer)]
        with open(log, "ab") as noise:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=noise, stderr=noise, pass_fds=[writer], cwd=ROOT
            )
        os.close(writer)
        self.reader, self.buffer = reader, b""

    def ask(self, request: dict[str, Any]) -> None:
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:  # it died at once; its end is read as that of any other
            return

    def next(self, limit: float) -> dict[str, Any] | None:
        """What it says next; None when it has ended.

        Raises
        ------
        TimeoutError: it said nothing for ``limit`` seconds.
        """
        end = time.monotonic() + limit
        while b"\n" not in self.buffer:
            ready, _, _ = select.select([self.reader], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError
            more = os.read(self.reader, 65536)
            if not more:
                return None
            self.buffer += more
        line, _, self.buffer = self.buffer.partition(b"\n")
        return json.loads(line)

    def kill(self) -> int:
        """End it; gives its exit status."""
        self.process.kill()
        self.process.stdin.close()
        os.close(self.reader)
        return self.process.wait()

    def end(self) -> int:
        """Its exit status, after it has closed its pipe."""
        try:
            status = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return self.kill()
        self.process.stdin.close()
        os.close(self.reader)
        return status

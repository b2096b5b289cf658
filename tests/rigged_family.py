"""A family for tests of the tuner: right numbers, and a time that the configuration rigs by sleeping.

It stands for ``cpu``.  The best configuration is known; others hang, crash, compute wrong numbers, or are refused.  As
a program, ``python rigged_family.py arguments…`` is ``tune.py`` with this family.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tvm.script import tirx as T

from schedules import families
from schedules.families.interface import Rejected, forward_program
from tests.toy_family import Isa

#: Microseconds of sleep by (block_m, num_stages), all different, since equal kernels are measured once; the best is far
#: enough ahead of each other one that a busy machine, which is late by some ms, leaves it the best.
COST = {(m, s): 4000 + 12000 * (abs(m - 48) // 16 + abs(s - 2)) + m + s for m in (16, 32, 48, 64) for s in (1, 2, 3)}
BEST = {"block_m": 48, "num_stages": 2}
HANGS, CRASHES, WRONG, REFUSED = (64, 3), (64, 1), (48, 3), (32, 3)


@dataclass(frozen=True)
class Config:
    """Both fields decide how long a call sleeps."""

    block_m: int = 16
    num_stages: int = 1


def _default_configs(template, pattern, target):
    return {0: Config()}


def _space(template, pattern, target):
    return {"block_m": (16, 32, 48, 64), "num_stages": (1, 2, 3)}


def _feasible(pattern, config, target):
    return Rejected("block_m 32 can't have 3 stages") if (config.block_m, config.num_stages) == REFUSED else None


def _program(pattern, config, target, traversal, name):
    key = (config.block_m, config.num_stages)
    first = {HANGS: "pause", CRASHES: "abort"}.get(key, "usleep")
    sleep, factor = COST[key], 0.5 if key == WRONG else 1.0

    @T.prim_func(s_tir=True)
    def attention(q: T.handle, k: T.handle, v: T.handle, o: T.handle, lse: T.handle, scale: T.float32):
        batch, heads, kv_heads, rows, keys = T.int64(), T.int64(), T.int64(), T.int64(), T.int64()
        dim, dim_v, lse_length = T.int64(), T.int64(), T.int64()
        Q = T.match_buffer(q, (batch, heads, rows, dim), "float32")
        K = T.match_buffer(k, (batch, kv_heads, keys, dim), "float32")
        V = T.match_buffer(v, (batch, kv_heads, keys, dim_v), "float32")
        O = T.match_buffer(o, (batch, heads, rows, dim_v), "float32")
        L = T.match_buffer(lse, (lse_length,), "float32")
        with T.sblock("all"):
            T.reads()
            T.writes()
            s = T.sblock_alloc_buffer((keys,), "float32")
            row = T.sblock_alloc_buffer((2,), "float32")  # maximum and sum
            T.evaluate(T.call_extern("int32", first, T.int32(sleep)))
            for b, h, i in T.grid(batch, heads, rows):
                row[0] = T.float32(-3e38)
                row[1] = T.float32(0)
                for j in range(keys):
                    s[j] = T.float32(0)
                    for d in range(dim):
                        s[j] = s[j] + Q[b, h, i, d] * K[b, h // (heads // kv_heads), j, d]
                    s[j] = s[j] * scale
                    row[0] = T.max(row[0], s[j])
                for e in range(dim_v):
                    O[b, h, i, e] = T.float32(0)
                for j in range(keys):
                    s[j] = T.exp(s[j] - row[0])
                    row[1] = row[1] + s[j]
                    for e in range(dim_v):
                        O[b, h, i, e] = O[b, h, i, e] + s[j] * V[b, h // (heads // kv_heads), j, e]
                for e in range(dim_v):
                    O[b, h, i, e] = O[b, h, i, e] / row[1] * T.float32(factor)
                if lse_length >= batch * heads * rows:
                    L[(b * heads + h) * rows + i] = row[0] + T.log(row[1])

    func = attention.with_attr("global_symbol", name)
    return forward_program(func, (), "s_tir", alignment=4, index_bits=64)


def module() -> types.ModuleType:
    """The family."""
    made = types.ModuleType("schedules.families.rigged")
    made.DTYPES, made.TEMPLATES, made.Config, made.INDEX_DTYPE = ("float32",), ("v1",), Config, "int64"
    made.default_configs, made.feasible, made.program, made.space = _default_configs, _feasible, _program, _space
    made.ISAS = {"toy": Isa()}
    return made


if __name__ in ("__main__", "__mp_main__"):  # also in the worker processes of the command
    sys.modules["schedules.families.rigged"] = module()
    families.FAMILY["cpu"] = "rigged"

if __name__ == "__main__":
    from schedules.commands.tune import main

    sys.exit(main())

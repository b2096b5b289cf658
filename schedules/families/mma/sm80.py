"""Ampere to Ada and consumer Blackwell: the blocks of :mod:`schedules.families.mma.asynchronous`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tvm.script import tirx as T

from schedules.definition.pattern import Pattern
from schedules.families import limits
from schedules.families.append import Appending, by_instruction
from schedules.families.interface import (
    APPEND,
    BACKWARD,
    BACKWARD_ACCUMULATE,
    CAUSAL_WITH_SINKS,
    DECODE,
    FORWARD,
    MERGED,
    OF_SEQUENCES,
    PAGED,
    PAGED_DECODE,
    RAGGED,
    RAGGED_BACKWARD,
    Program,
    Target,
)
from schedules.families.mma import backward, mma, scaled, scaled_decode
from schedules.families.mma.asynchronous import Config, DecodeMachine, Machine, PairedMachine, feasible
from schedules.families.mma.backward.joint_machine import JointMachine
from schedules.families.mma.backward.key_machine import KeyMachine
from schedules.families.mma.backward.query_machine import QueryMachine
from schedules.families.mma.decode import Decoding
from schedules.families.mma.instructions import AmpereProducts, AsynchronousStages
from schedules.families.mma.merged import MergedForward
from schedules.families.mma.paged_decode import PagedDecoding
from schedules.families.mma.ragged import PagedForward, RaggedForward
from schedules.tile.table_gradients import learnt_tables
from schedules.tile.tile_scheduler import Traversal

DTYPES = ("float16", "bfloat16")
TEMPLATES = ("v1", "v2")
INDEX_DTYPE = "int32"


#: By arch and head_dim, the first that is large enough.  sm_80 has 163 KiB of shared memory, so that two blocks of
#: 80 KiB or one of 8 warps fit a multiprocessor; the others have 99 KiB, for two blocks of 48 KiB.  Figures: TFLOP/s of
#: sm_80 code recompiled for an H200, V2, fp16, full attention over 16k keys, hidden size 2048; FlashAttention-2 has
#: 290, 335 and 312 at 64, 128 and 256.
_LARGE = {
    64: Config(128, 64, 4, 2, 2, q_in_registers=True),  # 380; block_n 32 382 but 302 for 336 at 1k, 48 367
    96: Config(128, 64, 4, 2, 2),
    128: Config(128, 48, 4, 2, 2),  # 382 to 397; block_n 64 with one stage 404 but spills, 32 379
    192: Config(128, 64, 8, 1, 1, cursors_in_shared=True, warps_per_tile=2),
    256: Config(128, 64, 8, 1, 1, cursors_in_shared=True, warps_per_tile=2),  # 393; a warp to a row tile 334
}
_SMALL = {
    64: Config(128, 64, 4, 2, 2, q_in_registers=True),
    96: Config(128, 32, 4, 2, 2),
    128: Config(128, 32, 4, 1, 2),
    192: Config(64, 32, 4, 1, 2),
    256: Config(128, 32, 8, 1, 1),
}


#: The same for sm_120, whose compiler spilled 4 to 28 bytes at 64 and 128 with the configurations above; and for a
#: padded batch's parameters, with which V2 spilled 24 bytes at 128 on sm_86.
_BLACKWELL = {
    **_SMALL,
    64: Config(128, 64, 4, 2, 2),
    128: Config(128, 32, 8, 2, 1),
}
_TABLES = {"sm_80": _LARGE, "sm_120": _BLACKWELL}


#: For few query rows (:mod:`schedules.families.mma.decode`).  Microseconds of sm_80 code recompiled for an H100, bf16,
#: V2, beside FlashAttention-2's: 32 heads on 8 at 128, 1 x 8k keys 10.5 (21.2; 16 keys and 4 stages 12.0), 32 x 4k 187
#: (202), 1 x 128k 190 (188); 64 on 8 at 64, 4 x 16k 56 (59); 16 on 8 at 256, 8 x 8k 189 (182).
DECODE_CONFIGS = {
    64: Config(16, 32, 1, 3, 8, q_in_registers=True),
    128: Config(16, 32, 1, 2, 6, q_in_registers=True),
    256: Config(16, 16, 1, 3, 3),
}


def _is_crowded(pattern: Pattern) -> bool:
    """Whether parameters that differ from head to head take more than one register."""
    return sum(p.per_head for p in pattern.params) > 1


def _with_parameters(config: Config, pattern: Pattern) -> Config:
    """Fewer keys at once where parameters of masks and scores take registers too.

    Those that differ from head to head are kept in registers: two of them, a padded batch's, made paired warps spill
    28 bytes with 64 keys.
    """
    if config.warps_per_tile == 2:
        return dataclasses.replace(config, block_n=32) if _is_crowded(pattern) else config
    if not pattern.params:
        return config
    return dataclasses.replace(config, block_n=32, q_in_registers=pattern.head_dim <= 64)


def _for_v2(config: Config, pattern: Pattern) -> Config:
    """What suits V2 better on sm_80: at 64 under a mask 1.02 times as fast (V1 1.006), at 128 without one 1.047.

    Under a mask it is 1.012 at 128; V1 is 0.977 without one and 1.014 under it.  Recompiled for an H200, V2 had spilled
    136 bytes at 128.
    """
    if pattern.head_dim <= 64 and not pattern.is_unmasked:
        return dataclasses.replace(config, num_stages=3)
    if 96 < pattern.head_dim <= 128:
        return dataclasses.replace(config, v_ahead=True)
    return config


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """The configuration for each bucket of sequence length."""
    table = _TABLES.get(target.arch, _BLACKWELL if _is_crowded(pattern) else _SMALL)
    config = limits.by_head_dim(table, pattern)
    if template == "v2" and target.arch == "sm_80" and not pattern.params:
        config = _for_v2(config, pattern)
    return {0: _with_parameters(config, pattern)}


def space(template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
    """Values of each field of ``Config``; what isn't feasible among their combinations is refused before compiling."""
    return {
        "block_m": (64, 128, 256),
        "block_n": (16, 32, 48, 64, 80, 96, 128),
        "num_warps": (4, 8),
        "num_stages": (1, 2, 3),
        "min_blocks_per_sm": (1, 2, 3),
        "q_in_registers": (False, True) if pattern.head_dim <= 64 else (False,),
        "cursors_in_shared": (False, True),
        "warps_per_tile": (1, 2) if pattern.head_dim > 128 else (1,),
        "section_mib": (4, 16, 64, 1024) if template == "v2" else (16,),
        "v_ahead": (False, True),
    }


def _machine(config: Config) -> type:
    return PairedMachine if config.warps_per_tile == 2 else Machine


def program(pattern: Pattern, config: Config, target: Target, traversal: Traversal, name: str) -> Program:
    """The kernel."""
    return mma.program(pattern, config, traversal, name, _machine(config))


@T.meta_class
class BackwardKeys(AsynchronousStages, AmpereProducts, KeyMachine):
    """The backward's launch for dk and dv."""


@T.meta_class
class BackwardJoint(AsynchronousStages, AmpereProducts, JointMachine):
    """The backward's joint launch."""


@T.meta_class
class BackwardQueries(AsynchronousStages, AmpereProducts, QueryMachine):
    """The backward's launch for dq."""


#: Of the backward, by head_dim, the first that is large enough, where shared memory is 99 KiB; paced, sm_120 spilled 8
#: to 80 bytes at 96 to 192.
_BACKWARD_SMALL = {
    64: backward.Config(128, 32, 4, 2, 2, 128, 32, 4, 2, 2, paced=False),
    96: backward.Config(128, 64, 8, 2, 1, 128, 32, 4, 2, 1, paced=False),
    128: backward.Config(128, 32, 8, 2, 1, 128, 32, 8, 2, 1, paced=False),
    192: backward.Config(32, 32, 4, 2, 1, 64, 32, 4, 2, 1, warps_per_tile=2, paced=False),
    256: backward.Config(32, 32, 4, 2, 1, 64, 16, 4, 2, 1, warps_per_tile=2, paced_dq=False),
}
#: The same for sm_80.
_BACKWARD_LARGE = {
    64: backward.Config(
        *(128, 32, 4, 2, 2, 128, 64, 4, 2, 2), paced=False, ahead=True, early=True, ahead_dq=True, early_dq=True
    ),
    96: _BACKWARD_SMALL[96],
    128: backward.Config(
        *(128, 64, 8, 2, 1, 256, 32, 8, 2, 1),
        warps_per_tile=2,
        paced=False,
        ahead=True,
        early=True,
        paced_dq=True,
        early_dq=True,
    ),
    192: backward.Config(64, 64, 8, 2, 1, 128, 32, 8, 2, 1, warps_per_tile=2),
    256: backward.Config(64, 32, 8, 2, 1, 64, 32, 4, 2, 1, warps_per_tile=2),
}
#: At 64 under a mask, where dq spilled 12 to 32 bytes with operands ahead, and was no faster with 48 keys.
_BACKWARD_MASKED_64 = backward.Config(128, 32, 4, 2, 2, 128, 64, 4, 2, 2, paced=False)
#: At 128, and at 64 under a mask, where keys are seen by all queries from some one on: recompiled for an H200, under a
#: causal mask 1.14 to 1.23 times as fast as the launches apart at 128, 1.03 to 1.16 at 64 (512 to 16k positions, 16k
#: tokens a batch).  At 64 where all is seen it was 0.74 of them for a sequence of 1000 positions, 1.08 to 1.09 for
#: 2k to 16k positions of 16k tokens.
_BACKWARD_JOINT = {
    64: dataclasses.replace(_BACKWARD_MASKED_64, ahead=True, early=True, joint=True, told_tiles=2),
    128: dataclasses.replace(_BACKWARD_LARGE[128], joint=True),
}
#: The same for sm_120, which spilled 12 bytes of dk and dv at 64, and 92 to 224 of dq at 256.
_BACKWARD_BLACKWELL = {
    **_BACKWARD_SMALL,
    64: backward.Config(128, 16, 4, 2, 2, 128, 32, 4, 2, 2, paced=False),
    256: backward.Config(32, 32, 4, 2, 1, 32, 32, 2, 2, 1, warps_per_tile=2, paced=False),
}


#: The same with parameters of masks and scores, which take registers too: on sm_80, and on the others.
_BACKWARD_WITH_PARAMETERS = {
    64: backward.Config(128, 16, 4, 2, 2, 128, 32, 4, 2, 2, paced=False),  # 32 queries a step spilled 8 to 48 bytes
    128: backward.Config(128, 32, 8, 2, 1, 128, 64, 8, 2, 1),
    256: _BACKWARD_LARGE[256],
}
_BACKWARD_SMALL_WITH_PARAMETERS = {
    64: _BACKWARD_WITH_PARAMETERS[64],
    128: backward.Config(128, 16, 8, 2, 1, 128, 32, 8, 2, 1, paced=False),  # 32 queries a step spilled 8 bytes
    256: dataclasses.replace(_BACKWARD_SMALL[256], paced=False),  # paced, it spilled 8 to 16 bytes
}
_BACKWARD_TABLES = {"sm_80": _BACKWARD_LARGE, "sm_120": _BACKWARD_BLACKWELL}


def _backward_config(template: str, pattern: Pattern, target: Target) -> backward.Config:
    if pattern.params:
        table = _BACKWARD_WITH_PARAMETERS if target.arch == "sm_80" else _BACKWARD_SMALL_WITH_PARAMETERS
        config = limits.by_head_dim(table, pattern)
        # what warps add to tables passes through shared memory, which is full with steps of 32 keys
        full = target.arch != "sm_80" and pattern.head_dim > 64 and learnt_tables(pattern)
        return dataclasses.replace(config, block_n_dq=16) if full else config
    config = limits.by_head_dim(_BACKWARD_TABLES.get(target.arch, _BACKWARD_SMALL), pattern)
    if target.arch == "sm_80" and pattern.is_scale_only and pattern.narrows:
        if config is _BACKWARD_LARGE[128]:
            return _BACKWARD_JOINT[128]
        # of head_dim 32 the warps can't share dq evenly
        if config is _BACKWARD_LARGE[64] and pattern.head_dim > 32 and not pattern.is_unmasked:
            return _BACKWARD_JOINT[64]
    if config is _BACKWARD_LARGE[64] and not pattern.is_unmasked:
        return _BACKWARD_MASKED_64
    return config


def _backward_of_longer(pattern: Pattern, target: Target) -> Mapping[int, backward.Config]:
    """Where blocks of a head wait for each other too long if there are few keys: 64 where all is seen."""
    serves = target.arch == "sm_80" and pattern.is_scale_only and pattern.is_unmasked and not pattern.params
    serves = serves and limits.by_head_dim(_BACKWARD_LARGE, pattern) is _BACKWARD_LARGE[64] and pattern.head_dim > 32
    return {2048: _BACKWARD_JOINT[64]} if serves else {}


def _accumulating_config(template: str, pattern: Pattern, target: Target) -> backward.Config:
    """Up to 128 sm_80 has those of the others, without parameters: a source that all have is verified once."""
    if target.arch == "sm_80" and pattern.head_dim <= 128 and not pattern.params:
        return limits.by_head_dim(_BACKWARD_SMALL, pattern)
    return _backward_config(template, pattern, target)


#: The same for ragged sequences, whose blocks read where they are wherever they need it: dq at 96 spilled 40 bytes on
#: sm_120 with 32 rows a warp.
_RAGGED_BACKWARD_BLACKWELL = {
    **_BACKWARD_BLACKWELL,
    96: dataclasses.replace(_BACKWARD_SMALL[96], num_warps_dq=8),
}


def _ragged_backward_config(template: str, pattern: Pattern, target: Target) -> backward.Config:
    """Up to 128 sm_80 has those of the others: the tiles of its own at 128 spilled 40 to 52 bytes, and a source that
    all have is verified once."""
    if target.arch == "sm_80" and pattern.head_dim > 128:
        return _backward_config(template, pattern, target)
    if pattern.params:
        return limits.by_head_dim(_BACKWARD_SMALL_WITH_PARAMETERS, pattern)
    return limits.by_head_dim(_RAGGED_BACKWARD_BLACKWELL if target.arch == "sm_120" else _BACKWARD_SMALL, pattern)


KINDS = {
    DECODE: Decoding(Config, DecodeMachine, DECODE_CONFIGS, feasible),
    RAGGED: RaggedForward(Config, default_configs, space, feasible, _machine),
    PAGED_DECODE: PagedDecoding(Config, DecodeMachine, DECODE_CONFIGS, feasible),
    PAGED: PagedForward(Config, default_configs, space, feasible, _machine),
    **scaled.asynchronous_kinds(),
    **scaled_decode.kinds(Config, feasible),
    BACKWARD: backward.Backward(
        (BackwardKeys, BackwardQueries, BackwardJoint), _backward_config, longer=_backward_of_longer
    ),
    BACKWARD_ACCUMULATE: backward.AccumulatingBackward((BackwardKeys, BackwardQueries), _accumulating_config),
    RAGGED_BACKWARD: backward.RaggedBackward((BackwardKeys, BackwardQueries), _ragged_backward_config),
    MERGED: MergedForward(Config, default_configs, space, feasible, _machine),
    APPEND: Appending(by_instruction),
}
TENSOR_KINDS, TABLE_KINDS = (FORWARD, BACKWARD), OF_SEQUENCES
#: Where results are merged, a sink is put in once, after the parts of all keys.
SINK_KINDS = (FORWARD, *(kind for kind in KINDS if kind != MERGED))
#: These would be the usual ones again, which serve them.
UNVERIFIED_VARIANTS = {BACKWARD: (CAUSAL_WITH_SINKS,)}
#: Of these sizes, (head_dim, head_dim_v), no GPU has run what works on float32 results yet.
UNVERIFIED_HEAD_DIMS = dict.fromkeys((MERGED, BACKWARD_ACCUMULATE), ((256, 256),))

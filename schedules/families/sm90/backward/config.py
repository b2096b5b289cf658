"""The schedule parameters of the Hopper family's backward, their defaults, and what fits into the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from schedules.definition.errors import DefinitionError
from schedules.definition.pattern import Pattern
from schedules.families.interface import Rejected, Target
from schedules.families.sm90 import config as forward
from schedules.families.sm90.barriers import WARPS
from schedules.families.sm90.config import BARRIER_BYTES, PANEL, SHARED_MEMORY, WARPGROUP_ROWS, panels
from schedules.tile.fragment import M16N8
from schedules.tile.place_gradients import stored_by
from schedules.tile.table_gradients import Slices, learnt_tables
from tvm_flash.packs import sizes

#: Consumer warpgroups of either launch, and the rows of a block of them, 64 each.
CONSUMERS = 2
BLOCK = CONSUMERS * WARPGROUP_ROWS
#: Registers of a producer's and of a consumer's thread: what the machine has for three warpgroups, the producers' share
#: as large as the consumers' allows.
REGISTERS = ((40, 232), (24, 240))
#: Registers of a thread of the warpgroup for dq of the joint launch, and of its consumers.
JOINT_REGISTERS = (88, 208)
#: Rows of a tile of dS: the block's keys, and a swizzle's height of rows that take what there is of keys past the last.
DS_ROWS = BLOCK + 8
#: Heads of a section of the joint launch, where an argument doesn't say how many.
SECTION = 16
#: Registers beside accumulators and what is packed, counted in kernels that compile without spills.
OTHER_REGISTERS = 28


@dataclass(frozen=True)
class Config:
    """How the two launches of a backward are scheduled.

    Attributes
    ----------
    block_m: queries of a step of the launch for dk and dv, a multiple of 16.
    num_stages: stages of its pipelines of queries and of gradients of outputs; a power of two.
    block_n: keys of a step of the launch for dq, a multiple of 16.
    num_stages_dq: stages of its pipelines of keys and of values; a power of two.
    overlaps: a step of the launch for dq issues its last product beside the next step's first ones.
    heads_first: blocks of all heads with the same keys, or queries, are started one after the other, and not all of a
        head.
    joint: one launch makes dk, dv and dq, with five products and sums of dq in memory; of the fields above the first
        two are its own.
    head_section: heads whose blocks are started together in the joint launch, those of the same keys after each other;
        0: an argument says how many.
    prefetches: the joint launch asks for sums of dq two tiles before it adds to them.
    shares_keys: both consumer warpgroups of the launch for dk and dv have the same 64 keys, and one computes dv, the
        other dk, with scores of its own: one product more, and room for a head_dim of 256.
    tensors_ahead: what tensors hold for a step's scores is fetched by the launch for dk and dv while the step before
        ends, and not read where the scores are.
    tensors_ahead_dq: the same of the launch for dq, of what doesn't come in boxes.
    tensor_stages_dq: stages of the pipelines of tiles of a tensor of the launch for dq, as the forward's
        (``tensor_boxes.py``); 0: its elements are fetched by the consumers' threads.
    """

    block_m: int = 64
    num_stages: int = 4
    block_n: int = 96
    num_stages_dq: int = 2
    overlaps: bool = True
    heads_first: bool = False
    joint: bool = False
    head_section: int = SECTION
    prefetches: bool = False
    shares_keys: bool = False
    tensors_ahead: bool = False
    tensors_ahead_dq: bool = False
    tensor_stages_dq: int = 0

    @property
    def block_keys(self) -> int:
        """Keys of a block of the launch for dk and dv."""
        return WARPGROUP_ROWS if self.shares_keys else BLOCK

    @property
    def threads(self) -> int:
        """Threads of a block: the producer's and the consumers' warpgroups."""
        return 128 * (CONSUMERS + 1)

    @property
    def for_queries(self) -> forward.Config:
        """The launch for dq, whose blocks are the forward's work tiles."""
        return forward.Config(
            num_consumer_warpgroups=CONSUMERS,
            block_n=self.block_n,
            num_stages=self.num_stages_dq,
            pingpong=False,
            head_section=forward.ALL if self.heads_first else 1,
            tensors_ahead=self.tensors_ahead_dq,
            tensor_stages=self.tensor_stages_dq,
        )


def default_configs(template: str, pattern: Pattern, target: Target) -> dict[int, Config]:
    """The configuration of a pattern, for any length: the largest steps that compile without spills.

    Those of plain scores at head_dim 64 and 128 are what docs/hopper.md has figures of; nothing else was tried.
    """
    if is_plain(pattern) or reads_ids(pattern):
        size = max(pattern.head_dim, pattern.head_dim_v)
        block_m, head_section = 128 if size <= 64 else 64, 0 if size in (64, 128) else SECTION
        found = Config(block_m=block_m, num_stages=3, joint=True, head_section=head_section)
        if feasible(pattern, found, target) is None:
            return {0: found}
    return {0: apart(pattern)}


def is_plain(pattern: Pattern) -> bool:
    """Whether the joint launch serves the pattern by what positions tell: its parameters are those of a sink, each of a
    head, and numbers that a mask compares positions with, and all heads see the same."""

    def is_served(param):
        if pattern.is_of_sink(param):
            return param.per_head and param not in pattern.of_mask
        return not param.is_tensor

    is_known = pattern.narrows and not pattern.mask_differs_along("h")
    return is_known and pattern.is_scale_only and all(map(is_served, pattern.params))


def reads_ids(pattern: Pattern) -> bool:
    """Whether the joint launch serves the pattern by numbers that launches before it find: its mask reads ids, and all
    heads see the same."""
    is_known = bool(pattern.atoms) and not pattern.has_unknown and not pattern.mask_differs_along("h")
    return is_known and pattern.is_scale_only and all(p in pattern.of_mask for p in pattern.params)


def apart(pattern: Pattern) -> Config:
    """The configuration of the launches apart."""
    plain = pattern.is_scale_only and not any(p.per_head for p in pattern.params)
    overlaps = not pattern.learnt
    if any(p.is_spread for p in pattern.params):
        return replace(_with_tensors(pattern), overlaps=overlaps)
    if pattern.head_dim <= 64:
        # Where the score is one of two, each has a branch of its own, and ptxas has enough registers for 96 queries.
        block_m = 96 if plain or pattern.has_choice else 80
        found = Config(block_m=block_m, num_stages=4, block_n=128 if plain else 96, num_stages_dq=4)
    elif pattern.head_dim <= 128:
        # Beside a sink and the sum of its gradient, 64 keys would spill.
        found = Config() if plain else Config(block_m=48, block_n=48 if pattern.has_sink else 64)
    elif pattern.head_dim + pattern.head_dim_v <= 320:
        found = Config(block_m=32, block_n=80 if plain else 64)
    elif pattern.head_dim <= 192:
        found = Config(block_m=64 if plain else 48, num_stages=2, block_n=80 if plain else 64, shares_keys=True)
    else:
        found = Config(block_m=64 if plain else 32, num_stages=2, block_n=48, shares_keys=True)
    return replace(found, overlaps=overlaps)


def _with_tensors(pattern: Pattern) -> Config:
    """Smaller steps, as addresses and elements of tensors take registers too: the largest that compile without spills
    with a bias of all axes or a mask for each score.

    At head_dim 64 a launch for dq that stores the gradient of a bias is 13% slower where it fetches ahead, at 128 as
    fast (docs/hopper.md).
    """
    if pattern.head_dim > 128 or sum(p.is_spread for p in pattern.params) > 1:
        return _with_untimed_tensors(pattern)
    found = Config(tensors_ahead=True, tensor_stages_dq=2 if _comes_in_boxes(pattern) else 0)
    if pattern.head_dim <= 64:
        ahead = not pattern.learnt
        return replace(found, num_stages=4, block_n=96 if ahead else 64, num_stages_dq=4, tensors_ahead_dq=ahead)
    if forward.is_mask_in_boxes(pattern):
        return replace(found, block_m=48, block_n=64)
    return replace(found, block_m=48, block_n=48, tensors_ahead_dq=True)


def _comes_in_boxes(pattern: Pattern) -> bool:
    """Whether the launch for dq may have its tensor in boxes: one for each query and key."""
    tensor = forward.boxed(pattern)
    return tensor is not None and "i" in tensor.axes and not (pattern.has_gaps or pattern.lists_tiles)


def _with_untimed_tensors(pattern: Pattern) -> Config:
    """Steps that compile without spills with several tensors, or with one at a larger head_dim; nothing else is known
    of them, so that nothing is fetched ahead."""
    if pattern.head_dim <= 64:
        return Config(block_m=32, num_stages=4, block_n=32, num_stages_dq=4)
    if pattern.head_dim + pattern.head_dim_v <= 320:
        return Config(block_m=16, block_n=16)
    return Config(block_m=16, num_stages=2, block_n=16, shares_keys=True)


def tiles_told(pattern: Pattern) -> tuple[tuple[int, int], ...]:
    """How many tiles a block of the joint launch adds to before it tells the next one, a power of two, for so many rows
    or more: it changes no bits.

    On an H200, bfloat16, TFLOP/s with 1 and 2 tiles (docs/hopper.md): head_dim 128 full 371 and 377 at 512 rows, 380
    and 461 at 16k; causal 239 and 231 at 512, 511 and 541 at 8k; head_dim 64 causal 495 and 464 at 8k, 490 and 538 at
    16k.
    """
    if pattern.atoms:
        return ((0, 1),)
    if max(pattern.head_dim, pattern.head_dim_v) <= 64:
        return (0, 1), (16384, 2)
    return ((0, 2),) if pattern.is_unmasked else ((0, 1), (8192, 2))


def usual_rows(ragged: bool) -> sizes.Expression:
    """Rows of a sequence, or of a usual one of ragged ones."""
    return ("ceildiv", "total_q", "batch") if ragged else "seqlen_q"


def section_heads(pattern: Pattern, ragged: bool) -> sizes.Expression:
    """How many heads the joint launch goes over at a time, where that is an argument: it changes no bits.

    On an H200, bfloat16, head_dim 128, TFLOP/s (docs/hopper.md): full, with 16 heads and with as many as are taken: 503
    and 522 at 2k rows, 481 and 560 at 16k, 418 and 582 at 32k, but 367 and 350 at 512; causal 540 and 547 at 8k, of 8
    heads with 8 and with 2 456 and 577 at 128k, 421 and 581 at 256k.  Under a causal mask it goes by the keys, as late
    rows see more of them than there are rows: where two GPUs share 256k positions, 418 ms forward and backward by keys,
    and 465 by rows, and 26.9 and 27.3 of 64k.
    """
    rows = usual_rows(ragged)
    if not (pattern.is_unmasked or ragged):
        rows = "seqlen_kv"
    if max(pattern.head_dim, pattern.head_dim_v) <= 64:
        few = ((8192, 8), (32768, 2)) if pattern.is_unmasked else ((65536, 8),)
    elif pattern.is_unmasked:
        few = ((2048, 8), (16384, 4), (32768, 1))
    else:
        few = ((8192, 8), (65536, 4), (131072, 2))
    return ("steps", rows, (0, 16), *few)


def space(template: str, pattern: Pattern, target: Target) -> Mapping[str, tuple]:
    """Values of each field of ``Config`` that are worth trying."""
    return {
        "block_m": (32, 48, 64, 80, 96, 112, 128),
        "num_stages": (2, 3, 4),
        "block_n": (32, 48, 64, 80, 96, 112, 128),
        "num_stages_dq": (2, 4),
        "overlaps": (True, False),
        "heads_first": (False, True),
        "joint": (True, False),
        "head_section": (0, 8, 16, 32),
        "prefetches": (False, True),
        "tensors_ahead": (False, True),
        "tensors_ahead_dq": (False, True),
        "tensor_stages_dq": (0, 2) if _comes_in_boxes(pattern) else (0,),
        "shares_keys": (pattern.head_dim + pattern.head_dim_v > 320,),
    }


def feasible(pattern: Pattern, config: Config, target: Target) -> Rejected | None:
    """Whether the configuration can be compiled for the pattern, and the score has a derivative; None if so."""
    for name, head_dim in (("head_dim", pattern.head_dim), ("head_dim_v", pattern.head_dim_v)):
        if head_dim % 16 or not 16 <= head_dim <= 256:
            return Rejected(f"{name} {head_dim} is not a multiple of 16 from 16 to 256")
    try:
        pattern.differentiate()
    except DefinitionError as e:
        return Rejected(f"the score has no backward: {e}")
    if config.joint:
        return _refuse_joint(pattern, config, target)
    if config.overlaps and (asked := [p.name for p in pattern.learnt]):
        return Rejected(f"overlaps: the gradient of {', '.join(asked)} is summed by steps by themselves")
    for name, size in (("block_m", config.block_m), ("block_n", config.block_n)):
        if size % 16 or not 16 <= size <= 256:
            return Rejected(f"{name} {size} is not a multiple of 16 from 16 to 256")
    for name, stages in (("num_stages", config.num_stages), ("num_stages_dq", config.num_stages_dq)):
        if stages not in (2, 4, 8):
            return Rejected(f"{name} {stages} is not 2, 4 or 8")
    if config.tensor_stages_dq and not _comes_in_boxes(pattern):
        return Rejected("tensor_stages_dq needs one tensor over queries and keys, and a mask without gaps or lists")
    for launch, needed in (("dkdv", _memory_of_keys(pattern, config)), ("dq", _memory_of_queries(pattern, config))):
        if needed > SHARED_MEMORY:
            return Rejected(f"{launch}: needs {needed} bytes of shared memory, a block of {target} has {SHARED_MEMORY}")
    most = REGISTERS[-1][1]
    for launch, needed in (
        ("dkdv", _registers_of_keys(pattern, config)),
        ("dq", _registers_of_queries(pattern, config)),
    ):
        if needed > most:
            return Rejected(f"{launch}: needs about {needed} registers a thread, a consumer has {most}")
    return None


def _refuse_joint(pattern: Pattern, config: Config, target: Target) -> Rejected | None:
    """Why the joint launch can't be made."""
    if not is_plain(pattern) and not reads_ids(pattern):
        return Rejected(
            "joint: it serves plain scores whose keys are seen by all queries from some one on, or by ids, the same in "
            "all heads"
        )
    if config.block_m not in (64, 128):
        return Rejected(f"block_m {config.block_m} is not 64 or 128")
    if config.num_stages not in (3, 4):
        return Rejected(f"num_stages {config.num_stages} is not 3 or 4")
    if (needed := _memory_of_joint(pattern, config)) > SHARED_MEMORY:
        return Rejected(f"joint: needs {needed} bytes of shared memory, a block of {target} has {SHARED_MEMORY}")
    if (needed := _registers_of_joint(pattern, config)) > JOINT_REGISTERS[1]:
        return Rejected(f"joint: needs about {needed} registers a thread, a consumer has {JOINT_REGISTERS[1]}")
    return None


def registers_of_keys(pattern: Pattern, config: Config) -> tuple[int, int]:
    """Registers of a producer's and of a consumer's thread of the launch for dk and dv."""
    return next(r for r in REGISTERS if r[1] >= _registers_of_keys(pattern, config))


def registers_of_queries(pattern: Pattern, config: Config) -> tuple[int, int]:
    """The same of the launch for dq."""
    return next(r for r in REGISTERS if r[1] >= _registers_of_queries(pattern, config))


# Of a step a thread has scores and their gradients in float32, and one of the two packed.


def _registers_of_keys(pattern: Pattern, config: Config) -> int:
    of_dk, of_dv = pattern.head_dim // 2, pattern.head_dim_v // 2
    step = config.block_m + config.block_m // 4
    if stored_by(pattern, transposed=True):
        step += config.block_m // 4
    if config.shares_keys:
        return max(of_dk + step, of_dv + step - config.block_m // 2) + OTHER_REGISTERS
    return of_dk + of_dv + step + OTHER_REGISTERS


def _registers_of_queries(pattern: Pattern, config: Config) -> int:
    return pattern.head_dim // 2 + config.block_n + config.block_n // 4 + OTHER_REGISTERS


def _registers_of_joint(pattern: Pattern, config: Config) -> int:
    # S and dP are never there together
    step = config.block_m // 2 + config.block_m // 4
    return pattern.head_dim // 2 + pattern.head_dim_v // 2 + step + OTHER_REGISTERS


def _memory_of_joint(pattern: Pattern, config: Config) -> int:
    rows = (BLOCK + config.num_stages * config.block_m) * (panels(pattern.head_dim) + panels(pattern.head_dim_v))
    numbers = config.num_stages * 2 * config.block_m * 4
    return rows * 2 * PANEL + 2 * 2 * config.block_m * DS_ROWS + numbers + BARRIER_BYTES


def _memory_of_keys(pattern: Pattern, config: Config) -> int:
    rows = (config.block_keys + config.num_stages * config.block_m) * (
        panels(pattern.head_dim) + panels(pattern.head_dim_v)
    )
    return rows * 2 * PANEL + config.num_stages * 2 * config.block_m * 4 + BARRIER_BYTES


def _memory_of_queries(pattern: Pattern, config: Config) -> int:
    rows = (BLOCK + config.num_stages_dq * config.block_n) * (panels(pattern.head_dim) + panels(pattern.head_dim_v))
    slices = Slices(M16N8, config.block_n).bytes(WARPS * CONSUMERS) if learnt_tables(pattern) else 0
    return rows * 2 * PANEL + slices + forward.tensor_memory(pattern, config.for_queries) + BARRIER_BYTES

"""Schedule parameters of the Hopper family, and what fits into the machine."""

from __future__ import annotations

from dataclasses import dataclass

from schedules.definition.pattern import Pattern
from schedules.families.interface import Rejected, Target
from schedules.tile.element_pairs import BYTES
from tvm_flash.packs import sizes
from tvm_flash.packs.manifest import Param

#: Elements of a shared-memory panel: 64 16-bit elements are the 128 bytes of the swizzle atom.
PANEL = 64
#: Rows of a warpgroup's wgmma.
WARPGROUP_ROWS = 64
#: Shared memory that a block can have, bytes.
SHARED_MEMORY = 227 * 1024
#: Registers beside accumulators and probabilities: addresses, row state, temporaries.
OTHER_REGISTERS = 32
#: The head section that is all heads of all batches, and the one that is as few as make rounds of blocks even.
ALL, BY_LENGTH = 0, -1
#: Room for the barriers.
BARRIER_BYTES = 512
#: Registers of a producer's and of a consumer's thread, by consumer warpgroups and blocks of a multiprocessor: all that
#: its 64 Ki allow.
REGISTERS = {
    (1, 2): (24, 232),
    (1, 3): (24, 136),
    (1, 4): (24, 104),
    (2, 1): (40, 232),
    (2, 2): (24, 104),
    (3, 1): (32, 160),
    (4, 1): (32, 112),
}


@dataclass(frozen=True)
class Config:
    """How a Hopper kernel is scheduled.

    Attributes
    ----------
    num_consumer_warpgroups: each computes 64 rows of a work tile.
    block_n: keys of a tile, a multiple of 16 up to 256.
    num_stages: stages of each of the two pipelines, of K and of V; a power of two.
    blocks_per_sm: blocks that share a multiprocessor.
    pingpong: consumer warpgroups take turns at issuing products, so that one's softmax overlaps the other's products.
    tiles_per_cta: work tiles at a place of the grid, 1 or 2: two are taken one from each end, which makes places of
        equal length under a causal mask.
    waves: the kernel is persistent with that many blocks for each that the device runs at a time, which take one place
        after the other; 0 starts a block for each place.
    overlap_tiles: the first product of a work tile is issued beside the last one of that before.
    separate_output: finished rows are staged in shared memory of their own and not in the place of the queries, so that
        the next work tile's queries come while the last product and the output are computed.
    running_max: take the row maximum in every step; else unmasked steps rely on the exact maximum of a row's first tile
        and take another only when the row sum of a step shows that it has been far exceeded.
    tensors_ahead: what tensors hold for a step's scores is fetched as soon as the step before has its scores, and not
        at the step's own beginning.
    tensor_stages: stages of the pipelines of tiles of a tensor, one for each consumer warpgroup
        (``tensor_boxes.py``); 0: its elements are fetched by the consumers' threads.
    batches_beside: the same work tile of all batch entries is visited at the same time, so that what of a tensor is the
        same for them comes from memory once.
    pack_heads: query heads of a group share a work tile where there are few queries (``rows.py``).
    head_section: heads whose work tiles are visited together, strip by strip: ``BY_LENGTH`` the fewer the longer they
        are, ``ALL`` those of all batches (what the backward's launch for dq may do); 1 visits all work tiles of a head
        first.
    """

    num_consumer_warpgroups: int = 2
    block_n: int = 128
    num_stages: int = 2
    blocks_per_sm: int = 1
    pingpong: bool = True
    tiles_per_cta: int = 1
    waves: int = 0
    overlap_tiles: bool = False
    separate_output: bool = False
    running_max: bool = False
    head_section: int = 1
    pack_heads: bool = False
    tensors_ahead: bool = False
    tensor_stages: int = 0
    batches_beside: bool = False

    @property
    def block_m(self) -> int:
        """Rows of a work tile."""
        return WARPGROUP_ROWS * self.num_consumer_warpgroups

    @property
    def threads(self) -> int:
        """Threads of a block: the producer's and the consumers' warpgroups."""
        return 128 * (self.num_consumer_warpgroups + 1)

    @property
    def registers(self) -> tuple[int, int]:
        """Registers of a producer's and of a consumer's thread."""
        return REGISTERS[self.num_consumer_warpgroups, self.blocks_per_sm]

    @property
    def reserved_memory(self) -> int:
        """Bytes of shared memory beside queries, keys and values."""
        return 0

    @property
    def persistent(self) -> bool:
        """Whether blocks go on to other places."""
        return self.waves > 0

    @property
    def keeps_parameters(self) -> bool:
        """Whether a block reads the parameters of a head once, for all of its work tiles."""
        return True

    @property
    def several_tiles(self) -> bool:
        """Whether blocks may compute more than one work tile."""
        return self.tiles_per_cta > 1 or self.persistent


def boxed(pattern: Pattern) -> Param | None:
    """The parameter that may come in boxes: the one tensor whose elements differ from key to key."""
    over_keys = [p for p in pattern.params if "j" in p.axes]
    return over_keys[0] if len(over_keys) == 1 else None


def comes_in_boxes(pattern: Pattern) -> bool:
    """Whether forward kernels have that tensor in boxes, unless their configuration says otherwise."""
    return boxed(pattern) is not None and not pattern.has_gaps and pattern.head_dim <= 128


def is_mask_in_boxes(pattern: Pattern) -> bool:
    """Whether that tensor is the mask, and nothing else changes scores."""
    only = len(pattern.params) == 1 and pattern.params == pattern.of_mask
    return comes_in_boxes(pattern) and pattern.is_scale_only and only and not pattern.narrows


def keeps_bits(pattern: Pattern) -> bool:
    """Whether a lane keeps but a bit for each score of that mask, and a step is one of a kernel without a mask.

    At head_dim 128, where there are two consumer warpgroups, that is no faster: 0.95 to 1.03.
    """
    return is_mask_in_boxes(pattern) and pattern.is_given and boxed(pattern).dtype == "bool" and pattern.head_dim <= 64


def box_width(block_n: int, dtype: str) -> int:
    """Columns of a box: those of the tile in as few boxes as are odd multiples of 8, or of 16 bytes, or in one that is
    wider."""
    unit = max(8, 16 // BYTES[dtype])
    units = block_n // unit
    odd = units // (units & -units)
    return unit * odd if odd > 1 else block_n + unit


def boxes_of(block_n: int, dtype: str) -> int:
    """Boxes of a tile."""
    return -(-block_n // box_width(block_n, dtype))


def tensor_memory(pattern: Pattern, config: Config) -> int:
    """Bytes of shared memory that tiles of a tensor need."""
    if not config.tensor_stages:
        return 0
    dtype = boxed(pattern).dtype
    columns = boxes_of(config.block_n, dtype) * box_width(config.block_n, dtype)
    tile = WARPGROUP_ROWS * columns * BYTES[dtype]
    return config.tensor_stages * config.num_consumer_warpgroups * tile


def panels(head_dim: int) -> int:
    """Panels of a tile with rows of ``head_dim`` elements."""
    return -(-head_dim // PANEL)


def shared_memory(pattern: Pattern, config: Config, q_stages: int) -> int:
    """Bytes of shared memory that a block needs with room for the queries of ``q_stages`` work tiles."""
    row = 2 * PANEL
    q = q_stages * config.block_m * panels(pattern.head_dim)
    k_and_v = config.num_stages * config.block_n * (panels(pattern.head_dim) + panels(pattern.head_dim_v))
    output = WARPGROUP_ROWS * panels(pattern.head_dim_v) if config.separate_output else 0
    tensors = tensor_memory(pattern, config)
    return (q + k_and_v + output) * row + BARRIER_BYTES + config.reserved_memory + tensors


def q_stages(pattern: Pattern, config: Config) -> int:
    """Row tiles whose queries a block has room for: 2 if it computes several, so that the next one's can come early."""
    fits = shared_memory(pattern, config, 2) <= available_memory(config)
    return 2 if config.several_tiles and fits else 1


def available_memory(config: Config) -> int:
    """Bytes of shared memory that a block may have; each of those on a multiprocessor costs 1 KiB more."""
    return (SHARED_MEMORY + 1024) // config.blocks_per_sm - 1024


def narrow_axes(config: Config) -> tuple[sizes.Expression, ...]:
    """What a launch has along the second and the third axis of its grid: persistent blocks are in one row."""
    if config.persistent:
        return ()
    places = ("ceildiv", "seqlen_q", config.block_m * config.tiles_per_cta)
    if config.batches_beside:
        return (places, "heads")
    return ("heads", "batch") if config.head_section == 1 else ("batch", places)


def feasible(pattern: Pattern, config: Config, target: Target) -> Rejected | None:
    """Whether the configuration can be compiled for the pattern."""
    for name, head_dim in (("head_dim", pattern.head_dim), ("head_dim_v", pattern.head_dim_v)):
        if head_dim % 16 or not 16 <= head_dim <= 256:
            return Rejected(f"{name} {head_dim} is not a multiple of 16 from 16 to 256")
    if panels(pattern.head_dim_v) > panels(pattern.head_dim) and not config.separate_output:
        return Rejected(
            f"head_dim_v {pattern.head_dim_v} exceeds head_dim {pattern.head_dim}; "
            "outputs are staged in the place of the queries"
        )
    if (config.num_consumer_warpgroups, config.blocks_per_sm) not in REGISTERS:
        return Rejected(
            f"num_consumer_warpgroups {config.num_consumer_warpgroups} with blocks_per_sm {config.blocks_per_sm} is "
            f"not one of {sorted(REGISTERS)}"
        )
    if config.pingpong and config.num_consumer_warpgroups not in (2, 3):
        return Rejected("pingpong needs 2 or 3 consumer warpgroups")
    if config.block_n % 16 or not 16 <= config.block_n <= 256:
        return Rejected(f"block_n {config.block_n} is not a multiple of 16 from 16 to 256")
    if config.num_stages not in (2, 4, 8):
        return Rejected(f"num_stages {config.num_stages} is not 2, 4 or 8")
    if config.tiles_per_cta not in (1, 2):
        return Rejected(f"tiles_per_cta {config.tiles_per_cta} is not 1 or 2")
    if config.head_section not in (1, BY_LENGTH):
        return Rejected(f"head_section {config.head_section} is not 1 or {BY_LENGTH} (by length)")
    if config.head_section == BY_LENGTH and not (config.persistent and config.tiles_per_cta == 1):
        return Rejected("head_section by length needs waves and tiles_per_cta 1: it makes rounds of tiles even")
    if config.separate_output and not config.several_tiles:
        return Rejected("separate_output gains nothing with one work tile a block: tiles_per_cta 2 or waves")
    if pattern.has_gaps and config.several_tiles and config.keeps_parameters:
        return Rejected("a mask with gaps needs tiles_per_cta 1 and waves 0: its tiles are counted as they come")
    if (pattern.depends_on_head or pattern.has_sink) and config.pack_heads:
        return Rejected("a score, a mask or a sink that differs from head to head can't have heads packed")
    if pattern.lists_tiles and config.persistent and config.keeps_parameters:
        return Rejected("a mask whose tiles are listed needs waves 0: a block follows one list")
    if pattern.has_sink and config.persistent and config.overlap_tiles:
        return Rejected("a sink needs waves 0 or no overlap_tiles: it is put in at the head that the block has come to")
    if config.tensors_ahead and (not config.running_max or pattern.has_gaps):
        return Rejected("tensors_ahead needs running_max, as a step may not be taken again, and a mask without gaps")
    if config.tensor_stages and (boxed(pattern) is None or pattern.has_gaps):
        return Rejected("tensor_stages needs one tensor over keys, and a mask without gaps")
    if config.tensor_stages and config.running_max:
        return Rejected("tensor_stages needs no running_max: its steps keep their products")
    if config.batches_beside and config.head_section != 1:
        return Rejected("batches_beside needs head_section 1, as it is an order of its own")
    if config.overlap_tiles and not (config.several_tiles and q_stages(pattern, config) == 2):
        return Rejected("overlap_tiles needs tiles_per_cta 2 or waves, and room for the queries of two work tiles")
    needed = shared_memory(pattern, config, q_stages(pattern, config))
    if needed > available_memory(config):
        return Rejected(f"needs {needed} bytes of shared memory, a block of {target} has {available_memory(config)}")
    # Scores and output are float32 accumulators (a warpgroup's thread holds 1/2 element per row of a column), the
    # probabilities are packed in pairs; about 30 registers are addresses, row state and temporaries.
    needed = config.block_n // 2 + config.block_n // 4 + pattern.head_dim_v // 2 + OTHER_REGISTERS
    if needed > config.registers[1]:
        return Rejected(f"needs about {needed} registers a thread, a consumer warpgroup has {config.registers[1]}")
    return None

"""Matrix products of the Hopper family: wgmma with operands in swizzled shared memory.

A tile in shared memory is ``[panels][rows][64]``: panels of 64 columns, whose 128-byte rows are swizzled in 16-byte
chunks (chunk ``c`` of row ``r`` stands at ``c ^ (r % 8)``), as TMA writes them and wgmma reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.script import tirx as T

from schedules.families.sm90.config import PANEL
from schedules.tile.dtypes import element_type

# Matrix descriptor fields (PTX ISA, "Matrix descriptor format"), in units of 16 bytes: 128-byte swizzle, and 8 rows of
# 128 bytes from one swizzle atom to the next.
_SWIZZLE_128B = 1 << 62
_ATOM_STRIDE = 64 << 32


def k_major(tile):
    """Descriptor of a tile whose contraction runs along its rows (Q, K)."""
    return T.uint64(_SWIZZLE_128B | _ATOM_STRIDE | 1 << 16) | _address(tile)


def mn_major(tile, rows):
    """Descriptor of a tile whose contraction runs down its columns (V); ``rows`` is the height of a panel."""
    return T.uint64(_SWIZZLE_128B | _ATOM_STRIDE | (rows * 8) << 16) | _address(tile)


def _address(tile):
    return T.Cast("uint64", (T.cuda.cvta_generic_to_shared(tile) >> T.uint32(4)) & T.uint32(0x3FFF))


def rows_offset(rows, panels):
    """What a descriptor advances by to pass a tile of ``panels`` panels of ``rows`` rows."""
    return T.Cast("uint64", rows * (panels * 8))


def swizzled(chunk, row):
    """Column at which a 16-byte chunk of a row stands in its panel."""
    return T.bitwise_xor(chunk, row % 8) * (PANEL // 8)


@dataclass(frozen=True)
class Products:
    """``S = Q Kᵀ`` and ``O += P V`` of one warpgroup: 64 rows.

    ``acc_s`` and ``acc_o`` are wgmma accumulators: element ``g * 4 + r * 2 + e`` of a thread is row ``lane // 4 + 8 r``
    of the warp's 16 and column ``8 g + 2 (lane % 4) + e``.
    """

    dtype: str
    block_m: int
    block_n: int
    head_dim: int
    head_dim_v: int

    def _wgmma(self, n):
        t = element_type(self.dtype).ptx
        return f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{t}.{t}"

    @T.inline
    def qk(self, acc_s, q, k, add: bool = False):
        """Issue ``acc_s = Q Kᵀ``, or ``acc_s += Q Kᵀ``, from the descriptors of Q's 64 rows and of the K tile."""
        for i in T.unroll(self.head_dim // 16):
            T.ptx[self._wgmma(self.block_n)](
                *[acc_s[x] for x in range(self.block_n // 2)],
                q + T.uint64(i // 4 * (self.block_m * 8) + i % 4 * 2),
                k + T.uint64(i // 4 * (self.block_n * 8) + i % 4 * 2),
                T.bool(True) if add else i > 0, 1, 1, 0, 0,
            )  # fmt: skip

    @T.inline
    def pv(self, acc_o, p, v):
        """Issue ``acc_o += P V`` from packed probabilities and the descriptor of the V tile."""
        for i in T.unroll(self.block_n // 16):
            T.ptx[self._wgmma(self.head_dim_v)](
                *[acc_o[x] for x in range(self.head_dim_v // 2)],
                p[i * 4], p[i * 4 + 1], p[i * 4 + 2], p[i * 4 + 3],
                v + T.uint64(i * 128),
                T.bool(True), 1, 1, 1,
            )  # fmt: skip

    @T.inline
    def pv_shared(self, acc_o, p, v):
        """The same from probabilities in a panel of shared memory, by its descriptor."""
        for i in T.unroll(self.block_n // 16):
            T.ptx[self._wgmma(self.head_dim_v)](
                *[acc_o[x] for x in range(self.head_dim_v // 2)],
                p + T.uint64(i * 2),
                v + T.uint64(i * 128),
                T.bool(True), 1, 1, 0, 1,
            )  # fmt: skip

    @T.inline
    def qk_again(self, acc_s, q_tile, k_tile, q_row, lane):
        """``acc_s = Q Kᵀ`` for the 16 rows of one warp alone, from row ``q_row`` of the Q tile, by mma.sync.

        ``q_tile`` and ``k_tile`` map ``[panel, row, column]`` to a pointer. The other warps take no part, so a warp can
        do this when it must.  It is rare: the loop over head_dim stays a loop, so that its code is small, and addresses
        come from a lane number that has been through a shuffle, so that no registers hold them throughout the kernel.
        """
        here: T.int32 = T.cuda.__shfl_xor_sync(T.uint32(0xFFFFFFFF), lane, 0, 32)
        a = T.alloc_local([4], "uint32")
        b = T.alloc_local([4], "uint32")
        for i in T.unroll(self.block_n // 2):
            acc_s[i] = T.float32(0)
        for i in T.serial(self.head_dim // 16):
            T.ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](
                *[a[x] for x in range(4)], q_tile(i // 4, q_row + here % 16, swizzled(i % 4 * 2 + here // 16, here % 8))
            )
            for n in T.unroll(self.block_n // 16):
                T.ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](
                    *[b[x] for x in range(4)],
                    k_tile(i // 4, n * 16 + here // 16 * 8 + here % 8, swizzled(i % 4 * 2 + here // 8 % 2, here % 8)),
                )
                for half in T.unroll(2):
                    T.ptx[self._mma()](
                        *[acc_s[n * 8 + half * 4 + x] for x in range(4)],
                        *[a[x] for x in range(4)],
                        b[half * 2], b[half * 2 + 1],
                        *[acc_s[n * 8 + half * 4 + x] for x in range(4)],
                    )  # fmt: skip

    def _mma(self):
        t = element_type(self.dtype).ptx
        return f"mma.sync.aligned.m16n8k16.row.col.f32.{t}.{t}.f32"

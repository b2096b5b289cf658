"""What the archs of the mma.sync families don't have in common of copies, products and rounding, to be mixed into a
machine with ``types``."""

from __future__ import annotations

from tvm.script import tirx as T

from schedules.families.mma.staged import load_or_zero, pack_halves

COPY = "cp.async.cg.shared.global.L2::128B"
_TURING = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32"


class AsynchronousCopies:
    """cp.async, from Ampere on; with :class:`schedules.families.mma.machine.RowCopies`."""

    @T.inline
    def copy(self, matrix, stage, tile_first, live, ragged=False):
        """Start copying a tile; what doesn't exist is filled with zeros, so that nothing branches."""

        @T.inline
        def row(n, memory, shared, inside):
            size = T.meta_var(T.Select(inside, T.uint32(16), T.uint32(0)))
            T.ptx[COPY](shared, matrix.memory.ptr_to([memory]), 16, size)

        matrix.find(tile_first)
        self.each_row(matrix, stage, tile_first, live, ragged, row)

    @T.inline
    def wait(self, in_flight):
        """Wait until at most ``in_flight`` groups of this thread's copies are."""
        T.ptx.cp.async_.wait_group(in_flight)

    @T.inline
    def arrive(self, in_flight):
        """The same, and every warp is here."""
        self.wait(in_flight)
        T.cuda.cta_sync()


class AsynchronousStages(AsynchronousCopies):
    """The same for a machine that fetches tiles into stages: whole groups of copies are on their way."""

    def place_staging(self, count: int):
        """Nothing waits in registers."""

    @T.inline
    def send(self, matrix, stage, tile_first, live, at):
        """Start copying a tile that may go beyond the last row."""
        self.copy(matrix, stage, tile_first, live, True)

    @T.inline
    def commit(self):
        """What was sent is a group."""
        T.ptx.cp.async_.commit_group()

    @T.inline
    def put(self, matrix, stage, at):
        """It goes to its stage by itself."""


class StagedStages:
    """Tiles into stages without cp.async: loaded to registers, ``count`` times 16 bytes, and stored after a step."""

    def place_staging(self, count: int):
        """Registers for a thread's part of the tiles of a step."""
        self.staging = T.alloc_local([count * 4], "uint32")

    @T.inline
    def copy(self, matrix, stage, tile_first, live, ragged=False):
        """Copy a tile at once; what doesn't exist is zero."""

        @T.inline
        def row(n, memory, shared, inside):
            load_or_zero(self.staging, 0, matrix.memory.ptr_to([memory]), inside)
            T.ptx["st.shared.v4.b32"](shared, *[self.staging[x] for x in range(4)])

        self.each_row(matrix, stage, tile_first, live, ragged, row)

    @T.inline
    def send(self, matrix, stage, tile_first, live, at):
        """Start loading a tile that may go beyond the last row, to the staging's 16 bytes from number ``at`` on."""

        @T.inline
        def row(n, memory, shared, inside):
            load_or_zero(self.staging, (at + n) * 4, matrix.memory.ptr_to([memory]), inside)

        self.each_row(matrix, stage, tile_first, live, True, row)

    @T.inline
    def put(self, matrix, stage, at):
        """Store what was loaded."""

        @T.inline
        def row(n, memory, shared, inside):
            T.ptx["st.shared.v4.b32"](shared, *[self.staging[(at + n) * 4 + x] for x in range(4)])

        self.each_row(matrix, stage, 0, True, False, row)

    @T.inline
    def commit(self):
        """There are no groups."""

    @T.inline
    def wait(self, in_flight):
        """Nothing is on its way but to registers."""

    @T.inline
    def arrive(self, in_flight):
        """Every warp is here."""
        T.cuda.cta_sync()


class AmpereProducts:
    """m16n8k16, of either type."""

    @T.inline
    def multiply(self, C, c, A, a, B, b):
        """One m16n8k16 product."""
        dt = T.meta_var(self.types.v.ptx)
        T.ptx[f"mma.sync.aligned.m16n8k16.row.col.f32.{dt}.{dt}.f32"](
            *[C[c + x] for x in range(4)], *[A[a + x] for x in range(4)], B[b], B[b + 1], *[C[c + x] for x in range(4)]
        )

    @T.inline
    def pack_pair(self, to, i, low, high):
        """Two float32 as one register of 16-bit elements."""
        T.ptx[self.types.v.pack](to[i], high, low)


class TuringProducts:
    """Two m16n8k8 for one k of 16: the registers are those of one m16n8k16."""

    @T.inline
    def multiply(self, C, c, A, a, B, b):
        """A product of k = 16."""
        for k in T.unroll(2):
            T.ptx[_TURING](
                *[C[c + x] for x in range(4)], A[a + k * 2], A[a + k * 2 + 1], B[b + k], *[C[c + x] for x in range(4)]
            )

    @T.inline
    def pack_pair(self, to, i, low, high):
        """Two float32 as one register of halves."""
        pack_halves(to, i, low, high)

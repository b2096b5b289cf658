"""A mask as a picture: queries down, keys across, and which tiles a kernel skips, masks, or takes as they are."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np

from schedules.definition.attention import Attention
from schedules.definition.errors import DefinitionError
from schedules.definition.sample import parameters_of
from tvm_flash import reference

#: Of tiles: nobody sees anything, somebody sees something, everybody sees everything; how they are written.
NOTHING, PARTLY, ALL = range(3)
_LETTERS = "·▒█"

#: Colours of a score in a tile that sees nothing; hidden, and seen, in one that is masked; in one that sees all; of the
#: lines between tiles.
_PALETTE = ((0xF1, 0xF2, 0xF4), (0xFB, 0xE6, 0xCB), (0xE0, 0x8A, 0x2E), (0x2F, 0x6F, 0x9F), (0xFF, 0xFF, 0xFF))
_LINE = 4
#: Pixels that a picture is wide at least, if that is possible with a whole number for each score.
_WIDTH = 384


@dataclass(frozen=True)
class Picture:
    """What is ``seen``, ``(seqlen_q, seqlen_kv)``, and the rows and columns of a tile."""

    seen: np.ndarray
    block_m: int
    block_n: int

    @staticmethod
    def of(definition: Attention, seqlen_q: int, seqlen_kv: int, block_m: int, block_n: int) -> Picture:
        """The mask of a definition at its first batch entry and head, by its twin.

        Raises
        ------
        DefinitionError: it has no twin, or an example that makes no sense.
        """
        if definition.mask.twin is None:
            raise DefinitionError(f"{definition.name}: its mask has no twin to draw")
        params = parameters_of(definition, 1, 1, seqlen_q, seqlen_kv)
        axes = {p.name: p.axes for p in definition.params}
        at = reference.positions(1, 1, seqlen_q, seqlen_kv, reference.beside_scores(params, axes))
        seen = np.broadcast_to(definition.mask.twin(at), (1, 1, seqlen_q, seqlen_kv))[0, 0]
        return Picture(seen.astype(bool), block_m, block_n)

    @property
    def tiles(self) -> np.ndarray:
        """What each tile is: ``NOTHING``, ``PARTLY`` or ``ALL``."""
        rows, columns = (np.arange(0, n, b) for n, b in zip(self.seen.shape, (self.block_m, self.block_n), strict=True))

        def joined(join):
            return join.reduceat(join.reduceat(self.seen, rows, axis=0), columns, axis=1)

        some, every = joined(np.logical_or), joined(np.logical_and)
        return np.where(every, ALL, np.where(some, PARTLY, NOTHING))

    def text(self) -> str:
        """A letter for each tile, and how many there are of each kind."""
        tiles = self.tiles
        lines = ["".join(_LETTERS[x] for x in row) for row in tiles]
        counts = [int((tiles == kind).sum()) for kind in (ALL, PARTLY, NOTHING)]
        words = "{} of {} tiles are seen whole (█), {} in part (▒), {} not at all (·)"
        return "\n".join([*lines, words.format(counts[0], tiles.size, *counts[1:])])

    def pixels(self) -> np.ndarray:
        """Numbers of colours, uint8."""
        of_scores = np.repeat(np.repeat(self.tiles, self.block_m, axis=0), self.block_n, axis=1)
        of_scores = of_scores[: self.seen.shape[0], : self.seen.shape[1]]
        colours = np.where(of_scores == ALL, 3, np.where(of_scores == NOTHING, 0, 1 + self.seen)).astype(np.uint8)
        scale = max(1, -(-_WIDTH // self.seen.shape[1]))
        found = np.repeat(np.repeat(colours, scale, axis=0), scale, axis=1)
        found[:: self.block_m * scale] = _LINE
        found[:, :: self.block_n * scale] = _LINE
        return found

    def png(self) -> bytes:
        """The picture as a file."""
        pixels = self.pixels()
        rows = b"".join(b"\0" + row.tobytes() for row in pixels)
        header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 3, 0, 0, 0)
        palette = bytes(x for colour in _PALETTE for x in colour)
        chunks = ((b"IHDR", header), (b"PLTE", palette), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
        return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*x) for x in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

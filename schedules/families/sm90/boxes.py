"""Boxes of TMA: how tensors are described to it, and where the rows and the keys of a work tile are then."""

from __future__ import annotations

from schedules.families.sm90.packing import Rows
from schedules.families.sm90.tma import encode_keys, encode_queries, encode_ragged, ragged_box
from schedules.tile.geometry import Geometry, Tensor
from schedules.tile.key_source import ContiguousRows


class DenseBoxes:
    """Of tensors with a batch axis."""

    def __init__(self, geometry: Geometry, rows: Rows):
        self.geometry, self.rows = geometry, rows

    def encode_queries(self, descriptor, tensor: Tensor, box_rows: int):
        """Make the descriptor of q or o, on the host."""
        return encode_queries(descriptor, tensor, self.rows, box_rows)

    def encode_keys(self, descriptor, tensor: Tensor, box_rows: int):
        """Make the descriptor of k or v, on the host."""
        return encode_keys(descriptor, tensor, box_rows)

    def queries(self, block, row):
        """Where rows from ``row`` of the work tile on are: position, head in its group, group, batch."""
        row = block.row_first + row
        head = block.head - block.kv_head * self.rows.group + self.rows.head(row)
        return self.rows.position(row), head, block.kv_head, block.batch

    def keys(self, block, key):
        """Where keys from ``key`` on are."""
        keys = self.geometry.keys.of(block.batch)
        return ContiguousRows(self.geometry.k, block.batch, block.kv_head, keys).box(key)


class RaggedBoxes:
    """Of tensors of ragged sequences: a box ends where its sequence does."""

    def encode_queries(self, descriptor, tensor: Tensor, box_rows: int):
        """Make the descriptor of q or o, on the host."""
        return encode_ragged(descriptor, tensor, box_rows)

    encode_keys = encode_queries

    def queries(self, block, row):
        """Where rows from ``row`` of the work tile on are."""
        return ragged_box(block.geometry.queries.of(block.batch), block.row_first + row, block.head)

    def keys(self, block, key):
        """Where keys from ``key`` on are."""
        return ragged_box(block.geometry.keys.of(block.batch), key, block.kv_head)

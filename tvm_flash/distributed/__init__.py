"""Context parallel attention: sequences that are shared among the processes of a ``torch.distributed`` mesh.

``docs/distributed.md`` has the methods, how to choose among them, and what they cost.
"""

from tvm_flash.distributed.attention import context_parallel_attention
from tvm_flash.distributed.sharding import sequence_positions, shard_batch, shard_sequence, unshard_sequence

__all__ = [
    "context_parallel_attention",
    "sequence_positions",
    "shard_batch",
    "shard_sequence",
    "unshard_sequence",
]

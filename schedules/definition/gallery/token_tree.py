"""A tree of speculative tokens (Miao et al., 2024), for ragged batches and keys on pages: each token sees all that was
there before, and of the new ones its ancestors and itself.

Queries are the new tokens of each sequence, the last keys.  ``sees[b, i, t]`` says whether token ``i`` of sequence
``b`` sees token ``t``: a small matrix for each sequence, of as many rows as the longest has tokens.
"""

import numpy as np
from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import IDENTITY, Mask
from tvm_flash.packs.manifest import Param

PARAMS = (Param("sees", "bool", rank=3),)


def line(at):
    before = at.seqlen_kv - at.seqlen_q
    return T.Or(at.j < before, at.table["sees"](at.b, at.i, at.j - before))


def line_twin(at):
    before, sees = at.seqlen_kv - at.seqlen_q, np.asarray(at.params["sees"])
    row, column = (np.clip(x, 0, n - 1) for x, n in zip((at.i, at.j - before), sees.shape[1:], strict=True))
    return (at.j < before) | sees[at.b, row, column]


def sees_of(parents):
    """The matrix of a tree: ``parents[t]`` is the token before token ``t``, −1 of one that follows what was before."""
    sees = np.eye(len(parents), dtype=bool)
    for token, parent in enumerate(parents):
        if parent >= 0:
            sees[token] |= sees[parent]
    return sees


def example(batch, heads, seqlen_q, seqlen_kv):
    """Each token has three that may follow it."""
    sees = sees_of([(t - 1) // 3 if t else -1 for t in range(seqlen_q)])
    return {"sees": np.broadcast_to(sees, (batch, *sees.shape))}


token_tree = Attention(IDENTITY, Mask("line", line, line_twin, PARAMS), example=example)

"""A small case that any kernel can be checked on."""

from __future__ import annotations

from typing import Any

import numpy as np

#: The case: odd lengths, grouped heads, more keys than queries.
BATCH, HEADS, KV_HEADS, SEQLEN_Q, SEQLEN_KV = 2, 4, 2, 33, 70

#: Run-time parameters of the builtin definition: small enough that each of them changes the result.
PARAMS = {
    "softcap": 2.5,
    "alibi_slopes": np.array([[2.0 ** -(2 + h + HEADS * b) for h in range(HEADS)] for b in range(BATCH)], np.float32),
    "window_left": 40,
    "window_right": 3,
    "sink_tokens": 4,
    "kv_start": np.array([[2, 3, 0, 1], [11, 0, 5, 12]], np.int32),
    "kv_end": np.array([[70, 60, 50, 40], [70, 41, 52, 63]], np.int32),
    "query_start": np.array([[37, 30, 21, 10], [40, 9, -2, 31]], np.int32),
    "has_query_start": 1,
    "has_alibi_slopes": 1,
    "has_sinks": 1,
    "sinks": np.array([[0.5, -1.0, 2.0, -np.inf], [1.5, 0.0, -3.0, 4.0]], np.float32),
}


def _of_scores(seqlen_q: int, seqlen_kv: int) -> dict[str, np.ndarray]:
    """Parameters with a value for each score: three keys of four are seen, and none by one query; 16 bits hold what is
    added."""
    i, j = np.arange(seqlen_q)[:, None], np.arange(seqlen_kv)
    head = np.arange(BATCH * HEADS).reshape(BATCH, HEADS, 1, 1)
    return {
        "visible": ((i + 3 * j + head) % 4 > 0) & (i != head),
        "bias": (np.round(64 * np.cos(0.1 * i - 0.3 * j + head)) / 64).astype(np.float32),
    }


PARAMS |= _of_scores(SEQLEN_Q, SEQLEN_KV)


def params_of(seqlen_q: int, seqlen_kv: int) -> dict[str, Any]:
    """The parameters for other lengths than the case's: key ranges end as far from the last key, and query 0 stands as
    far from where it would stand anyway, so that about as many rows see keys."""
    later, farther = seqlen_kv - SEQLEN_KV, (seqlen_kv - seqlen_q) - (SEQLEN_KV - SEQLEN_Q)
    placed = {"kv_end": PARAMS["kv_end"] + later, "query_start": PARAMS["query_start"] + farther}
    return {**PARAMS, **placed, **_of_scores(seqlen_q, seqlen_kv)}

"""Inputs of :mod:`tvm_flash.measure.small_case` for sequences of different lengths, packed and on pages."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

#: Keys on a page: fewer than a tile has, and no divisor of it.
PAGE_SIZE = 12


def packed(sequences: list[Mapping[str, np.ndarray]], after: int = 0) -> dict[str, np.ndarray]:
    """Inputs of sequences, by role ``(heads, length, dim)`` or ``(heads, length)``, as ragged kernels take them.

    ``after`` are rows and keys after the last, full of NaN.
    """
    inputs = {role: one_after_another([x[role] for x in sequences], after, np.nan) for role in sequences[0]}
    lengths = {"cu_seqlens_q": "q", "cu_seqlens_k": "k"}
    starts = {name: np.cumsum([0, *(x[role].shape[1] for x in sequences)]) for name, role in lengths.items()}
    return inputs | {name: x.astype(np.int32) for name, x in starts.items()}


def one_after_another(sequences: list[np.ndarray], after: int, beyond: float) -> np.ndarray:
    """``(total, heads, dim)`` of ``(heads, length, dim)`` each, or ``(heads, total)`` of ``(heads, length)``."""
    rest = np.full((len(sequences[0]), after, *sequences[0].shape[2:]), beyond, sequences[0].dtype)
    whole = np.concatenate([*sequences, rest], axis=1)
    return np.ascontiguousarray(whole.swapaxes(0, 1)) if whole.ndim == 3 else whole


def on_pages(inputs: Mapping[str, np.ndarray], page_size: int = PAGE_SIZE) -> dict[str, np.ndarray]:
    """Inputs of ragged kernels as those take them whose keys lie on pages: in no order, NaN where no key is."""
    starts = inputs["cu_seqlens_k"]
    lengths = np.diff(starts)
    columns = -(-int(lengths.max()) // page_size) + 1
    order = np.random.default_rng(2).permutation(len(lengths) * columns)
    table = np.full((len(lengths), columns), np.iinfo(np.int32).max, np.int32)  # nobody reads what no key needs
    pages = {
        role: np.full((len(order), page_size, *inputs[role].shape[1:]), np.nan, inputs[role].dtype) for role in "kv"
    }
    for b, length in enumerate(lengths):
        keys = np.arange(length)
        table[b, : -(-length // page_size)] = order[b * columns :][: -(-length // page_size)]
        for role, x in pages.items():
            x[table[b, keys // page_size], keys % page_size] = inputs[role][starts[b] + keys]
    others = {role: x for role, x in inputs.items() if role not in ("k", "v", "cu_seqlens_k")}
    return others | pages | {"seqlens_k": lengths.astype(np.int32), "page_table": table}

"""What :func:`tvm_flash.flash_attention_with_kvcache` checks of numbers in tensors before it writes, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tvm_flash.call.ragged import fault_of
from tvm_flash.errors import InvalidArgumentError
from tvm_flash.tracing.torch_cache_checks import Sizes


def check_contents(
    tensors: Mapping[str, Any],
    before: torch.Tensor,
    after: torch.Tensor,
    table: torch.Tensor,
    sizes: Sizes,
    along: bool,
    shift: int,
) -> None:
    """What is in int32 tensors of the CPU; ``along`` says that queries are turned by positions of their own.

    Page p of k_cache is page p − ``shift`` of v_cache, if that isn't 0.

    Raises
    ------
    InvalidArgumentError
    """
    for name, of in (("cu_seqlens_q", "q"), ("cu_seqlens_k_new", "k")):
        if tensors[name] is not None and (fault := fault_of(tensors[name].tolist(), of, tensors[of].shape[0])):
            raise InvalidArgumentError(f"{name}: {fault}")
    first, last = (x.numpy() for x in (before, after))
    for b, (begin, new) in enumerate(zip(first.tolist(), (last - first).tolist(), strict=True)):
        if begin < 0 or begin + new > sizes.capacity:  # in Python, since the sum may not be an int32
            new = f", and {new} more come to them" if new else ""
            raise InvalidArgumentError(
                f"cache_seqlens: is {begin} of sequence {b}{new}, expected room for them among {sizes.capacity} keys"
            )
    page_size, pages = tensors["k_cache"].shape[1], tensors["k_cache"].shape[0]
    entries_of = table.numpy()
    columns, each = np.arange(entries_of.shape[1]), max(page_size, 1)
    needed = columns < ((last + (page_size - 1)) // each)[:, None]
    wrong = ((entries_of < 0) | (entries_of >= pages)) & needed
    if wrong.any():
        b, i = np.argwhere(wrong)[0].tolist()
        name, place = (
            ("page_table", f"[{b}, {i}]") if tensors["page_table"] is not None else ("cache_batch_idx", f"[{b}]")
        )
        raise InvalidArgumentError(
            f"{name}: is {int(entries_of[b, i])} at {place}, expected 0 to {pages - 1}"
            if pages
            else f"k_cache: has no pages, and sequence {b} has {int(last[b])} keys; expected the pages that hold them"
        )
    if shift:
        of_keys = set(entries_of[needed].tolist())
        if both := of_keys & {page + shift for page in of_keys}:
            page = min(both)
            raise InvalidArgumentError(
                f"v_cache: shares memory with k_cache, to which keys are appended, and its page {page - shift} is page "
                f"{page} there; sequences need both, give v_cache memory of its own"
            )
    if tensors["k"] is not None:
        repeated = _repeated_padding(entries_of, first, last)
        needed[repeated] = False
        if tensors["cache_batch_idx"] is not None:
            _check_different(np.delete(entries_of[:, 0], repeated).tolist())
        if tensors["page_table"] is not None:
            written = needed & (columns >= (first // each)[:, None]) & (last > first)[:, None]
            _check_shared(entries_of, needed, written, first, last, page_size, pages)
    _check_positions(tensors, before, after, along)


def _repeated_padding(table: np.ndarray, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Sequences that have a new key and none before, but for one of those whose key comes to the same page.

    So look the rows that bring a batch to a size for which a graph was captured: all have one page, and nobody asks
    what they see.  Whatever is no such row has a key before, of which sharing a page is told, at the next token.
    """
    alone = np.flatnonzero((before == 0) & (after == 1))
    if len(alone) < 2:
        return alone[:0]
    return np.delete(alone, np.unique(table[alone, 0], return_index=True)[1])


def _check_different(entries: list[int]) -> None:
    if len(set(entries)) < len(entries):
        raise InvalidArgumentError(
            "cache_batch_idx: names an entry twice, and keys are appended; expected different ones"
        )


def _check_shared(table, needed, written, before, after, size: int, pages: int) -> None:
    """That a row to which a new key comes is no other key's; ``needed`` and ``written`` are entries of the table."""
    to = table[written]
    is_written = np.zeros(pages, bool)
    is_written[to] = True
    holding = is_written[table[needed]]
    if np.count_nonzero(holding) == len(to) == len(set(to.tolist())):
        return
    holders: dict[int, list[tuple[int, int]]] = {}
    for b, i in np.argwhere(needed)[holding].tolist():
        holders.setdefault(int(table[b, i]), []).append((b, i))
    for b, i in np.argwhere(written).tolist():
        page = int(table[b, i])
        first, end = max(int(before[b]) - i * size, 0), min(int(after[b]) - i * size, size)
        for other, j in holders[page]:
            if (other, j) != (b, i) and min(after[other] - j * size, size) > first:
                raise InvalidArgumentError(
                    f"page_table: has page {page} at [{b}, {i}], to whose rows {first} to {end - 1} keys are appended, "
                    f"and at [{other}, {j}], where they are other keys; give each sequence pages of its own to write "
                    f"to, or no new keys"
                )


def _check_positions(tensors: Mapping[str, Any], before: torch.Tensor, after: torch.Tensor, along: bool) -> None:
    """That the rotation has an angle for each position."""
    cos, first = tensors["rotary_cos"], tensors["rotary_seqlens"]
    if cos is None or not before.numel():
        return
    first = before if first is None else first
    last = first + torch.maximum(after - before, torch.ones_like(before)) - 1
    if along:
        starts, q = tensors["cu_seqlens_q"], tensors["q"]
        last = torch.maximum(last, first + (q.shape[1] if starts is None else starts.diff()) - 1)
    if int(first.min()) < 0 or int(last.max()) >= cos.shape[0]:
        raise InvalidArgumentError(
            f"rotary_cos: has {cos.shape[0]} positions, and {int(first.min())} to {int(last.max())} are needed"
        )

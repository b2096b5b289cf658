"""``causal`` and ``window_size`` become the cheapest mask that means the same."""

import itertools

import numpy as np
import pytest

from tvm_flash import reference
from tvm_flash.call.problem import Mask, normalise_mask


def visible(mask: Mask, seqlen_q: int, seqlen_kv: int) -> np.ndarray:
    left, right = mask.widths(seqlen_q, seqlen_kv)
    params = {"window_left": left, "window_right": right}
    at = reference.Positions(np.arange(seqlen_q)[:, None], np.arange(seqlen_kv)[None], seqlen_q, seqlen_kv, params)
    by_window = np.broadcast_to(reference.window(at), (seqlen_q, seqlen_kv))
    assert np.array_equal(by_window, np.broadcast_to(reference.MASKS[mask.kind](at), by_window.shape))
    return by_window


def as_documented(causal, left, right, seqlen_q, seqlen_kv):
    """FlashAttention's documentation, element by element."""
    result = np.zeros((seqlen_q, seqlen_kv), bool)
    for i, j in itertools.product(range(seqlen_q), range(seqlen_kv)):
        diagonal = i + seqlen_kv - seqlen_q
        result[i, j] = (
            (left < 0 or j >= diagonal - left)
            and (right < 0 or j <= diagonal + right)
            and (not causal or j <= diagonal)
        )
    return result


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("lengths", list(itertools.product((1, 2, 4, 7), repeat=2)))
def test_every_window_of_small_problems(causal, lengths):
    for left, right in itertools.product((-1, 0, 1, 2, 3, 6, 7, 100, 10**12), repeat=2):
        mask = normalise_mask(causal, (left, right), *lengths)
        assert np.array_equal(visible(mask, *lengths), as_documented(causal, left, right, *lengths)), (left, right)


@pytest.mark.parametrize(
    ("causal", "window", "lengths", "kind"),
    [
        (False, (-1, -1), (9, 9), "full"),
        (True, (-1, -1), (9, 9), "causal"),
        (True, (-1, 5), (9, 9), "causal"),
        (False, (-1, 0), (9, 9), "causal"),
        (False, (100, 100), (9, 9), "full"),
        (True, (100, 100), (9, 9), "causal"),
        (True, (-1, -1), (1, 9), "full"),  # a single query stands on the last key
        (True, (4, -1), (9, 9), "window"),
        (False, (4, 4), (9, 9), "window"),
        (False, (-1, 3), (9, 9), "window"),
    ],
)
def test_the_cheapest_kind(causal, window, lengths, kind):
    assert normalise_mask(causal, window, *lengths).kind == kind

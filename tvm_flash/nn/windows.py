"""Windows as flash_attn's functions take them."""

from __future__ import annotations

from tvm_flash.call.checks import check_window


def sides(window_size: tuple[int | None, int | None] | None) -> tuple[int, int]:
    """``(left, right)`` with −1 for a side that is None or negative; what are no sides is refused."""
    try:
        found = (None, None) if window_size is None else tuple(window_size)
        return tuple(-1 if x is None or x < 0 else x for x in found)
    except (TypeError, ValueError, RuntimeError):  # of tensors too
        return check_window(window_size)

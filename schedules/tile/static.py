"""What is decided when a kernel is made, and what when it runs: in a kernel's text both are an ``if``."""

from __future__ import annotations

from typing import TypeVar

Value = TypeVar("Value")


def static(value: Value) -> Value:
    """The value itself; marks a condition on it as decided when the kernel is made, so that one branch remains.

    Such an ``if`` around one on run-time values can't be joined with it by ``and``.
    """
    return value

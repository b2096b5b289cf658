"""Errors of a drop-in: they name the arguments that it was called with, and not those that it calls with."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from tvm_flash.errors import TvmFlashError


def named_call(names: Mapping[str, str], function: Callable, *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``; an error's text has, for each of its arguments in ``names``, what that gives.

    In a program that is compiled texts are as they are, since nobody catches what happens in it.
    """
    if torch.compiler.is_compiling():
        return function(*args, **kwargs)
    try:
        return function(*args, **kwargs)
    except TvmFlashError as e:
        text = re.sub(rf"\b({'|'.join(names)})\b", lambda found: names[found[0]], str(e))
        e.args = (text,)
        raise

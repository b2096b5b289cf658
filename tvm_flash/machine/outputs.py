"""Whether a file or a folder that a command is to write can be written, asked before anything takes time."""

from __future__ import annotations

import os
from pathlib import Path


def fault_of_file(path: Path) -> str | None:
    """Why a file can't be written, or None if it can; its folder has to be there."""
    if path.is_dir():
        return f"{path} is a folder"
    if path.exists():
        return None if os.access(path, os.W_OK) else f"{path} can't be written"
    folder = path.absolute().parent
    return _fault_of(folder) if folder.exists() else f"{folder} isn't there"


def fault_of_folder(path: Path) -> str | None:
    """Why files can't be written into a folder, or None if they can; it need not be there yet."""
    return _fault_of(next(x for x in (path, *path.absolute().parents) if x.exists()))


def _fault_of(there: Path) -> str | None:
    if not there.is_dir():
        return f"{there} is no folder"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} can't be written"

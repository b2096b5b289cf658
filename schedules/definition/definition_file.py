"""Definitions of a user's own: ``file.py:name``."""

from __future__ import annotations

import dataclasses
import keyword
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from schedules.definition.attention import Attention
from schedules.definition.pattern import DefinitionError

#: Mask and score of a definition of the user's that isn't made of a mask and a score modification.
CUSTOM = "custom"


@dataclass(frozen=True)
class DefinitionFile:
    """Where a definition is: a Python file, and the name of the object in it."""

    path: Path
    name: str

    @staticmethod
    def parse(text: str) -> DefinitionFile:
        """Read ``"file.py:name"``.

        Raises
        ------
        ValueError: it has another form, or there is no such file.
        """
        file, colon, name = text.rpartition(":")
        if not colon or not file or not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(f"--definition {text!r}: expected file.py:name, the name of a definition in a Python file")
        path = Path(file).resolve()
        if not path.is_file():
            raise ValueError(f"--definition {text!r}: there is no file {path}")
        return DefinitionFile(path, name)

    def load(self) -> Callable:
        """Run the file and take the object: an :class:`Attention`, or a function with the signature of its call.

        Raises
        ------
        DefinitionError: the file fails, or has no such object, or it isn't callable.
        """
        module = types.ModuleType(self.path.stem)
        module.__file__ = str(self.path)
        try:
            # Not by an import: bytecode of an earlier text of the same second and size would pass for this one's.
            exec(compile(self.path.read_bytes(), str(self.path), "exec"), vars(module))
        except Exception as e:  # a user's file may fail in any way; the cause is chained
            raise DefinitionError(f"{self.path}: can't be loaded: {type(e).__name__}: {e}") from e
        if not hasattr(module, self.name):
            names = sorted(n for n, value in vars(module).items() if isinstance(value, Attention))
            hint = f"; its definitions are {', '.join(names)}" if names else ""
            raise DefinitionError(f"{self.path}: defines no {self.name!r}{hint}")
        definition = getattr(module, self.name)
        if isinstance(definition, Attention):
            return dataclasses.replace(definition, name=self.name)
        if not callable(definition):
            raise DefinitionError(
                f"{self.path}:{self.name} is {type(definition).__name__}; expected an Attention, or a function "
                f"(head_dim, dtype, *, head_dim_v=None, index_dtype) that returns a PrimFunc"
            )
        return definition

    def variant(self) -> tuple[str, str]:
        """Names of its mask and score for the manifest."""
        definition = self.load()
        if isinstance(definition, Attention):
            return definition.mask.name, definition.score.name
        return CUSTOM, CUSTOM

"""Arrays of a kernel's own as variables, where each use names an element by a constant, and there are very many.

nvcc's optimiser looks at the uses of an array anew whenever it has changed one of them, before it takes the array
apart: with the square of their number.  A kernel of 128 registers a thread for its output, which masks scores in three
places, names elements of two arrays 3300 times each: it takes nvcc 7.9 s so, and 3.6 s with variables.
"""

from __future__ import annotations

import re
from collections import Counter

#: Uses of an array from which on it becomes variables.  So, and with the last element declared first, nvcc made the
#: same PTX of all of them as of arrays; of arrays with fewer uses too, some of it had other registers.
MANY_USES = 2000

_KERNEL = re.compile(r'^extern "C" __global__ void [^;{]* \{.*?^\}', re.M | re.S)
_DECLARATION = re.compile(r"\balignas\(\d+\) (\w+) (\w+)\[(\d+)\];")
_USE = re.compile(r"\b(\w+)\[\d+\]")


def with_variables(device: str) -> str:
    """A device half in which arrays with many uses are variables."""
    return _KERNEL.sub(lambda kernel: _of_kernel(kernel[0]), device)


def _of_kernel(text: str) -> str:
    uses = Counter(_USE.findall(text))
    declared = Counter(name for _, name, _ in _DECLARATION.findall(text))
    for declaration in list(_DECLARATION.finditer(text)):
        dtype, name, size = declaration.groups()
        if uses[name] < MANY_USES or declared[name] > 1 or re.search(rf"\b{name}\b(?!\[\d+\])", text):
            continue
        names = ", ".join(f"{name}_at_{i}" for i in reversed(range(int(size))))
        text = text.replace(declaration[0], f"{dtype} {names};")
        text = re.sub(rf"\b{name}\[(\d+)\]", rf"{name}_at_\1", text)
    return text

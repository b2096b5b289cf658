"""Arrays of a kernel's own with many uses, each of which names an element by a constant, as arrays of one element.

nvcc's optimiser looks at all uses of an array anew whenever it has changed one of them, with the square of their
number, before it takes the array apart: a kernel of 128 registers a thread for its output, which masks scores in three
places, names elements of two arrays 3300 times each, and takes it 7.9 s.  Taken apart beforehand it takes 3.5 s.

The elements are declared in the order in which nvcc comes by them, the last first, and each is an array still, so that
there are as many instructions.  So it made the same PTX of the twelve kernels that were compared, of sm_80 and sm_90a;
with variables, in the other order, or of arrays with few uses too, some of it had other registers.
"""

from __future__ import annotations

import re
from collections import Counter

#: Uses of an array from which on its elements are taken apart.
MANY_USES = 300

_KERNEL = re.compile(r'^extern "C" __global__ void [^;{]* \{.*?^\}', re.M | re.S)
#: A declaration, or a use of an element that a constant names.
_PLACE = re.compile(
    r"\balignas\(\d+\) (?P<dtype>\w+) (?P<array>\w+)\[(?P<size>\d+)\];|\b(?P<name>\w+)\[(?P<index>\d+)\]"
)
_NAME = re.compile(r"\b[A-Za-z_]\w*")


def with_elements_apart(device: str) -> str:
    """A device half in which such arrays are apart."""
    return _KERNEL.sub(lambda kernel: _of_kernel(kernel[0]), device)


def _of_kernel(text: str) -> str:
    places, named = list(_PLACE.finditer(text)), Counter(_NAME.findall(text))
    constant = Counter(x["array"] or x["name"] for x in places)
    declared = Counter(x["array"] for x in places if x["array"])
    apart = {x for x, n in declared.items() if n == 1 and constant[x] == named[x] > MANY_USES}

    def replaced(place: re.Match) -> str:
        if place["array"] in apart:
            elements = (f"{place['array']}_at_{i}[1]" for i in reversed(range(int(place["size"]))))
            return f"{place['dtype']} {', '.join(elements)};"
        return f"{place['name']}_at_{place['index']}[0]" if place["name"] in apart else place[0]

    return _PLACE.sub(replaced, text)

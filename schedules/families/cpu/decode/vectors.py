"""What TIR has no expression for: sums along vectors and their parts, as LLVM's assembly for any instruction set.

A quad is four neighbouring lanes.
"""

from __future__ import annotations

from tvm.script import tirx as T


def _mask(places) -> str:
    return f"<{len(places)} x i32> <{', '.join(f'i32 {x}' for x in places)}>"


def _halves(value: str, lanes: int, combine) -> tuple[list[str], str]:
    """Combine the halves of ``value`` until 4 lanes are left."""
    lines = []
    while lanes > 4:
        half = lanes // 2
        for side, start in (("low", 0), ("high", half)):
            places = _mask(range(start, start + half))
            lines.append(
                f"{value}_{side} = shufflevector <{lanes} x float> {value}, <{lanes} x float> poison, {places}"
            )
        lines += combine(f"{value}_half", f"{value}_low", f"{value}_high", half)
        value, lanes = f"{value}_half", half
    return lines, value


def _add(to: str, a: str, b: str, lanes: int) -> list[str]:
    return [f"{to} = fadd <{lanes} x float> {a}, {b}"]


def _larger(to: str, a: str, b: str, lanes: int) -> list[str]:
    vector = f"<{lanes} x float>"
    return [
        f"{to}_is = fcmp ogt {vector} {a}, {b}",
        f"{to} = select <{lanes} x i1> {to}_is, {vector} {a}, {vector} {b}",
    ]


def _function(result: str, name: str, arguments: list[str], lines: list[str], value: str) -> str:
    body = "\n".join(f"  {line}" for line in lines)
    head = f"define linkonce_odr {result} @{name}({', '.join(arguments)}) alwaysinline nounwind"
    return f"{head} {{\n{body}\n  ret {result} {value}\n}}\n"


def _sums(lanes: int) -> str:
    """Of four vectors of quads, the sums of each quad: that of a place is a quad of four sums, one of each vector.

    Each sum has the same order, whichever of the four it is, and wherever in a vector its quad is.
    """
    vector = f"<{lanes} x float>"
    quads = range(0, lanes, 4)

    def shuffled(to, a, b, quad):
        places = _mask([q + (x if x < 4 else lanes + x - 4) for q in quads for x in quad])
        return f"{to} = shufflevector {vector} {a}, {vector} {b}, {places}"

    lines = []
    for a, b, to, (low, high) in (
        ("%a", "%b", "%ab", ((0, 4, 1, 5), (2, 6, 3, 7))),
        ("%c", "%d", "%cd", ((0, 4, 1, 5), (2, 6, 3, 7))),
        ("%ab", "%cd", "%all", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ):
        lines += [shuffled(f"{to}_first", a, b, low), shuffled(f"{to}_second", a, b, high)]
        lines += _add(to, f"{to}_first", f"{to}_second", lanes)
    return _function(vector, "tvm_flash_sums", [f"{vector} %{x}" for x in "abcd"], lines, "%all")


def _quads(lanes: int) -> str:
    """A quad in all places of a vector, and the quad of a place."""
    functions = []
    for name, element in (("float32", "float"), ("uint32", "i32")):
        quad, vector = f"<4 x {element}>", f"<{lanes} x {element}>"
        lines = [f"%all = shufflevector {quad} %x, {quad} poison, {_mask([lane % 4 for lane in range(lanes)])}"]
        functions.append(_function(vector, f"tvm_flash_repeated_{name}", [f"{quad} %x"], lines, "%all"))
    for place in range(lanes // 4):
        lines = [
            f"%quad = shufflevector <{lanes} x float> %x, <{lanes} x float> poison, "
            f"{_mask(range(4 * place, 4 * place + 4))}"
        ]
        functions.append(_function("<4 x float>", f"tvm_flash_quad{place}", [f"<{lanes} x float> %x"], lines, "%quad"))
    return "".join(functions)


def _reduction(name: str, lanes: int, combine) -> str:
    lines, value = _halves("%x", lanes, combine)
    for step, places in (("two", (2, 3, 2, 3)), ("one", (1, 1, 1, 1))):
        lines.append(f"%{step}_other = shufflevector <4 x float> {value}, <4 x float> poison, {_mask(places)}")
        lines += combine(f"%{step}", value, f"%{step}_other", 4)
        value = f"%{step}"
    lines.append(f"%result = extractelement <4 x float> {value}, i64 0")
    return _function("float", name, [f"<{lanes} x float> %x"], lines, "%result")


#: acc[i] += a[i].low * b[i].low + a[i].high * b[i].high.
_DOT_VECTORS = """
define linkonce_odr <16 x float>
@tvm_flash_dot_vectors(<16 x float> %acc, <16 x i32> %a, <16 x i32> %b) alwaysinline nounwind {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %sum = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %acc, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %sum
}
"""


#: 16 float32 as pairs of bfloat16, to the nearest.
_ROUNDED = """
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)
define linkonce_odr <8 x i32> @tvm_flash_rounded(<16 x float> %x) alwaysinline nounwind {
  %y = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %x)
  %words = bitcast <16 x bfloat> %y to <8 x i32>
  ret <8 x i32> %words
}
"""


def _interleave() -> str:
    """Half of what two rows of 32 are, element by element in turn."""
    functions = []
    for half in range(2):
        places = _mask([x for i in range(16 * half, 16 * half + 16) for x in (i, 32 + i)])
        lines = [
            f"%both = shufflevector <32 x i16> %a, <32 x i16> %b, {places}",
            "%words = bitcast <32 x i16> %both to <16 x i32>",
        ]
        arguments = ["<32 x i16> %a", "<32 x i16> %b"]
        functions.append(_function("<16 x i32>", f"tvm_flash_interleaved{half}", arguments, lines, "%words"))
    return "".join(functions)


def functions(lanes: int, has_pairs: bool) -> str:
    """The assembly of all that is called here with vectors of so many lanes; that of pairs follows ``DOT_PAIRS``."""
    reductions = _reduction("tvm_flash_sum", lanes, _add) + _reduction("tvm_flash_max", lanes, _larger)
    of_pairs = _DOT_VECTORS + _ROUNDED + _interleave() if has_pairs else ""
    return _sums(lanes) + _quads(lanes) + reductions + of_pairs


def sums(a, b, c, d):
    """The sums of the quads of four vectors: at each place a quad of those of ``a``, ``b``, ``c`` and ``d`` there."""
    return T.call_extern(str(a.ty.dtype), "tvm_flash_sums", a, b, c, d)


def repeated(quad, lanes: int, dtype: str):
    """A quad in all places of a vector."""
    return T.call_extern(f"{dtype}x{lanes}", f"tvm_flash_repeated_{dtype}", quad)


def quad(x, place: int):
    """The quad of a vector at a place."""
    return T.call_extern("float32x4", f"tvm_flash_quad{place}", x)


def total(x):
    """The sum of a vector."""
    return T.call_extern("float32", "tvm_flash_sum", x)


def largest(x):
    """The largest element of a vector."""
    return T.call_extern("float32", "tvm_flash_max", x)


def dot_vectors(acc, a, b):
    """``acc`` with the products of pairs."""
    return T.call_extern("float32x16", "tvm_flash_dot_vectors", acc, a, b)


def rounded(x):
    """16 float32 as 8 pairs of bfloat16."""
    return T.call_extern("uint32x8", "tvm_flash_rounded", x)


def interleaved(a, b, half: int):
    """The first (0) or second (1) half of the pairs that two rows of 32 bfloat16 make."""
    return T.call_extern("uint32x16", f"tvm_flash_interleaved{half}", a, b)

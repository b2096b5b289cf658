"""What TIR has no expression for: sums and the maximum along a vector, as LLVM's assembly for any instruction set."""

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
    """The sums of four vectors as one of four; each sum has the same order, whichever of the four it is."""
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
    rest, value = _halves("%all", lanes, _add)
    return _function("<4 x float>", "tvm_flash_sums", [f"{vector} %{x}" for x in "abcd"], lines + rest, value)


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
    return _sums(lanes) + reductions + (_DOT_VECTORS + _interleave() if has_pairs else "")


def sums(a, b, c, d):
    """The sums of four vectors."""
    return T.call_extern("float32x4", "tvm_flash_sums", a, b, c, d)


def total(x):
    """The sum of a vector."""
    return T.call_extern("float32", "tvm_flash_sum", x)


def largest(x):
    """The largest element of a vector."""
    return T.call_extern("float32", "tvm_flash_max", x)


def dot_vectors(acc, a, b):
    """``acc`` with the products of pairs."""
    return T.call_extern("float32x16", "tvm_flash_dot_vectors", acc, a, b)


def interleaved(a, b, half: int):
    """The first (0) or second (1) half of the pairs that two rows of 32 bfloat16 make."""
    return T.call_extern("uint32x16", f"tvm_flash_interleaved{half}", a, b)

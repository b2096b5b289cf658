"""Keys and values of 8 bits in the dtype of queries: a tile of rows, once for all that read it.

Where there is an instruction that looks 32 words up in a table of 64 (AVX-512), elements of 16 bits come from a table
of what each magnitude stands for, made for a scale with the expressions of :mod:`schedules.definition.cache`: to the
nearest and ties to even, a number and its opposite stand for opposites.  Where there is one that looks 64 bytes up in a
table of 128 (AVX-512 VBMI), which the processor is asked for, low and high bytes come from tables of their own.  Else
elements are computed one by one.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from schedules.definition.cache import dequantised
from schedules.families.cpu.isa import Isa

#: Magnitudes of a table, and the one of int8 that has no opposite.
_MAGNITUDES = 128
#: Words of a table: of magnitudes, of the one without an opposite, and of low and high bytes, in whole vectors.
_BYTES_AT = 160
TABLE = _BYTES_AT + _MAGNITUDES
#: Elements that are looked up at once.
_AT_ONCE = 32
#: Elements that are computed at once: what every head_dim is a multiple of.
_TOGETHER = 8

_BEGIN = """
declare <32 x i16> @llvm.x86.avx512.vpermi2var.hi.512(<32 x i16>, <32 x i16>, <32 x i16>)
declare <32 x i16> @llvm.abs.v32i16(<32 x i16>, i1)
declare <64 x i8> @llvm.abs.v64i8(<64 x i8>, i1)
declare i32 @tvm_flash_looks_up_bytes()
"""
#: Where row number ``j`` comes from, and where it goes.
_ROW = """\
  %j = phi i64 [ 0, %entry ], [ %j_next, %row_end ]
  %place = getelementptr i64, ptr %rows, i64 %j
  %offset = load i64, ptr %place, align 8
  %first = add i64 %offset, %base
  %x_row = getelementptr i8, ptr %from, i64 %first
  %to_first = mul i64 %j, %to_stride
  %y_row = getelementptr i16, ptr %to, i64 %to_first"""
#: (to, to_stride, from, rows, count, vectors, table): ``count`` rows of ``vectors`` times 32 elements, from the places
#: in ``rows`` on.  The stride is in elements.
_WIDEN = """
define linkonce_odr i32 @tvm_flash_widen_{cache}(
    ptr noalias %to, i64 %to_stride, ptr noalias %from, i64 %base, ptr noalias %rows, i64 %count, i64 %vectors,
    ptr noalias %table) noinline nounwind {{
  %bytes = call i32 @tvm_flash_looks_up_bytes()
  %has_bytes = icmp ne i32 %bytes, 0
  br i1 %has_bytes, label %by_bytes, label %entry
by_bytes:
  call void @tvm_flash_widen_bytes_{cache}(
      ptr %to, i64 %to_stride, ptr %from, i64 %base, ptr %rows, i64 %count, i64 %vectors, ptr %table)
  ret i32 0
entry:
  %p1 = getelementptr i16, ptr %table, i64 32
  %p2 = getelementptr i16, ptr %table, i64 64
  %p3 = getelementptr i16, ptr %table, i64 96
  %p4 = getelementptr i16, ptr %table, i64 128
  %t0 = load <32 x i16>, ptr %table, align 2
  %t1 = load <32 x i16>, ptr %p1, align 2
  %t2 = load <32 x i16>, ptr %p2, align 2
  %t3 = load <32 x i16>, ptr %p3, align 2
  %last = load i16, ptr %p4, align 2
  %last_one = insertelement <32 x i16> poison, i16 %last, i64 0
  %t4 = shufflevector <32 x i16> %last_one, <32 x i16> poison, <32 x i32> zeroinitializer
  %some = icmp sgt i64 %count, 0
  br i1 %some, label %row, label %done
row:
{row}
  br label %vector
vector:
  %v = phi i64 [ 0, %row ], [ %v_next, %vector ]
  %at = mul i64 %v, 32
  %x_at = getelementptr i8, ptr %x_row, i64 %at
  %x = load <32 x i8>, ptr %x_at, align 1
{index}
  %low = call <32 x i16> @llvm.x86.avx512.vpermi2var.hi.512(<32 x i16> %t0, <32 x i16> %index, <32 x i16> %t1)
  %high = call <32 x i16> @llvm.x86.avx512.vpermi2var.hi.512(<32 x i16> %t2, <32 x i16> %index, <32 x i16> %t3)
  %bit = and <32 x i16> %index, splat (i16 64)
  %is_high = icmp ne <32 x i16> %bit, zeroinitializer
  %found = select <32 x i1> %is_high, <32 x i16> %high, <32 x i16> %low
{last}
  %sign = and <32 x i16> %signed, splat (i16 -32768)
  %y = xor <32 x i16> %magnitude, %sign
  %y_at = getelementptr i16, ptr %y_row, i64 %at
  store <32 x i16> %y, ptr %y_at, align 2
  %v_next = add i64 %v, 1
  %more = icmp slt i64 %v_next, %vectors
  br i1 %more, label %vector, label %row_end
row_end:
  %j_next = add i64 %j, 1
  %another = icmp slt i64 %j_next, %count
  br i1 %another, label %row, label %done
done:
  ret i32 0
}}
"""
_E4M3 = {
    "index": """  %index = zext <32 x i8> %x to <32 x i16>
  %signed = shl <32 x i16> %index, splat (i16 8)""",
    "last": "  %magnitude = select i1 true, <32 x i16> %found, <32 x i16> %t4",
}
_INT8 = {
    "index": """  %signed = sext <32 x i8> %x to <32 x i16>
  %index = call <32 x i16> @llvm.abs.v32i16(<32 x i16> %signed, i1 false)""",
    "last": """  %is_last = icmp eq <32 x i16> %index, splat (i16 128)
  %magnitude = select <32 x i1> %is_last, <32 x i16> %t4, <32 x i16> %found""",
}


def _shuffled(of: str, to: str, a: str, b: str, places) -> str:
    places = ", ".join(f"i32 {x}" for x in places)
    return f"  {to} = shufflevector {of} {a}, {of} {b}, <{len(places.split(','))} x i32> <{places}>"


def _found_bytes(x: str, stored: str) -> list[str]:
    """The words that 64 elements ``x`` stand for, of the first 32 and of the others, as ``{x}_first`` and ``_second``.

    Bytes are put together in turns within 16, so that quarters of ``x`` are taken in turns before.  TVM gives every
    function the instructions of the pack's target, to which the one that looks up needn't belong: hence assembly.
    """
    of, low, high = "<64 x i8>", f"{x}_low", f"{x}_high"
    first = [y for q in range(0, 64, 16) for i in range(q, q + 8) for y in (i, 64 + i)]
    index = f"{x}_turned"
    lines = [_shuffled(of, index, x, "poison", [8 * q + i for q in (0, 4, 1, 5, 2, 6, 3, 7) for i in range(8)])]
    if stored == "int8":
        index = f"{x}_index"
        lines.append(f"  {index} = call {of} @llvm.abs.v64i8({of} {x}_turned, i1 false)")
    for side in (low, high):
        half = side.rsplit("_", 1)[1]
        lines.append(
            f'  {side}_found = call {of} asm "vpermi2b $3, $2, $0", "=v,0,v,v"'
            f"({of} {index}, {of} %{half}0, {of} %{half}1)"
        )
    if stored == "int8":
        lines.append(f"  {x}_is_last = icmp eq {of} {x}_turned, splat (i8 -128)")
        for side, last in ((low, "%low_last"), (high, "%high_last")):
            lines.append(f"  {side}_all = select <64 x i1> {x}_is_last, {of} {last}, {of} {side}_found")
    found = "_all" if stored == "int8" else "_found"
    lines += [
        f"  {x}_sign = and {of} {x}_turned, splat (i8 -128)",
        f"  {high}_signed = xor {of} {high}{found}, {x}_sign",
        _shuffled(of, f"{x}_first", f"{low}{found}", f"{high}_signed", first),
        _shuffled(of, f"{x}_second", f"{low}{found}", f"{high}_signed", [y + 8 for y in first]),
    ]
    return lines


def _widen_bytes(stored: str) -> str:
    """The same as ``_WIDEN``, 64 elements at once; of the last 32, if these are left, the others are nothing."""
    whole, half = (_found_bytes(x, stored) for x in ("%x", "%rest"))
    tables = []
    for number, name in enumerate(("low0", "low1", "high0", "high1")):
        tables += [
            f"  %{name}_at = getelementptr i16, ptr %table, i64 {_BYTES_AT + 32 * number}",
            f"  %{name} = load <64 x i8>, ptr %{name}_at, align 1",
        ]
    for side, place in (("low", 2 * _MAGNITUDES), ("high", 2 * _MAGNITUDES + 1)):
        tables += [
            f"  %{side}_last_at = getelementptr i8, ptr %table, i64 {place}",
            f"  %{side}_last_byte = load i8, ptr %{side}_last_at, align 1",
            f"  %{side}_last_one = insertelement <64 x i8> poison, i8 %{side}_last_byte, i64 0",
            _shuffled("<64 x i8>", f"%{side}_last", f"%{side}_last_one", "poison", [0] * 64),
        ]
    widened = _shuffled("<32 x i8>", "%rest", "%rest_32", "poison", [min(i, 32) for i in range(64)])
    return f"""
define linkonce_odr void @tvm_flash_widen_bytes_{stored}(
    ptr noalias %to, i64 %to_stride, ptr noalias %from, i64 %base, ptr noalias %rows, i64 %count, i64 %vectors,
    ptr noalias %table) noinline nounwind {{
entry:
{chr(10).join(tables)}
  %pairs = lshr i64 %vectors, 1
  %odd_bit = and i64 %vectors, 1
  %odd = icmp ne i64 %odd_bit, 0
  %has_pairs = icmp ne i64 %pairs, 0
  %rest_from = mul i64 %pairs, 64
  %some = icmp sgt i64 %count, 0
  br i1 %some, label %row, label %done
row:
{_ROW}
  br i1 %has_pairs, label %vector, label %rest_of_row
vector:
  %v = phi i64 [ 0, %row ], [ %v_next, %vector ]
  %at = mul i64 %v, 64
  %x_at = getelementptr i8, ptr %x_row, i64 %at
  %x = load <64 x i8>, ptr %x_at, align 1
{chr(10).join(whole)}
  %y_at = getelementptr i16, ptr %y_row, i64 %at
  %y_next = getelementptr i8, ptr %y_at, i64 64
  store <64 x i8> %x_first, ptr %y_at, align 2
  store <64 x i8> %x_second, ptr %y_next, align 2
  %v_next = add i64 %v, 1
  %more = icmp ult i64 %v_next, %pairs
  br i1 %more, label %vector, label %rest_of_row
rest_of_row:
  br i1 %odd, label %half, label %row_end
half:
  %rest_at = getelementptr i8, ptr %x_row, i64 %rest_from
  %rest_32 = load <32 x i8>, ptr %rest_at, align 1
{widened}
{chr(10).join(half)}
  %rest_to = getelementptr i16, ptr %y_row, i64 %rest_from
  store <64 x i8> %rest_first, ptr %rest_to, align 2
  br label %row_end
row_end:
  %j_next = add i64 %j, 1
  %another = icmp slt i64 %j_next, %count
  br i1 %another, label %row, label %done
done:
  ret void
}}
"""


#: Of a table of words the tables of its bytes.
_SPLIT = f"""
define linkonce_odr i32 @tvm_flash_split_table(ptr %table) noinline nounwind {{
  %words = load <{_MAGNITUDES} x i16>, ptr %table, align 2
  %low = trunc <{_MAGNITUDES} x i16> %words to <{_MAGNITUDES} x i8>
  %shifted = lshr <{_MAGNITUDES} x i16> %words, splat (i16 8)
  %high = trunc <{_MAGNITUDES} x i16> %shifted to <{_MAGNITUDES} x i8>
  %low_at = getelementptr i16, ptr %table, i64 {_BYTES_AT}
  %high_at = getelementptr i16, ptr %table, i64 {_BYTES_AT + _MAGNITUDES // 2}
  store <{_MAGNITUDES} x i8> %low, ptr %low_at, align 1
  store <{_MAGNITUDES} x i8> %high, ptr %high_at, align 1
  ret i32 0
}}
"""


def looks_up(isa: Isa, dtype: str) -> bool:
    """Whether elements of a dtype come from tables."""
    return isa.mcpu == "x86-64-v4" and dtype != "float32"


def functions(isa: Isa, dtype: str) -> str:
    """LLVM's assembly that is called."""
    if not looks_up(isa, dtype):
        return ""
    by_words = _WIDEN.format(cache="uint8", row=_ROW, **_E4M3) + _WIDEN.format(cache="int8", row=_ROW, **_INT8)
    return _BEGIN + by_words + _widen_bytes("uint8") + _widen_bytes("int8") + _SPLIT


@T.inline
def _make_table(table: tirx.Buffer, words: tirx.Buffer, made: tirx.Buffer, stored: str, factor, dtype):
    """What each magnitude stands for with a scale, unless the table has it."""
    if made[0] != T.cast(T.reinterpret("uint32", factor), "int64"):
        made[0] = T.cast(T.reinterpret("uint32", factor), "int64")
        for x in T.serial(_MAGNITUDES):
            table[x] = dequantised(T.cast(x, stored), factor, dtype)
        if stored == "int8":  # the opposite of what −128 stands for
            table[_MAGNITUDES] = dequantised(T.int8(-128), -factor, dtype)
        T.evaluate(T.call_extern("int32", "tvm_flash_split_table", words.access_ptr("rw")))


@T.inline
def _compute_rows(tensor, base, width, first, count, at, factor):
    for j in T.serial(first, first + count):
        row: T.int64 = base + tensor.rows[at + j]
        for d in T.serial(width // _TOGETHER):
            for lane in T.vectorized(_TOGETHER):
                tensor.flat[j * tensor.width + d * _TOGETHER + lane] = dequantised(
                    tensor.stored[row + d * _TOGETHER + lane], factor, tensor.dtype
                )


@T.inline
def widen_rows(tensor, base, head, width, keys, at):
    """Bring ``keys`` rows of a head, which were looked up from ``at`` on, into the tile that products read: those with
    the same scale together."""
    first: T.int64 = T.int64(0)
    while first < keys:
        factor: T.float32 = tensor.scales[tensor.numbers[at + first], head]
        bits = T.meta_var(lambda x: T.reinterpret("uint32", x))
        end: T.int64 = first + 1
        if tensor.scales.strides[0] == 0:
            end = keys
        else:
            while T.And(
                end < keys,
                bits(tensor.scales[tensor.numbers[at + T.min(end, keys - 1)], head]) == bits(factor),
            ):
                end = end + 1
        if tensor.table is None:
            _compute_rows(tensor, base, width, first, end - first, at, factor)
        else:
            if width % _AT_ONCE == 0:
                _make_table(tensor.table, tensor.words, tensor.made, str(tensor.stored.dtype), factor, tensor.dtype)
                T.evaluate(
                    T.call_extern(
                        "int32",
                        f"tvm_flash_widen_{tensor.stored.dtype}",
                        tensor.memory.access_ptr("w", offset=first * tensor.width),
                        T.int64(tensor.width),
                        tensor.stored.access_ptr("r"),
                        base,
                        tensor.rows.access_ptr("r", offset=at + first),
                        end - first,
                        width // _AT_ONCE,
                        tensor.words.access_ptr("r"),
                    )
                )
            else:
                _compute_rows(tensor, base, width, first, end - first, at, factor)
        first = end

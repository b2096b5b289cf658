"""PTX, as ``asm`` statements have it, to calls of the machine (``instructions.h``)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

ASM = re.compile(r'asm(?: volatile)?\(\s*((?:"[^"]*"\s*)+)(.*?)\);', re.S)
_OPERAND = re.compile(r'"[=+&]*[rlf]"\((\w+)\)')
_OFFSET = r"\[%\d+\+?(\d*)\]"

#: PTX by how it begins, and the call of the machine that it becomes: its operands by number, all of them or all but the
#: first one or two as ``{rest0}``, ``{rest1}``, ``{rest2}``, the constant in its address, whether it is of bfloat16,
#: and what the pattern names.  The first that matches counts.
_INSTRUCTIONS = {
    r"$": "",
    # Where a thread is, and its end.
    r"mov\.u32 %0, %%tid\.(?P<axis>\w);": "{0} = threadIdx.{axis};",
    r"mov\.u32 %0, %%ctaid\.(?P<axis>\w);": "{0} = blockIdx.{axis};",
    r"mov\.u32 %0, %%cluster_ctaid\.(?P<axis>\w);": "{0} = blockIdx.{axis} % clusterDim.{axis};",
    r"mov\.u32 %0, %%nctaid\.(?P<axis>\w);": "{0} = gridDim.{axis};",
    r".*elect\.sync ": "{0} = simt::elect();",
    r"exit;": "simt::leave();",
    r"setmaxnreg\.|griddepcontrol\.": "",  # blocks and launches run one after the other
    # Loads, stores, cp.async.
    r"ld\.shared(::cluster)?\.v2\.f32 ": "simt::load2_of_cluster({0}, {1}, {2} + {offset});",
    r"mapa\.shared::cluster\.u32 ": "{0} = simt::map_to_rank({1}, {2});",
    r"ld\.shared\.b32 ": "simt::load1({0}, {1} + {offset});",
    r"ld\.shared\.v2": "simt::load2({0}, {1}, {2} + {offset});",
    r"ld\.shared\.v4": "simt::load4({0}, {1}, {2}, {3}, {4} + {offset});",
    r"st\.shared\.v[24]\.\w\d\d |st\.shared\.\w\d\d ": "simt::store_shared({0} + {offset}, {{{rest1}}});",
    r"ld\.(acquire|relaxed)\.gpu\.global\.\w32 ": "simt::load({{{targets}}}, (const void*){last});",
    r"st\.(release|relaxed)\.gpu\.global\.\w32 ": "simt::store((void*){0}, {{{rest1}}});",
    r"ld\.global(\.nc|\.cg)?(\.v[24])?\.\w32 ": "simt::load({{{targets}}}, (const void*){last});",
    r"st\.global(\.v[24])?\.\w32 ": "simt::store((void*){0}, {{{rest1}}});",
    r"red(\.relaxed|\.gpu)*\.global(\.gpu|\.relaxed)*\.add(\.v[24])?\.f32 ": "simt::add((float*){0}, {{{rest1}}});",
    r"red\.global(\.gpu|\.relaxed)*(\.v[24])?\.f32\.add ": "simt::add((float*){0}, {{{rest1}}});",
    r"red\.relaxed\.gpu\.global\.add\.u64 ": "*(uint64_t*){0} += {1};",
    r"cp\.async\.cg": "simt::copy_later({0} + {offset}, {1}, {2});",
    r"cp\.async\.ca": "simt::copy_later({0} + {offset}, {1}, {2}, 4);",
    r"cp\.async\.commit": "simt::commit();",
    r"cp\.async\.wait_group (?P<groups>\d+);": "simt::wait({groups});",
    r"\{\.reg \.pred p; setp\.ne\.s32 p, %3, 0;": "simt::load_half_or_zero({0}, {1}, {2}, {3});",
    r"\{\.reg \.pred p; setp\.ne\.s32 p, %5, 0;": "simt::load_or_zero({0}, {1}, {2}, {3}, {4}, {5});",
    r"mul\.rn\.f32 ": "{0} = {1} * {2};",
    r"add\.rn\.f32 ": "{0} = {1} + {2};",
    r"div\.rn\.f32 ": "{0} = {1} / {2};",
    r"\{\.reg \.b16 p, q, x, y; \.reg \.b32 h, g; mov\.b32 \{p, q\}, %4; cvt\.rn\.f16x2\.e4m3x2 h, p;": (
        "simt::widen_e4m3({0}, {1}, {4}); simt::widen_e4m3({2}, {3}, {4} >> 16);"
    ),
    r"\{\.reg \.b16 x, y; \.reg \.b32 h; mul\.rn\.f16x2 h, %2, %3;": "simt::widen_halves({0}, {1}, {2}, {3});",
    r"\{\.reg \.b16 x, y; \.reg \.b32 h, g; prmt\.b32 h, %4, 0, 0x4140;": "simt::widen_int8({0}, {1}, {2}, {3}, {4});",
    r"cvt\.rn\.b?f16x2": "{0} = simt::pack({1}, {2}, {brain});",
    r"ex2\.approx(\.ftz)?\.f32 ": "{0} = exp2f({1});",
    r"fma\.rn(\.ftz)?\.f32 ": "{0} = fmaf({1}, {2}, {3});",
    r"lg2\.approx(\.ftz)?\.f32 ": "{0} = log2f({1});",
    r"rcp\.approx(\.ftz)?\.f32 ": "{0} = 1.0f / {1};",
    r"tanh\.approx\.f32 ": "{0} = tanhf({1});",
    # Warps and barriers.
    r"ldmatrix\.sync\.aligned\.m8n8\.x4\.trans\b": "simt::ldmatrix({0}, {1}, {2}, {3}, {4} + {offset}, true);",
    r"ldmatrix\.sync\.aligned\.m8n8\.x4\.": "simt::ldmatrix({0}, {1}, {2}, {3}, {4} + {offset}, false);",
    r"stmatrix\.sync\.aligned\.m8n8\.x[124]\.trans\.": "simt::stmatrix({0} + {offset}, {{{rest1}}}, true);",
    r"stmatrix\.sync\.aligned\.m8n8\.x[124]\.": "simt::stmatrix({0} + {offset}, {{{rest1}}}, false);",
    r"movmatrix\.sync\.aligned\.m8n8\.trans\.": "{0} = simt::movmatrix({1});",
    r"barrier\.cluster\.arrive\b": "simt::cluster_arrive();",
    r"barrier\.cluster\.wait\b": "simt::cluster_wait();",
    r"bar(rier)?\.sync %0, %1": "simt::barrier({0}, {1});",
    r"bar\.arrive %0, %1": "simt::barrier({0}, {1}, false);",
    r"fence\.proxy\.async": "simt::fence_async();",
    r"fence\.mbarrier_init\.|fence\.acq_rel\.|membar\.": "",
    # Transaction barriers.
    r"mbarrier\.init\.": "simt::mbarrier_init({0}, {1});",
    r"mbarrier\.inval\.": "simt::mbarrier_invalidate({0});",
    r"mbarrier\.arrive\.expect_tx\.\S+ _, \[%0\], %1;": "simt::mbarrier_arrive_expect({0}, {1});",
    r"mbarrier\.expect_tx\.": "simt::mbarrier_expect({0}, {1});",
    r"mbarrier\.arrive\.\S+ _, \[%0\], %1;": "simt::mbarrier_arrive({0}, {1});",
    r"mbarrier\.arrive\.\S+ _, \[%0\];": "simt::mbarrier_arrive({0}, 1);",
    r".*LAB_WAIT:.*mbarrier\.try_wait\.parity\.": "simt::mbarrier_wait({0}, {1});",
    # Bulk copies.
    r"cp\.async\.bulk\.prefetch\.L2\.global ": "",
    # The last operand of one with a policy of the L2 cache is that.
    r"cp\.async\.bulk\.tensor\.\dd\.shared::(cluster|cta)\.global(\.tile)?\.mbarrier::complete_tx::bytes \[": (
        "simt::load_box({last}, *(const CUtensorMap*){1}, {0}, {{{middle2}}});"
    ),
    r"cp\.async\.bulk\.tensor\.\dd\.shared::cluster\.global\.mbarrier::complete_tx::bytes\.L2::cache_hint \[": (
        "simt::load_box({before_last}, *(const CUtensorMap*){1}, {0}, {{{middle2_before_last}}});"
    ),
    r"cp\.async\.bulk\.tensor\.\dd\.global\.shared::cta(\.tile)?\.bulk_group \[": (
        "simt::store_box(*(const CUtensorMap*){0}, {last}, {{{middle1}}}, false);"
    ),
    r"cp\.reduce\.async\.bulk\.tensor\.\dd\.global\.shared::cta\.add(\.tile)?\.bulk_group \[": (
        "simt::store_box(*(const CUtensorMap*){0}, {last}, {{{middle1}}}, true);"
    ),
    r"cp\.async\.bulk\.shared::(cluster|cta)\.global\.mbarrier::complete_tx::bytes \[": (
        "simt::load_bytes({3}, {0}, (const void*){1}, {2});"
    ),
    r"cp\.async\.bulk\.global\.shared::cta\.bulk_group \[": ("simt::store_bytes({1}, (void*){0}, {2}, false);"),
    r"cp\.reduce\.async\.bulk\.global\.shared::cta\.bulk_group\.add\.f32 \[": (
        "simt::store_bytes({1}, (void*){0}, {2}, true);"
    ),
    r"cp\.async\.bulk\.commit_group": "simt::commit_bulk();",
    r"cp\.async\.bulk\.wait_group(\.read)? (?P<groups>\d+);": "simt::wait_bulk({groups});",
    # What stands around asynchronous products.
    r"wgmma\.fence": "simt::wgmma_fence();",
    r"wgmma\.commit_group": "simt::wgmma_commit();",
    r"wgmma\.wait_group\.sync\.aligned (?P<groups>\d+);": "simt::wgmma_wait({groups});",
}

#: mma.sync by shape: the machine's function, and how many registers of d, a and b a thread holds.
_PRODUCTS = {
    "m16n8k16": ("mma_m16n8<16>", 4, 4, 2),
    "m16n8k8": ("mma_m16n8<8>", 4, 2, 1),
    "m8n8k4": ("mma_m8n8k4", 8, 2, 2),
}
_PRODUCT = re.compile(r"mma\.sync\.aligned\.(?P<shape>m\d+n8k\d+)\.row\.(?P<b_order>\w+)")

#: wgmma with the predicate that says whether it accumulates: operands d, a (a descriptor, or four registers), b,
#: predicate; then the signs of a and b, and which of those in shared memory are transposed.
_WGMMA = re.compile(
    r"\{ \.reg \.pred (?P<p>\w+); setp\.ne\.b32 (?P=p), %\d+, 0; "
    r"wgmma\.mma_async\.sync\.aligned\.m64n(?P<n>\d+)k16\.f32\.(?P<type>b?f16)\.(?P=type) "
    r"\{[^}]*\}, (?P<a>\{[^}]*\}|%\d+), %\d+, (?P=p), (?P<constants>[-\d, ]+); \}"
)


def translate(match: re.Match) -> str:
    """One ``asm`` statement, a match of :data:`ASM`, as a call of the machine.

    Raises
    ------
    ValueError: the machine doesn't have the instruction.
    """
    text = "".join(re.findall(r'"([^"]*)"', match.group(1)))
    operands = _OPERAND.findall(match.group(2))
    brain = "true" if "bf16" in text else "false"
    if found := _PRODUCT.match(text):
        return _product(found["shape"], found["b_order"], operands, brain)
    if found := _WGMMA.match(text):
        return _wgmma(found, operands, brain)
    for pattern, call in _INSTRUCTIONS.items():
        if found := re.match(pattern, text):
            return call.format(*operands, **_names(text, operands), brain=brain, **found.groupdict())
    raise ValueError(f"the machine has no instruction {text}")


def _names(text: str, operands: Sequence[str]) -> dict[str, object]:
    """What calls name beside single operands."""
    listed: Callable[[Sequence[str]], str] = ", ".join
    return {
        "offset": int((re.search(_OFFSET, text) or [0, ""])[1] or 0),
        "last": operands[-1] if operands else "",
        "before_last": operands[-2] if len(operands) > 1 else "",
        "rest1": listed(operands[1:]),
        "middle1": listed(operands[1:-1]),
        "middle2": listed(operands[2:-1]),
        "middle2_before_last": listed(operands[2:-2]),
        "targets": listed([f"&{name}" for name in operands[:-1]]),
    }


def _product(shape: str, b_order: str, operands: Sequence[str], brain: str) -> str:
    """A matrix product: registers in and out of the arrays that the machine's function takes."""
    function, d, a, b = _PRODUCTS[shape]
    flag = ("true" if b_order == "row" else "false") if shape == "m8n8k4" else brain
    # operands: d, a, b, c
    arrays = (
        f"float d[] = {{{', '.join(operands[d + a + b : d + a + b + d])}}};",
        f"uint32_t a[] = {{{', '.join(operands[d : d + a])}}};",
        f"uint32_t b[] = {{{', '.join(operands[d + a : d + a + b])}}};",
    )
    results = (f"{operands[i]} = d[{i}];" for i in range(d))
    return "{" + "".join(arrays) + f"simt::{function}(d, a, b, {flag});" + "".join(results) + "}"


def _wgmma(found: re.Match, operands: Sequence[str], brain: str) -> str:
    """An asynchronous product: the addresses of the accumulator's registers, which it writes later."""
    columns, in_registers = int(found["n"]), found["a"].startswith("{")
    d, rest = operands[: columns // 2], operands[columns // 2 :]
    a, b, accumulates = (rest[:4], *rest[4:]) if in_registers else rest
    scale_a, scale_b, *transposed = map(int, found["constants"].split(","))
    a_transposed, b_transposed = (0, *transposed) if in_registers else transposed
    registers = ", ".join(a) if in_registers else "0"
    flags = f"{brain}, {'true' if in_registers else 'false'}"
    descriptor = "0" if in_registers else a
    shape = (
        f"{{{columns}, {flags}, {scale_a}.0f, {scale_b}.0f, {a_transposed} != 0, {b_transposed} != 0, "
        f"{descriptor}, {b}, {accumulates} != 0}}"
    )
    return (
        f"{{float* d[] = {{{', '.join(f'&{name}' for name in d)}}}; uint32_t a[] = {{{registers}}}; "
        f"simt::wgmma(d, a, {shape});}}"
    )

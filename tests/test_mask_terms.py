"""What kernels compute of a mask once for a row or a column of scores, and how they divide."""

from __future__ import annotations

import ctypes
import random
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("tvm")

import tvm_ffi
from tvm import tirx
from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import IDENTITY, MASKS, Mask
from schedules.definition.definition_file import DefinitionFile
from schedules.definition.pattern import match
from schedules.families.ranged import with_tiles
from schedules.tile import mask_terms, quotients
from schedules.tile.mask_terms import MaskTerms
from schedules.toolchain.process import host_compiler
from tvm_flash.packs.manifest import Param

GALLERY = Path(__file__).resolve().parent.parent / "schedules" / "definition" / "gallery"


def pattern_of(mask):
    return match(Attention(IDENTITY, mask)(16, "float16", index_dtype="int32"))


def of_gallery(name):
    return match(DefinitionFile.parse(f"{GALLERY / name}.py:{name}").load()(16, "float16", index_dtype="int32"))


def listed(pattern):
    return with_tiles(pattern, "i", 128, 128)


def axes(pattern):
    return sorted(t.axis for t in pattern.mask_split.terms)


def test_lines_and_columns_of_a_picture():
    pattern = of_gallery("neighbourhood_2d")
    assert axes(pattern) == ["i", "i", "j", "j"] and MaskTerms.serves(listed(pattern))


def test_what_is_computed_of_a_line_belongs_to_it():
    """Comparisons with the least and the greatest of several are taken apart by TVM, at each score."""
    split = of_gallery("neighbourhood_2d").mask_split
    found = []
    tvm_ffi.structural_walk(split.rest, [(tirx.Min, found.append), (tirx.Max, found.append)])
    assert not found
    first, *_ = (t for t in split.terms if t.axis == "i")
    assert isinstance(first.expr, tirx.Max)


def test_the_least_of_positions_alone_is_no_term():
    mask = Mask("last", lambda at: T.min(at.i, 7) >= T.floordiv(at.j, 3), None)
    assert axes(pattern_of(mask)) == ["j"]


def test_divisions_of_both_positions_stay():
    pattern = of_gallery("dilated")
    assert axes(pattern) == [] and MaskTerms.serves(listed(pattern))


def test_a_division_of_a_division_is_one_term():
    params = (Param("width", "int32"),)
    mask = Mask("nested", lambda at: T.floordiv(T.floormod(at.i, at.param["width"]), 3) == at.j, None, params)
    (term,) = pattern_of(mask).mask_split.terms
    assert term.axis == "i" and "width" in str(term.expr)


def test_ids_are_no_terms():
    ids = Param("ids", "int32", axes="bi")
    mask = Mask("ids", lambda at: T.floordiv(at.param["ids"], 5) == T.floordiv(at.j, 7), None, (ids,))
    assert axes(pattern_of(mask)) == ["j"]


@pytest.mark.parametrize("name", ["causal", "window", "full"])
def test_masks_without_divisions_are_left_alone(name):
    assert not MaskTerms.serves(listed(pattern_of(MASKS[name])))


@pytest.mark.parametrize(
    ("source", "name"),
    [(mask_terms._FLOOR_DIVIDE, "floor_divide"), (quotients._FLOOR_QUOTIENT, "floor_quotient")],
)
def test_division_is_exact(source, name, tmp_path):
    source = source.replace("__forceinline__ __device__", 'extern "C"')
    (tmp_path / "divide.cpp").write_text(source)
    library = tmp_path / "divide.so"
    subprocess.run([host_compiler(), "-O2", "-shared", "-fPIC", tmp_path / "divide.cpp", "-o", library], check=True)
    divide = getattr(ctypes.CDLL(str(library)), name)
    numbers = random.Random(0)
    edges = [0, 1, 2, 3, 64, 65535, 65536, 2**30, 2**31 - 2, 2**31 - 1]
    cases = [(s * x, t * y) for x in edges for y in edges[1:] for s in (1, -1) for t in (1, -1)]
    for _ in range(50000):
        x, y = (numbers.getrandbits(numbers.randint(1, 31)) for _ in range(2))
        cases.append((x * numbers.choice((1, -1)), max(y, 1) * numbers.choice((1, -1))))
    assert [c for c in cases if divide(*c) != c[0] // c[1]] == []


def test_floors_by_what_a_call_says_are_a_function():
    x, y = tirx.Var("x", "int32"), tirx.Var("y", "int32")
    asked = quotients.with_quotients_called(T.floordiv(x, y) + T.floormod(x, y) + T.floordiv(x, 4))
    found = []
    tvm_ffi.structural_walk(asked, [(tirx.FloorDiv, found.append), (tirx.FloorMod, found.append)])
    assert [str(e.b) for e in found] == ["4"] and str(asked).count("floor_quotient") >= 2

"""What kernels compute of a mask once for a row or a column of scores, and how they divide."""

from __future__ import annotations

import ctypes
import random
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("tvm")

from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import IDENTITY, MASKS, Mask
from schedules.definition.definition_file import DefinitionFile
from schedules.definition.pattern import match
from schedules.families.ranged import with_tiles
from schedules.tile import mask_terms
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


def test_division_is_exact(tmp_path):
    source = mask_terms._FLOOR_DIVIDE.replace("__forceinline__ __device__", 'extern "C"')
    (tmp_path / "divide.cpp").write_text(source)
    library = tmp_path / "divide.so"
    subprocess.run([host_compiler(), "-O2", "-shared", "-fPIC", tmp_path / "divide.cpp", "-o", library], check=True)
    divide = ctypes.CDLL(str(library)).floor_divide
    numbers = random.Random(0)
    edges = [0, 1, 2, 3, 64, 65535, 65536, 2**30, 2**31 - 2, 2**31 - 1]
    cases = [(s * x, t * y) for x in edges for y in edges[1:] for s in (1, -1) for t in (1, -1)]
    for _ in range(50000):
        x, y = (numbers.getrandbits(numbers.randint(1, 31)) for _ in range(2))
        cases.append((x * numbers.choice((1, -1)), max(y, 1) * numbers.choice((1, -1))))
    assert [c for c in cases if divide(*c) != c[0] // c[1]] == []

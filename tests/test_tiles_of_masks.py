"""What is known of tiles of masks that aren't affine: never wrong, and where ids lie sorted all of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import tirx
from tvm.script import tirx as T

from schedules.definition.attention import Attention
from schedules.definition.catalogue import IDENTITY, MASKS, Mask
from schedules.definition.definition_file import DefinitionFile
from schedules.definition.flex import from_flex
from schedules.definition.parameters import Site, append_arguments, parameter_symbols
from schedules.definition.pattern import match
from schedules.definition.picture import ALL, NOTHING, Picture
from schedules.definition.sample import parameters_of
from schedules.families.cpu.bounds import fill_bounds, with_bounds
from tests.oracle import TARGET
from tvm_flash.packs.manifest import Param

GALLERY = Path(__file__).resolve().parent.parent / "schedules" / "definition" / "gallery"
BLOCK_M, BLOCK_N, LANES = 16, 8, 4
#: Masks of which every tile that sees nothing is known to, and those of which every tile that sees all is.
KNOWN = {
    "documents",
    "chunked",
    "block_causal_video",
    "neighbourhood_1d",
    "cross_attention",
    "prefix_lm",
    "sink_window",
}
#: Of others, how much at least: a tree's numbers aren't sorted.
LEAST = {"dilated": 0.6, "neighbourhood_2d": 0.6, "speculative_tree": -1}
NAMES = sorted({*KNOWN, *LEAST})


@dataclass(frozen=True)
class Call:
    """As much of a kernel's geometry as bounds need."""

    pattern: object
    sizes: tuple
    params: dict
    bounds: object = None

    def __getattr__(self, name):
        return self.sizes[("batch", "heads", "seqlen_q", "seqlen_kv").index(name)]

    def site(self, b, h):
        batch, heads, seqlen_q, seqlen_kv = self.sizes
        return Site(b, h, batch, heads, heads, seqlen_q, seqlen_kv, T.float32(1), self.params)


def asked(definition, lengths, laid):
    """``tile_live`` and ``tile_full`` of each tile of the first head, as arrays; ``laid`` puts tensors into memory."""
    pattern = match(definition(8, "float32"))
    arguments, params = parameter_symbols(pattern.params, pattern.index_dtype)
    sizes = tuple(tirx.IntImm("int64", n) for n in (1, 1, *lengths))
    shape = [-(-n // size) for n, size in zip(lengths, (BLOCK_M, BLOCK_N), strict=True)]
    live, full = (tirx.decl_buffer(shape, "int32", name=name) for name in ("live", "full"))
    call = Call(pattern, sizes, params)

    def write(P, m, n):
        rows, columns = (m * BLOCK_M, n * BLOCK_N), (BLOCK_M, BLOCK_N)
        last = [T.min(x + (size - 1), end - 1) for x, size, end in zip(rows, columns, lengths, strict=True)]
        knows, site = P.bounds or pattern, P.site(T.int64(0), T.int64(0))
        for buffer, ask in ((live, knows.tile_live), (full, knows.tile_full)):
            T.buffer_store(buffer, T.cast(ask(site, rows[0], last[0], rows[1], last[1]), "int32"), [m, n])

    @T.prim_func(s_tir=True, check_well_formed=False)
    def tiles():
        T.func_attr({"tirx.noalias": True, "global_symbol": "tiles"})
        P = T.meta_var(with_bounds(call, BLOCK_M, BLOCK_N, LANES))
        fill_bounds(P, announce=lambda items, work: 0)
        for m, n in T.grid(T.int64(shape[0]), T.int64(shape[1])):
            with T.sblock("tile"):
                T.reads()
                T.writes()
                write(P, m, n)

    module = tvm.compile(append_arguments(tiles, [live, full, *arguments]), target=TARGET)
    found = [tvm.runtime.tensor(np.full(shape, -1, np.int32)) for _ in range(2)]
    values = parameters_of(definition, 1, 1, *lengths)
    given = [tvm_ffi.from_dlpack(laid(x)) if isinstance(x, np.ndarray) else x for x in values.values()]
    module["tiles"](*found, *given)
    return SimpleNamespace(live=found[0].numpy() == 1, full=found[1].numpy() == 1)


def compare(definition, lengths, laid=np.asarray):
    """Never wrong; gives what is known of how many tiles that see nothing, and of how many that see all."""
    found, tiles = asked(definition, lengths, laid), Picture.of(definition, *lengths, BLOCK_M, BLOCK_N).tiles
    assert found.live[tiles != NOTHING].all() and (tiles[found.full] == ALL).all()
    return (~found.live).sum(), (tiles == NOTHING).sum(), found.full.sum(), (tiles == ALL).sum()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lengths", ((96, 160), (128, 128)))
def test_what_is_known_of_tiles(name, lengths):
    definition = DefinitionFile.parse(f"{GALLERY / name}.py:{name}").load()
    skipped, invisible, full, whole = compare(definition, lengths)
    assert skipped == invisible if name in KNOWN else skipped > LEAST[name] * invisible
    assert full == whole if name in KNOWN else full <= whole


def random_mask(seed):
    """A mask of several operations, positions, ids, and a table, with its twin."""
    rng = np.random.default_rng(seed)
    a, b, c, d = (int(x) for x in rng.integers(2, 40, 4))
    sign = int(rng.choice([-1, 1]))

    def expr(at):
        ids = at.param["q_id"] - at.param["k_id"]
        distance = T.abs(at.i * sign - at.j)
        by_table = at.table["labels"](T.floordiv(at.i, a)) == at.table["labels"](T.floordiv(at.j, b))
        parts = [
            T.floormod(at.i + c, a) + T.floormod(at.j, b) < d,
            T.Not(T.And(ids > 0, distance < 3 * d)),
            T.Or(by_table, T.floordiv(distance, c) != 1),
            T.min(at.i, 2 * at.j) * sign >= T.max(at.j - d, c) - 60,
        ]
        return T.And(parts[seed % 4], T.Or(parts[(seed + 1) % 4], at.j <= at.diagonal))

    def twin(at):
        ids = at.params["q_id"] - at.params["k_id"]
        distance = np.abs(at.i * sign - at.j)
        labels = at.params["labels"]
        by_table = labels[at.i // a] == labels[at.j // b]
        parts = [
            (at.i + c) % a + at.j % b < d,
            ~((ids > 0) & (distance < 3 * d)),
            by_table | (distance // c != 1),
            np.minimum(at.i, 2 * at.j) * sign >= np.maximum(at.j - d, c) - 60,
        ]
        return parts[seed % 4] & (parts[(seed + 1) % 4] | (at.j <= at.diagonal))

    params = (Param("q_id", "int32", axes="bi"), Param("k_id", "int32", axes="hj"), Param("labels", "int32", rank=1))

    def example(batch, heads, seqlen_q, seqlen_kv):
        q, k = (np.sort(np.random.default_rng(seed).integers(0, 5, n)) for n in (seqlen_q, seqlen_kv))
        return {"q_id": q, "k_id": k, "labels": np.arange(100) // 9}

    return Attention(IDENTITY, Mask("random", expr, twin, params), example=example)


@pytest.mark.parametrize("seed", range(8))
def test_random_masks_are_never_wrong(seed):
    compare(random_mask(seed), (70, 100))


def test_ids_that_flex_attention_reads_of_a_table():
    torch = pytest.importorskip("torch")
    DOCUMENTS = torch.arange(128) // 30

    def same(b, h, q_idx, kv_idx):
        return DOCUMENTS[q_idx] == DOCUMENTS[kv_idx]

    definition = from_flex(None, same)
    ids = DOCUMENTS.numpy().astype(np.int32)
    definition = Attention(definition.score, definition.mask, example=lambda *_: {"DOCUMENTS": ids})
    skipped, invisible, full, whole = compare(definition, (128, 128))
    assert skipped == invisible > 0 and full == whole > 0


def in_blocks(batch, heads, seqlen_q, seqlen_kv):
    """What is seen of blocks, and one whole row."""
    blocks = np.random.default_rng(5).random((-(-seqlen_q // 24), -(-seqlen_kv // 20))) < 0.4
    seen = np.kron(blocks, np.ones((24, 20), bool))[:seqlen_q, :seqlen_kv]
    seen[30] = True
    return {"seen": seen}


def repeated(*axes):
    """A tensor that is the same along axes, by strides of 0."""
    return lambda x: np.lib.stride_tricks.as_strided(
        x, x.shape, [0 if n in axes else stride for n, stride in enumerate(x.strides)], writeable=True
    )


@pytest.mark.parametrize(
    "laid, lengths, causal",
    (
        (np.asarray, (96, 160), False),
        (np.asarray, (70, 101), True),
        (np.asfortranarray, (70, 101), True),
        (repeated(0), (70, 101), False),
        (repeated(1), (96, 160), False),
    ),
)
def test_all_is_known_of_a_tensor_over_queries_and_keys(laid, lengths, causal):
    params = (Param("seen", "bool", axes="ij"),)
    mask = Mask("in_blocks", lambda at: at.param["seen"], lambda at: at.params["seen"], params)
    mask = mask & MASKS["causal"] if causal else mask
    definition = Attention(IDENTITY, mask, example=lambda *sizes: {"seen": laid(in_blocks(*sizes)["seen"])})
    assert match(definition(8, "float32")).has_unknown
    skipped, invisible, full, whole = compare(definition, lengths, laid)
    assert skipped == invisible > 0 and full == whole > 0


def test_all_is_known_of_pairs_of_labels():
    """Of a table that positions are looked up in, and of numbers that aren't integers."""

    def example(batch, heads, seqlen_q, seqlen_kv):
        rng = np.random.default_rng(6)
        return {"pairs": rng.random((4, 4)) < 0.5, "height": np.linspace(0, 9, seqlen_kv, dtype=np.float32)}

    mask = Mask(
        "pairs",
        lambda at: T.And(at.table["pairs"](at.i // 40, at.j // 30), at.param["height"] < T.Cast("float32", at.i)),
        lambda at: at.params["pairs"][at.i // 40, at.j // 30] & (at.params["height"] < at.i),
        (Param("pairs", "bool", rank=2), Param("height", "float32", axes="j")),
    )
    skipped, invisible, full, whole = compare(Attention(IDENTITY, mask, example=example), (130, 120))
    assert skipped == invisible > 0 and full == whole > 0


def test_what_families_without_bounds_know():
    """Positions are enough for chunks; of ids nothing is known without a pass over them."""
    chunked, documents = (DefinitionFile.parse(f"{GALLERY / n}.py:{n}").load() for n in ("chunked", "documents"))
    assert match(chunked(8, "float32")).has_gaps and not match(chunked(8, "float32")).atoms
    assert not match(documents(8, "float32")).has_gaps and len(match(documents(8, "float32")).atoms) == 2
    assert not match(Attention(mask=MASKS["given"])(8, "float32")).has_gaps

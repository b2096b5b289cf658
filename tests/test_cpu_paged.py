"""The CPU's kernels over pages against float64, and beside those of the same keys one after the other."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from schedules.definition.attention import Attention
from schedules.definition.catalogue import MASKS
from schedules.families.interface import PAGED
from tests import paged_cases, ragged_cases
from tests.cpu_kernels import runnable_isas
from tests.paged_cases import PAGED_CASES, PagedCase
from tests.ragged_cases import RaggedCase
from tests.scaled_cases import CACHES, as_kernels_take, quantised
from tests.test_cpu_ragged import attend as attend_ragged
from tests.test_cpu_ragged import core, kernel
from tvm_flash.packs.manifest import CACHE_OF_KIND

pytestmark = pytest.mark.usefixtures("cpu_pack")

#: Every case in one dtype; ``test_paged.py`` has all of them in bfloat16.
CASES = [c for i, c in enumerate(PAGED_CASES) if i % 3 == (i // 3) % 2]


def attend(case: PagedCase, data, made: tuple = ()):
    compute, params = made or core(case.of.dtype, PAGED)
    return paged_cases.run(case, data, compute, params)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_against_float64_and_the_bits_of_ragged_keys(case):
    data = ragged_cases.inputs(case.of)
    found = attend(case, data)
    paged_cases.check(case, data, *found)
    for x, y in zip(found, attend_ragged(case.of, data), strict=True):
        assert np.array_equal(x, y)


_ONE = PagedCase(RaggedCase((3, 150, 0, 1, 70), 4, 64, (9, 161, 5, 0, 1333), kv_heads=2, mask="causal"), 16, 1)


def test_another_instruction_set():
    """Of scores as they are: what else may become of them is the same in kernels of all forms."""
    data = ragged_cases.inputs(_ONE.of)
    isa = next(x for x in ("avx2", "baseline") if x in runnable_isas())
    made = kernel(_ONE.of.dtype, isa, PAGED, definition=Attention(mask=MASKS["positioned"]))
    paged_cases.check(_ONE, data, *attend(_ONE, data, made))


@pytest.mark.parametrize("head_dim", [64, 32], ids=["whole_vectors", "half_of_one"])
@pytest.mark.parametrize("cache", CACHES)
def test_elements_of_8_bits_looked_up_by_words_are_those_by_bytes(cache, head_dim):
    """Where a processor looks bytes up, a kernel that is told that there is no such instruction gives the same bits."""
    kind = next(k for k, dtype in CACHE_OF_KIND.items() if dtype == cache)
    case = replace(_ONE, of=replace(_ONE.of, dtype="bfloat16", head_dim=head_dim))
    data = ragged_cases.inputs(case.of)
    given = as_kernels_take(case, quantised(case, data, cache, True)[0])
    found = []
    for source in ("", "int tvm_flash_looks_up_bytes(void) { return 0; }"):
        definition = Attention(mask=MASKS["positioned"])
        compute, params = kernel("bfloat16", runnable_isas()[0], kind, definition, source)
        run = lambda values, sizes, compute=compute: compute({**values, **given}, sizes)  # noqa: E731
        found.append(paged_cases.run(case, data, run, params))
    for by_bytes, by_words in zip(*found, strict=True):
        assert np.array_equal(by_bytes, by_words) and not np.isnan(by_bytes.astype(np.float32)).any()


def test_pages_that_make_no_sense_are_refused_before_anything_is_written():
    data = ragged_cases.inputs(_ONE.of)
    compute, params = core("float32", PAGED)
    written = {}

    def spoilt(values, extents):
        written.update(values)
        lengths, table = values["seqlens_k"], values["page_table"]
        for place, bad in (((4, 3), -1), ((4, 0), extents["pages"])):
            other = table.clone()
            other[place] = bad
            with pytest.raises(RuntimeError, match="pages that the cache has"):
                compute({**values, "page_table": other}, extents)
        for bad in (-1, extents["seqlen_kv"] + 1):
            other = lengths.clone()
            other[2] = bad
            with pytest.raises(RuntimeError, match="lengths that the table has pages for"):
                compute({**values, "seqlens_k": other}, extents)
        starts = torch.tensor([0, 3, 2, 4, 5, 6], dtype=torch.int32)
        with pytest.raises(RuntimeError, match="never to fall"):
            compute({**values, "cu_seqlens_q": starts}, extents)

    paged_cases.run(_ONE, data, spoilt, params)
    assert all(written[name].isnan().all() for name in ("o", "lse"))


def test_shares_are_the_same_in_any_order_of_sequences():
    """A sequence has the same bits wherever it is in the batch, and its pages in the cache."""
    case = PagedCase(RaggedCase((5, 70, 1), 4, 64, (1100, 90, 3000), kv_heads=2, dtype="bfloat16", mask="causal"), 16)
    data = ragged_cases.inputs(case.of)
    out, lse = attend(case, data)
    for b in range(case.of.batch):
        i, j = case.of.rows(b)
        alone = replace(case, of=replace(case.of, queries=case.of.queries[b : b + 1], keys=case.of.keys[b : b + 1]))
        found = attend(alone, ragged_cases.RaggedInputs(data.q[i], data.k[j], data.v[j], data.params))
        assert np.array_equal(found[0], out[i]) and np.array_equal(found[1], lse[:, i])

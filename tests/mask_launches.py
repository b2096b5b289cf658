"""The launches that come before a GPU kernel and look at its mask, run on the processor (tests/simt), and the mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from schedules.builder.compile import export_cuda
from schedules.definition.definition_file import DefinitionFile
from schedules.definition.sample import parameters_of
from schedules.families.interface import Program, ScheduledLaunch, Target
from schedules.templates import v1
from tests.simt.simulate import Simulated
from tvm_flash import reference

GALLERY = Path(__file__).resolve().parent.parent / "schedules" / "definition" / "gallery"
BATCH, HEADS = 2, 2


def of_gallery(name):
    return DefinitionFile.parse(f"{GALLERY / name}.py:{name}").load()


def computed(maker, known, definition, lengths, folder, found=()):
    """What a launch of ``maker``, ``mask_ranges`` or the like, leaves of the pattern ``known`` in its workspace, and
    what is seen, ``(batch, heads, seqlen_q, seqlen_kv)``; ``found`` has what others have left, by role."""
    func, workspace = maker.find(known, v1.TRAVERSAL, "found"), maker.workspace(known)
    launch = ScheduledLaunch(func, maker.roles(known))
    program = Program("forward", (launch,), "tirx", alignment=16, index_bits=32, workspaces=(workspace,))
    simulated = Simulated(program, export_cuda(program, Target("sm_80")), folder)
    params = parameters_of(definition, BATCH, HEADS, *lengths)
    rows = {
        x: torch.zeros(BATCH, HEADS, n, 16, dtype=torch.float16)
        for x, n in zip("qkv", (*lengths, lengths[1]), strict=True)
    }
    params_and_found = {**params, **dict(found)}
    given = {n: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for n, x in params_and_found.items()}
    numbers = simulated(rows | given)[workspace.name].numpy()
    axes = {p.name: p.axes for p in definition.params}
    at = reference.positions(BATCH, HEADS, *lengths, reference.beside_scores(params, axes))
    return numbers, np.broadcast_to(definition.mask.twin(at), (BATCH, HEADS, *lengths))


def heads_that_differ(pattern):
    """Batch entries and heads of which a workspace has numbers of their own: 1 where they are all the same."""
    return [n if pattern.mask_differs_along(a) else 1 for a, n in (("b", BATCH), ("h", HEADS))]

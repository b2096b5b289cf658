"""The stages of ``scripts/show.py`` before there is a kernel: mathematics, the derivative, the mask's picture."""

from __future__ import annotations

import re
from pathlib import Path

from tvm import tirx

from schedules.builder.compile import configs_of, definition_of
from schedules.builder.plan import BuildRequest
from schedules.builder.suite import HeadDim, KernelSpec
from schedules.definition.attention import Attention
from schedules.definition.catalogue import MASKS, SCORES
from schedules.definition.derive import derive
from schedules.definition.errors import DefinitionError
from schedules.definition.mathematics import text
from schedules.definition.parameters import Site, parameter_symbols, value_dtype
from schedules.definition.pattern import Pattern, match
from schedules.definition.picture import Picture
from schedules.families import family_of
from schedules.families.interface import Target

#: An operator's mathematics, the derivative of the score, the picture of the mask.
DEFINITION, GRADIENT, MASK = "definition", "gradient", "mask"
STAGES = (DEFINITION, GRADIENT, MASK)


def before_templates(
    spec: KernelSpec, request: BuildRequest, stage: str, op: str, lengths: tuple[int, int], picture: Path | None
) -> tuple[str, str, str]:
    """The title of a stage, its text, and the text's language; the picture goes to the file ``picture`` too.

    Raises
    ------
    ValueError, DefinitionError: there is no such mask or tile, or the definition isn't attention.
    """
    pattern = match(definition_of(spec, request.targets[0], request.definition))
    if stage == MASK:
        return _picture(spec, request, pattern, lengths, picture)
    if stage == GRADIENT:
        return f"{stage}: {spec.score}", derivatives(pattern), "python"
    kind = f"head_dim {HeadDim(spec.head_dim, spec.head_dim_v)}, {spec.dtype}, {spec.mask}, {spec.score}"
    return f"{stage} of {op}: {kind}", derive(pattern, op).script(), "python"


def derivatives(pattern: Pattern) -> str:
    """The score and its derivatives as expressions of the scaled product ``s``."""
    names = ("b", "h", "batch", "heads", "kv_heads", "seqlen_q", "seqlen_kv")
    index = {n: tirx.Var(n, pattern.index_dtype) for n in (*names, "i", "j")}
    _, symbols = parameter_symbols(pattern.params, pattern.index_dtype)
    params = {
        p.name: symbols[p.name] if p.rank else tirx.Var(_with_axes(p.name, p.axes), value_dtype(p))
        for p in pattern.params
    }
    site = Site(*(index[n] for n in names), tirx.const(1.0, "float32"), params)
    at = (site, tirx.Var("s", "float32"), index["i"], index["j"])
    lines = [
        "# s = softmax_scale * (q · k)",
        f"score = {text(pattern.score(*at))}",
        f"d_score_d_s = {text(pattern.score_gradient(*at))}",
    ]
    for p in pattern.params:
        if p.dtype.startswith(("float", "bfloat")) and not p.rank:
            lines.append(f"d_score_d_{_with_axes(p.name, p.axes)} = {text(pattern.parameter_gradient(p.name, *at))}")
        if p.dtype.startswith(("float", "bfloat")) and p.rank:
            for place, slope in pattern.table_gradients(p.name, *at):
                lines.append(f"d_score_d_{text(params[p.name][place])} = {text(slope)}")
    return "\n".join(lines)


def _with_axes(name: str, axes: str) -> str:
    return f"{name}[{', '.join(axes)}]" if axes else name


def parse_lengths(given: str) -> tuple[int, int]:
    """``"512"`` or ``"256x512"``: how many queries and keys.

    Raises
    ------
    ValueError: it is none of these.
    """
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)?", given):
        raise ValueError(f"--lengths {given}: expected 512, or 256x512 for queries and keys")
    queries, _, keys = given.partition("x")
    return int(queries), int(keys or queries)


def _picture(
    spec: KernelSpec, request: BuildRequest, pattern: Pattern, lengths: tuple[int, int], file: Path | None
) -> tuple[str, str, str]:
    target = request.targets[0]
    definition = request.definition.load() if request.definition else Attention(SCORES[spec.score], MASKS[spec.mask])
    if not isinstance(definition, Attention):
        raise DefinitionError(f"{spec.definition}: is no Attention, and has no mask of its own to draw")
    tile = tile_of(spec, request, pattern, target)
    drawn = Picture.of(definition, *lengths, *tile)
    if file:
        file.write_bytes(drawn.png())
    name = (
        definition.mask.name if request.definition is None else f"{definition.mask.name} of {request.definition.name}"
    )
    title = f"mask {name}: {lengths[0]} queries (down), {lengths[1]} keys, tiles of {tile[0]} x {tile[1]} of {target}"
    return title, drawn.text(), "text"


def tile_of(spec: KernelSpec, request: BuildRequest, pattern: Pattern, target: Target) -> tuple[int, int]:
    """The rows and the columns that a kernel decides about at once, in the configuration that a build takes."""
    configs, _ = configs_of(spec, pattern, target, request.configs, request.tuned(spec, target))
    config = configs[min(configs)][0]
    if config is None:
        raise ValueError(f"--stage {MASK}: {target.arch} has no kernels of {spec.template} and {spec.dtype}")
    of_family = getattr(family_of(target), "mask_tile", None)
    return of_family(config, target) if of_family else (config.block_m, config.block_n)

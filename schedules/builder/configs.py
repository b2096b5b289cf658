"""Where a kernel's configurations come from: the family's defaults, a request, or tuning records.

What the records say is worked out in :mod:`schedules.tuning.best`; here is the form in which the builder takes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tvm_flash.packs.manifest import Speed, Waves


class Slot(NamedTuple):
    """Which of a spec's kernels: the fewest keys that it is for, and the height of its work tiles if it isn't the usual
    one, as in the manifest."""

    bucket: int
    block_m: int = 0


@dataclass(frozen=True)
class ChosenConfig:
    """A configuration as JSON, and the tuning record that it comes from."""

    config: Mapping[str, object]
    source: str


@dataclass(frozen=True)
class Proposal:
    """What records say of a range of lengths: a configuration from ``bucket`` keys on.

    ``config`` is None where nothing beats the family's default.  ``kernel_hash`` is what must come out of it, empty if
    it was measured for another arch.  ``source`` names the record.
    """

    bucket: int
    config: Mapping[str, Any] | None
    kernel_hash: str = ""
    source: str = ""


@dataclass(frozen=True)
class Tuned:
    """All that records say of a kernel.

    Attributes
    ----------
    proposals: by rising bucket from 0 on; none if there are no records, or the default is the best everywhere.
    longest: keys of the longest problem that was measured.
    verified: source hashes of this kernel that may ship; None if any may.
    speeds: by kernel hash.
    waves: by source hash.
    """

    proposals: tuple[Proposal, ...] = ()
    longest: int = 0
    verified: tuple[str, ...] | None = None
    speeds: Mapping[str, tuple[Speed, ...]] = field(default_factory=dict)
    waves: Mapping[str, Waves] = field(default_factory=dict)


#: Nothing was measured.
NO_RECORDS = Tuned()


def with_proposals(
    defaults: Mapping[int, Any], proposals: tuple[Proposal, ...], config: type, longest: int | None = None
) -> dict[int, tuple[Any, str]]:
    """Configurations and their origins by bucket: the proposals', and within a range without one the defaults; those
    that begin beyond what was measured stay too.

    Parameters
    ----------
    defaults: of the family, by bucket.
    config: the family's ``Config``.
    longest: keys of the longest problem that was measured; None where proposals hold for all that are longer.

    Raises
    ------
    TypeError: the configuration of a record has other fields than the family has now.
    """
    found: dict[int, tuple[Any, str]] = {}
    ends = [p.bucket for p in proposals[1:]] + [None]
    for proposal, end in zip(proposals, ends, strict=True):
        if proposal.config is not None:
            found[proposal.bucket] = (config(**proposal.config), proposal.source)
            continue
        for bucket, next_bucket in zip(sorted(defaults), [*sorted(defaults)[1:], None], strict=True):
            reaches = next_bucket is None or next_bucket > proposal.bucket
            if reaches and (end is None or bucket < end):
                found[max(bucket, proposal.bucket)] = (defaults[bucket], "default")
    if longest is not None:
        found |= {bucket: (c, "default") for bucket, c in defaults.items() if bucket > longest}
    return found

"""Which rows were computed by which weights: `WeightSpan`, and what becomes of spans when rows are cut and joined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moetrace.layout import as_int, require_text


@dataclass(frozen=True)
class WeightSpan:
    """From row `start` on (until the next span), rows were computed by weights called `version`."""

    start: int
    version: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", as_int(self.start, "the start of a weight span"))
        require_text(self.version, "a weight version")


def cut_spans(spans: Sequence[WeightSpan], first: int, stop: int) -> tuple[WeightSpan, ...]:
    """The spans of the rows `first <= row < stop`, counted from `first`."""
    cut: list[WeightSpan] = []
    for span in spans:
        moved = WeightSpan(max(span.start - first, 0), span.version)
        if moved.start == 0:
            cut = [moved]
        elif moved.start < stop - first:
            cut.append(moved)
    return tuple(cut)


def joined_spans(
    earlier: Sequence[WeightSpan], later: Sequence[WeightSpan], num_earlier: int
) -> tuple[WeightSpan, ...]:
    """The spans of `num_earlier` rows followed by others; none if those of either part are unknown."""
    if not earlier or not later:
        return ()
    joined = list(earlier)
    for span in later:
        if joined[-1].version != span.version:
            joined.append(WeightSpan(span.start + num_earlier, span.version))
    return tuple(joined)

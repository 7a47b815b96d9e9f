"""Diagnosis of answers with another number of rows than P + O - 1. Axes: T rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from moetrace.conformance.suite.bugs import Bug
from moetrace.conformance.suite.scene import UNKNOWN_TOKEN, Scene

_LEAST = 0.5
"""Of the rows that an explanation places, how many must be those rows."""


class Count(NamedTuple):
    """Why there are so many rows, how far that explains them, and where it begins to go wrong."""

    bug: Bug
    detail: str
    score: float
    position: int | None


def explain_count(scene: Scene) -> Count:
    """The explanation under which most rows are the right ones, the earlier one if two do."""
    want, got = len(scene.want_TLK), len(scene.got_TLK)
    explanations = (
        _fewer(scene, scene.seen_T, scene.right_T) if got < want else _more(scene, scene.seen_T, scene.right_T)
    )
    best = max(explanations, key=lambda count: count.score, default=None)
    if best is None or best.score < _LEAST:
        return Count(Bug.UNKNOWN, "their number and their content", 0, None)
    return best


def _fewer(scene: Scene, seen: np.ndarray, right: np.ndarray) -> Iterator[Count]:
    got, want, first = len(seen), len(right), scene.start
    last_prompt = scene.prompt_length - 1 - first
    if got == want - 1:
        yield Count(Bug.LAST_ROW, "", _alike(seen, right[:-1]), first + want - 1)
        if 0 <= last_prompt < want:
            score = _alike(seen, np.delete(right, last_prompt))
            yield Count(Bug.PROMPT_ROW, "", score, first + last_prompt)
    if got in (want // 2, -(-want // 2)) and want >= 4:
        for name, part in (
            ("the first half of the rows", right[:got]),
            ("the second half of the rows", right[want - got :]),
            ("every second row", right[::2][:got]),
            ("every second row", right[1::2][:got]),
        ):
            yield Count(Bug.SHARD, name, _alike(seen, part), first)
    yield Count(Bug.TRUNCATED, f"{got} of {want} rows", _alike(seen, right[:got]), first + got)
    missing = want - got
    cached = ", all that may be cached" if missing == scene.cached else ""
    yield Count(Bug.HEAD, f"the first {missing} of {want}{cached}", _alike(seen, right[missing:]), first)
    kept = _in_order(seen, right)
    if len(kept) == got:
        hole = next(i for i in range(want) if i >= got or kept[i] != i)
        yield Count(Bug.HOLES, f"{missing} of {want}", 0.99, first + hole)


def _more(scene: Scene, seen: np.ndarray, right: np.ndarray) -> Iterator[Count]:
    got, want, first = len(seen), len(right), scene.start
    extra = got - want
    if first and extra == first:
        yield Count(Bug.OFFSET, f"rows from position 0 on instead of {first}", _alike(seen, scene.tokens[:got]), first)
    if scene.seams and (end := _overlaps(scene, seen, right)) is not None:
        yield Count(Bug.OVERLAP, f"{extra} too many", 1.0, first + end)
    leading, trailing = _leading(seen[:want], right), _leading(seen[::-1][:want], right[::-1])
    if leading + trailing >= want:
        block, before = seen[leading : leading + extra], seen[max(leading - extra, 0) : leading]
        if leading and len(block) == len(before) and (block == before).all():
            yield Count(Bug.DUPLICATED, f"{extra} too many", 1.0, first + leading)
        if want == leading:
            following = scene.tokens[first + want : first + want + 1]
            never = extra == 1 and (block == following).all() and len(following)
            what = "the token that was sampled last has a row" if never else f"{extra} after the last"
            yield Count(Bug.EXTRA, what, 0.99, first + want)
        elif trailing == want:
            yield Count(Bug.EXTRA, f"{extra} before the first", 0.99, first)
        else:
            yield Count(Bug.EXTRA, f"{extra} in between", 0.9, first + leading)


def _alike(seen: np.ndarray, right: np.ndarray) -> float:
    """How many of the rows are those: 1 where there are none to compare."""
    if len(seen) != len(right):
        return 0.0
    return float((seen == right).mean()) if len(seen) else 1.0


def _leading(a: np.ndarray, b: np.ndarray) -> int:
    """How many elements are equal from the beginning on."""
    length = min(len(a), len(b))
    differing = np.flatnonzero(a[:length] != b[:length])
    return int(differing[0]) if len(differing) else length


def _in_order(seen: np.ndarray, right: np.ndarray) -> list[int]:
    """Where in `right` the elements of `seen` are found, one after another."""
    places, place = [], 0
    for token in seen.tolist():
        while place < len(right) and (token == UNKNOWN_TOKEN or right[place] != token):
            place += 1
        if place == len(right):
            break
        places.append(place)
        place += 1
    return places


def _overlaps(scene: Scene, seen: np.ndarray, right: np.ndarray) -> int | None:
    """Where the first piece begins that repeats rows, if all pieces are runs of the right rows and leave no gap."""
    end, first = 0, None
    for piece in np.split(seen, list(scene.seams)):
        begins = [
            at
            for at in range(end + 1)
            if at + len(piece) <= len(right) and (right[at : at + len(piece)] == piece).all()
        ]
        if not begins:
            return None
        begin = begins[-1]
        if begin < end and first is None:
            first = begin
        end = max(end, begin + len(piece))
    return first

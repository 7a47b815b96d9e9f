"""Diagnosis of rows that are there and wrong: hypotheses, tried from the simplest to the strangest.

Each takes a scene and the wrong rows that nothing has explained yet, and says which of them it explains. The first one
that explains all is named; if none does, the one that explains most, and the rest is diagnosed again.

Axes: T rows, L MoE layers, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from moetrace.conformance.suite.bugs import Bug
from moetrace.conformance.suite.scene import UNKNOWN_TOKEN, Scene, right_rows, wrong_layers

_SHIFTS = [sign * by for by in range(1, 9) for sign in (1, -1)]
_ROUNDS = 4
_LEAST = 0.5


class Guess(NamedTuple):
    """What rows look like: the class, in this case's numbers, and which rows it explains."""

    bug: Bug
    detail: str
    rows_T: np.ndarray


Hypothesis = Callable[[Scene, np.ndarray], Iterator[Guess]]


def explain_contents(scene: Scene) -> list[Guess]:
    """What the wrong rows of a scene look like; every wrong row is in one guess."""
    left_T = scene.wrong_T.copy()
    guesses: list[Guess] = []
    for _ in range(_ROUNDS):
        if not left_T.any():
            return guesses
        guess = _best(scene, left_T)
        if guess is None:
            break
        guesses.append(guess)
        left_T &= ~guess.rows_T
    if left_T.any():
        guesses.append(Guess(Bug.UNKNOWN, "", left_T))
    return guesses


def _best(scene: Scene, left_T: np.ndarray) -> Guess | None:
    best, most = None, 0
    for hypothesis in HYPOTHESES:
        for guess in hypothesis(scene, left_T):
            rows_T = guess.rows_T & left_T
            explained = int(rows_T.sum())
            if explained == left_T.sum():
                return guess._replace(rows_T=rows_T)
            if explained > most:
                best, most = guess._replace(rows_T=rows_T), explained
    return best if most >= _LEAST * left_T.sum() else None


def _axes(scene: Scene, left_T: np.ndarray) -> Iterator[Guess]:
    rows, layers, top_k = scene.got_TLK.shape
    turned = scene.got_TLK.reshape(layers, rows, top_k).transpose(1, 0, 2)
    if layers > 1 and rows > 1 and not wrong_layers(scene.want_TLK, turned, scene.ordered).any():
        yield Guess(Bug.AXES, "the bytes are in the order [L, T, K]", left_T)
    back = scene.got_TLK.transpose(1, 0, 2).reshape(rows, layers, top_k)
    if layers > 1 and rows > 1 and not wrong_layers(scene.want_TLK, back, scene.ordered).any():
        yield Guess(Bug.AXES, "the bytes are in the order [T, L, K]", left_T)


def _rank(scene: Scene, left_T: np.ndarray) -> Iterator[Guess]:
    if scene.ordered:
        yield Guess(Bug.RANK_LOST, "", right_rows(scene.want_TLK, scene.got_TLK, False) & left_T)


def _versions(scene: Scene, left_T: np.ndarray) -> Iterator[Guess]:
    for version, reader in scene.readers.items():
        if version != scene.form.weight_version:
            seen_T = reader.read(scene.got_TLK)
            yield Guess(
                Bug.STALE_WEIGHTS,
                f"the weights are version {scene.form.weight_version}, the rows of version {version}",
                seen_T == scene.right_T,
            )


def _half(scene: Scene, left_T: np.ndarray) -> Iterator[Guess]:
    """Exactly one half is wrong, and nothing that belongs to anybody: filler, or the other half again."""
    rows = len(left_T)
    if rows < 8:
        return
    place, half = np.arange(rows), -(-rows // 2)
    for name, part_T in (
        ("the second half of the rows", place >= half),
        ("the second half of the rows", place >= rows // 2),
        ("the first half of the rows", place < half),
        ("every second row", place % 2 == 1),
        ("every second row", place % 2 == 0),
    ):
        if not (left_T == part_T).all():
            continue
        ids_TLK = scene.got_TLK[part_T]
        other_TLK = scene.got_TLK[~part_T][: len(ids_TLK)]
        if (ids_TLK == ids_TLK[0, 0, 0]).all() or (ids_TLK[: len(other_TLK)] == other_TLK).all():
            yield Guess(Bug.SHARD, f"{name} was not written", part_T)
            return


def _filler(scene: Scene, left_T: np.ndarray) -> Iterator[Guess]:
    if scene.got_TLK.shape[1] * scene.got_TLK.shape[2] < 2:
        return
    first_T = scene.got_TLK[:, 0, 0]
    constant_T = (scene.got_TLK == first_T[:, None, None]).all(axis=(1, 2))
    yield Guess(Bug.ZEROS, "", constant_T & (first_T == 0))
    for value in np.unique(first_T[constant_T & left_T]):
        yield Guess(Bug.FILL, str(value), constant_T & (first_T == value))


def _shifts(scene: Scene, left_T: np.ndarray) -> Iterator[Guess]:
    seen_T, place = scene.seen_T, scene.start + np.arange(len(left_T))
    for by in _SHIFTS:
        there = place + by
        inside = (there >= 0) & (there < len(scene.tokens))
        token_T = np.where(inside, scene.tokens[np.clip(there, 0, len(scene.tokens) - 1)], UNKNOWN_TOKEN - 1)
        rows_T = (seen_T == token_T) & left_T
        if rows_T.sum() < 2 and len(left_T) > 2:
            continue  # one row that equals its neighbour is no shift
        first = int(np.flatnonzero(rows_T)[0]) if rows_T.any() else 0
        if by < 0 and first > -by and (rows_T | ~scene.wrong_T)[first:].all():
            yield Guess(Bug.DUPLICATED, f"{-by} before position {place[first]}, and all later rows moved on", rows_T)
        yield Guess(Bug.SHIFTED, f"row t holds the route of token t {'+' if by > 0 else '-'} {abs(by)}", rows_T)


def _samples(scene: Scene, left_T: np.ndarray) -> Iterator[Guess]:
    for which, tokens in scene.siblings.items():
        padded = np.full(scene.start + len(left_T), UNKNOWN_TOKEN - 1)
        padded[: len(tokens)] = tokens[: len(padded)]
        yield Guess(Bug.SAMPLES, f"rows of sample {which}", scene.seen_T == padded[scene.start :])


def _others(scene: Scene, left_T: np.ndarray) -> Iterator[Guess]:
    seen_T, place = scene.seen_T, scene.start + np.arange(len(left_T))
    known = np.flatnonzero(left_T & (seen_T != UNKNOWN_TOKEN))
    seen = [(int(place[row]), int(seen_T[row])) for row in known]
    cached = bool(len(known)) and place[known[-1]] < scene.cached
    found = scene.book.find(seen, scene.number, past=cached)
    if found is None:
        return
    other, offset = found
    there = place + offset
    inside = (there >= 0) & (there < len(other.tokens))
    token_T = np.where(inside, other.tokens[np.clip(there, 0, len(other.tokens) - 1)], UNKNOWN_TOKEN - 1)
    rows_T = (seen_T == token_T) & left_T
    tries = len(scene.book.sequences) if offset == 0 else scene.book.num_tokens
    chance = min(tries / scene.form.vocab_size, 1.0) ** int(rows_T.sum())
    if chance > 0.01:
        return
    past = other.ended is not None and other.ended < scene.began
    at = "" if offset == 0 else f", from {abs(offset)} positions {'further on' if offset > 0 else 'before'}"
    yield Guess(Bug.STALE_PREFIX if past else Bug.OTHER_SEQUENCE, f"rows of sequence {other.number}{at}", rows_T)


def _repeated(scene: Scene, left_T: np.ndarray) -> Iterator[Guess]:
    got_TLK = scene.got_TLK
    same_T = np.zeros(len(left_T), bool)
    same_T[1:] = (got_TLK[1:] == got_TLK[:-1]).all(axis=(1, 2))
    yield Guess(Bug.REPEATED, "each equals the row before it", same_T)
    rows, counts = np.unique(got_TLK[left_T].reshape(int(left_T.sum()), -1), axis=0, return_counts=True)
    if counts.max() > 1:
        most = rows[counts.argmax()]
        yield Guess(Bug.REPEATED, "they are all equal", (got_TLK.reshape(len(left_T), -1) == most).all(axis=1))


def _layers(scene: Scene, left_T: np.ndarray) -> Iterator[Guess]:
    layers = len(scene.form.layers)
    if layers < 2:
        return
    want_TLK, got_TLK = scene.want_TLK[left_T], scene.got_TLK[left_T]
    source: list[int | None] = []
    for layer in range(layers):
        held = [
            float((~wrong_layers(want_TLK[:, [m]], got_TLK[:, [layer]], scene.ordered)).mean()) for m in range(layers)
        ]
        own_first = sorted(range(layers), key=lambda m: (-held[m], m != layer))
        nothing = bool((got_TLK[:, layer] == got_TLK[0, layer, 0]).all())
        if held[own_first[0]] < 0.9 and not nothing:
            return
        source.append(None if nothing else own_first[0])
    filled = [i for i in range(layers) if source[i] is not None]
    if all(source[i] == i for i in filled):
        return
    taken = [int(source[i] or 0) for i in filled]
    mapped_T = right_rows(scene.want_TLK[:, taken], scene.got_TLK[:, filled], scene.ordered)
    yield Guess(Bug.LAYER_MAP, _layer_words(source, scene.form.layers), mapped_T)


def _layer_words(source: list[int | None], names: tuple[int, ...]) -> str:
    layers = len(source)
    moved = [i for i in range(layers) if source[i] != i]
    if source == list(range(layers))[::-1] and layers > 2:
        return "in reverse"
    if len(moved) == 2 and source[moved[0]] == moved[1] and source[moved[1]] == moved[0]:
        return f"layers {names[moved[0]]} and {names[moved[1]]} are swapped"
    words = [f"layer {names[i]} holds {'nothing' if source[i] is None else names[source[i] or 0]}" for i in moved]
    return ", ".join(words[:4]) + (" ..." if len(words) > 4 else "")


def _some_layers(scene: Scene, left_T: np.ndarray) -> Iterator[Guess]:
    """Only some layers are wrong: never written, or moved by themselves, as by a draft head that has their number."""
    some_L = scene.wrong_TL[left_T].any(axis=0)
    if some_L.all():
        return
    got_TLK = scene.got_TLK[:, some_L]
    first_T = got_TLK[:, 0, 0]
    constant_T = (got_TLK == first_T[:, None, None]).all(axis=(1, 2))
    if got_TLK.shape[1] * got_TLK.shape[2] > 1:
        yield Guess(Bug.ZEROS, "", constant_T & (first_T == 0))
    place = scene.start + np.arange(len(left_T))
    for by in _SHIFTS:
        inside = (place + by >= 0) & (place + by < len(scene.tokens))
        tokens = scene.tokens[np.clip(place + by, 0, len(scene.tokens) - 1)]
        moved_TLK = scene.form.routes(tokens)[:, some_L].astype(np.int64)
        rows_T = inside & right_rows(moved_TLK, got_TLK, scene.ordered) & left_T
        if rows_T.sum() > 1 or len(left_T) <= 2:
            yield Guess(Bug.SHIFTED, f"row t holds the route of token t {'+' if by > 0 else '-'} {abs(by)}", rows_T)


_NARROW: tuple[tuple[str, Callable[[np.ndarray], np.ndarray]], ...] = (
    ("as int8", lambda ids: (ids + 128) % 256 - 128),
    ("modulo 256", lambda ids: ids % 256),
    ("modulo 128", lambda ids: ids % 128),
    ("at most 127", lambda ids: np.minimum(ids, 127)),
    ("at most 255", lambda ids: np.minimum(ids, 255)),
)


def _overflow(scene: Scene, left_T: np.ndarray) -> Iterator[Guess]:
    want_TLK = scene.want_TLK.astype(np.int64)
    for name, narrow in _NARROW:
        yield Guess(Bug.OVERFLOW, f"ids {name}", right_rows(narrow(want_TLK), scene.got_TLK, scene.ordered))


def _local(scene: Scene, left_T: np.ndarray) -> Iterator[Guess]:
    for ranks in (2, 4, 8, 16):
        share = scene.form.num_experts // ranks
        if share * ranks == scene.form.num_experts and share > 1:
            local_TLK = scene.want_TLK.astype(np.int64) % share
            rows_T = right_rows(local_TLK, scene.got_TLK, scene.ordered)
            yield Guess(Bug.SHARD, f"ids within one of {ranks} ranks of {share} experts each", rows_T)


HYPOTHESES: tuple[Hypothesis, ...] = (
    _axes, _rank, _versions, _half, _filler, _samples, _shifts, _repeated, _others, _layers, _some_layers, _overflow,
    _local,
)  # fmt: skip
"""From the simplest to the strangest. Renumbered ids need more rows than one answer has: see `renumbering`."""

"""The ways in which mutants bend answers. Axes: T rows, L MoE layers, K experts per token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from moetrace.conformance.suite.asking import Answer, Ask, Rows
from moetrace.conformance.suite.broken import Bend, Broken

IdsBend = Callable[[Broken, Ask, Answer, np.ndarray], np.ndarray]


def with_ids(answer: Answer, ids_TLK: np.ndarray) -> Answer:
    rows = answer.rows
    if rows is None:
        return answer
    valid_T = np.ones(len(ids_TLK), bool)
    seams = tuple(seam for seam in rows.seams if seam < len(ids_TLK))
    return replace(answer, rows=replace(rows, ids_TLK=ids_TLK, valid_T=valid_T, seams=seams))


def ids(bend: IdsBend) -> Bend:
    """Bend the ids of every answer that has some."""

    def all_of(broken: Broken, ask: Ask, answers: list[Answer]) -> list[Answer]:
        return [
            with_ids(answer, bend(broken, ask, answer, answer.rows.ids_TLK.copy()))
            if answer.rows is not None
            else answer
            for answer in answers
        ]

    return all_of


def put(where: Callable[[Broken, Ask, int], Any], value: int) -> Bend:
    """Write one value over the rows that `where(broken, ask, T)` indexes."""

    def write(broken: Broken, ask: Ask, answer: Answer, ids_TLK: np.ndarray) -> np.ndarray:
        ids_TLK[where(broken, ask, len(ids_TLK))] = value
        return ids_TLK

    return ids(write)


def ahead(broken: Broken, ask: Ask, answer: Answer, ids_TLK: np.ndarray) -> np.ndarray:
    tokens = [*ask.prompt, *answer.output]
    following = broken.form.routes(tokens[ask.start + 1 : ask.start + 1 + len(ids_TLK)]).astype(np.int64)
    return np.concatenate([following, ids_TLK[len(following) :]])


def behind(broken: Broken, ask: Ask, answer: Answer, ids_TLK: np.ndarray) -> np.ndarray:
    return np.concatenate([ids_TLK[:1], ids_TLK[:-1]])


def no_prompt_row(broken: Broken, ask: Ask, answer: Answer, ids_TLK: np.ndarray) -> np.ndarray:
    if len(answer.output) < 2 or ask.start >= len(ask.prompt):
        return ids_TLK
    return np.delete(ids_TLK, len(ask.prompt) - 1 - ask.start, axis=0)


def twice(broken: Broken, ask: Ask, answer: Answer, ids_TLK: np.ndarray) -> np.ndarray:
    return np.repeat(ids_TLK, [2 if i == len(ids_TLK) // 2 else 1 for i in range(len(ids_TLK))], axis=0)


def twice_cut(broken: Broken, ask: Ask, answer: Answer, ids_TLK: np.ndarray) -> np.ndarray:
    return twice(broken, ask, answer, ids_TLK)[: len(ids_TLK)] if len(ids_TLK) > 8 else ids_TLK


def last_token_too(broken: Broken, ask: Ask, answer: Answer, ids_TLK: np.ndarray) -> np.ndarray:
    if not answer.output:
        return ids_TLK
    return np.concatenate([ids_TLK, broken.form.routes(answer.output[-1:]).astype(np.int64)])


def swapped(broken: Broken, ask: Ask, answer: Answer, ids_TLK: np.ndarray) -> np.ndarray:
    ids_TLK[:, [0, 1]] = ids_TLK[:, [1, 0]]
    return ids_TLK


def dense_first(broken: Broken, ask: Ask, answer: Answer, ids_TLK: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros_like(ids_TLK[:, :1]), ids_TLK], axis=1)


def draft(broken: Broken, ask: Ask, answer: Answer, ids_TLK: np.ndarray) -> np.ndarray:
    ids_TLK[:, 0] = ahead(broken, ask, answer, ids_TLK)[:, 0]
    return ids_TLK


def stale_prefix(broken: Broken, ask: Ask, answer: Answer, ids_TLK: np.ndarray) -> np.ndarray:
    shared = broken.shared(ask)
    others = [tokens for tokens in broken.past if len(tokens) >= shared and tokens[0] != ask.prompt[0]]
    if shared and others and ask.start == 0:
        rows = min(shared, len(ids_TLK))
        ids_TLK[:rows] = broken.form.routes(others[-1][:rows])
    return ids_TLK


def stale_weights(broken: Broken, ask: Ask, answer: Answer, ids_TLK: np.ndarray) -> np.ndarray:
    shared = broken.shared(ask) if broken.old_form else 0
    if broken.old_form and shared:
        ids_TLK[:shared] = broken.old_form.routes(ask.prompt[: min(shared, len(ids_TLK))])
    return ids_TLK


def neighbour(broken: Broken, ask: Ask, answer: Answer, ids_TLK: np.ndarray) -> np.ndarray:
    others = [other.prompt for other in broken.running if other is not ask and len(other.prompt) >= 4]
    if others and ask.start == 0 and len(ids_TLK) >= 4:
        ids_TLK[:4] = broken.form.routes(others[-1][:4])
    return ids_TLK


def replayed(broken: Broken, ask: Ask, answer: Answer, ids_TLK: np.ndarray) -> np.ndarray:
    first = len(ask.prompt) - ask.start
    ids_TLK[first + 1 :] = ids_TLK[first : first + 1]
    return ids_TLK


def physical(broken: Broken, ask: Ask, answer: Answer, ids_TLK: np.ndarray) -> np.ndarray:
    places = np.stack(
        [np.random.default_rng(layer).permutation(broken.form.num_experts + 8) for layer in broken.form.layers]
    )
    return np.stack([places[i][ids_TLK[:, i]] for i in range(len(places))], axis=1)


def half_written(broken: Broken, ask: Ask, answer: Answer, ids_TLK: np.ndarray) -> np.ndarray:
    ids_TLK[-(-len(ids_TLK) // 2) :] = 0
    return ids_TLK


def prefix_gone(broken: Broken, ask: Ask, answer: Answer, ids_TLK: np.ndarray) -> np.ndarray:
    return ids_TLK[min(broken.shared(ask), len(ids_TLK) - 1) :] if ask.start == 0 else ids_TLK


def busy_cut(broken: Broken, ask: Ask, answer: Answer, ids_TLK: np.ndarray) -> np.ndarray:
    busy = len(broken.running) > 8 and len(ids_TLK) > 8
    return ids_TLK[: len(ids_TLK) * 3 // 4] if busy else ids_TLK


def unmarked(broken: Broken, ask: Ask, answers: list[Answer]) -> list[Answer]:
    """Rows of a cached prefix are marked missing: honest, but no rows."""
    shared, bent = broken.shared(ask), []
    for answer in answers:
        if answer.rows is not None and shared and ask.start == 0:
            valid_T = np.arange(len(answer.rows.ids_TLK)) >= shared
            answer = replace(answer, rows=replace(answer.rows, valid_T=valid_T))
        bent.append(answer)
    return bent


def last_sample(broken: Broken, ask: Ask, answers: list[Answer]) -> list[Answer]:
    return [replace(answer, rows=answers[-1].rows) for answer in answers]


def start_ignored(broken: Broken, ask: Ask, answer: Answer, ids_TLK: np.ndarray) -> np.ndarray:
    return np.concatenate([broken.form.routes(ask.prompt[: ask.start]).astype(np.int64), ids_TLK])


def abort_empties(broken: Broken, ask: Ask, answers: list[Answer]) -> list[Answer]:
    return [replace(answer, rows=None) if answer.finish_reason == "abort" else answer for answer in answers]


def overlapping(broken: Broken, ask: Ask, answers: list[Answer]) -> list[Answer]:
    """Every piece of a stream but the first begins with the last row of the one before it."""
    bent = []
    for answer in answers:
        rows = answer.rows
        if rows is not None and rows.seams:
            pieces = np.split(rows.ids_TLK, list(rows.seams))
            pieces = [pieces[0], *(np.concatenate([a[-1:], b]) for a, b in pairwise(pieces))]
            seams = tuple(np.cumsum([len(piece) for piece in pieces])[:-1].tolist())
            ids_TLK = np.concatenate(pieces)
            answer = replace(answer, rows=Rows(ids_TLK, np.ones(len(ids_TLK), bool), seams=seams))
        bent.append(answer)
    return bent


def only_scored(broken: Broken, ask: Ask, answer: Answer, ids_TLK: np.ndarray) -> np.ndarray:
    return ids_TLK[:-1] if ask.max_new_tokens == 0 else ids_TLK

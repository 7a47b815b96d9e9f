"""Comparing one answer with the closed form. Axes: T rows, L MoE layers, K experts per token."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from moetrace.conformance.dye.form import DyeForm
from moetrace.conformance.suite.asking import Answer, Ask, Rows
from moetrace.conformance.suite.bugs import Bug, Finding
from moetrace.conformance.suite.contents import explain_contents
from moetrace.conformance.suite.counting import explain_count
from moetrace.conformance.suite.places import place_of
from moetrace.conformance.suite.scene import Asked, Book, Reader, Scene, right_rows, wrong_layers


@dataclass
class World:
    """What is known of the engine while a run goes on: the weights in force, and every sequence so far."""

    form: DyeForm
    readers: dict[int, Reader] = field(default_factory=dict)
    book: Book = field(default_factory=Book)
    coming: DyeForm | None = None
    """The weights that an update brings, or has brought, to requests under way."""

    def __post_init__(self) -> None:
        self.readers[self.form.weight_version] = Reader(self.form)

    def switch(self, form: DyeForm) -> None:
        """Other weights are in force."""
        self.form = form
        self.readers.setdefault(form.weight_version, Reader(form))


@dataclass(frozen=True)
class Judgement:
    """What is wrong with one answer, and how many rows were looked at; `unexplained` are rows for later."""

    findings: list[Finding]
    rows: int
    missing: int = 0
    unexplained: tuple[np.ndarray, np.ndarray] | None = None
    """Rows as they should be and as they came, `[T, L, K]` each, of the finding that is `Bug.UNKNOWN`."""


def judge(
    world: World, form: DyeForm, ask: Ask, answer: Answer, asked: Asked, siblings: dict[int, np.ndarray], check: str
) -> Judgement:
    """Judge one sequence.

    Args:
        world: the run so far.
        form: the weights in force when it was asked.
        ask, answer: the request, and one of its answers.
        asked: the sequence.
        siblings: tokens of the request's other samples, by their number.
        check: name of the check.
    """
    lengths = (len(ask.prompt), len(answer.output))
    about = Finding(check, Bug.UNKNOWN, sequence=asked.number, lengths=lengths)
    findings = _tokens(form, ask, answer, about)
    # Each token that was an input has a row; of a scored prompt all were, else all but the last.
    stop = sum(lengths) - (ask.max_new_tokens > 0)
    want_TLK = form.routes(asked.tokens[ask.start : stop]).astype(np.int64)
    rows = answer.rows
    if rows is None:
        findings.append(replace(about, bug=Bug.NO_ROWS, expected=f"{len(want_TLK)} rows", got="none"))
        return Judgement(findings, 0)
    if rows.ids_TLK.shape[0] == 0 and len(want_TLK) > 1:
        findings.append(replace(about, bug=Bug.NO_ROWS, expected=f"{len(want_TLK)} rows", got="0 rows"))
        return Judgement(findings, 0)
    got_TLK, shaped = _shape(form, rows, want_TLK, about)
    findings += shaped
    if got_TLK is None:
        return Judgement(findings, len(rows.ids_TLK))
    if ask.switches:
        want_TLK = _switched(world, want_TLK, got_TLK, asked.tokens[ask.start : stop])
    ordered = form.order == "rank" and rows.order != "set"
    missing_T = ~rows.valid_T[: len(got_TLK)]
    if missing_T.any():
        place = place_of(missing_T, ask.start, lengths[0], ask.cached)
        first = ask.start + int(np.flatnonzero(missing_T)[0])
        findings.append(replace(about, bug=Bug.MISSING, rows=int(missing_T.sum()), position=first, place=place))
        if len(got_TLK) == len(want_TLK):
            got_TLK = np.where(missing_T[:, None, None], want_TLK, got_TLK)
    scene = Scene(
        form=form, readers=world.readers, number=asked.number, tokens=asked.tokens, prompt_length=lengths[0],
        start=ask.start, cached=ask.cached, want_TLK=want_TLK, got_TLK=got_TLK, seams=rows.seams, began=asked.began,
        siblings=siblings, book=world.book, ordered=ordered,
    )  # fmt: skip
    told = "" if rows.start in (None, ask.start) else f"it says that it starts at {rows.start}"
    if rows.layout not in (None, form.layout):
        told = f"it says {rows.layout}"
    counts = len(got_TLK), int(missing_T.sum())
    if len(got_TLK) != len(want_TLK):
        return Judgement([*findings, _of_count(scene, about)], *counts)
    wrong, unexplained = _of_contents(scene, about)
    findings += wrong
    if not findings and (rows.refusal or told):
        refused = replace(about, bug=Bug.PAYLOAD, detail=rows.refusal or told)
        findings.append(refused)
    return Judgement(findings, *counts, unexplained)


def _tokens(form: DyeForm, ask: Ask, answer: Answer, about: Finding) -> list[Finding]:
    """What is wrong with the tokens and with how they ended."""
    findings, output, last = [], list(answer.output), ask.prompt[-1]
    if ask.temperature == 0:
        right = form.continuation(last, len(output))
        if output != right:
            first = next(i for i, token in enumerate(output) if token != right[i])
            findings.append(
                replace(
                    about, bug=Bug.TOKENS, position=len(ask.prompt) + first, expected=right[first], got=output[first]
                )
            )
    count, reason = ask.max_new_tokens, "length"
    eos = form.eos_token_id
    if not ask.ignore_eos and ask.temperature == 0 and eos is not None:
        to_end = (eos - last - 1) % form.vocab_size + 1
        if to_end <= count:
            count, reason = to_end, "stop"
    if (ask.abort_after is not None or ask.switches) and answer.finish_reason == "abort":
        return findings if len(output) <= count else [*findings, replace(about, bug=Bug.FINISH, detail="too long")]
    if len(output) != count or (answer.finish_reason != reason and ask.max_new_tokens > 0):
        expected, got = f"{count} tokens, {reason}", f"{len(output)} tokens, {answer.finish_reason}"
        findings.append(replace(about, bug=Bug.FINISH, expected=expected, got=got))
    return findings


def _shape(form: DyeForm, rows: Rows, want_TLK: np.ndarray, about: Finding) -> tuple[np.ndarray | None, list[Finding]]:
    """The ids as `[T, L, K]` of the MoE layers where that can be made of them, and what is wrong with their shape."""
    ids, layers, top_k = rows.ids_TLK, len(form.layers), form.top_k
    findings = []
    if rows.all_layers and ids.shape[1] == form.num_layers:
        ids = ids[:, list(form.layers)]
    if ids.shape == (layers, len(want_TLK), top_k) and ids.shape[0] != ids.shape[1]:
        turned = ids.transpose(1, 0, 2)
        if not wrong_layers(want_TLK, turned, form.order == "rank").any():
            return None, [replace(about, bug=Bug.AXES, expected=list(want_TLK.shape), got=list(ids.shape))]
    if ids.shape[1] != layers:
        expected, got = f"{layers} layers", f"{ids.shape[1]} layers"
        if ids.shape[1] == form.num_layers:
            detail = f"{form.num_layers - layers} of {form.num_layers} decoder layers have no experts"
            findings.append(replace(about, bug=Bug.DENSE_COUNTED, detail=detail, expected=expected, got=got))
            ids = ids[:, list(form.layers)]
        else:
            return None, [replace(about, bug=Bug.LAYERS, expected=expected, got=got)]
    if ids.shape[2] != top_k:
        found = replace(about, bug=Bug.WIDTH, expected=f"{top_k} ids a route", got=f"{ids.shape[2]} ids")
        narrow = min(ids.shape[2], top_k)
        same = len(ids) == len(want_TLK) and (ids[..., :narrow] == want_TLK[..., :narrow]).all()
        kept = f"the first {narrow} are right" + (", as with shared experts fused in" if ids.shape[2] > top_k else "")
        return None, [*findings, replace(found, detail=kept if same else "")]
    return ids, findings


def _switched(world: World, want_TLK: np.ndarray, got_TLK: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Rows as they should be if the weights changed once, at the place where that fits best."""
    if world.coming is None or len(got_TLK) != len(want_TLK):
        return want_TLK
    newer_TLK = world.coming.routes(tokens).astype(np.int64)
    old_T = right_rows(want_TLK, got_TLK, False)
    new_T = right_rows(newer_TLK, got_TLK, False)
    right = np.concatenate([[0], np.cumsum(old_T)]) + np.concatenate([np.cumsum(new_T[::-1])[::-1], [0]])
    at = len(right) - 1 - int(right[::-1].argmax())
    return np.concatenate([want_TLK[:at], newer_TLK[at:]])


def _of_count(scene: Scene, about: Finding) -> Finding:
    count = explain_count(scene)
    return replace(
        about,
        bug=count.bug,
        detail=count.detail,
        position=count.position,
        rows=abs(len(scene.want_TLK) - len(scene.got_TLK)),
        expected=f"{len(scene.want_TLK)} rows",
        got=f"{len(scene.got_TLK)} rows",
    )


def _of_contents(scene: Scene, about: Finding) -> tuple[list[Finding], tuple[np.ndarray, np.ndarray] | None]:
    findings, unexplained = [], None
    for guess in explain_contents(scene):
        row = int(np.flatnonzero(guess.rows_T)[0])
        layer = int(np.flatnonzero(scene.wrong_TL[row])[0])
        partly = scene.wrong_TL[guess.rows_T].any(axis=0)
        place = place_of(guess.rows_T, scene.start, scene.prompt_length, scene.cached)
        if not partly.all():
            layers = ", ".join(str(scene.form.layers[i]) for i in np.flatnonzero(partly))
            place = ", ".join(part for part in (place, f"layers {layers} only") if part)
        findings.append(
            replace(
                about,
                bug=guess.bug,
                detail=guess.detail,
                place=place,
                rows=int(guess.rows_T.sum()),
                position=scene.start + row,
                layer=scene.form.layers[layer],
                expected=scene.want_TLK[row, layer].tolist(),
                got=scene.got_TLK[row, layer].tolist(),
            )
        )
        if guess.bug is Bug.UNKNOWN:
            unexplained = scene.want_TLK[guess.rows_T], scene.got_TLK[guess.rows_T]
    return findings, unexplained

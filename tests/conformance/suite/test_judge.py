"""One answer at a time, wrong in a way worked out by hand: which bug, where, and in what words."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moetrace.conformance.dye.form import DyeForm
from moetrace.conformance.suite.asking import Answer, Ask, Rows
from moetrace.conformance.suite.bugs import Bug, Finding
from moetrace.conformance.suite.judge import Judgement, World, judge
from moetrace.conformance.suite.places import place_of
from moetrace.conformance.suite.renumbering import renumbering
from moetrace.conformance.suite.scene import Asked
from moetrace.errors import CheckError
from moetrace.layout import MoeLayout

FORM = DyeForm("qwen3_moe", (17, 16), 32, 4, (1, 2, 3), 4, eos_token_id=271)
PROMPT = (20, 7, 200, 31, 150, 90, 3, 244, 61, 12)
OUTPUT = (13, 14, 15, 16)
RIGHT_TLK = np.array(
    [[FORM.route(token, layer) for layer in FORM.layers] for token in [*PROMPT, *OUTPUT[:-1]]], np.int64
)


def rows(ids_TLK: np.ndarray, **facts: object) -> Rows:
    return Rows(ids_TLK, np.ones(len(ids_TLK), bool), **facts)  # type: ignore[arg-type]


def judged(
    got: Rows | None, ask: Ask | None = None, answer: Answer | None = None, world: World | None = None
) -> Judgement:
    ask, answer = ask or Ask(PROMPT, 4), answer or Answer(OUTPUT, "length", got)
    tokens = np.array([*ask.prompt, *answer.output])
    return judge(world or World(FORM), FORM, ask, answer, Asked(5, tokens, 10, 11), {}, "a check")


def only(judgement: Judgement) -> Finding:
    [finding] = judgement.findings
    return finding


def test_right_rows_are_not_blamed() -> None:
    judgement = judged(rows(RIGHT_TLK))
    assert judgement.findings == []
    assert judgement.rows == 13


def test_a_finding_names_sequence_position_layer_expected_and_got_in_one_line() -> None:
    got_TLK = RIGHT_TLK.copy()
    got_TLK[4] = 0
    right = FORM.route(150, 1)
    assert only(judged(rows(got_TLK))).line() == (
        f"sequence 5, P 10 + O 4, position 4, layer 1: expected {right}, got [0, 0, 0, 0]: looks like zeros"
    )


def test_one_wrong_id_of_one_layer_is_found() -> None:
    got_TLK = RIGHT_TLK.copy()
    got_TLK[6, 2, 3] = (got_TLK[6, 2, 3] + 1) % 32
    finding = only(judged(rows(got_TLK)))
    assert (finding.bug, finding.position, finding.layer) == (Bug.UNKNOWN, 6, 3)
    assert finding.place == "layers 3 only"


@pytest.mark.parametrize(
    ("kept", "bug", "position"),
    [
        (list(range(12)), Bug.LAST_ROW, 12),
        ([*range(9), *range(10, 13)], Bug.PROMPT_ROW, 9),
        (list(range(8)), Bug.TRUNCATED, 8),
        (list(range(4, 13)), Bug.HEAD, 0),
        ([0, 1, 2, 5, 6, 7, 9, 10, 11, 12], Bug.HOLES, 3),
        (list(range(6)), Bug.SHARD, 0),
        (list(range(0, 13, 2)), Bug.SHARD, 0),
        ([0, 1, 2, 3, 3, *range(4, 13)], Bug.DUPLICATED, 4),
        ([], Bug.NO_ROWS, None),
    ],
)
def test_a_wrong_number_of_rows(kept: list[int], bug: Bug, position: int | None) -> None:
    finding = only(judged(rows(RIGHT_TLK[kept])))
    assert (finding.bug, finding.position) == (bug, position)


def test_a_row_of_the_last_sampled_token_is_extra() -> None:
    last = np.array([[FORM.route(16, layer) for layer in FORM.layers]])
    assert "sampled last" in only(judged(rows(np.concatenate([RIGHT_TLK, last])))).detail


def test_a_scored_prompt_has_all_its_rows() -> None:
    ask, answer = Ask(PROMPT, 0), Answer((), "length", rows(RIGHT_TLK[:10]))
    assert judged(None, ask, answer).findings == []
    short = replace(answer, rows=rows(RIGHT_TLK[:9]))
    assert only(judged(None, ask, short)).bug is Bug.LAST_ROW


@pytest.mark.parametrize("by", [-3, -1, 1, 2, 8])
def test_a_shift_by_any_few_places(by: int) -> None:
    tokens = [*PROMPT, *OUTPUT]
    got_TLK = RIGHT_TLK.copy()
    for t in range(13):
        if 0 <= t + by < len(tokens):
            got_TLK[t] = [FORM.route(tokens[t + by], layer) for layer in FORM.layers]
    findings = judged(rows(got_TLK)).findings
    assert {finding.bug for finding in findings} == {Bug.SHIFTED}
    assert findings[0].detail == f"row t holds the route of token t {'+' if by > 0 else '-'} {abs(by)}"


def test_rows_of_an_earlier_sequence_are_stale_and_those_of_a_running_one_are_a_neighbours() -> None:
    other = [5, 99, 201, 33, 18, 240, 77, 150, 160, 4, 9]
    got_TLK = RIGHT_TLK.copy()
    got_TLK[:6] = [[FORM.route(token, layer) for layer in FORM.layers] for token in other[:6]]
    for ended, bug in ((8, Bug.STALE_PREFIX), (None, Bug.OTHER_SEQUENCE)):
        world = World(FORM)
        world.book.add(Asked(2, np.array(other), 7, ended))
        finding = only(judged(rows(got_TLK), world=world))
        assert (finding.bug, finding.detail) == (bug, "rows of sequence 2")
        assert finding.place == "at positions 0 to 5"


def test_two_bugs_of_one_answer_are_two_findings() -> None:
    got_TLK = RIGHT_TLK.copy()
    got_TLK[2], got_TLK[7:9] = 0, 31
    assert [(finding.bug, finding.rows) for finding in judged(rows(got_TLK)).findings] == [
        (Bug.FILL, 2),
        (Bug.ZEROS, 1),
    ]


def test_dense_layers_have_a_place_where_the_dialect_has_one() -> None:
    all_TDK = np.concatenate([np.full((13, 1, 4), 9), RIGHT_TLK], axis=1)
    assert judged(rows(all_TDK, all_layers=True)).findings == []
    assert only(judged(rows(all_TDK))).bug is Bug.DENSE_COUNTED
    assert judged(rows(RIGHT_TLK, all_layers=True)).findings == []
    assert only(judged(rows(all_TDK[:, :2], all_layers=True))).bug is Bug.LAYERS


def test_what_is_marked_missing_is_not_judged_but_told() -> None:
    got_TLK, valid_T = RIGHT_TLK.copy(), np.ones(13, bool)
    got_TLK[3:5], valid_T[3:5] = -1, False
    judgement = judged(Rows(got_TLK, valid_T))
    assert (only(judgement).bug, judgement.missing) == (Bug.MISSING, 2)


def test_sets_are_compared_as_sets_where_nobody_ranks() -> None:
    assert judged(rows(RIGHT_TLK[:, :, ::-1], order="set")).findings == []
    assert only(judged(rows(RIGHT_TLK[:, :, ::-1]))).bug is Bug.RANK_LOST


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"refusal": "the hash is wrong"}, "the hash is wrong"),
        ({"start": 3}, "it says that it starts at 3"),
        ({"layout": MoeLayout((0, 1, 2), 32, 4)}, "layers=(0, 1, 2)"),
    ],
)
def test_right_ids_with_a_wrong_description_are_refused(facts: dict, told: str) -> None:
    finding = only(judged(rows(RIGHT_TLK, **facts)))
    assert finding.bug is Bug.PAYLOAD
    assert told in finding.detail


@pytest.mark.parametrize(
    ("output", "reason", "bug"),
    [((13, 14, 99, 100), "length", Bug.TOKENS), ((13, 14, 15), "length", Bug.FINISH), (OUTPUT, "stop", Bug.FINISH)],
)
def test_tokens_and_ends(output: tuple, reason: str, bug: Bug) -> None:
    tokens = [*PROMPT, *output][:-1]
    got = rows(np.array([[FORM.route(token, layer) for layer in FORM.layers] for token in tokens]))
    assert only(judged(None, answer=Answer(output, reason, got))).bug is bug


def test_rows_follow_the_new_weights_from_one_position_on() -> None:
    newer, world = replace(FORM, weight_version=1), World(FORM)
    world.coming = newer
    new_TLK = newer.routes([*PROMPT, *OUTPUT[:-1]]).astype(np.int64)
    ask = Ask(PROMPT, 4, switches=True)
    assert judged(rows(np.concatenate([RIGHT_TLK[:11], new_TLK[11:]])), ask, world=world).findings == []
    back_TLK = np.concatenate([RIGHT_TLK[:4], new_TLK[4:8], RIGHT_TLK[8:]])
    assert judged(rows(back_TLK), ask, world=world).findings


def test_a_renumbering_needs_evidence_and_must_be_one_to_one() -> None:
    places = np.random.default_rng(0).permutation(40)
    many_TLK = FORM.routes(np.arange(272)).astype(np.int64)
    maps, words = renumbering([many_TLK], [places[many_TLK]], 32) or ([], "")
    assert maps[0] == {expert: int(places[expert]) for expert in range(32)}
    assert words.startswith("one renumbering for all layers")
    assert renumbering([many_TLK[:2]], [places[many_TLK[:2]]], 32) is None
    assert renumbering([many_TLK], [many_TLK % 16], 32) is None
    assert renumbering([many_TLK], [many_TLK], 32) is None


@pytest.mark.parametrize(
    ("positions", "cached", "words"),
    [
        (range(20), 0, "in all rows"),
        ([19], 0, "in the last row"),
        ([11], 0, "in the last prompt row"),
        (range(10), 12, "in the 10 rows of a prefix asked before"),
        (range(12), 0, "in all prompt rows"),
        (range(12, 20), 0, "in all generated rows"),
        ([16], 0, "at position 16, a multiple of 16"),
        ([4], 0, ""),
        ([4, 5, 6], 0, "at positions 4 to 6"),
        ([4, 6], 0, "in 2 of 20 rows, positions 4 to 6"),
    ],
)
def test_places(positions: object, cached: int, words: str) -> None:
    rows_T = np.isin(np.arange(20), list(positions))  # type: ignore[call-overload]
    assert place_of(rows_T, 0, 12, cached) == words


def test_multiples_of_a_chunk() -> None:
    assert place_of(np.isin(np.arange(600), [256, 512]), 0, 590, 0) == "at multiples of 256"


def test_rows_that_are_no_rows_cannot_be_judged() -> None:
    with pytest.raises(CheckError, match="no form that can be judged"):
        Rows(RIGHT_TLK[0], np.ones(3, bool))
    with pytest.raises(CheckError, match="no form that can be judged"):
        rows(RIGHT_TLK[:, :, 0])

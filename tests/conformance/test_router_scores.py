"""Where a family scores its experts by a softmax, the tap sees its logits; where it does not, nothing claims so."""

from __future__ import annotations

import pytest
import torch
from tapped import TAPPED

from moetrace.conformance import zoo
from moetrace.conformance.census import batch
from moetrace.conformance.scoring import RULES
from moetrace.conformance.spies import RouterCall, spying
from moetrace.errors import UnsupportedRouterError
from moetrace.replayer import router_scores
from moetrace.replayer.drift import RouterScores

SOFTMAX = ["dbrx", "ernie4_5_moe", "granitemoe", "zaya"]
"""A method of the block; a bias after the softmax; selection by logits; a class that skips."""
OTHERS = ["deepseek_v4", "inkling_text", "kolibri1", "llama4_text"]
"""Softplus; sigmoid over shared experts too; selection by biased logits; sigmoid after the selection."""


def scored(name: str) -> tuple[list[RouterCall], RouterScores]:
    model = zoo.tiny(zoo.architecture(name)).eval()
    with torch.no_grad(), spying(model) as calls, router_scores(model) as scores:
        model(input_ids=batch(), use_cache=False)
    return calls, scores


@pytest.mark.parametrize("name", [name for name in SOFTMAX if name in TAPPED])
def test_log_probabilities_are_those_of_the_routers_logits(name: str) -> None:
    assert RULES[name].score == "softmax"
    calls, scores = scored(name)
    for call, ids_NK, logs_NK in zip(calls, scores.experts_LNK, scores.log_probs_LNK, strict=True):
        assert call.logits_NE is not None
        expected_NE = call.logits_NE - call.logits_NE.logsumexp(-1, keepdim=True)
        torch.testing.assert_close(logs_NK.double(), expected_NE.gather(1, ids_NK), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in OTHERS if name in TAPPED])
def test_what_is_no_softmax_is_refused(name: str) -> None:
    assert RULES[name].score != "softmax"
    with pytest.raises(UnsupportedRouterError, match="no probabilities"):
        scored(name)[1].experts_LNK  # noqa: B018

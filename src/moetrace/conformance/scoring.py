"""What an expert weighs once it is chosen: each family's rule as a formula in float64, with its source.

The formulas are written from the papers and from what the config's attributes mean; they call no code of a model. The
choice itself (groups, correction bias) is no part of them: it decides who is chosen, not what the chosen weigh.

Axes: N tokens, H hidden size, E experts, K experts per token (and shared experts, where they share in the weights).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn

SCORES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "softmax": lambda x_NE: torch.exp(x_NE - x_NE.logsumexp(-1, keepdim=True)),
    "sigmoid": lambda x_NE: 1 / (1 + torch.exp(-x_NE)),
    "sqrt(softplus)": lambda x_NE: torch.log1p(torch.exp(x_NE)).sqrt(),
}
"""Name of a score -> its formula, over all E logits of a token."""


@dataclass(frozen=True)
class Rule:
    """The weight of a chosen expert: its score, divided by a norm over the chosen, times factors.

    Attributes:
        score: a name in `SCORES`.
        norm: order of the norm (1 is the sum: the weights are renormalised, 0 is none), or the config's attribute that
            holds it; an attribute may be a bool.
        factor: the config's attribute that multiplies every weight, or "".
        gain: the router's parameter that multiplies them, one number or one for each expert, or "".
        epsilon: is added to the norm; what is below a float32's rounding is left out.
        shared: shared experts have logits too (rows of the router's weight after E), and weights in the same norm.
        window: the config's attribute that holds SparseMixer's jitter, or "". Each expert in turn is then scored over
            those only that were not chosen before it and are not further below it than twice that, relative to the
            larger of its own logit and their absolute one.
        skips: the last of the E classes skips the layer and weighs nothing.
        paper: where the formula is published; "" where transformers' router class is the norm.
    """

    score: str
    norm: float | str = 0
    factor: str = ""
    gain: str = ""
    epsilon: float = 0
    shared: bool = False
    window: str = ""
    skips: bool = False
    paper: str = ""

    @property
    def title(self) -> str:
        """The rule in words."""
        conditional = f" if {self.norm}" if isinstance(self.norm, str) else ""
        return ", ".join(
            [
                self.score,
                *([f"in turn within 2 {self.window}"] if self.window else []),
                *([f"renormalised{conditional}{' with the shared experts' * self.shared}"] if self.norm else []),
                *[f"× {name}" for name in (self.factor, self.gain) if name],
                *(["0 for the class that skips"] if self.skips else []),
            ]
        )

    def weights(
        self, config: Any, router: nn.Module, hidden_NH: torch.Tensor, logits_NE: torch.Tensor, ids_NK: torch.Tensor
    ) -> torch.Tensor:
        """The weights of the experts `ids_NK`, float64 `[N, K]`; with `shared`, those of the shared experts follow.

        Args:
            config: of the text decoder.
            router: whose parameters `gain` and, with `shared`, `weight` are used.
            hidden_NH: the router's input; used with `shared` only.
            logits_NE: the router's logits, float64.
            ids_NK: any experts, live or not, int64.
        """
        if self.window:
            chosen_NK = self._in_turn(2 * float(attrgetter(self.window)(config)), logits_NE, ids_NK)
        else:
            chosen_NK = SCORES[self.score](logits_NE).gather(1, ids_NK)
        if self.skips:
            chosen_NK = chosen_NK * (ids_NK < logits_NE.shape[1] - 1)
        if self.shared:
            shared_SH = router.get_parameter("weight").detach().double()[logits_NE.shape[1] :]
            chosen_NK = torch.cat([chosen_NK, SCORES[self.score](hidden_NH.double() @ shared_SH.T)], dim=1)
        order = float(attrgetter(self.norm)(config) or 0) if isinstance(self.norm, str) else self.norm
        if order:
            norm_N1 = chosen_NK.pow(order).sum(-1, keepdim=True).pow(1 / order)
            chosen_NK = chosen_NK / (norm_N1 + self.epsilon)
        if self.factor:
            chosen_NK = chosen_NK * float(attrgetter(self.factor)(config))
        if self.gain:
            gain = router.get_parameter(self.gain).detach().double()
            chosen_NK = chosen_NK * (gain if len(gain) == 1 else gain[ids_NK])
        return chosen_NK

    def _in_turn(self, window: float, logits_NE: torch.Tensor, ids_NK: torch.Tensor) -> torch.Tensor:
        gone_NE, scores = torch.zeros_like(logits_NE, dtype=torch.bool), []
        for ids_N1 in ids_NK.split(1, dim=1):
            own_N1 = logits_NE.gather(1, ids_N1)
            below_NE = (own_N1 - logits_NE) / torch.maximum(logits_NE.abs(), own_N1) > window
            among_NE = logits_NE.masked_fill(gone_NE | below_NE, -torch.inf)
            scores.append(SCORES[self.score](among_NE).gather(1, ids_N1))
            gone_NE = gone_NE.scatter(1, ids_N1, True)
        return torch.cat(scores, dim=1)


_ROWS: tuple[tuple[str, Rule], ...] = (
    ("mixtral", Rule("softmax", 1, paper="arXiv 2401.04088, section 2.1")),
    ("gpt_oss", Rule("softmax", 1, paper="arXiv 2508.10925, section 2.2")),
    ("minimax", Rule("softmax", 1, paper="arXiv 2501.08313, section 2")),
    (
        "aria aria_text cohere2_moe ernie4_5_moe ernie4_5_vl_moe granitemoe granitemoe_swa granitemoehybrid "
        "granitemoeshared hunyuan_v1_moe jetmoe qwen3_5_moe qwen3_5_moe_text qwen3_vl_moe",
        Rule("softmax", 1),
    ),
    ("dbrx", Rule("softmax", "ffn_config.moe_normalize_expert_weights")),
    ("olmoe", Rule("softmax", "norm_topk_prob", paper="arXiv 2409.02060, section 2")),
    (
        "flex_olmo mellum qwen2_moe qwen3_moe qwen3_next qwen3_omni_moe_thinker qwen4_exp qwen4_exp_text",
        Rule("softmax", "norm_topk_prob"),
    ),
    ("mistral4", Rule("softmax", "norm_topk_prob", "routed_scaling_factor")),
    ("mistral_large4", Rule("softmax", 1, "routed_scaling_factor")),
    ("gemma4 gemma4_text", Rule("softmax", 1, gain="per_expert_scale")),
    ("jamba", Rule("softmax")),
    ("phimoe", Rule("softmax", window="router_jitter_noise")),
    ("zaya", Rule("softmax", skips=True)),
    ("deepseek_v2", Rule("softmax", factor="routed_scaling_factor", paper="arXiv 2405.04434, equations 20 to 22")),
    ("longcat_flash", Rule("softmax", factor="routed_scaling_factor", paper="arXiv 2509.01322, section 2.1")),
    ("deepseek_ocr2 unlimited_ocr", Rule("softmax", factor="routed_scaling_factor")),
    (
        "deepseek_v3 deepseek_v32 kimi_k25",
        Rule("sigmoid", "norm_topk_prob", "routed_scaling_factor", paper="arXiv 2412.19437, equations 12 to 16"),
    ),
    (
        "axk1 axk2 bailing_hybrid dots1 dots3_note dots3_note_text exaone_moe glm4_moe glm4_moe_lite glm4v_moe "
        "glm5_next glm_moe_dsa hy_v4 kimi_linear mimo_v2_flash nemo_speechlm nemotron_h nemotron_h_omni "
        "solar_open",
        Rule("sigmoid", "norm_topk_prob", "routed_scaling_factor"),
    ),
    ("lfm2_moe", Rule("sigmoid", "norm_topk_prob", "routed_scaling_factor", epsilon=1e-6)),
    ("beam flint kolibri1", Rule("sigmoid", "norm_topk_prob")),  # Beam scales what comes out of the experts
    ("laguna minimax_m2 minimax_m3_vl minimax_m3_vl_text step3p7", Rule("sigmoid", 1)),  # all but M2 scale so too
    ("inkling2 inkling2_text muse_spark", Rule("sigmoid", 1, "routed_scaling_factor")),
    ("afmoe", Rule("sigmoid", 1, "route_scale")),
    ("hy_v3", Rule("sigmoid", 1, "router_scaling_factor")),
    ("inkling_mm_model inkling_text", Rule("sigmoid", 1, "route_scale", gain="global_scale", shared=True)),
    ("llama4 llama4_text", Rule("sigmoid")),  # of the expert's input, not of its output
    ("deepseek_v4", Rule("sqrt(softplus)", 1, "routed_scaling_factor")),
)

RULES: dict[str, Rule] = {name: rule for names, rule in _ROWS for name in names.split()}
"""Name of an architecture -> its rule."""

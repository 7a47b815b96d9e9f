"""What routers deviate in from the common shape: one row for each router class of transformers that does.

The common shape: attributes `top_k` and `num_experts`, one top-k over `[N, num_experts]` in `forward`, and the very
indices of that top-k among the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RouterTraits:
    """How one class of routers differs.

    Attributes:
        num_experts: dotted attribute that holds E, the width of what the top-k selects from.
        top_k: dotted attribute that holds K.
        method: the method that selects, if not `forward`; a row counts only for modules that have it.
        in_turn: the K experts are chosen one after the other, each by a max over all E: in eval mode only, for in
            training they are drawn at random. What an expert weighs depends on those chosen before it.
        returns_ids: whether the indices of the top-k are among the outputs, as they are.
        fixed: the ids are no choice (a table by token id): nothing to record or replay.
        refusal: why the router can be neither recorded nor replayed; empty if it can.
    """

    num_experts: str = "num_experts"
    top_k: str = "top_k"
    method: str = "forward"
    in_turn: bool = False
    returns_ids: bool = True
    fixed: bool = False
    refusal: str = ""


_CAPACITY = "it drops tokens beyond an expert's capacity: who computes a token depends on the rest of the batch"
COMMON = RouterTraits()
TRAITS: dict[str, RouterTraits] = {
    # the block or the experts select, the router only makes logits (Aria, Jamba: before transformers 5.2x)
    "AriaExperts": RouterTraits("config.moe_num_experts", "config.moe_topk", method="route_tokens_to_experts"),
    "DbrxFFN": RouterTraits("experts.num_experts", method="route_tokens_to_experts"),
    "JambaSparseMoeBlock": RouterTraits(method="route_tokens_to_experts"),
    # expert ids are a table over token ids
    "DeepseekV4HashRouter": RouterTraits(fixed=True),
    "DogeCDMoE": RouterTraits(
        refusal="it retrieves experts by two top-ks over halves of a product key, and its full forward pairs halves of "
        "different tokens: a token's route depends on the rest of the batch"
    ),
    "Gemma4TextRouter": RouterTraits("config.num_experts", "config.top_k_experts"),
    # returns the selection as a sorted list of (token, expert) pairs
    "JetMoeTopKGating": RouterTraits(returns_ids=False),
    # returns the selection as dense scores, zero outside it
    "Llama4Router": RouterTraits(returns_ids=False),
    # zero-compute experts come after the others
    "LongcatFlashTopkRouter": RouterTraits("n_routed_experts"),
    "NllbMoeTop2Router": RouterTraits(refusal=_CAPACITY),
    # SparseMixer; joins the ids of its turns
    "PhimoeTopKRouter": RouterTraits(in_turn=True, returns_ids=False),
    "SwitchTransformersTop1Router": RouterTraits(refusal=_CAPACITY),
    # the last class skips the layer; the experts receive expert 0 with weight 0 for it
    "ZayaRouter": RouterTraits("num_router_classes", returns_ids=False),
}

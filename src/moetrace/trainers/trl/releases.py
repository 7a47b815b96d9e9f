"""Which releases of TRL are supported, and what of them is relied on. Checked before a trainer is made."""

from __future__ import annotations

import inspect

import trl
from packaging.version import Version

from moetrace.errors import ReplayError

SUPPORTED = "1.16"
"""The minor release; every patch of it counts."""

METHODS: dict[str, tuple[str, ...]] = {
    "_generate": ("prompts",),
    "_generate_single_turn": ("prompt_ids",),
    "_generate_and_score_completions": ("inputs",),
    "_get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"),
    "_compute_loss": ("model", "inputs"),
}
"""Methods of TRL's GRPOTrainer that are extended, with the parameters that are read."""


def require_supported_release() -> None:
    """Raise `ReplayError` where the installed TRL is not one that this module was tested with."""
    supported = f"TRL {SUPPORTED}"
    if Version(trl.__version__).release[:2] != Version(SUPPORTED).release:
        raise ReplayError(
            "this release of TRL is not supported: its GRPOTrainer may hand sequences on in another way",
            expected=supported,
            got=f"TRL {trl.__version__}",
            fix=f"Run: pip install 'trl=={SUPPORTED}.*'",
        )
    for name, expected in METHODS.items():
        method = getattr(trl.GRPOTrainer, name, None)
        got = tuple(inspect.signature(method).parameters)[1:] if method else ()
        if got[: len(expected)] != expected:
            raise ReplayError(
                f"this GRPOTrainer is not that of {supported}: {name} is another",
                expected=f"{name}({', '.join(expected)}, ...)",
                got=f"{name}({', '.join(got)})" if method else "none",
                fix="Reinstall TRL, or take away what changed it.",
            )

"""Routes as trainers take them, from traces and back: `to_NAME` and `from_NAME`, one module for each trainer.

What a trainer takes is a row of `CONTRACTS`; a module adds what no table can say. All is numpy: a trainer that wants
tensors gets them by `torch.from_numpy`. Writers refuse a row that was not captured unless the trainer can be told and
the caller permits what it then does; readers never take filling for routes. See docs/trainers.md.
"""

from __future__ import annotations

from moetrace.trainers.contracts.automodel import AUTOMODEL, from_automodel, to_automodel
from moetrace.trainers.contracts.batches import BatchContract
from moetrace.trainers.contracts.contract import Captured, Contract
from moetrace.trainers.contracts.maxtext import (
    MAXTEXT,
    from_maxtext,
    from_maxtext_batch,
    to_maxtext,
    to_maxtext_batch,
)
from moetrace.trainers.contracts.miles import MILES, from_miles, to_miles
from moetrace.trainers.contracts.nemo_rl import (
    NEMO_RL,
    from_nemo_rl,
    from_nemo_rl_batch,
    to_nemo_rl,
    to_nemo_rl_batch,
)
from moetrace.trainers.contracts.prime_rl import PRIME_RL, from_prime_rl, to_prime_rl
from moetrace.trainers.contracts.skyrl import (
    SKYRL,
    SKYRL_BATCH,
    from_skyrl,
    from_skyrl_batch,
    to_skyrl,
    to_skyrl_batch,
)
from moetrace.trainers.contracts.slime import SLIME, from_slime, to_slime
from moetrace.trainers.contracts.verl import VERL, from_verl, from_verl_batch, to_verl, to_verl_batch

__all__ = [
    "CONTRACTS",
    "SKYRL_BATCH",
    "BatchContract",
    "Captured",
    "Contract",
    "from_automodel",
    "from_maxtext",
    "from_maxtext_batch",
    "from_miles",
    "from_nemo_rl",
    "from_nemo_rl_batch",
    "from_prime_rl",
    "from_skyrl",
    "from_skyrl_batch",
    "from_slime",
    "from_verl",
    "from_verl_batch",
    "to_automodel",
    "to_maxtext",
    "to_maxtext_batch",
    "to_miles",
    "to_nemo_rl",
    "to_nemo_rl_batch",
    "to_prime_rl",
    "to_skyrl",
    "to_skyrl_batch",
    "to_slime",
    "to_verl",
    "to_verl_batch",
]

CONTRACTS: dict[str, Contract] = {
    "verl": VERL,
    "slime": SLIME,
    "miles": MILES,
    "nemo_rl": NEMO_RL,
    "automodel": AUTOMODEL,
    "skyrl": SKYRL,
    "prime_rl": PRIME_RL,
    "maxtext": MAXTEXT,
}
"""Every contract by name."""

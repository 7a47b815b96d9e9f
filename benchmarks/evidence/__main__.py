"""What R3 changes: a small MoE trained by GRPO, and the mismatch of a large one's shape.

    python benchmarks/evidence grpo --minutes 4.5
    python benchmarks/evidence grpo --minutes 4 --rollout float8 --set epochs=4 lr=2e-4 --name float8-hard
    python benchmarks/evidence mismatch --layers 48
    python benchmarks/evidence plots

`grpo` trains every seed with no replay, with R2 (routes of the trainer's own forward before the updates) and with R3
(routes of the rollout), all from the same weights and prompts, and stops at its time with what it has. `--smoke` is
for a CPU. `plots` draws whatever results the folder has, with matplotlib.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

BEGAN = time.time()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["grpo", "mismatch", "plots"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/evidence"), help="folder")
    parser.add_argument("--smoke", action="store_true", help="sizes for two CPU cores")
    parser.add_argument("--device", help="default: cuda where there is one")
    grpo = parser.add_argument_group("grpo")
    grpo.add_argument("--name", help="of the result, grpo-NAME.json; default: the engine's weights")
    grpo.add_argument("--minutes", type=float, default=4.5, help="for everything, start and warm starts included")
    grpo.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    grpo.add_argument("--variants", nargs="+", choices=["none", "R2", "R3"], default=["none", "R2", "R3"])
    grpo.add_argument("--rollout", choices=["bfloat16", "float8"], default="bfloat16", help="weights of the engine")
    grpo.add_argument("--set", nargs="+", default=[], metavar="KNOB=VALUE", help="numbers of settings.py, as lr=3e-5")
    grpo.add_argument("--at-once", type=int, help="runs in parallel; default: one a core")
    shape = parser.add_argument_group("mismatch")
    shape.add_argument("--layers", type=int, default=48)
    shape.add_argument("--requests", type=int, default=64)
    shape.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    shape.add_argument("--new", type=int, default=64, help="tokens generated for each")
    shape.add_argument("--router-std", type=float, default=1.5, help="spread of the router's logits")
    shape.add_argument("--head-std", type=float, default=4.5, help="spread of the logits over the vocabulary")
    shape.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.part == "plots":
        import plots

        plots.draw(args.out)
        return 0

    import torch

    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.part == "mismatch":
        import mismatch

        mismatch.measure(args)
        return 0
    return train(args)


def train(args: argparse.Namespace) -> int:
    from dataclasses import replace

    import processes
    from settings import Settings

    settings = Settings.smoke(args.device, args.rollout) if args.smoke else Settings(args.device, args.rollout)
    given = dict(pair.split("=", 1) for pair in args.set)
    settings = replace(settings, **{name: type(getattr(settings, name))(value) for name, value in given.items()})
    record = processes.experiment(
        settings,
        args.seeds,
        args.variants,
        BEGAN,
        args.minutes,
        args.at_once or os.cpu_count() or 1,
        args.out / f"grpo-{args.name or args.rollout}.json",
    )
    print(processes.summary(record))
    return int(not record["runs"] or all(run["error"] for run in record["runs"]))


if __name__ == "__main__":
    sys.exit(main())

"""Plots of whatever results a folder has: thin lines are seeds, thick ones the mean of the seeds that every variant
has, as far as the shortest of these runs goes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

COLOURS = {"none": "tab:red", "R2": "tab:orange", "R3": "tab:blue"}
PANELS = (
    ("reward", "reward of the rollout", 10, "linear"),
    ("expected_exact_match", "P(right answer), held out, trainer", 1, "linear"),
    ("grad_norm", "gradient norm, mean of a step", 10, "log"),
    ("router_mismatch", "router mismatch, rollout and trainer", 10, "linear"),
    ("token_mismatch", "token mismatch", 10, "linear"),
    ("kl_after_updates", "KL (k3) after the step's updates", 10, "log"),
    ("kl", "KL (k3) at equal weights, live", 10, "log"),
    ("kl_R3", "KL (k3) at equal weights, under R3", 10, "log"),
    ("extreme", "F(2) at equal weights, live", 10, "linear"),
)


def draw(folder: Path) -> None:
    """Write an SVG beside each JSON."""
    plt.switch_backend("svg")
    plt.rcParams["svg.hashsalt"] = "moetrace"  # equal results give equal files
    for path in sorted(folder.glob("grpo-*.json")):
        draw_training(json.loads(path.read_text()), path.with_suffix(".svg"))
    if (folder / "mismatch.json").exists():
        draw_mismatch(json.loads((folder / "mismatch.json").read_text()), folder / "mismatch.svg")


def draw_training(record: dict[str, Any], path: Path) -> None:
    """Measures by step, one colour for each variant."""
    figure, axes = plt.subplots(3, 3, figsize=(12, 9), constrained_layout=True)
    trained = [run for run in record["runs"] if run["steps"]]
    seeds_of = {variant: {run["seed"] for run in trained if run["variant"] == variant} for variant in COLOURS}
    common = set.intersection(*(seeds for seeds in seeds_of.values() if seeds))
    for axis, (name, title, width, scale) in zip(axes.flat, PANELS, strict=True):
        for variant, colour in COLOURS.items():
            curves = {run["seed"]: curve(run, name, width) for run in trained if run["variant"] == variant}
            for steps, values in curves.values():
                axis.plot(steps, values, color=colour, linewidth=0.5, alpha=0.4)
            compared = [curves[seed] for seed in common if seed in curves and len(curves[seed][0])]
            if compared:
                steps, _ = min(compared, key=lambda pair: len(pair[0]))
                means = np.mean([values[: len(steps)] for _, values in compared], 0)
                seeds = f"{len(compared)} seed{'s' * (len(compared) > 1)}"
                axis.plot(steps, means, color=colour, linewidth=2, label=f"{variant} ({seeds})")
        axis.set(title=title, xlabel="step", yscale=scale)
        axis.title.set_fontsize(10)
    if axes[0, 0].lines:
        axes[0, 0].legend()
    settings = record["settings"]
    numerics = f"rollout weights {settings['rollout']}, learning rate {settings['lr']}"
    figure.suptitle(f"GRPO on sorting digits; {numerics}; running means of 10 steps")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def curve(run: dict[str, Any], name: str, width: int) -> tuple[Sequence[float], np.ndarray]:
    """Steps and values of one run, smoothed by a running mean over `width` steps."""
    if name == "expected_exact_match":
        matches = run.get(name, {})
        return [int(step) for step in matches], np.array(list(matches.values()))
    values = np.array(run.get("steps", {}).get(name, []))
    if len(values) < width:
        return [], values
    return range(width - 1, len(values)), np.convolve(values, np.full(width, 1 / width), "valid")


def draw_mismatch(record: dict[str, Any], path: Path) -> None:
    """Router mismatch by layer; KL and extreme tokens, live and under R3."""
    figure, (layers, tails) = plt.subplots(1, 2, figsize=(11, 4), constrained_layout=True)
    layers.bar(range(len(record["router_mismatch_per_layer"])), record["router_mismatch_per_layer"], color="tab:gray")
    layers.set(title="router mismatch, live", xlabel="MoE layer")
    taus = (1.1, 1.25, 1.5, 2.0)
    for kind, colour in (("live", COLOURS["none"]), ("R3", COLOURS["R3"])):
        label = f"{kind}: KL {record[kind]['kl']:.2g} nats"
        tails.plot(taus, [record[kind][f"extreme_{tau}"] for tau in taus], "o-", color=colour, label=label)
    tails.set(title="F(tau): tokens whose probability differs by more than tau", xlabel="tau")
    tails.legend()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)

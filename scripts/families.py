"""Write docs/families.md: what the tap does with every MoE architecture of transformers, measured.

    python scripts/families.py                     # `make families`
    python scripts/families.py --check             # exit 1 if the page is stale
    python scripts/families.py --json FILE         # only this release's findings, for the page's column "lowest"

The column of the lowest supported release comes from docs/families-lowest.json, which was written under that release.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
import transformers

from moetrace.conformance import zoo
from moetrace.conformance.census import Finding, examine
from moetrace.conformance.scoring import RULES

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, LOWEST = DOCS / "families.md", DOCS / "families-lowest.json"
HEAD = """\
<!-- Written by `make families`; do not edit. -->
# Families

Every autoregressive Mixture-of-Experts architecture of transformers {newest}, found in its code and run as a tiny
random model: **{works} of {total} record and replay**, {refused} are refused by name.

What "works" means, each measured by hooks on the router and on the experts module, not by trusting the tap:

- the recorded ids are those the experts received;
- replaying a model's own record leaves logits and all gradients bit-identical;
- altered routes reach the experts, and no replayed expert has weight zero;
- the weights that the experts receive, at live ids and at altered ones, equal the family's formula in float64
  (`moetrace.conformance.scoring`), which is written from the source, not by calling the model;
- under altered routes the gradient of the router's logits equals that formula's derivative, and of every token every
  replayed expert's logit has one.

Columns:

- *weight*: the formula of a chosen expert's weight, with × for factors that the config or a parameter names. "Softmax,
  renormalised" is the same as a softmax over the K chosen logits. Llama 4 multiplies the expert's input by it. What
  multiplies the output of all experts together is not part of it.
- *source*: the paper that states the formula; else the class named in *tapped* is the only source, and this its file in
  transformers/models.
- *ids*, *weights*: "equal" as measured; "–" where the experts do not receive them.
- *gradient*: the logits that it reaches: those of the K replayed experts, or all E.
- *router logits*: what the model returns with `output_router_logits=True`, "–" if nothing (older releases return less).
  They stay live under replay, and so do the choices that the auxiliary loss counts:
  [replay.md](replay.md#auxiliary-losses).

Where the formula gives no gradient there is none: a weight renormalised over K = 1 is always 1, and Zaya's class that
skips the layer weighs nothing. In LongCat-Flash and Zaya the router also selects experts that compute nothing; they
have ids like the others. Routers of vision and audio towers are not touched, and of DeepSeek-V4 only the layers that
choose: its hash layers are a table. JetMoE routes twice in a layer, in its attention and in its MLP: the layout names
such a layer twice. PhiMoE draws its experts at random in training mode: its routers are tapped in eval mode only, also
within a model that trains, and replay traces in rank order only. Its second expert is weighed among those that are not
the first, each among those not further below it than a window: the window goes with the replayed expert.

Logits or weights that hooks cannot see, so that there only ids, the model's own record and the gradient of the router's
parameters are checked: {unseen} under {newest}; {unseen_lowest} under {lowest}.

Status on {lowest}: "–" where the architecture does not exist there.

"""
COLUMNS = ("family", "class", "weight", "source", "tapped", "order", "groups", "corrected", "shared")
COLUMNS += ("ids", "weights", "record", "replay", "gradient", "router logits")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)  # sums in a fixed order: bit-identical means bit-identical
    findings = {architecture: examine(architecture) for architecture in zoo.architectures()}
    if args.json:
        statuses = {finding.name: _status(finding) for finding in findings.values()}
        content = {"transformers": transformers.__version__, "statuses": statuses, "unseen": _unseen(findings)}
        args.json.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        return 0
    page = render(findings, json.loads(LOWEST.read_text()))
    if args.check:
        if PAGE.read_text() == page:
            return 0
        print(f"{PAGE} is stale under transformers {transformers.__version__}: run `make families`", file=sys.stderr)
        return 1
    PAGE.write_text(page)
    return 0


def render(findings: dict[zoo.Architecture, Finding], lowest: dict) -> str:
    """The page of one release's findings, beside the statuses of the lowest release."""
    works = sum(finding.works for finding in findings.values())
    refused = [finding for finding in findings.values() if finding.refusal]
    page = HEAD.format(
        newest=transformers.__version__,
        lowest=lowest["transformers"],
        works=works,
        total=len(findings),
        refused=len(refused),
        unseen=", ".join(_unseen(findings)) or "none",
        unseen_lowest=", ".join(lowest["unseen"]) or "none",
    )
    columns = [*COLUMNS, lowest["transformers"], transformers.__version__]
    page += f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|\n"
    for architecture, finding in findings.items():
        page += _row(architecture, finding, lowest["statuses"].get(finding.name, "–"))
    page += "\n## Refused\n\n"
    page += "".join(f"- **{finding.name}**: {finding.refusal.partition(' docs/')[0]}\n" for finding in refused)
    page += "\n## Not in the census\n\nClasses that mention experts and are no autoregressive decoder themselves:\n\n"
    reasons: dict[str, list[str]] = {}
    for item in zoo.excluded():
        reasons.setdefault(item.reason, []).append(item.class_name)
    return page + "".join(f"- {reason}: {', '.join(sorted(names))}\n" for reason, names in sorted(reasons.items()))


def _row(architecture: zoo.Architecture, finding: Finding, lowest: str) -> str:
    cells = [finding.name, architecture.model_class.__name__]
    if finding.refusal:
        cells += ["–"] * (len(COLUMNS) - len(cells))
    else:
        rule = RULES.get(finding.name)
        cells += [rule.title, rule.paper or finding.source_file] if rule else ["–", "–"]
        cells += [", ".join(finding.routers), finding.order]
        cells += ["yes" if fact else "" for fact in (finding.grouped, finding.bias, finding.shared)]
        cells += [{True: "equal", False: "NO", None: "–"}[fact] for fact in (finding.received, finding.weights)]
        cells += ["yes" if fact else "NO" for fact in (finding.received is not False, _replays(finding))]
        cells += [finding.gradient or "NO", finding.router_logits or "–"]
    return f"| {' | '.join([*cells, lowest, _status(finding)])} |\n"


def _replays(finding: Finding) -> bool:
    return finding.replayed and finding.altered is not False


def _unseen(findings: dict[zoo.Architecture, Finding]) -> list[str]:
    return [finding.name for finding in findings.values() if not finding.refusal and finding.weights is None]


def _status(finding: Finding) -> str:
    return "works" if finding.works else "refused" if finding.refusal else "BROKEN"


if __name__ == "__main__":
    sys.exit(main())

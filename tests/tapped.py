"""The census's names, those that are refused, and what was found on each."""

from functools import cache

from moetrace.conformance import zoo
from moetrace.conformance.census import Finding, examine

REFUSED = {
    "doge": "product key",
    "nllb-moe": "drops tokens beyond an expert's capacity",
    "switch_transformers": "drops tokens beyond an expert's capacity",
}
NAMES = [architecture.name for architecture in zoo.architectures()]
TAPPED = [name for name in NAMES if name not in REFUSED]


@cache
def found(name: str) -> Finding:
    """What the census finds, measured once in a run of the tests."""
    return examine(zoo.architecture(name))

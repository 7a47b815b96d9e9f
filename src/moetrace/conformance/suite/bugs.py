"""The classes of bugs that a wrong answer can look like, and findings."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Bug(Enum):
    """What a wrong answer looks like: a name, and what that means."""

    about: str

    def __new__(cls, name: str, about: str) -> Bug:
        member = object.__new__(cls)
        member._value_ = name
        member.about = about
        return member

    LAST_ROW = (
        "last row missing",
        "the rows end one early: the row of the token that was sampled last but one is not there",
    )
    PROMPT_ROW = "last prompt row missing", "the row between prefill and decode is not there"
    TRUNCATED = "truncated", "rows are missing at the end"
    HEAD = "first rows missing", "rows are missing at the beginning, as when a cached prefix brings none"
    HOLES = "rows missing", "rows are missing in between"
    EXTRA = "extra rows", "there are rows of tokens that were never an input, or of padding"
    DUPLICATED = "row duplicated", "a row comes twice in a row"
    OVERLAP = "streamed pieces overlap", "a piece of a stream brings rows that an earlier one had brought"
    OFFSET = "start ignored", "the rows before the position that was asked for come too"
    NO_ROWS = "no rows", "the answer has no routes at all"
    MISSING = "rows marked missing", "the payload says that these rows were not captured: honest, but no rows"
    SHIFTED = "shifted", "rows hold the routes of tokens some places further on, or back"
    STALE_PREFIX = "stale prefix", "rows are those of a sequence that was asked for before"
    STALE_WEIGHTS = "stale weights", "rows are those of other weights than the ones in force"
    OTHER_SEQUENCE = "another sequence", "rows are those of a sequence that ran at the same time"
    SAMPLES = "samples mixed up", "rows are those of another sample of the same request (n > 1)"
    LAYER_MAP = "layer map", "the layers are in another order"
    DENSE_COUNTED = "dense layers counted", "layers without experts have a place among those that have some"
    LAYERS = "number of layers", "there are more or fewer layers than the model routes in"
    WIDTH = "width of K", "a route has more or fewer ids than K: cut, or with shared experts fused in"
    AXES = "axes swapped", "the data is in another axis order than its shape says"
    ZEROS = "zeros", "rows hold nothing but zeros: never written"
    FILL = "fill value", "rows hold nothing but one value, such as 255 or -1: never written"
    REPEATED = "one row repeated", "several tokens hold one row, as when a replayed CUDA graph repeats its inputs"
    SHARD = "shard", "half of the rows, or of the ids, are there: one rank's share was taken for the whole"
    PHYSICAL = "physical ids", "ids are renumbered: places of redundant or balanced experts, not logical experts"
    RANK_LOST = "rank order lost", "the right experts in another order, where the model ranks them"
    OVERFLOW = "dtype overflow", "ids do not fit the type that carried them"
    TOKENS = "wrong tokens", "the next token is not the one that the checkpoint's weights give"
    FINISH = "wrong finish", "the answer ended for another reason, or with another number of tokens, than it had to"
    PAYLOAD = (
        "payload refused",
        "the ids are right, but what the payload says of them is not: a strict reader refuses it",
    )
    ERROR = "request failed", "the engine answered with an error, or not at all"
    UNKNOWN = "unexplained", "rows are wrong in no way that is known here"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one answer.

    Attributes:
        check: name of the check that asked.
        bug: what it looks like.
        detail: the same in this case's numbers, or "".
        place: which rows, in words, or "".
        rows: how many rows it explains.
        sequence: number of the sequence in this run, from 0; None for what is not said of one.
        lengths: its prompt and output tokens, P and O.
        position, layer: the first wrong id's; layer is the absolute decoder layer.
        expected, got: the ids there, or another pair of facts.
    """

    check: str
    bug: Bug
    detail: str = ""
    place: str = ""
    rows: int = 0
    sequence: int | None = None
    lengths: tuple[int, int] | None = None
    position: int | None = None
    layer: int | None = None
    expected: object = None
    got: object = None

    def line(self) -> str:
        """All of it in one line, without the check's name."""
        where = []
        if self.sequence is not None:
            where.append(f"sequence {self.sequence}")
        if self.lengths is not None:
            where.append("P {} + O {}".format(*self.lengths))
        if self.position is not None:
            where.append(f"position {self.position}")
        if self.layer is not None:
            where.append(f"layer {self.layer}")
        facts = [
            f"{name} {value}" for name, value in (("expected", self.expected), ("got", self.got)) if value is not None
        ]
        looks = f"looks like {self.bug.value}" + (f" ({self.detail})" if self.detail else "")
        looks += f", {self.place}" if self.place else ""
        return ": ".join(part for part in (", ".join(where), ", ".join(facts), looks) if part)

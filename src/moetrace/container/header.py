"""What a container says about one trace before anything of it is read: `TraceHeader`, as JSON and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from moetrace import codecs
from moetrace.codecs.packing import packed_size
from moetrace.container.envelope import TensorSpec
from moetrace.errors import FormatError
from moetrace.layout import MoeLayout, as_int, require_text
from moetrace.trace import Order, WeightSpan

MAX_ROWS = 1 << 40


@dataclass(frozen=True)
class TraceHeader:
    """One trace's facts, as `RoutingTrace` has them, and how its arrays are stored.

    Attributes:
        codec: full name of the codec of its ids, as `moetrace.codecs.NAMES` has it.
        num_valid: V, the number of rows that were captured; only these are stored. None in version 1, which stores all.
        token_bits: bits a token id is packed with, or None where only the hash is known (or in version 1).
        sha256: of its tensors' bytes, experts, tokens, valid in this order; "" in version 1, which has no checksum.
    """

    layout: MoeLayout
    num_rows: int
    num_tokens: int
    token_sha256: str
    start: int
    order: Order
    weight_spans: tuple[WeightSpan, ...]
    fingerprint: str
    engine: str
    codec: str
    num_valid: int | None = None
    token_bits: int | None = None
    sha256: str = ""

    def __post_init__(self) -> None:
        for name in ("num_rows", "num_tokens"):
            if not 0 <= as_int(getattr(self, name), name) <= MAX_ROWS:
                raise FormatError(f"{name} is out of range", expected=f"0 to {MAX_ROWS}", got=getattr(self, name))
        if self.num_valid is not None and not 0 <= as_int(self.num_valid, "num_valid") <= self.num_rows:
            raise FormatError("num_valid is out of range", expected=f"0 to {self.num_rows}", got=self.num_valid)
        if self.token_bits is not None and not 0 <= as_int(self.token_bits, "token_bits") <= 32:
            raise FormatError("token_bits is out of range", expected="0 to 32", got=self.token_bits)
        for name in ("token_sha256", "sha256", "fingerprint", "engine", "order"):
            require_text(getattr(self, name), name)
        codec, _ = codecs.find(self.codec)
        codec.check(self.layout)
        if codec.order == "set" and self.order != "set":
            raise FormatError(f"codec {self.codec!r} keeps no ranks", expected="order 'set'", got=self.order)

    def to_json(self) -> dict[str, Any]:
        """The header as a JSON object of version 2."""
        facts = {name: value for name, value in vars(self).items() if name != "layout"}
        return facts | asdict(self.layout) | {"weight_spans": [asdict(span) for span in self.weight_spans]}

    @classmethod
    def from_json(cls, facts: dict[str, Any], version: int) -> TraceHeader:
        """The header that a JSON object of that version holds.

        Raises:
            FormatError: a key is missing or unknown, or a value breaks its rule.
            InvalidTraceError: likewise.
        """
        keys = _KEYS - (_SINCE_2 if version == 1 else set())
        if not isinstance(facts, dict) or facts.keys() != keys:
            raise FormatError("the header's keys are not those of its version", expected=sorted(keys), got=facts)
        if version == 1 and facts["codec"] != "raw":
            raise FormatError("version 1 has one codec only", expected="'raw'", got=repr(facts["codec"]))
        if version > 1:
            as_int(facts["num_valid"], "num_valid")
        facts = dict(facts)
        layout = MoeLayout(tuple(facts.pop("layers")), facts.pop("num_experts"), facts.pop("top_k"))
        spans = tuple(WeightSpan(span["start"], span["version"]) for span in facts.pop("weight_spans"))
        return cls(layout=layout, weight_spans=spans, **facts)

    def tensors(self, i: int) -> dict[str, TensorSpec | None]:
        """Names, dtypes and shapes of trace i's tensors in version 2; None for a size that only zstd knows."""
        rows, layout = self.num_valid or 0, self.layout
        codec, compressed = codecs.find(self.codec)
        experts: TensorSpec | None = None
        if self.codec == "raw":
            experts = TensorSpec(f"U{8 * layout.dtype.itemsize}", (rows, layout.num_layers, layout.top_k))
        elif not compressed:
            experts = TensorSpec("U8", (codec.size(rows * layout.num_layers, layout),))
        specs = {f"{i}.experts": experts}
        if self.token_bits is not None:
            specs[f"{i}.tokens"] = TensorSpec("U8", (packed_size(self.num_tokens, self.token_bits),))
        return specs | {f"{i}.valid": TensorSpec("U8", (-(-self.num_rows // 8),))}

    @property
    def decoded_bytes(self) -> int:
        """What a reader holds at most while it makes this trace of its tensors, beside a fixed workspace."""
        codec, compressed = codecs.find(self.codec)
        valid = self.num_rows if self.num_valid is None else self.num_valid
        copies = 1 + (valid < self.num_rows)
        encoded = codec.size(valid * self.layout.num_layers, self.layout)
        experts = copies * self.num_rows * self.layout.row_bytes + (3 if compressed else 1) * encoded
        return experts + 20 * self.num_tokens + 3 * self.num_rows


_KEYS = {field.name for field in fields(TraceHeader)} - {"layout"} | {field.name for field in fields(MoeLayout)}
_SINCE_2 = {"num_valid", "token_bits", "sha256"}

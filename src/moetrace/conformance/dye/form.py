"""The closed form of a dye checkpoint: which experts every token goes to, and which token follows. Imports numpy only.

A token is told by its digits: token v is (v mod n_1, v mod n_2) with coprime n_1 and n_2, so every v < n_1 n_2 has
digits of its own, and v + 1 has both digits one higher. Each digit chooses experts of its own *pool*, half of all
experts, so that whatever a digit chooses leaves the other's choice alone. With one digit all experts are its pool.

Axes: T tokens, L MoE layers, K experts per token.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from math import gcd
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moetrace.errors import DyeError
from moetrace.layout import MoeLayout, fingerprint_from
from moetrace.trace import Order

FILE_NAME = "dye.json"
_FORMAT = "moetrace-dye-1"
_WIDTH = 512
"""The hidden size is a multiple of this."""


class Pool(NamedTuple):
    """The experts that one digit chooses from: `groups` groups of `size`, from expert `first` on.

    Of them `picked_groups` are used by a token, and `picks` experts.
    """

    first: int
    groups: int
    size: int
    picked_groups: int
    picks: int


@dataclass(frozen=True)
class DyeForm:
    """What a dye checkpoint does.

    Attributes:
        architecture: `model_type` of its config.
        digits: n_1 and n_2, or n_1 alone; their product is the vocabulary.
        num_experts, top_k: E and K.
        layers: absolute numbers of its MoE layers.
        num_layers: all decoder layers.
        num_groups, top_groups: experts are in so many groups, of which a token uses so many (1, 1: no groups).
        weight_version: each version routes every token differently, in every layer.
        order: "rank" where the architecture ranks the ids it chooses, best first; "set" where it does not sort.
        eos_token_id: the last token of the vocabulary, or None.

    Raises:
        DyeError: the numbers do not fit together.
    """

    architecture: str
    digits: tuple[int, ...]
    num_experts: int
    top_k: int
    layers: tuple[int, ...]
    num_layers: int
    num_groups: int = 1
    top_groups: int = 1
    weight_version: int = 0
    order: Order = "rank"
    eos_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in ("digits", "layers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not 1 <= self.top_groups <= self.num_groups:
            expected = f"1 to num_groups, which is {self.num_groups}"
            raise DyeError("top_groups does not make a dye", expected=expected, got=self.top_groups)
        for right, what, expected, got in (
            (len(self.digits) in (1, 2) and min(self.digits) > 1, "digits", "one or two numbers > 1", self.digits),
            (gcd(*self.digits) == 1 or len(self.digits) == 1, "digits", "no common divisor", self.digits),
            (self.num_experts % self.num_groups == 0, "num_groups", f"divides {self.num_experts}", self.num_groups),
            (self.weight_version >= 0, "weight_version", "at least 0", self.weight_version),
            (
                all(pool.picked_groups <= pool.picks <= pool.picked_groups * pool.size for pool in self.pools),
                "top_k",
                "at least one expert for each digit and each group that is used, and no more than they have",
                f"{self.top_k} of {self.num_experts}, {self.top_groups} groups of {self.num_groups}",
            ),
        ):
            if not right:
                raise DyeError(f"{what} does not make a dye", expected=expected, got=got)

    @property
    def vocab_size(self) -> int:
        """Number of tokens; token v is followed by (v + 1) mod that."""
        return int(np.prod(self.digits))

    @property
    def words(self) -> str:
        """The form in a line."""
        return (
            f"{self.architecture}, {len(self.layers)} MoE layers of {self.num_layers}, {self.top_k} of "
            f"{self.num_experts} experts, {self.vocab_size} tokens, weights {self.weight_version}"
        )

    @property
    def layout(self) -> MoeLayout:
        """The layout of the model's traces."""
        return MoeLayout(self.layers, self.num_experts, self.top_k)

    @property
    def hidden_size(self) -> int:
        """The smallest in which every digit has a place of its own."""
        return _WIDTH * -(-sum(self.digits) // _WIDTH)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the checkpoint, which traces of it carry."""
        return fingerprint_from(
            [[layer, self.num_experts, self.top_k] for layer in self.layers],
            model_type=self.architecture,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            vocab_size=self.vocab_size,
        )

    @cached_property
    def pools(self) -> tuple[Pool, ...]:
        """The pool of each digit: the first takes the larger half of experts, groups and picks."""
        if len(self.digits) == 1:
            size = self.num_experts // self.num_groups
            return (Pool(0, self.num_groups, size, self.top_groups, self.top_k),)
        picks = -(-self.top_k // 2), self.top_k // 2
        if self.num_groups == 1:
            half = -(-self.num_experts // 2)
            return Pool(0, 1, half, 1, picks[0]), Pool(half, 1, self.num_experts - half, 1, picks[1])
        size, groups, used = self.num_experts // self.num_groups, -(-self.num_groups // 2), -(-self.top_groups // 2)
        first = Pool(0, groups, size, used, picks[0])
        return first, Pool(groups * size, self.num_groups - groups, size, self.top_groups - used, picks[1])

    def choice(self, which: int, digit: int, layer: int) -> list[int]:
        """The experts that digit number `which` chooses in an absolute decoder layer when its value is `digit`.

        With m experts in a group, S strides, w the weight version, and digit = (rest S + block) m + unit: pick k is in
        the pool's group (digit + layer + k mod g) mod G, and there expert start + (k // g) stride mod m, with
        stride = strides[(block + layer + w) mod S] and start = digit + 13 layer + 5 w + rest // m^(layer mod (D + 1)).
        D is how many digits the largest rest has to the base m: where one layer has too few experts to tell all values,
        several do.
        """
        pool = self.pools[which]
        strides, size = self._strides(pool), pool.size
        rest, block = divmod(digit // size, len(strides))
        most, places = (self.digits[which] - 1) // size // len(strides), 1
        while size**places <= most:
            places += 1
        stride = strides[(block + layer + self.weight_version) % len(strides)]
        start = digit + 13 * layer + 5 * self.weight_version + rest // size ** (layer % (places + 1))
        experts = []
        for k in range(pool.picks):
            turn, place = divmod(k, pool.picked_groups)
            group = (digit + layer + place) % pool.groups
            experts.append(pool.first + group * size + (start + turn * stride) % size)
        return experts

    def route(self, token: int, layer: int) -> list[int]:
        """Expert ids, best first, of a token at an absolute decoder layer: the digits' choices in turn."""
        choices = [self.choice(which, token % base, layer) for which, base in enumerate(self.digits)]
        return [choices[k % len(choices)][k // len(choices)] for k in range(self.top_k)]

    def routes(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """Rows of input tokens: `[T, L, K]`, dtype as in a trace; ids best first."""
        tokens = np.asarray(tokens, np.int64)
        experts_TLK = np.empty((len(tokens), len(self.layers), self.top_k), self.layout.dtype)
        for which, base in enumerate(self.digits):
            experts_TLK[:, :, which :: len(self.digits)] = self._tables[which][tokens % base]
        return experts_TLK

    def continuation(self, token: int, count: int) -> list[int]:
        """The `count` tokens that follow a token."""
        return [(token + 1 + i) % self.vocab_size for i in range(count)]

    def save(self, folder: Path, **facts: Any) -> None:
        """Write `dye.json`: the form, and facts about the checkpoint beside it."""
        values = asdict(self) | {"format": _FORMAT, "vocab_size": self.vocab_size}
        (folder / FILE_NAME).write_text(json.dumps(values | facts, indent=1) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> DyeForm:
        """The form of a checkpoint folder, or of a `dye.json`.

        Raises:
            DyeError: it is no dye checkpoint, or one of another version.
        """
        path = Path(folder) if Path(folder).suffix == ".json" else Path(folder) / FILE_NAME
        try:
            values = json.loads(path.read_text())
            if values["format"] != _FORMAT:
                raise DyeError(f"{path} is of another version", expected=_FORMAT, got=values["format"])
            return cls(**{field.name: values[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DyeError(
                f"{path} does not describe a dye checkpoint", got=repr(error), fix="Write one with: moetrace dye"
            ) from error

    @cached_property
    def _tables(self) -> list[np.ndarray]:
        """For each digit `[n, L, picks]`: what each of its values chooses."""
        return [
            np.array([[self.choice(which, digit, layer) for layer in self.layers] for digit in range(base)])
            for which, base in enumerate(self.digits)
        ]

    @staticmethod
    def _strides(pool: Pool) -> list[int]:
        """Strides under which the picks of a group are distinct; below half a group, so that no two give one set."""
        turns = -(-pool.picks // pool.picked_groups)
        found = [stride for stride in range(1, (pool.size + 1) // 2) if pool.size // gcd(stride, pool.size) >= turns]
        return found if turns > 1 and found else [1]


def require_told_apart(form: DyeForm) -> None:
    """Raise `DyeError` unless rows tell every token from every other, layers from layers, and versions from versions.

    The rows of two tokens differ somewhere; those of tokens that follow one another differ in every layer, as a set.
    The rows of two layers, and of a version and the one before it, are not the same for all tokens.
    """
    rows_VLK = np.sort(form.routes(np.arange(form.vocab_size)), axis=-1)
    flat = np.ascontiguousarray(rows_VLK.reshape(form.vocab_size, -1))
    distinct = len(np.unique(flat.view([("", flat.dtype)] * flat.shape[1])))
    if distinct < form.vocab_size:
        raise DyeError(
            "the rows of some tokens are equal",
            expected=f"{form.vocab_size} different rows",
            got=distinct,
            fix="Lower vocab_size, or take more experts or layers.",
        )
    if (rows_VLK == np.roll(rows_VLK, -1, axis=0)).all(axis=2).any():
        raise DyeError(
            "some tokens are routed as their neighbours in a layer", fix="Take more experts, or fewer a token."
        )
    layers = {rows_VLK[:, layer].tobytes() for layer in range(rows_VLK.shape[1])}
    if len(layers) < rows_VLK.shape[1]:
        raise DyeError("some layers route alike", fix="Take more experts, or fewer layers.")


def digits_for(vocab_size: int, two: bool) -> tuple[int, ...]:
    """Digits of the smallest vocabulary that is at least `vocab_size`: one, or two coprime ones next to each other."""
    if not two:
        return (vocab_size,)
    low = 2
    while low * (low + 1) < vocab_size:
        low += 1
    return low + 1, low

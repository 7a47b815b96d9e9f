"""Whether a model is called with the tokens that its routes were aligned to.

Another batch of the same size passes every check of shapes, and its routes are then of nobody's tokens.

Axis: N tokens of the batch.
"""

from __future__ import annotations

import torch

from moetrace.errors import TokenMismatchError
from moetrace.replayer.routes import AlignedRoutes
from moetrace.replayer.upload import RoutesUpload


class TokenCheck:
    """Compares the ids that a model is called with to those that were aligned, where both are known."""

    def __init__(self, routes: AlignedRoutes, upload: RoutesUpload) -> None:
        self._routes, self._upload = routes, upload
        self._differs_N: torch.Tensor | None = None

    @property
    def pending(self) -> bool:
        """Whether ids were compared on a device, and so what came out is not known here yet."""
        return self._differs_N is not None

    def compare(self, ids: torch.Tensor, *, later: bool) -> None:
        """Look at the ids of one forward.

        Ids that are no batch of N tokens are not of this batch as a whole: whether they are its slice is for the
        routers to say, who count their tokens.

        Args:
            ids: `[B, S]`, as the model's input embeddings get them.
            later: keep on the device of the ids what comes out. No synchronisation then.

        Raises:
            TokenMismatchError: some are others, and `later` is False.
        """
        compared_N = self._upload.compared_N
        if compared_N is None or ids.ndim != 2 or ids.numel() != len(compared_N):
            return
        if later:
            differs_N = _differ(ids.detach(), self._upload.on(ids.device).tokens_N)
            self._differs_N = differs_N if self._differs_N is None else self._differs_N | differs_N
            return
        differs_N = _differ(ids.detach().cpu(), torch.from_numpy(compared_N))
        if differs_N.any():
            raise self._error(*_found_in(differs_N).tolist())

    def found(self, device: torch.device) -> torch.Tensor:
        """`[2]` int64 on a device: how many differ, and the number of the first. No synchronisation."""
        if self._differs_N is None:
            return torch.zeros(2, dtype=torch.int64, device=device)  # made there: bringing it would wait
        return _found_in(self._differs_N).to(device)

    def error_of(self, found: list[int]) -> TokenMismatchError | None:
        """What there is to raise, of what `found` gave."""
        count, first = found
        return self._error(count, first) if count else None

    def _error(self, count: int, first: int) -> TokenMismatchError:
        routes = self._routes
        assert routes.tokens_N is not None, "nothing else is compared"
        return TokenMismatchError(
            "the model was called with other tokens than those that the routes were aligned to",
            expected=f"token {routes.tokens_N[first]} at position {routes.position_N[first]} "
            f"of sequence {routes.sequence_N[first]}",
            got=f"another there, the first of {count} that differ",
            fix="Call the model with the very input_ids given to replay, each microbatch inside its own replay.",
        )


def _differ(ids: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
    """`[N]` bool. Where nothing is compared `tokens_N` is below 0."""
    return (ids.reshape(-1) != tokens_N) & (tokens_N >= 0)


def _found_in(differs_N: torch.Tensor) -> torch.Tensor:
    """`[2]` int64: how many are True, and the number of the first."""
    return torch.stack([differs_N.sum(), differs_N.view(torch.uint8).argmax()])

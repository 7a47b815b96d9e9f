"""The alarm: when a replay is judged, and what is said of routes that fit better shifted by one token.

Reading counts makes the host wait for the device that holds them. Where that costs nothing, a replay is judged at the
end of its context. Where it does (`defers`), the counts leave for the host behind the forward, and the end of the
backward pass judges them: by then they have arrived long ago, or else the device has a backward pass to work on while
the host waits. Both are before the optimizer's step. Whether the model was called with the tokens that were aligned is
judged in the same way; where it costs no wait, before the model computes anything.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Literal

import torch
from torch.autograd import Variable

from moetrace.errors import ShiftedRoutesError
from moetrace.replayer.counts import Findings, ReplayCounts, looks_shifted
from moetrace.replayer.monitor import OverlapMonitor

logger = logging.getLogger(__name__)
OnShift = Literal["error", "warn", "ignore"]


def defers(device: torch.device) -> bool:
    """Whether to leave it to the backward pass to judge what was counted on a device."""
    return device.type == "cuda"


class ShiftAlarm:
    """Judges what one monitor counted, once.

    Where no backward pass comes after all, the verdict waits: for `judge`, or for the end of whatever could still call
    it, where routes that are shifted are logged as an error.
    """

    def __init__(self, monitor: OverlapMonitor, on_shift: OnShift) -> None:
        self._monitor, self._on_shift = monitor, on_shift
        self._awaited = False  # a backward pass that has not begun
        self._forwards = 0  # whose counts were sent
        self._sent: Callable[[], Findings] | None = None  # and not judged

    @property
    def _looks(self) -> bool:
        return self._on_shift != "ignore" or self._monitor.tokens.pending

    def see_tokens(self, ids: torch.Tensor) -> None:
        """Compare the ids of a forward with those that were aligned: now, or where that is to be deferred, as a shift.

        Raises:
            TokenMismatchError: some are others, which is known already.
        """
        self._monitor.tokens.compare(ids, later=defers(ids.device))

    def watch(self, tensor: torch.Tensor) -> None:
        """Judge at the end of the backward pass that brings this tensor its gradient, where that is to be deferred."""
        if self._looks and defers(tensor.device):
            tensor.register_hook(self._on_gradient)
            self._awaited = True

    def close(self) -> None:
        """The context is over: judge, unless a backward pass is still to come. No synchronisation then."""
        if self._looks:
            self._send()
            if not self._awaited:
                self.judge()

    def _on_gradient(self, _: torch.Tensor) -> None:
        """The first one of a backward pass; others, and those of a second pass over the same graph, change nothing.

        The engine calls back when all of the pass is queued, and what that raises comes out of `backward()`.
        """
        if self._awaited:
            self._awaited = False
            self._send()
            Variable._execution_engine.queue_callback(self.judge)

    def _send(self) -> None:
        if self._monitor.forwards > self._forwards:
            if self._sent is not None:
                self._unjudged.detach()
            self._forwards = self._monitor.forwards
            self._sent = self._monitor.send()
            self._unjudged: weakref.finalize = weakref.finalize(self, _report, self._sent, self._on_shift)

    def counts(self) -> ReplayCounts:
        """What was counted so far, judged first if it was sent before. Waits for the device.

        Raises:
            TokenMismatchError: the model was called with other tokens than those that were aligned.
            ShiftedRoutesError: as `judge`.
        """
        found = self._monitor.send()()
        self.judge()
        return found.trusted()

    def judge(self) -> None:
        """Judge what was sent, if nobody has yet. Waits for it to arrive.

        Raises:
            TokenMismatchError: the model was called with other tokens than those that were aligned.
            ShiftedRoutesError: the routes are shifted, and `on_shift` is "error".
        """
        if self._sent is None:
            return
        sent, self._sent = self._sent, None
        self._unjudged.detach()
        found = sent()
        found.trusted()
        alarm = _alarm_of(found)
        if alarm is not None and self._on_shift == "error":
            raise alarm
        if alarm is not None and self._on_shift == "warn":
            logger.warning("%s", alarm)


def _alarm_of(found: Findings) -> ShiftedRoutesError | None:
    """Of the whole batch; or where that hides it, of the sequence that gains most."""
    stats = found.counts.stats()
    if not stats.shifted:
        return None
    whose, shift, gain, where, more = "the routes", stats.best_shift, stats.shift_gain, "", ""
    if not looks_shifted(stats.neighbour_rows, gain):
        worst = max(found.shifted, key=lambda one: one.gain)
        whose, shift, gain = f"the routes of sequence {worst.sequence}", worst.best_shift, worst.gain
        where = " in the whole batch"
        more = f" on {worst.neighbour_rows} rows; so look sequences {[one.sequence for one in found.shifted]}"
    return ShiftedRoutesError(
        f"{whose} look shifted by one token: the row {shift} than each token's own fits better",
        expected=f"highest overlap with the given rows (now {stats.overlap:.3f}{where})",
        got=f"{gain:+.3f} overlap when shifted{more}",
        fix="Row t must be the routing while token t was the input; check the producer with a known model.",
    )


def _report(sent: Callable[[], Findings], on_shift: OnShift) -> None:
    found = sent()
    alarm = found.other_tokens or (None if on_shift == "ignore" else _alarm_of(found))
    if alarm is not None:
        logger.error("no backward pass came that would have raised this: %s", alarm)

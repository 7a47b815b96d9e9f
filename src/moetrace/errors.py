"""Every error that moetrace raises, as one tree.

    MoetraceError
    ├── TraceError                 a trace is wrong, or does not fit what it is used with
    │   ├── InvalidTraceError      it breaks its own contract (shape, dtype, range, duplicates)
    │   ├── TokenMismatchError     it was recorded on other tokens
    │   ├── LayoutMismatchError    it was recorded on another model (layers, experts, top-k, fingerprint)
    │   └── MissingRowError        a row is needed that was never captured
    ├── FormatError                bytes or a payload cannot be read as traces
    ├── StoreError                 a store cannot keep or find what it is asked for
    │   ├── QuotaError             it is full
    │   ├── UnknownTraceError      a server does not have what it is asked for, or no more
    │   └── ArchiveError           what a server keeps traces in has failed
    ├── RouterError                a model's routers cannot be recorded or replayed
    │   ├── NotMoeError            there are none: the model is dense
    │   └── UnsupportedRouterError there are some, but not of a kind that can be tapped safely
    ├── ReplayError                a replay cannot go on without lying
    │   └── ShiftedRoutesError     the routes fit better when shifted by one token
    ├── EngineError                an engine cannot start or has stopped
    │   ├── ShuttingDownError      a server takes no more requests
    │   ├── CaptureError           an engine's internals are not as the capture adapter knows them
    │   └── WeightsError           new weights do not fit the running model; the old ones stay
    ├── RequestError               one request cannot be served as asked; the engine goes on
    │   ├── CaptureOffError        it asks for routes, but capture is stopped or was never there
    │   ├── UnknownModelError      it names a model that is not served
    │   ├── DuplicateRequestError  it has the id of a request under way
    │   └── OverloadedError        there are too many already; try again later
    ├── DyeError                   a dye checkpoint cannot be made as asked, or a folder is none
    ├── CheckError                 an engine cannot be tested: it does not answer, or not as its dialect says
    │   └── LackingError           it has no such feature
    ├── ServerError                a server's answer is an error of no kind above, or cannot be understood
    ├── UnreachableError           a server cannot be reached, or gave no whole answer
    ├── RolloutError               a rollout cannot begin or go on as asked
    └── MissingExtraError          an optional dependency is not installed

A message says what is wrong, what was expected, what was got and what to do next.
"""

from __future__ import annotations

import copyreg


class MoetraceError(Exception):
    """Root of all errors of this package.

    Args:
        what: what is wrong, as a sentence without its full stop.
        expected: what would have been right.
        got: what was there instead.
        fix: what to do next, as a sentence.
    """

    def __init__(self, what: str, *, expected: object = None, got: object = None, fix: str | None = None) -> None:
        self.what, self.expected, self.got, self.fix = what, expected, got, fix
        facts = [f"{name} {value}" for name, value in (("expected", expected), ("got", got)) if value is not None]
        message = f"{what}: {', '.join(facts)}." if facts else f"{what}."
        super().__init__(f"{message} {fix}" if fix else message)

    def __reduce__(self) -> tuple[object, ...]:
        """As it is: exceptions are pickled by their message, which would come back as what is wrong."""
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class TraceError(MoetraceError):
    """A trace is wrong, or does not fit what it is used with."""


class InvalidTraceError(TraceError):
    """A trace breaks its own contract."""


class TokenMismatchError(TraceError):
    """A trace was recorded on other tokens than those it is used with."""


class LayoutMismatchError(TraceError):
    """A trace was recorded on another model than the one it is used with."""


class MissingRowError(TraceError):
    """A row is needed that was never captured."""


class FormatError(MoetraceError):
    """Bytes or a payload cannot be read as traces."""


class StoreError(MoetraceError):
    """A store cannot keep or find what it is asked for."""


class QuotaError(StoreError):
    """A store is full: what it was asked to keep would pass its quota."""


class UnknownTraceError(StoreError):
    """A server does not have the trace it is asked for, or no more."""


class ArchiveError(StoreError):
    """What a server keeps traces in has failed."""


class RouterError(MoetraceError):
    """A model's routers cannot be recorded or replayed."""


class NotMoeError(RouterError):
    """The model is dense: it has no routed experts."""


class UnsupportedRouterError(RouterError):
    """The model routes in a way that cannot be tapped safely."""


class ReplayError(MoetraceError):
    """A replay cannot go on without lying about the routes that were used."""


class ShiftedRoutesError(ReplayError):
    """The routes that were given fit the live router better when shifted by one token."""


class EngineError(MoetraceError):
    """An engine cannot start or has stopped."""


class CaptureError(EngineError):
    """An engine's internals are not as the capture adapter knows them."""


class ShuttingDownError(EngineError):
    """A server is being shut down and takes no more requests."""


class WeightsError(EngineError):
    """New weights do not fit the running model; the old ones stay in use."""


class RequestError(MoetraceError):
    """One request cannot be served as asked; the engine goes on.

    Args:
        param: name of the request's field that is to blame, where one is; `what` says it too.
    """

    def __init__(
        self,
        what: str,
        *,
        expected: object = None,
        got: object = None,
        fix: str | None = None,
        param: str | None = None,
    ) -> None:
        super().__init__(what, expected=expected, got=got, fix=fix)
        self.param = param


class CaptureOffError(RequestError):
    """A request asks for routes, but capture is stopped, or the engine was started without it."""


class UnknownModelError(RequestError):
    """A request names a model that is not served."""


class DuplicateRequestError(RequestError):
    """A request has the id of one that is under way."""


class OverloadedError(RequestError):
    """Too many requests or sequences are under way already."""


class DyeError(MoetraceError):
    """A dye checkpoint cannot be made as asked, or a folder is none."""


class CheckError(MoetraceError):
    """An engine cannot be tested: it does not answer, or not as its dialect says."""


class LackingError(CheckError):
    """An engine under test, or its dialect, has no such feature."""


class ServerError(MoetraceError):
    """A server's answer is an error of a kind that is not known here, or cannot be understood.

    Attributes:
        status: of the response, or None.
    """

    status: int | None = None


class UnreachableError(MoetraceError):
    """A server cannot be reached, or gave no whole answer."""


class RolloutError(MoetraceError):
    """A rollout cannot begin or go on as asked."""


class MissingExtraError(MoetraceError, ImportError):
    """An optional dependency is not installed."""

    @classmethod
    def of(cls, error: ModuleNotFoundError, extra: str) -> MissingExtraError:
        """Translate a failed import of something that `extra` would have brought."""
        return cls(f"{error.name} is not installed", fix=f"Run: pip install 'moetrace[{extra}]'")

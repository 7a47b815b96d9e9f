"""Ask a moetrace server from Python: `Client`, and `AsyncClient` for an event loop. See docs/client.md."""

from moetrace.client.http import AsyncClient, Client
from moetrace.client.results import Completion, ModelInfo, StreamEvent, TraceReference, Usage

__all__ = ["AsyncClient", "Client", "Completion", "ModelInfo", "StreamEvent", "TraceReference", "Usage"]

"""The knobs of the server. The command line reads names, defaults and help from here. Imports no web framework."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from moetrace.errors import EngineError
from moetrace.ranges import require_ranges


@dataclass(frozen=True)
class ServerConfig:
    """Where the server listens, who may ask, and how much at once.

    Raises:
        EngineError: a value is out of range.
    """

    host: str = field(default="127.0.0.1", metadata={"help": "address to bind"})
    port: int = field(default=8000, metadata={"help": "port to bind"})
    served_model_name: str | None = field(
        default=None, metadata={"help": "name of the model in OpenAI's API; default: the checkpoint folder's"}
    )
    api_key: str | None = field(
        default=None,
        metadata={"help": "key that clients send as 'Authorization: Bearer KEY'; default: $MOETRACE_API_KEY, or none"},
    )
    max_body_bytes: int = field(default=16 << 20, metadata={"help": "largest request body"})
    max_prompt_tokens: int | None = field(default=None, metadata={"help": "longest prompt; default: by the window"})
    max_requests: int = field(default=1024, metadata={"help": "most requests at once; more are told to try again"})
    max_sequences: int = field(
        default=4096, metadata={"help": "most sequences at once, running and queued; more are told to try again"}
    )
    archive: str | None = field(
        default=None,
        metadata={"help": "store URI for routes returned by reference, of this server alone; default: its own memory"},
    )
    archive_bytes: int = field(default=1 << 30, metadata={"help": "most bytes of them; the oldest go for newer ones"})
    archive_seconds: float = field(
        default=3600.0, metadata={"help": "how long they are kept; 0: until others need room"}
    )
    shutdown_seconds: float = field(
        default=30.0,
        metadata={"help": "on SIGTERM, how long running requests may go on before they are answered as they are"},
    )

    def __post_init__(self) -> None:
        require_ranges(
            self,
            EngineError,
            max_body_bytes=1,
            max_prompt_tokens=1,
            max_requests=1,
            max_sequences=1,
            archive_bytes=0,
            archive_seconds=0,
            shutdown_seconds=0,
        )
        if not 0 <= self.port <= 65535:
            raise EngineError("port is out of range", expected="0 (any that is free) to 65535", got=self.port)
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise EngineError("the API key cannot be sent in a header", expected="printable ASCII, not empty")

    @property
    def is_exposed(self) -> bool:
        """Whether other machines can reach the server and no key keeps them out."""
        if self.api_key is not None or self.host == "localhost":
            return False
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return True

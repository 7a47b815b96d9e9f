"""The HTTP server: a shell around an engine and a tokenizer that it is given."""

from moetrace.server.app import create_app

__all__ = ["create_app"]

"""The embedded engine: transformers' continuous batching, with capture attached from outside."""

from moetrace.engines.transformers.engine import TransformersEngine

__all__ = ["TransformersEngine"]

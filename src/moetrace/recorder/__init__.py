"""Keep the routes a model chose: of plain forwards (`record`), or of an engine's steps (`Staging`, `RowStore`)."""

from moetrace.recorder.commit import StepSlots
from moetrace.recorder.plain import Recording, record
from moetrace.recorder.rows import NO_TOKEN, PulledPages, RowStore
from moetrace.recorder.staging import Staging

__all__ = ["NO_TOKEN", "PulledPages", "Recording", "RowStore", "Staging", "StepSlots", "record"]

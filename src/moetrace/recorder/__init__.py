"""Keep the routes a model chose: of plain forwards (`record`), or of an engine's steps (`Staging`, `SequenceRows`)."""

from moetrace.recorder.plain import Recording, record
from moetrace.recorder.rows import PagedRows, SequenceRows
from moetrace.recorder.staging import Staging, commit_rows

__all__ = ["PagedRows", "Recording", "SequenceRows", "Staging", "commit_rows", "record"]

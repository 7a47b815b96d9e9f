"""Dye checkpoints: real architectures whose routes and next tokens are known in closed form. `form` needs no torch."""

from moetrace.conformance.dye.form import DyeForm

__all__ = ["DyeForm"]

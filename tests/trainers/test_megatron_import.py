"""`moetrace.trainers` loads no trainer, and says which extra is missing."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
sys.modules["megatron"] = None
import moetrace.trainers
assert "torch" not in sys.modules
try:
    import moetrace.trainers.megatron
except ImportError as error:
    print(type(error).__name__, error)
"""


def test_without_megatron_core_the_extra_is_named() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert "MissingExtraError" in done.stdout
    assert "pip install 'moetrace[megatron]'" in done.stdout

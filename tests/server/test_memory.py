"""The C library gives memory back: few arenas, whatever the number of threads."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, sys, threading
from moetrace.server import memory
print(memory.keep_level(), flush=True)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
barrier = threading.Barrier(8)
def work():
    barrier.wait()
    for _ in range(2000):
        libc.malloc(ctypes.c_size_t(64))
    barrier.wait()
threads = [threading.Thread(target=work) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc.fdopen.restype = ctypes.c_void_p
libc.malloc_info(0, ctypes.c_void_p(libc.fdopen(1, b"w")))
libc.fflush(None)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="not glibc")
@pytest.mark.parametrize(("variable", "changed"), [({}, True), ({"MALLOC_ARENA_MAX": "8"}, False)])
def test_eight_threads_share_two_arenas_unless_the_environment_says_otherwise(
    variable: dict[str, str], changed: bool
) -> None:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], env=clean | variable, capture_output=True, check=True)
    told, *_ = run.stdout.decode().splitlines()
    arenas = len(re.findall(r"<heap nr=", run.stdout.decode()))
    assert told == str(changed)
    assert (arenas <= 2) == changed

"""Keep the memory of a process that runs for weeks level."""

from __future__ import annotations

import ctypes
import os

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # malloc.h of glibc
_ARENAS = 2
_MAPPED_FROM = 1 << 20


def keep_level() -> bool:
    """Let the C library give memory back; to be called before the process has threads.

    glibc gives every busy thread an arena of its own, and from the first large block that is freed on it takes blocks
    of that size from the arenas too. Those fill with holes: traces of many sizes, made on one thread and freed on
    another, are the worst case, and memory grows for days. With few arenas, and large blocks mapped one by one, what is
    freed is gone. (mallopt(3))

    Returns:
        False where nothing was changed: another C library, or the environment says how malloc is to work.
    """
    if "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return bool(mallopt and mallopt(_M_ARENA_MAX, _ARENAS) and mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM))

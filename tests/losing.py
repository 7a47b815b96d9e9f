"""A way to a server on which the first request gets lost: it arrives, and then the connection is cut."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


@contextmanager
def losing(url: str, has_arrived: Callable[[], bool]) -> Iterator[str]:
    """Pass connections on to `url`, and cut the first one as soon as `has_arrived`; yields the URL to use instead."""
    parts = urlsplit(url)
    listener = socket.create_server(("127.0.0.1", 0))

    def accept() -> None:
        is_first = True
        with suppress(OSError):
            while True:
                near = listener.accept()[0]
                far = socket.create_connection((parts.hostname, parts.port))
                for a, b in ((near, far), (far, near)):
                    threading.Thread(target=pass_on, args=(a, b), daemon=True).start()
                if is_first:
                    while not has_arrived():
                        time.sleep(0.001)
                    for end in (near, far):
                        with suppress(OSError):  # one end may have closed it because the other was cut
                            end.shutdown(socket.SHUT_RDWR)
                is_first = False

    def pass_on(a: socket.socket, b: socket.socket) -> None:
        with suppress(OSError):
            while data := a.recv(1 << 16):
                b.sendall(data)
            b.shutdown(socket.SHUT_WR)

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(30)

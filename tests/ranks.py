"""Run a worker script on two ranks of this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_two_ranks(worker: Path, *args: str | Path, devices: str = "") -> None:
    """Run `worker` with `args` in two processes that torchrun starts; fails with its last words.

    They see the GPUs that `devices` numbers: none, unless told.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    found = {"PYTHONPATH": os.pathsep.join(sys.path)}  # the tests' own modules
    environment = {**os.environ, **found, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": devices}
    command = [*launch, str(worker), *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]

"""The whole loop on one machine, in about a minute: serve, roll out, and train without and with replay.

    python examples/demo.py [--out demo-output] [--prompts 96] [--new-tokens 64]

1. starts `moetrace serve` on the tiny model, as a process, in bfloat16;
2. sends real prompts to it concurrently over HTTP and asks for the routes of every token;
3. saves the rollout, and starts `examples/trainer.py`: another process, in float32 with other kernels, that compares
   its own routes with the recorded ones, replays them, and takes one optimizer step;
4. prints what replay changed, and names the folder with the traces and the summary.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

import moetrace
from moetrace.client import Completion
from moetrace.errors import MoetraceError, UnreachableError

ROOT = Path(__file__).resolve().parent.parent
CONCURRENCY = 32


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "models/tiny-qwen3-moe"))
    parser.add_argument("--prompt-file", type=Path, default=ROOT / "examples/prompts.txt", help="one prompt a line")
    parser.add_argument("--prompts", type=int, default=96, help="how many of them to send")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    args = parser.parse_args()
    if not args.prompt_file.is_file():
        parser.error(f"--prompt-file: there is no {args.prompt_file}; write one prompt a line")
    prompts = args.prompt_file.read_text().splitlines()[: args.prompts]
    if not prompts:
        parser.error(f"there are no prompts: raise --prompts, or write one a line in {args.prompt_file}")
    args.out.mkdir(parents=True, exist_ok=True)
    with serving(args.model, args.out / "server.log") as url:
        completions = asyncio.run(roll_out(url, prompts, args.new_tokens))
    save_rollout(completions, args.out)
    trainer = [sys.executable, str(ROOT / "examples/trainer.py"), "--model", args.model, "--rollout", str(args.out)]
    if (code := subprocess.run(trainer, check=False).returncode) != 0:
        return code
    print(f"\nTraces, log-probabilities and summary.json are in {args.out.resolve()}")
    return 0


@contextmanager
def serving(model: str, log_path: Path) -> Iterator[str]:
    """Run `moetrace serve` for the length of the context; yields its URL once it answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moetrace", "serve", model, "--port", str(port), "--enable-return-routed-experts"]
    command += ["--dtype", "bfloat16", "--experts-implementation", "grouped_mm"]
    began, url = time.perf_counter(), f"http://127.0.0.1:{port}"
    print(f"[1/3] starting the server: moetrace {' '.join(command[3:])}")
    with log_path.open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_until_healthy(url, server, log_path)
            print(f"      ready after {time.perf_counter() - began:.1f} s (log: {log_path})")
            yield url
        finally:
            server.terminate()
            server.wait(timeout=30)


def wait_until_healthy(url: str, server: subprocess.Popen, log_path: Path, seconds: float = 120) -> None:
    client, deadline = moetrace.Client(url, timeout=2), time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"the server stopped with code {server.returncode}:\n{log_path.read_text()[-2000:]}")
        try:
            if client.health():
                return
        except UnreachableError:
            time.sleep(0.1)
    raise SystemExit(f"the server was not ready after {seconds:.0f} s; see {log_path}")


async def roll_out(url: str, prompts: list[str], new_tokens: int) -> list[Completion]:
    """All prompts, up to `CONCURRENCY` at a time; completions in the order of the prompts."""
    gate = asyncio.Semaphore(CONCURRENCY)
    async with moetrace.AsyncClient(url) as client:
        with tqdm(total=len(prompts), desc="[2/3] rolling out", unit="sequence") as progress:

            async def one(prompt: str) -> Completion:
                async with gate:
                    (completion,) = await client.generate(prompt, do_sample=True, max_new_tokens=new_tokens)
                progress.update()
                return completion

            return await asyncio.gather(*map(one, prompts))


def save_rollout(completions: list[Completion], folder: Path) -> None:
    """What a trainer needs: the traces (with their token ids), prompt lengths, and the log-probabilities."""
    traces = [completion.trace for completion in completions if completion.trace is not None]
    moetrace.save_file(traces, folder / "traces.safetensors")
    rollout = [
        {
            "prompt_tokens": len(completion.prompt_tokens),
            "text": completion.text,
            "logprobs": completion.logprobs,
        }
        for completion in completions
    ]
    (folder / "rollout.json").write_text(json.dumps(rollout, indent=1))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (MoetraceError, OSError) as error:
        sys.exit(f"demo.py: {error}")

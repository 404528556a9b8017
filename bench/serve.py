"""How many requests a second `airl-fast serve` answers, and how long each waits, with and without merging them.

    python -m bench.serve RUN [--seconds 2] [--rounds 5] [--json FILE]

Clients in one other process each send a trace of the run's task, wait for the answer and send the next. Both services
run all the time and take turns, so that a machine that slows down slows both.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from airl_fast.config import Config
from airl_fast.data.task import make_task
from airl_fast.overrides import load_config, read_yaml

CONCURRENCY = (1, 8, 32)
# 1 token: no request shares a pass, and none waits for company.
SERVICES = {"merged": (), "one by one": ("--batch-tokens", "1", "--batch-wait-ms", "0")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Milliseconds, and requests to a forward pass."""

    rate: float
    p50: float
    p99: float
    merged: float


@contextmanager
def served(run: Path, flags: tuple[str, ...]) -> Iterator[str]:
    command = [sys.executable, "-m", "airl_fast", "serve", str(run), "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        yield re.search(r"http://\S+", process.stdout.readline())[0]
    finally:
        process.terminate()
        process.wait()


def requests_of(run: Path) -> list[bytes]:
    """One trace each: demonstrations of the run's test prompts."""
    config = load_config(Config, read_yaml(run / "config.yaml"), [], origin=str(run / "config.yaml"))
    data = config.data
    task = make_task(data.task, path=data.path, seed=config.seed, **data.options)
    rows = [{"prompt": each.prompt, "completion": each.expert} for each in task.load("test", 64) if each.expert]
    return [json.dumps({"traces": [row]}).encode() for row in rows]


async def measure(address: str, bodies: list[bytes], clients: int, seconds: float) -> Round:
    """Each client has one connection and no library between: two cores are shared with the service."""
    host, port = re.fullmatch(r"http://(.*):(\d+)", address).groups()
    connections = [await asyncio.open_connection(host, int(port)) for _ in range(clients)]

    async def work(own: int, end: float) -> list[float]:
        found, i = [], own
        while time.perf_counter() < end:
            began = time.perf_counter()
            await exchange(*connections[own], b"POST /score", bodies[i % len(bodies)])
            found.append(time.perf_counter() - began)
            i += clients
        return found

    async def all_of(seconds: float) -> list[float]:
        end = time.perf_counter() + seconds
        return [t for own in await asyncio.gather(*(work(i, end) for i in range(clients))) for t in own]

    async def passes() -> int:
        return int(re.search(rb"^airl_passes_total (\d+)", await exchange(*connections[0], b"GET /metrics"), re.M)[1])

    await all_of(0.3)  # whatever is computed once
    before, began = await passes(), time.perf_counter()
    times = await all_of(seconds)
    rate = len(times) / (time.perf_counter() - began)
    merged = len(times) / (await passes() - before)
    for _, writer in connections:
        writer.close()
    p50, p99 = 1000 * np.quantile(times, [0.5, 0.99])
    return Round(rate=rate, p50=float(p50), p99=float(p99), merged=merged)


async def exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes, body: bytes = b""
) -> bytes:
    """One request and the body of its answer, which must be 200."""
    head = b"%b HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    writer.write(head % (request, len(body)) + body)
    answered = await reader.readuntil(b"\r\n\r\n")
    if not answered.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(answered.decode())
    return await reader.readexactly(int(re.search(rb"content-length: (\d+)", answered)[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round (default: 2)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--json", type=Path, help="write every round here")
    arguments = parser.parse_args()
    bodies = requests_of(arguments.run)
    rounds: dict[tuple[int, str], list[Round]] = {}
    with served(arguments.run, SERVICES["merged"]) as first, served(arguments.run, SERVICES["one by one"]) as second:
        for _ in range(arguments.rounds):
            for clients in CONCURRENCY:
                for name, address in zip(SERVICES, (first, second), strict=True):
                    found = asyncio.run(measure(address, bodies, clients, arguments.seconds))
                    rounds.setdefault((clients, name), []).append(found)
    table = Table("clients", "requests", "requests/s", "p50 ms", "p99 ms", "requests a pass", box=None)
    for (clients, name), found in rounds.items():
        cells = [_range([getattr(each, field) for each in found]) for field in ("rate", "p50", "p99", "merged")]
        table.add_row(str(clients), name, *cells)
    Console(width=100).print(table)
    print(f"median of {arguments.rounds} rounds of {arguments.seconds:g} s [lowest, highest]; {os.cpu_count()} cores")
    if arguments.json:
        listed = [{"clients": c, "requests": name, "rounds": [asdict(r) for r in f]} for (c, name), f in rounds.items()]
        arguments.json.write_text(json.dumps(listed, indent=1) + "\n")


def _range(values: list[float]) -> str:
    digits = 0 if max(values) >= 100 else 1
    return f"{median(values):.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


if __name__ == "__main__":
    main()

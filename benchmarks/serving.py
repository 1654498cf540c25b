"""effnet serve under load: throughput, behaviour under overload, and LitServe with the same engine for comparison.

    python benchmarks/serving.py [--model b0] [--seconds 15] [--turns 3] [--clients 32] [--latency 50ms] [--minutes 10]
                                 [--skip overload,litserve,hey] [--json FILE]

The photos are 64 JPEGs of 640 x 480 pixels. Server and client share the machine's cores, so the client reduces the
measured throughput; it is a few lines of asyncio that send the same bytes repeatedly, one process for all clients.

- throughput: `classifier.stream` on the files alternates with the server, with `--clients` clients that send the next
  request as soon as they have an answer; the server's budget is long enough (--latency 1s) that it refuses none. If
  Debian's `hey` is installed, it is used as well.
- LitServe takes turns with them, with one worker and with two: the same classifier decodes and computes, batches are
  equally large, and a batch waits 10 ms for more requests. It takes JSON, so its photos are base64.
- overload: requests arrive at three times the measured throughput, whether or not earlier ones have been answered, with
  a budget of `--latency`. Memory is that of the server process.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import effnet
from effnet.data.image import PHOTOS
from effnet.fields import parse_seconds
from effnet.machine import this_machine

FILES, SIDES = 64, (640, 480)
WARMUP = 2.0  # seconds before the first turn
OVERLOAD = 3  # times the measured throughput
WINDOW = 10.0  # seconds between readings of the memory
LIMIT = 512  # connections under overload
LITSERVE = """
import base64, io, sys
import litserve as ls
import numpy as np
import effnet
model, port, batch, workers = sys.argv[1], *map(int, sys.argv[2:])

class Api(ls.LitAPI):
    def setup(self, device):
        self.classifier = effnet.load(model)

    def decode_request(self, request):
        return self.classifier.read(io.BytesIO(base64.b64decode(request["image"])))

    def batch(self, inputs):
        return np.stack(inputs)

    def predict(self, pixels):
        return self.classifier.describe(*self.classifier.answer(pixels))

    def unbatch(self, output):
        return output

    def encode_response(self, prediction):
        return prediction.to_dict()

if __name__ == "__main__":
    api = Api(max_batch_size=batch, batch_timeout=0.01)
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=workers)
    server.run(host="127.0.0.1", port=port, log_level="error", generate_client_file=False)
"""


@dataclass
class Load:
    """The results that clients saw."""

    seconds: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)  # of answers, in seconds

    @property
    def rate(self) -> float:
        """Answers per second."""
        return self.statuses["200"] / self.seconds

    def percentile(self, share: float) -> float:
        """The latency in milliseconds at this quantile."""
        return 1e3 * float(np.quantile(self.latencies, share)) if self.latencies else float("nan")

    def line(self, name: str) -> str:
        """A row of the table."""
        others = ", ".join(f"{count} x {status}" for status, count in self.statuses.items() if status != "200")
        shares = "  ".join(f"{self.percentile(share):7.1f}" for share in (0.5, 0.9, 0.99))
        return f"{name:<34}{self.rate:8.1f}  {shares}   {others}"


HEAD = f"{'':<34}{'images/s':>8}  {'p50 ms':>7}  {'p90 ms':>7}  {'p99 ms':>7}"


def write_photos(folder: Path) -> list[Path]:
    """Write the JPEGs, crops of the two packaged photos."""
    random, paths = np.random.default_rng(0), []
    sources = [Image.open(path).convert("RGB") for path in sorted(PHOTOS.glob("*.png"))]
    for number in range(FILES):
        source = sources[number % len(sources)]
        side = random.uniform(0.6, 1.0)
        box = [(1 - side) * random.uniform() * length for length in source.size]
        box += [start + side * length for start, length in zip(box, source.size, strict=True)]
        paths.append(folder / f"{number:02}.jpg")
        source.resize(SIDES, Image.Resampling.BICUBIC, box=tuple(box)).save(paths[-1], quality=90)
    return paths


def requests_of(paths: Sequence[Path], *, in_json: bool = False) -> list[bytes]:
    """The bytes of HTTP requests."""
    bodies = [path.read_bytes() for path in paths]
    if in_json:
        bodies = [json.dumps({"image": base64.b64encode(body).decode()}).encode() for body in bodies]
    kind = "application/json" if in_json else "image/jpeg"
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: "
    return [head.encode() + f"{len(body)}\r\n\r\n".encode() + body for body in bodies]


class Connection:
    """One client's connection, reopened if the server closed it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes) -> str:
        """Send a request and return the status of its answer, or the name of the error."""
        try:
            if self._streams is None:
                self._streams = await asyncio.open_connection("127.0.0.1", self._port)
            reader, writer = self._streams
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            found = re.search(rb"content-length: (\d+)", head)
            await reader.readexactly(int(found[1]) if found else 0)
            if b"connection: close" in head:
                self.close()
            return head[9:12].decode()
        except (OSError, asyncio.IncompleteReadError) as error:
            self.close()
            return type(error).__name__

    def close(self) -> None:
        """Close it."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def closed_loop(port: int, requests: Sequence[bytes], clients: int, seconds: float) -> Load:
    """Clients that send the next request as soon as they have an answer."""
    load, started = Load(), time.perf_counter()
    numbers = iter(range(10**9))

    async def work() -> None:
        connection = Connection(port)
        while (began := time.perf_counter()) < started + seconds:
            status = await connection.ask(requests[next(numbers) % len(requests)])
            load.statuses[status] += 1
            if status == "200":
                load.latencies.append(time.perf_counter() - began)
        connection.close()

    await asyncio.gather(*(work() for _ in range(clients)))
    load.seconds = time.perf_counter() - started
    return load


async def open_loop(
    port: int, requests: Sequence[bytes], rate: float, seconds: float, watch: Callable[[Load], None]
) -> Load:
    """Send `rate` requests per second on as many connections as needed; `watch` is called now and then."""
    # connections take turns, since the server closes those that are idle for too long
    load, idle = Load(), deque(Connection(port) for _ in range(LIMIT))
    pending: set[asyncio.Task[None]] = set()
    started = last = time.perf_counter()

    async def work(connection: Connection, request: bytes) -> None:
        began = time.perf_counter()
        status = await connection.ask(request)
        load.statuses[status] += 1
        if status == "200":
            load.latencies.append(time.perf_counter() - began)
        idle.append(connection)

    sent = 0
    while (now := time.perf_counter()) < started + seconds:
        while sent < (now - started) * rate:
            sent += 1
            if idle:
                task = asyncio.create_task(work(idle.popleft(), requests[sent % len(requests)]))
                pending.add(task)
                task.add_done_callback(pending.discard)
            else:
                load.statuses["not sent: no connection is free"] += 1
        if now >= last + WINDOW:
            last, load.seconds = now, now - started
            watch(load)
        await asyncio.sleep(0.002)
    if pending:
        await asyncio.wait(pending, timeout=30)
    load.statuses["no answer"] += len(pending)
    load.seconds = time.perf_counter() - started
    return load


@contextmanager
def process(command: Sequence[str], ready: Callable[[str], bool], log: Path) -> Iterator[tuple[int, str]]:
    """Start a server process; yields its pid and its output until it was ready."""
    with log.open("w") as file:
        started = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while not ready(log.read_text()):
            if time.monotonic() > end or started.poll() is not None:
                raise SystemExit(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield started.pid, log.read_text()
    finally:
        started.terminate()
        started.wait(60)
        with suppress(ProcessLookupError):  # LitServe leaves child processes behind
            os.killpg(started.pid, signal.SIGKILL)


@contextmanager
def effnet_server(model: str, latency: str, folder: Path) -> Iterator[tuple[int, int]]:
    """Start `effnet serve`; yields its pid and port."""
    command = [sys.executable, "-m", "effnet", "serve", model, "--port", "0", "--latency", latency, "--grace", "1ms"]
    with process(command, lambda said: "Next: " in said, folder / "effnet.log") as (pid, said):
        print(next(line for line in said.splitlines() if "in flight" in line))
        yield pid, int(re.findall(r"Serving at \S+:(\d+);", said)[0])


@contextmanager
def litserve_server(model: str, batch: int, workers: int, folder: Path) -> Iterator[int]:
    """Start LitServe; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    script = folder / "served.py"
    script.write_text(LITSERVE)
    command = [sys.executable, str(script), model, str(port), str(batch), str(workers)]

    def ready(_: str) -> bool:
        with socket.socket() as probe:
            probe.settimeout(1)
            if probe.connect_ex(("127.0.0.1", port)):
                return False
            probe.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            return b" 200 " in probe.recv(100)

    with process(command, ready, folder / "litserve.log"):
        yield port


def memory(pid: int) -> float:
    """MB of memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def run(awaitable: Awaitable[Load]) -> Load:
    """Run in uvloop, like the server, so that the client costs less."""
    import uvloop

    async def main() -> Load:
        return await awaitable

    return uvloop.run(main())


def measure_throughput(options: argparse.Namespace, folder: Path, paths: list[Path]) -> dict[str, Any]:
    """Measure stream, effnet serve and LitServe in turns."""
    requests, in_json, found = requests_of(paths), requests_of(paths, in_json=True), dict[str, list[Load]]()
    rates: list[float] = []
    with effnet.load(options.model) as classifier:
        print(f"{options.model}: {classifier.selection}")
        group = classifier.group

        def stream(seconds: float) -> float:
            began, done = time.perf_counter(), 0
            while time.perf_counter() < began + seconds:
                done += sum(1 for _ in classifier.stream(str(path) for path in paths * 4))
            return done / (time.perf_counter() - began)

        stream(WARMUP)
        for turn in range(options.turns):
            rates.append(stream(options.seconds))
            print(f"{'stream':<34}{rates[-1]:8.1f}")
            with effnet_server(options.model, "1s", folder) as (_, port):
                run(closed_loop(port, requests, options.clients, WARMUP))
                load = run(closed_loop(port, requests, options.clients, options.seconds))
                found.setdefault("effnet serve", []).append(load)
                print(load.line("effnet serve"))
                if "hey" not in options.skip and shutil.which("hey") and not turn:
                    print(hey(port, paths[0], options))
            for workers in () if "litserve" in options.skip else (1, 2):
                name = f"LitServe, {workers} worker{'s' * (workers > 1)}"
                with litserve_server(options.model, group, workers, folder) as port:
                    run(closed_loop(port, in_json, options.clients, WARMUP))
                    load = run(closed_loop(port, in_json, options.clients, options.seconds))
                    found.setdefault(name, []).append(load)
                    print(load.line(name))
    shares = [load.rate / rate for load, rate in zip(found["effnet serve"], rates, strict=True)]
    print(f"effnet serve answers {statistics.median(shares):.2f} of what stream does")
    figures = {name: [(load.rate, load.percentile(0.99)) for load in loads] for name, loads in found.items()}
    return {"stream": rates, **figures}


def hey(port: int, photo: Path, options: argparse.Namespace) -> str:
    """Measure with Debian's hey: one photo, the same number of clients."""
    address = f"http://127.0.0.1:{port}/predict"
    words = [*f"hey -z {options.seconds:.0f}s -c {options.clients} -m POST -D".split(), str(photo), address]
    said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    rate = re.findall(r"Requests/sec:\s+([\d.]+)", said)
    slow = re.findall(r"99%+ in ([\d.]+) secs", said) or ["nan"]
    status = ", ".join(f"{count} x {code}" for code, count in re.findall(r"\[(\d+)\]\s+(\d+) responses", said))
    return f"{'effnet serve, asked by hey':<34}{float(rate[0]):8.1f}  {'':>16}  {1e3 * float(slow[0]):7.1f}   {status}"


def measure_overload(options: argparse.Namespace, folder: Path, paths: list[Path]) -> dict[str, Any]:
    """Measure the peak throughput with this budget, then overload the server with three times as many requests."""
    requests, budget = requests_of(paths), 1e3 * parse_seconds("latency", options.latency)
    with effnet_server(options.model, options.latency, folder) as (pid, port):
        run(closed_loop(port, requests, 8, WARMUP))
        peak = max(
            (run(closed_loop(port, requests, clients, options.seconds)) for clients in (2, 4, 8)),
            key=lambda load: load.rate,
        )
        print(peak.line(f"peak, budget {budget:.0f} ms"))
        held = [memory(pid)]

        def watch(load: Load) -> None:
            held.append(memory(pid))
            print(load.line(f"{load.seconds:5.0f} s, {held[-1]:.1f} MB"), flush=True)

        rate, seconds = OVERLOAD * peak.rate, 60 * options.minutes
        load = run(open_loop(port, requests, rate, seconds, watch))
        print(load.line(f"{rate:.0f} a second"))
        after = memory(pid)
    print(
        f"answers {load.rate / peak.rate:.2f} of the peak; p90 {load.percentile(0.9) / budget:.2f} and p99 "
        f"{load.percentile(0.99) / budget:.2f} of the budget; memory {held[0]:.1f} to {after:.1f} MB, "
        f"at most {max(held):.1f}"
    )
    shares = {f"p{100 * share:.0f}_ms": load.percentile(share) for share in (0.5, 0.9, 0.99)}
    rates = {"peak": peak.rate, "asked": rate, "answered": load.rate}
    return {**rates, **shares, "statuses": dict(load.statuses), "memory_mb": [*held, after]}


def main() -> None:
    """Read the options and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="lite0")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each turn")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--latency", default="50ms", help="budget under overload")
    parser.add_argument("--minutes", type=float, default=10.0, help="of overload")
    parser.add_argument("--skip", default="", help="throughput, overload, litserve, hey")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(this_machine())
    figures: dict[str, Any] = {"machine": this_machine().to_dict()}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = write_photos(folder)
        print(f"{FILES} photos of {statistics.mean(path.stat().st_size for path in paths) / 1e3:.0f} kB\n{HEAD}")
        if "throughput" not in options.skip:
            figures["throughput"] = measure_throughput(options, folder, paths)
        if "overload" not in options.skip:
            figures["overload"] = measure_overload(options, folder, paths)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()

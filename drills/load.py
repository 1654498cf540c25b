"""Load: a server at three times its capacity, with every kind of bad client, while its bundle is replaced underneath.

Each try is one client. Most of them ask about a photo whose answer is known; the others come slowly, leave before they
are answered, send half of a request and fall silent, send too much, send what is no HTTP, or never read what they
get. Now and then the bundle is replaced by another, or by half of one, and the server is told to load it. At the end
it gets SIGTERM under full load. Then every request that was sent whole has had one answer, a right one or a refusal
that says when to come again; the server's memory, descriptors and threads have not grown; its exit code is 0.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import re
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from verdict import Drill, Scale, begin

import effnet
from effnet.arch.spec import InputSpec

TIMES = 3  # of its capacity
SIDE, CLASSES = 128, 10
MOST = 1_000_000  # bytes of a body
GRACE = 2.0  # seconds after SIGTERM in which it still answers
PATIENCE = 300.0  # seconds until an answer counts as lost; the server gives up a body after 60, silence after 75
SILENT = 40  # silent clients at once
SWAP = 7.0  # seconds between two replaced bundles
GROWN = 48 * 2**20  # bytes by which its memory may grow while it runs: an allocator's play, no leak of an hour
FULL, SHORT = 10_000_000, 600

Answers = dict[str, tuple[str, float]]  # photo -> label and probability


@dataclass
class Site:
    """The server, what is known of it, and what was seen of it."""

    drill: Drill
    process: subprocess.Popen[str]
    folder: Path
    photos: dict[str, bytes]
    known: dict[str, Answers]  # of each bundle
    log: list[str] = field(default_factory=list)
    port: int = 0
    rate: float = 0.0
    ending: float = float("inf")
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    silent: int = 0
    memory: list[tuple[float, int, int, int]] = field(default_factory=list)

    def right(self, photo: str, shown: dict[str, Any]) -> bool:
        """Whether one of the bundles answers so."""
        label, share = best_of(shown)
        return any(each[photo][0] == label and abs(each[photo][1] - share) < 2e-3 for each in self.known.values())


def main() -> int:
    """Run the drill."""
    drill = begin("load", Scale(FULL, 60, SHORT, 0.15), __doc__ or "")
    with tempfile.TemporaryDirectory(prefix="effnet-load-") as name:
        asyncio.run(attack(drill, Path(name)))
    return drill.finish()


async def attack(drill: Drill, folder: Path) -> None:
    """Start the server, load it, end it."""
    site = prepare(drill, folder)
    try:
        await wait_for(site, "Next:")
        site.port = int(re.findall(r"Serving at http://[^:]+:(\d+);", "".join(site.log))[0])
        site.rate = float(re.findall(r"about (\d+) images a second", "".join(site.log))[0])
        drill.start = time.monotonic()  # what comes before is not the attack
        around = [asyncio.create_task(watch(site)), asyncio.create_task(replace_bundles(site))]
        clients = await offer(site)
        if drill.only is None:
            await settle(site, clients)
            clients = await offer(site, seconds=1.0)  # then SIGTERM, while they ask
        await end(site, clients)
        for task in around:
            task.cancel()
        judge(site)
    finally:
        site.process.kill()
        site.process.wait()


def prepare(drill: Drill, folder: Path) -> Site:
    """Two bundles of one shape, photos and what each bundle says of them, and a server of the first."""
    photos = {f"photo{index}": photo(index) for index in range(12)}
    known = {}
    for index, name in enumerate(("first", "second")):
        torch.manual_seed(index)
        network = effnet.EfficientNet(effnet.spec("b0", resolution=SIDE, num_classes=CLASSES))
        with torch.no_grad():
            network.classifier.weight.mul_(400.0)  # untrained, it would answer alike about all photos
        effnet.save(network, folder / name, classes=[f"class{n}" for n in range(CLASSES)], input=InputSpec(SIDE, SIDE))
        files = [io.BytesIO(content) for content in photos.values()]
        with effnet.load(folder / name) as model:
            found = [model.predict(file).to_dict() for file in files]
        known[name] = {photo: best_of(each) for photo, each in zip(photos, found, strict=True)}
    shutil.copytree(folder / "first", folder / "served")
    words = ["serve", f"net={folder / 'served'}", "--port", "0", "--max-upload", "1MB", "--grace", f"{GRACE}s"]
    process = subprocess.Popen(
        [sys.executable, "-m", "effnet", *words, "--threads", "1", "--latency", "300ms"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Site(drill, process, folder, photos, known)


def photo(index: int) -> bytes:
    """A JPEG of coloured noise that no other photo looks like."""
    random = np.random.default_rng(index)
    tiles = random.integers(0, 256, (3 + index, 4 + index, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(tiles).resize((320, 240)).save(buffer, "JPEG")
    return buffer.getvalue()


def best_of(shown: dict[str, Any]) -> tuple[str, float]:
    """Label and probability of the best class of an answer."""
    return str(shown["predictions"][0]["label"]), float(shown["predictions"][0]["probability"])


async def wait_for(site: Site, words: str) -> None:
    """Read what the server says until it says that, then go on reading."""

    def read() -> None:
        for line in site.process.stdout or ():
            site.log.append(line)

    asyncio.get_running_loop().run_in_executor(None, read)
    while words not in "".join(site.log):
        if site.process.poll() is not None:
            raise SystemExit("load: the server did not start:\n" + "".join(site.log))
        await asyncio.sleep(0.1)


async def offer(site: Site, seconds: float | None = None) -> set[asyncio.Task[None]]:
    """Start clients at three times the rate of the server's capacity; those that are not yet done are returned."""
    drill, loop = site.drill, asyncio.get_running_loop()
    numbers, clients, random = iter(drill.numbers()), set[asyncio.Task[None]](), drill.draws(-1)
    due = start = loop.time()
    for number in numbers if seconds is None else iter(lambda: drill.done, -1):
        if drill.over or (seconds is not None and loop.time() - start > seconds):
            break
        task = asyncio.create_task(client(site, number))
        clients.add(task)
        task.add_done_callback(clients.discard)
        drill.done += 1
        due += random.expovariate(TIMES * site.rate)
        await asyncio.sleep(max(0.0, due - loop.time()))
        due = max(due, loop.time() - 1.0)  # what this machine cannot offer is not made up for
    return clients


async def client(site: Site, number: int) -> None:
    """One client of a kind that is drawn."""
    random = site.drill.draws(number)
    (kind,) = random.choices([*KINDS], [weight for weight, _ in KINDS.values()])
    began = time.monotonic()
    try:
        outcome = await asyncio.wait_for(KINDS[kind][1](site, random), PATIENCE)
    except TimeoutError:
        outcome = "LOST: no answer"
    except (OSError, EOFError) as error:
        outcome = f"LOST: {type(error).__name__} {error}"
    if outcome.startswith("LOST") and time.monotonic() > site.ending and began > site.ending - 1:
        outcome = "came too late"  # it was told to end before
    site.seen[f"{kind}: {outcome}"] += 1
    if outcome.isupper() or outcome.startswith(("LOST", "WRONG")):
        site.drill.fault(number, f"{kind}: {outcome}")
    else:
        site.drill.count(outcome)


# What clients send


async def connect(site: Site, small: bool = False) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection of its own."""
    return await asyncio.open_connection("127.0.0.1", site.port, limit=4096 if small else 2**20)


def post(path: str, body: bytes, kind: str = "image/jpeg", extra: str = "") -> bytes:
    """A request."""
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
    return head.encode() + body


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    """Status and body of an answer, and whether the connection ends with it."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int((re.findall(rb"content-length: (\d+)", head) or [b"0"])[0])
    return int(head[9:12]), await reader.readexactly(length), b"connection: close" in head.lower()


async def leave(writer: asyncio.StreamWriter, hard: bool = False) -> None:
    """Close, or reset."""
    if hard:
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(1, 13, linger)  # SOL_SOCKET, SO_LINGER
        writer.transport.abort()
    writer.close()


async def exchange(site: Site, request: bytes, *, fresh: bool = False) -> tuple[int, bytes]:
    """One request and its answer, over a connection that was used before if there is one."""
    while True:
        used = bool(site.idle) and not fresh
        reader, writer = site.idle.pop() if used else await connect(site)
        try:
            writer.write(request)
            await writer.drain()
            status, body, closes = await answer(reader)
        except (OSError, EOFError):
            await leave(writer)
            if used:  # it was closed meanwhile: every client asks again then
                continue
            raise
        if closes or fresh or len(site.idle) > 100:
            await leave(writer)
        else:
            site.idle.append((reader, writer))
        return status, body


def named(status: int, right: bool = True) -> str:
    """What became of a request about photos."""
    if status == 200:
        return "answered" if right else "WRONG ANSWER"
    return "told to come again" if status in (429, 503) else f"WRONG STATUS {status}"


async def ask(site: Site, random: random.Random) -> str:
    """A photo, as curl --data-binary sends it."""
    name = random.choice([*site.photos])
    status, body = await exchange(site, post("/predict", site.photos[name]), fresh=random.random() < 0.2)
    return named(status, status != 200 or site.right(name, json.loads(body)))


async def ask_several(site: Site, random: random.Random) -> str:
    """Two to five photos in a form."""
    names = random.choices([*site.photos], k=random.randint(2, 5))
    parts = [
        b'--EDGE\r\ncontent-disposition: form-data; name="file"; filename="x"\r\n\r\n' + site.photos[name] + b"\r\n"
        for name in names
    ]
    status, body = await exchange(
        site, post("/predict", b"".join(parts) + b"--EDGE--\r\n", "multipart/form-data; boundary=EDGE")
    )
    shown = json.loads(body).get("images", ())
    right = len(shown) == len(names) and all(map(site.right, names, shown))
    return named(status, status != 200 or right)


async def ask_kserve(site: Site, random: random.Random) -> str:
    """A photo by the protocol of KServe, as binary data."""
    name = random.choice([*site.photos])
    data = struct.pack("<I", len(site.photos[name])) + site.photos[name]
    tensor = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": len(data)}}
    head = json.dumps({"inputs": [tensor]}).encode()
    extra = f"inference-header-content-length: {len(head)}\r\n"
    status, body = await exchange(site, post("/v2/models/net/infer", head + data, "application/octet-stream", extra))
    if status != 200:
        return named(status)
    outputs = {each["name"]: each["data"] for each in json.loads(body)["outputs"]}
    shown = {"predictions": [{"label": outputs["label"][0], "probability": outputs["probability"][0]}]}
    return named(status, site.right(name, shown))


async def ask_slowly(site: Site, random: random.Random) -> str:
    """A photo that comes in ten pieces over seconds."""
    name, pause = random.choice([*site.photos]), random.uniform(0.02, 0.3)
    request = post("/predict", site.photos[name])
    reader, writer = await connect(site)
    step = len(request) // 10 + 1
    for start in range(0, len(request), step):
        writer.write(request[start : start + step])
        await writer.drain()
        await asyncio.sleep(pause)
    status, body, _ = await answer(reader)
    await leave(writer)
    return named(status, status != 200 or site.right(name, json.loads(body)))


async def cancel(site: Site, random: random.Random) -> str:
    """A photo that nobody waits for any more, or half of one."""
    request = post("/predict", site.photos[random.choice([*site.photos])])
    _, writer = await connect(site)
    writer.write(request[: random.choice((len(request), random.randrange(1, len(request))))])
    await asyncio.sleep(random.uniform(0.0, 0.05))
    await leave(writer, hard=random.random() < 0.5)
    return "left before an answer"


async def fall_silent(site: Site, random: random.Random) -> str:
    """Nothing, or a part of a head, or of a body, and then silence: the server must close, and keep its place free."""
    if site.silent >= SILENT:
        return "left before an answer"
    request = post("/predict", site.photos["photo0"])
    sent = request[: random.choice((0, 20, request.index(b"\r\n\r\n") + 2, len(request) // 2))]
    reader, writer = await connect(site)
    site.silent += 1
    try:
        writer.write(sent)
        while time.monotonic() < site.ending and not site.drill.over and site.drill.done < site.drill.tries:
            try:
                await asyncio.wait_for(reader.read(1000), 1.0)
            except TimeoutError:
                continue
            return "silent, and closed by the server"
        return "silent to the end"
    finally:
        site.silent -= 1
        await leave(writer)


async def send_too_much(site: Site, random: random.Random) -> str:
    """More than a body may have: by its length, or in chunks that do not say so."""
    reader, writer = await connect(site)
    if random.random() < 0.5:
        writer.write(post("/predict", b"x").replace(b"length: 1", b"length: 30000000"))
    else:
        writer.write(b"POST /predict HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        for _ in range(MOST // 50_000 + 2):
            writer.write(b"c350\r\n" + bytes(50_000) + b"\r\n")
            await writer.drain()
    status, _, _ = await answer(reader)
    await leave(writer)
    return "refused as too large" if status == 413 else named(status, right=False)


async def send_endless_head(site: Site, random: random.Random) -> str:
    """A head that never ends: one header without an end, or ever more of them."""
    piece = b"x" * 4096 if random.random() < 0.5 else b"name: value\r\n" * 300
    reader, writer = await connect(site)
    writer.write(b"GET / HTTP/1.1\r\nfirst: ")
    try:
        for _ in range(2000):  # 8 MB
            writer.write(piece)
            await writer.drain()
            if reader.at_eof():
                break
        else:
            return "WRONG: 8 MB of a head were taken"
    except OSError:
        pass
    await leave(writer)
    return "refused as no request"


async def send_noise(site: Site, random: random.Random) -> str:
    """What is not HTTP."""
    reader, writer = await connect(site)
    writer.write(random.randbytes(random.randint(4, 300)) + b"\r\n\r\n")
    try:
        status = (await asyncio.wait_for(answer(reader), 5))[0]
    except (OSError, EOFError, TimeoutError):
        status = 400
    await leave(writer)
    return "refused as no request" if status == 400 else f"WRONG STATUS {status}"


async def send_no_photo(site: Site, random: random.Random) -> str:
    """A photo that was cut short, or noise."""
    whole = site.photos[random.choice([*site.photos])]
    body = random.choice((whole[: len(whole) // 2], random.randbytes(500), b""))
    status, _ = await exchange(site, post("/predict", body))
    return "refused as no photo" if status == 422 else named(status, right=False)


async def never_read(site: Site, random: random.Random) -> str:
    """Asks for pages over and over, and reads none of them."""
    _, writer = await connect(site, small=True)
    request = b"GET /docs HTTP/1.1\r\nhost: x\r\n\r\n"
    try:
        for _ in range(random.randint(50, 400)):
            writer.write(request)
            await asyncio.wait_for(writer.drain(), 1)
        await asyncio.sleep(random.uniform(0, 10))
    except (OSError, TimeoutError):
        pass
    await leave(writer, hard=True)
    return "never read its answers"


async def look(site: Site, random: random.Random) -> str:
    """What a load balancer and Prometheus ask for."""
    path = random.choice(("/metrics", "/v2/health/live", "/v2/health/ready", "/", "/v2/models/net"))
    status, _ = await exchange(site, f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    return "looked after" if status == 200 or "ready" in path else f"WRONG STATUS {status}"


KINDS: dict[str, tuple[float, Callable[[Site, random.Random], Awaitable[str]]]] = {
    "ask": (60, ask),
    "ask_several": (5, ask_several),
    "ask_kserve": (8, ask_kserve),
    "ask_slowly": (5, ask_slowly),
    "cancel": (10, cancel),
    "fall_silent": (2, fall_silent),
    "send_too_much": (1, send_too_much),
    "send_endless_head": (0.1, send_endless_head),
    "send_noise": (1, send_noise),
    "send_no_photo": (4, send_no_photo),
    "never_read": (0.5, never_read),
    "look": (3, look),
}


# What happens around them


async def replace_bundles(site: Site) -> None:
    """Now and then put another bundle in place, or half of one, and tell the server."""
    random, served = site.drill.draws(-2), site.folder / "served"
    for number in range(1_000_000):
        await asyncio.sleep(SWAP if site.drill.minutes > 1 else 2.0)
        new, old = site.folder / f"new{number}", site.folder / f"old{number}"
        shutil.copytree(site.folder / ("first", "second")[number % 2], new)
        if random.random() < 0.25:
            weights = new / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[: random.randrange(1, weights.stat().st_size)])
        served.replace(old)
        new.replace(served)
        shutil.rmtree(old)
        site.process.send_signal(signal.SIGHUP)


async def watch(site: Site) -> None:
    """Note the server's memory, descriptors and threads every second, and its capacity, if that is more now."""
    folder, answered = Path(f"/proc/{site.process.pid}"), deque([0], 10)
    while True:
        answered.append(site.drill.counts.get("answered", 0))
        site.rate = max(site.rate, (answered[-1] - answered[0]) / 10)
        try:
            pages = int((folder / "statm").read_text().split()[1])
            here = len([*(folder / "fd").iterdir()]), len([*(folder / "task").iterdir()])
        except OSError:
            return
        site.memory.append((time.monotonic(), pages * os.sysconf("SC_PAGE_SIZE"), *here))
        await asyncio.sleep(1.0)


async def settle(site: Site, clients: set[asyncio.Task[None]]) -> None:
    """Wait for the last answers: then no place is taken, and no image was answered twice or not at all."""
    await asyncio.gather(*clients)
    for _ in range(50):
        _, text = await exchange(site, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
        taken = re.findall(rb'^effnet_places_taken{model="net"} (\S+)', text, re.MULTILINE)
        if float(taken[0]) == 0:
            break
        await asyncio.sleep(0.2)
    else:
        site.drill.fault(-1, f"{taken[0].decode()} places are still taken, and nobody waits")
    statuses = re.findall(rb'^effnet_requests_total{endpoint="(\w+)",status="(\d+)"} (\S+)', text, re.MULTILINE)
    given = sum(float(count) for _, status, count in statuses if status == b"200")
    asked = site.drill.counts.get("answered", 0)
    gone = site.drill.counts.get("left before an answer", 0)
    if not asked <= given <= asked + gone:
        site.drill.fault(-1, f"it counts {given:.0f} answers, and {asked} came; {gone} clients had left")
    for status in (b"500",):
        if broken := sum(float(count) for _, each, count in statuses if each == status):
            site.drill.fault(-1, f"it answered {broken:.0f} times with {status.decode()}")


async def end(site: Site, clients: set[asyncio.Task[None]]) -> None:
    """Send SIGTERM while clients ask; those who asked before are answered."""
    site.ending = time.monotonic()
    site.process.send_signal(signal.SIGTERM)
    if site.drill.only is None:
        clients |= await offer(site, seconds=GRACE)
    await asyncio.gather(*clients)
    try:
        code = await asyncio.to_thread(site.process.wait, PATIENCE)
    except subprocess.TimeoutExpired:
        site.drill.fault(-1, f"it runs {PATIENCE:.0f} s after SIGTERM")
        return
    if code:
        site.drill.fault(-1, f"its exit code after SIGTERM is {code}")


def judge(site: Site) -> None:
    """What the server said, and whether it grew."""
    said = "".join(site.log)
    for line in site.log:
        known = ("net", "Opening", "Serving", "Next:", "Invalid HTTP request received.", "the head")
        if not line.startswith(known):
            site.drill.fault(-1, f"it says: {line.strip()}")
            break
    site.drill.counts["bundles replaced"] = said.count("was reloaded")
    site.drill.counts["damaged bundles refused"] = said.count("was not reloaded")
    whole = [each for each in site.memory if each[0] <= site.ending]
    quarter = len(whole) // 4
    if quarter < 10:  # seconds: too short to say
        return
    for place, name, allowed in ((1, "bytes of memory", GROWN), (2, "descriptors", 50), (3, "threads", 10)):
        early, late = (
            statistics.median(row[place] for row in rows) for rows in (whole[quarter : 2 * quarter], whole[-quarter:])
        )
        most = max(row[place] for row in whole)
        print(f"load: {name}: {early:,.0f} in the second quarter, {late:,.0f} in the last, {most:,} at most")
        if late > early + allowed:
            site.drill.fault(-1, f"it grew from {early:,.0f} to {late:,.0f} {name}")
    for key, value in sorted(site.seen.items()):
        print(f"load: {value:9,} {key}")


if __name__ == "__main__":
    sys.exit(main())

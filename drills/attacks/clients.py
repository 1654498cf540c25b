"""The kinds of clients of the load drill: what each sends, and the outcome."""

from __future__ import annotations

import asyncio
import json
import random
import re
import socket
import struct
import subprocess
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verdict import Drill

MOST = 1_000_000  # bytes of a body, at most
SILENT = 40  # silent clients at once

Answers = dict[str, tuple[str, float]]  # photo -> label and probability


@dataclass
class Site:
    """The server, its known answers, and what was observed."""

    drill: Drill
    process: subprocess.Popen[str]
    folder: Path
    photos: dict[str, bytes]
    known: dict[str, Answers]  # by bundle
    log: list[str] = field(default_factory=list)
    port: int = 0
    rate: float = 0.0
    ending: float = float("inf")
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)
    seen: Counter[str] = field(default_factory=Counter)
    silent: int = 0
    memory: list[tuple[float, int, int, int]] = field(default_factory=list)

    def right(self, photo: str, shown: dict[str, Any]) -> bool:
        """Whether this is the answer of one of the bundles."""
        label, share = best_of(shown)
        return any(each[photo][0] == label and abs(each[photo][1] - share) < 2e-3 for each in self.known.values())


def best_of(shown: dict[str, Any]) -> tuple[str, float]:
    """Label and probability of the best class of an answer."""
    return str(shown["predictions"][0]["label"]), float(shown["predictions"][0]["probability"])


async def connect(site: Site, small: bool = False) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a new connection."""
    return await asyncio.open_connection("127.0.0.1", site.port, limit=4096 if small else 2**20)


def post(path: str, body: bytes, kind: str = "image/jpeg", extra: str = "") -> bytes:
    """A request."""
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n{extra}\r\n"
    return head.encode() + body


async def answer(reader: asyncio.StreamReader) -> tuple[int, bytes, bool]:
    """Status and body of an answer, and whether the server then closes the connection."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int((re.findall(rb"content-length: (\d+)", head) or [b"0"])[0])
    return int(head[9:12]), await reader.readexactly(length), b"connection: close" in head.lower()


async def leave(writer: asyncio.StreamWriter, hard: bool = False) -> None:
    """Close, or reset."""
    if hard:
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()
    writer.close()


async def exchange(site: Site, request: bytes, *, fresh: bool = False) -> tuple[int, bytes]:
    """Send a request and return its answer, over a used connection if there is one."""
    while True:
        used = bool(site.idle) and not fresh
        reader, writer = site.idle.pop() if used else await connect(site)
        try:
            writer.write(request)
            await writer.drain()
            status, body, closes = await answer(reader)
        except (OSError, EOFError):
            await leave(writer)
            if used:  # closed in the meantime; every client retries then
                continue
            raise
        if closes or fresh or len(site.idle) > 100:
            await leave(writer)
        else:
            site.idle.append((reader, writer))
        return status, body


def named(status: int, right: bool = True) -> str:
    """The outcome of a request with photos, in words."""
    if status == 200:
        return "answered" if right else "WRONG ANSWER"
    return "told to come again" if status in (429, 503) else f"WRONG STATUS {status}"


async def ask(site: Site, random: random.Random) -> str:
    """Send a photo as curl --data-binary does."""
    name = random.choice([*site.photos])
    status, body = await exchange(site, post("/predict", site.photos[name]), fresh=random.random() < 0.2)
    return named(status, status != 200 or site.right(name, json.loads(body)))


async def ask_several(site: Site, random: random.Random) -> str:
    """Send two to five photos in a form."""
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
    """Send a photo by the KServe protocol, as binary data."""
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
    """Send a photo in ten pieces over several seconds."""
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
    """Send a photo, or half of one, and disconnect without waiting."""
    request = post("/predict", site.photos[random.choice([*site.photos])])
    _, writer = await connect(site)
    writer.write(request[: random.choice((len(request), random.randrange(1, len(request))))])
    await asyncio.sleep(random.uniform(0.0, 0.05))
    await leave(writer, hard=random.random() < 0.5)
    return "left before an answer"


async def fall_silent(site: Site, random: random.Random) -> str:
    """Send nothing, or part of a head or body, then stall: the server must close, and not reserve a place."""
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
    """Send too large a body, by its content length or in chunks."""
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
    """Send a head that never ends: one endless header, or endlessly many."""
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
    """Send something that is not HTTP."""
    reader, writer = await connect(site)
    writer.write(random.randbytes(random.randint(4, 300)) + b"\r\n\r\n")
    try:
        status = (await asyncio.wait_for(answer(reader), 5))[0]
    except (OSError, EOFError, TimeoutError):
        status = 400
    await leave(writer)
    return "refused as no request" if status == 400 else f"WRONG STATUS {status}"


async def send_no_photo(site: Site, random: random.Random) -> str:
    """Send a truncated photo, or noise."""
    whole = site.photos[random.choice([*site.photos])]
    body = random.choice((whole[: len(whole) // 2], random.randbytes(500), b""))
    status, _ = await exchange(site, post("/predict", body))
    return "refused as no photo" if status == 422 else named(status, right=False)


async def never_read(site: Site, random: random.Random) -> str:
    """Request pages over and over without reading the answers."""
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
    """Request what a load balancer and Prometheus do."""
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

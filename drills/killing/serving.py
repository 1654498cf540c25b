"""A server that is killed while clients use it, and restarted on the same port."""

from __future__ import annotations

import http.client
import json
import os
import queue
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from killing.processes import HANG, NEVER, Aim, Running

CLIENTS = 4
ROUNDS = 3  # times that every photo is sent


def free_port(draws: random.Random) -> int:
    """A free port below the ephemeral ports, or else a client could connect to itself."""
    while True:
        port = draws.randrange(20_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def attack_server(
    draws: random.Random,
    kills: int,
    start: Callable[[list[str], Aim], Running],
    shared: Path,
    place: Path,
    *,
    slow: bool,
) -> Iterator[str | None]:
    """Kill a server `kills` times while photos are sent; yields None for each kill, and a line for each fault."""
    port = free_port(draws)
    words = [
        "serve",
        str(shared / "new"),
        "--port",
        str(port),
        "--engine",
        "native",
        "--threads",
        "1",
        "--grace",
        "10ms",
    ]
    photos = sorted((shared / "shapes").rglob("*.png"))
    answers = place / "answers.jsonl"
    clients = os.fork()
    if not clients:
        _ask_for_all(port, photos, answers)
    try:
        for _ in range(kills):
            server = start(words, NEVER)
            if draws.random() < 0.8:  # the other kills come while it starts
                yield from _wait_until_ready(port, server)
            time.sleep(draws.random() * (3 if slow else 0.4))
            if draws.random() < 0.3:
                os.kill(server.pids[0], signal.SIGHUP if _ready(port) else 0)
                time.sleep(draws.random() * 0.1)
            server.kill()
            if server.wait() is not None:
                yield f"serve ended by itself: {server.tail()}"
            yield None
        server = start(words, NEVER)
        end = time.monotonic() + HANG
        while not os.waitpid(clients, os.WNOHANG)[0]:
            if server.poll() or time.monotonic() > end:
                os.kill(clients, signal.SIGKILL)
                os.waitpid(clients, 0)
                yield f"serve did not answer all: {server.tail()}"
                break
            time.sleep(0.01)
        yield from _wait_until_ready(port, server)
        if not server.poll():
            os.kill(server.pids[0], signal.SIGTERM)
        if (code := server.wait()) != 0:
            yield f"serve ended with {code} after SIGTERM: {server.tail()}"
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(clients, signal.SIGKILL)
            os.waitpid(clients, 0)
    yield from _judge(answers, photos)


def _judge(answers: Path, photos: list[Path]) -> Iterator[str]:
    """Check that every photo got an answer each time, and always the same one."""
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    for photo in photos:
        own = [line for line in lines if line["photo"] == photo.name and line["class"] == photo.parent.name]
        if len(own) != ROUNDS:
            yield f"{photo.name} got {len(own)} answers and not {ROUNDS}"
        if len({json.dumps(line["answer"]) for line in own}) != 1:
            yield f"{photo.name} got different answers"
    if wrong := [line for line in lines if "predictions" not in line["answer"]]:
        yield f"an answer is {wrong[0]}"


def _ready(port: int) -> bool:
    try:
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG)
        client.request("GET", "/v2/health/ready")
        return client.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False


def _wait_until_ready(port: int, server: Running) -> Iterator[str]:
    end = time.monotonic() + HANG
    while not _ready(port):
        if server.poll() or time.monotonic() > end:
            yield f"serve did not start: {server.tail()}"
            return
        time.sleep(0.01)


def _ask_for_all(port: int, photos: list[Path], answers: Path) -> None:
    """Act as the clients: send each photo until it is answered, and end when all are."""
    open_questions: queue.Queue[Path] = queue.Queue()
    for photo in photos * ROUNDS:
        open_questions.put(photo)
    lock = threading.Lock()

    def ask() -> None:
        with suppress(queue.Empty):
            while True:
                photo = open_questions.get_nowait()
                line = {"photo": photo.name, "class": photo.parent.name, "answer": _insist(port, photo.read_bytes())}
                with lock, answers.open("a") as stream:
                    stream.write(json.dumps(line) + "\n")

    threads = [threading.Thread(target=ask) for _ in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os._exit(0)


def _insist(port: int, photo: bytes) -> Any:
    """The complete answer to a photo, retrying while the server is down."""
    while True:
        try:
            client = http.client.HTTPConnection("127.0.0.1", port, timeout=HANG)
            client.request("POST", "/predict", photo)
            response = client.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException):
            time.sleep(0.02)
            continue
        if response.status == 200:
            time.sleep(0.005)
            return json.loads(content)
        time.sleep(0.02)  # 429: too many at once; 503: loading or shutting down

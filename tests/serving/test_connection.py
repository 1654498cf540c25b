"""Clients that send nothing, send endlessly or do not read are cut off; those that are only slow are answered."""

from __future__ import annotations

import asyncio
import gc
import re
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import torch
import uvicorn
from served import photo
from uvicorn.server import ServerState

import effnet
from effnet.arch.spec import InputSpec
from effnet.serving.connection import Connection

IDLE = 1.0  # seconds
PROGRAM = f"import effnet.serving.connection as c; c.IDLE = {IDLE}; from effnet.__main__ import main; main()"
RED = photo("red")
POST = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(RED)}\r\n\r\n".encode() + RED


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, int]]:
    torch.manual_seed(0)
    network = effnet.EfficientNet(effnet.spec("b0", width=0.25, depth=0.4, resolution=32, num_classes=3))
    bundle = effnet.save(network, tmp_path_factory.mktemp("served") / "tiny", input=InputSpec(32, 40))
    command = [sys.executable, "-c", PROGRAM, "serve", str(bundle), "--port", "0", "--latency", "1s"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        said = ""
        while "Next:" not in said:
            line = server.stderr.readline()
            assert line, said
            said += line
        yield "127.0.0.1", int(re.findall(r"Serving at http://[\d.]+:(\d+)", said)[0])
        server.terminate()
        assert server.wait(60) == 0
        assert server.stderr.read() == ""  # malformed requests are not logged


def is_cut_off(client: socket.socket, piece: bytes, most: int) -> bool:
    """Whether the server ends the connection before it has taken so many bytes."""
    try:
        for _ in range(0, most, len(piece)):
            client.sendall(piece)
    except (ConnectionError, BrokenPipeError):
        return True
    return False


def test_silent_clients_are_cut_off(address: tuple[str, int]) -> None:
    with ExitStack() as stack:
        clients = []
        for sent in (b"", b"GET / HT", POST[:30], POST + POST[:30]):
            clients.append((sent, stack.enter_context(socket.create_connection(address, 60))))
            clients[-1][1].sendall(sent)
        for sent, client in clients:
            said = b""
            with suppress(ConnectionResetError):
                while more := client.recv(4096):
                    said += more
            assert said.count(b"HTTP/1.1 200") == sent.count(RED)


@pytest.mark.parametrize("piece", [b"x" * 4096, b"name: value\r\n" * 300], ids=["one header", "many"])
def test_an_endless_head_is_refused(address: tuple[str, int], piece: bytes) -> None:
    with socket.create_connection(address, 60) as client:
        client.sendall(b"GET / HTTP/1.1\r\nfirst: ")
        assert is_cut_off(client, piece, 100_000_000)


def test_a_client_who_reads_nothing_is_cut_off(address: tuple[str, int]) -> None:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(address)
        client.settimeout(60)  # seconds for a send that waits: it is cut off long before
        client.sendall(b"GET /coffee.png HTTP/1.1\r\nHost: x\r\n\r\n" * 20)  # 9 MB
        time.sleep(2 * IDLE)
        assert is_cut_off(client, b"GET /coffee.png HTTP/1.1\r\nHost: x\r\n\r\n", 100_000_000)


def test_a_slow_client_is_answered(address: tuple[str, int]) -> None:
    with socket.create_connection(address, 60) as client:
        for start in range(0, len(POST), len(POST) // 4 + 1):
            client.sendall(POST[start : start + len(POST) // 4 + 1])
            time.sleep(IDLE / 2)
        assert client.recv(4096).startswith(b"HTTP/1.1 200")


def test_nothing_is_kept_of_a_connection_that_was_reset() -> None:
    async def answer(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    config = uvicorn.Config(answer, log_config=None, timeout_keep_alive=1000)
    config.load()
    made: list[weakref.ref[Connection]] = []

    def connection() -> Connection:
        new = Connection(config=config, server_state=ServerState(), app_state={})
        made.append(weakref.ref(new))
        return new

    async def scene() -> None:
        server = await asyncio.get_running_loop().create_server(connection, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 204 " in await reader.readline()
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
        for _ in range(500):
            gc.collect()
            if made[0]() is None:
                break
            await asyncio.sleep(0.01)
        server.close()

    asyncio.run(scene())
    assert [each() for each in made] == [None]

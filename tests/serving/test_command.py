"""effnet serve as a process: it starts without torch, drains at SIGTERM, reloads at SIGHUP and explains what fails."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from served import photo, wait_until

import effnet
from effnet.arch.spec import InputSpec

COMMAND = "serve"
WITHOUT_TORCH = "import sys; sys.modules['torch'] = sys.modules['torchvision'] = None; "
PROGRAM = WITHOUT_TORCH + "from effnet.__main__ import main; main()"
TINY = effnet.spec("b0", width=0.25, depth=0.4, resolution=32, num_classes=3)
CLIENTS = 20


def write_bundle(folder: Path, classes: list[str]) -> Path:
    """A bundle that always answers with the first of its classes."""
    torch.manual_seed(0)
    network = effnet.EfficientNet(TINY)
    with torch.no_grad():
        network.classifier.bias.copy_(torch.tensor([50.0, 0.0, 0.0]))
    return effnet.save(network, folder, classes=classes, input=InputSpec(32, 40))


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "tiny", ["a", "b", "c"])


class Process:
    """A server in a process of its own, what it says, and a client."""

    def __init__(self, *words: object) -> None:
        command = [sys.executable, "-c", PROGRAM, COMMAND, *map(str, words), "--port", "0"]
        # By the rules, as a user has it; onnxruntime and OpenVINO may be the ones where nothing was compiled.
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.said = ""
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line

    def wait_for(self, words: str) -> None:
        wait_until(lambda: words in self.said or self.process.poll() is not None, 120)
        assert words in self.said, self.said

    @property
    def url(self) -> str:
        return re.findall(r"Serving at (\S+);", self.said)[0]

    def end(self) -> int:
        code = self.process.wait(60)
        self._thread.join(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code


@contextmanager
def running(*words: object) -> Iterator[Process]:
    server = Process(*words)
    try:
        server.wait_for("Next: ")
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
        server.end()


def refuses(host: str, port: int) -> bool:
    """Whether nothing listens there any more."""
    try:
        socket.create_connection((host, port), 30).close()
    except ConnectionRefusedError:
        return True
    return False


def keep_asking(url: str, done: Callable[[httpx.Client], bool], answers: list[httpx.Response | Exception]) -> None:
    """Ask until it is done; a busy server is asked again."""
    with httpx.Client(base_url=url, timeout=60, verify=False) as client:
        while not done(client):
            try:
                answer = client.post("/predict", content=photo("red"))
            except httpx.HTTPError as error:
                answers.append(error)
                return
            if answer.status_code == 429:
                time.sleep(0.05)
            else:
                answers.append(answer)


def test_sigterm_drains(bundle: Path) -> None:
    """Clients who go when it is not ready any more, as behind a load balancer, lose no answer and no connection."""
    with running(bundle, "--latency", "1s", "--grace", "600s") as server:
        answers: list[httpx.Response | Exception] = []
        gone = threading.Event()

        def done(client: httpx.Client) -> bool:
            return gone.is_set()

        clients = [threading.Thread(target=keep_asking, args=(server.url, done, answers)) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        wait_until(lambda: len(answers) > CLIENTS, 60)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(f"{server.url}/v2/health/ready").status_code == 503)
        before = len(answers)
        wait_until(lambda: len(answers) > before + CLIENTS, 60)  # it is not ready, but answers
        gone.set()
        for client in clients:
            client.join(60)
        server.process.send_signal(signal.SIGTERM)  # the second ends it at once
        assert server.end() == 0
        assert [answer for answer in answers if getattr(answer, "status_code", 0) != 200] == []


def test_sigterm_answers_what_is_in_flight(bundle: Path) -> None:
    with running(bundle, "--grace", "100ms") as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = photo("red")
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        with socket.create_connection((host, port), 60) as client:
            client.sendall(head + body[:20])
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: refuses(host, int(port)))
            client.sendall(body[20:])
            assert client.recv(4096).startswith(b"HTTP/1.1 200")
        assert server.end() == 0


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_sighup_reloads_and_refuses_what_is_broken(bundle: Path, tmp_path: Path) -> None:
    with running(f"mine={bundle}", "--latency", "1s") as server:
        answers: list[httpx.Response | Exception] = []
        end = threading.Event()
        asking = threading.Thread(target=keep_asking, args=(server.url, lambda client: end.is_set(), answers))
        asking.start()
        wait_until(lambda: answers, 60)
        shutil.rmtree(bundle)
        shutil.move(write_bundle(tmp_path / "new", ["x", "y", "z"]), bundle)
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("mine was reloaded")
        weights = bundle / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("mine was not reloaded")
        assert httpx.post(f"{server.url}/predict", content=photo("red")).json()["predictions"][0]["label"] == "x"
        end.set()
        asking.join(60)
        assert {getattr(answer, "status_code", answer) for answer in answers} == {200}
        labels = [answer.json()["predictions"][0]["label"] for answer in answers if isinstance(answer, httpx.Response)]
        assert sorted(set(labels)) == ["a", "x"]
        assert labels == sorted(labels)
        server.process.send_signal(signal.SIGINT)
        assert server.end() == 0


def test_answers_are_the_classifiers(bundle: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = effnet.save(effnet.EfficientNet(TINY), tmp_path / "other", input=InputSpec(32, 40))
    pictures = [photo(colour) for colour in ("red", "lime", "blue")]
    paths = []
    for number, picture in enumerate(pictures):
        paths.append(tmp_path / f"{number}.png")
        paths[-1].write_bytes(picture)
    expected = effnet.load(other, engine="torch", precision="fp32").predict(paths, topk=3)
    with running(other, "--precision", "fp32") as server:
        for picture, prediction in zip(pictures, expected, strict=True):
            found = httpx.post(f"{server.url}/predict?topk=3", content=picture).json()["predictions"]
            assert [each["index"] for each in found] == [score.index for score in prediction]
            np.testing.assert_allclose(
                [each["probability"] for each in found], [score.probability for score in prediction], rtol=1e-3
            )


def test_a_port_that_is_taken(run: Callable[..., tuple[int, str, str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = run("lite0", "--port", port)
    assert code == 2
    assert f"`port` (={port})" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ((), "models"),
        (("lite0", "--latency", "50"), "50ms"),
        (("lite0", "--max-upload", "20"), "20MB"),
        (("lite0", "--token", "ü"), "token"),
        (("lite0", "--host", "no.such.host.invalid"), "host"),
        (("lite0", "x=lite0", "lite0"), "NAME=MODEL"),
    ],
)
def test_what_is_typed_wrongly_is_named(
    run: Callable[..., tuple[int, str, str]], words: tuple[str, ...], part: str
) -> None:
    code, _, err = run(*words)
    assert code == 2
    assert part in err


def test_a_model_that_cannot_be_loaded_ends_it(tmp_path: Path) -> None:
    server = Process(tmp_path / "nothing")
    assert server.end() == 2
    assert "nothing" in server.said.splitlines()[-1]
    assert "Traceback" not in server.said


def test_a_token_comes_from_the_environment_too(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "EFFNET_TOKEN", "secret")
    with running(bundle, "--host", "0.0.0.0") as server:
        assert "secret" not in server.said
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        assert httpx.post(f"{url}/predict").status_code == 401
        known = {"Authorization": "Bearer secret"}
        assert httpx.post(f"{url}/predict", content=photo("red"), headers=known).status_code == 200
        server.process.send_signal(signal.SIGINT)
        assert server.end() == 0

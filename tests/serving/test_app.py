"""POST /predict and the other endpoints over HTTP, with an engine that knows colours."""

from __future__ import annotations

import math
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from served import LOGIT, Colours, Served, bomb, photo, serving, wait_until

from effnet.serving.admission import LEFT

RED = photo("red")
SURE = math.exp(LOGIT) / (math.exp(LOGIT) + 2)  # softmax of (5, 0, 0)


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(Colours()) as server:
        yield server


def test_a_photo_is_the_body(served: Served) -> None:
    answer = served.http.post("/predict?topk=2", content=RED)
    assert answer.status_code == 200
    best, second = answer.json()["predictions"]
    assert best == {"index": 0, "label": "red", "probability": pytest.approx(SURE)}
    assert second["label"] == "green"
    assert served.number("effnet_requests_total", endpoint="predict", status="200") == 1
    assert served.number("effnet_images_total", model="colours", result="answered") == 1


def test_several_photos_and_a_bad_one_costs_only_itself(served: Served) -> None:
    files = [("file", (f"{colour}.jpg", photo(colour, "JPEG"))) for colour in ("blue", "green")]
    files.insert(1, ("file", ("text.jpg", b"no photo")))
    answer = served.http.post("/predict?topk=1", files=files)
    assert answer.status_code == 200
    blue, text, green = answer.json()["images"]
    assert (blue["file"], blue["predictions"][0]["label"]) == ("blue.jpg", "blue")
    assert text["file"] == "text.jpg"
    assert "not an image" in text["error"]
    assert green["predictions"][0]["label"] == "green"
    assert served.number("effnet_images_total", model="colours", result="unreadable") == 1


def test_more_photos_than_places_are_answered(served: Served) -> None:
    served.catalogue.engine().batcher.pace.rate = 4 / 0.8
    files = [("file", (f"{n}.png", photo(("red", "lime", "blue")[n % 3]))) for n in range(30)]
    images = served.http.post("/predict", files=files).json()["images"]
    assert [image["predictions"][0]["label"] for image in images] == ["red", "green", "blue"] * 10


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"no photo", "not an image"),
        (b"", "empty"),
        (RED[:60], "damaged"),
        (bomb(), "10000 x 9000 pixels; at most 64,000,000"),
    ],
    ids=["text", "empty", "cut", "bomb"],
)
def test_what_is_no_photo_is_refused_with_the_reason(served: Served, body: bytes, words: str) -> None:
    answer = served.http.post("/predict", content=body)
    assert answer.status_code == 422
    assert words in answer.json()["error"]
    assert served.engine.batches == []


@pytest.mark.parametrize(
    ("query", "status", "words"),
    [("topk=0", 422, "topk"), ("topk=x", 422, "topk"), ("model=colour", 404, "Did you mean 'colours'")],
)
def test_wrong_arguments_are_named(served: Served, query: str, status: int, words: str) -> None:
    answer = served.http.post(f"/predict?{query}", content=RED)
    assert answer.status_code == status
    assert words in answer.json()["error"]


def test_a_form_without_a_file(served: Served) -> None:
    answer = served.http.post("/predict", files={"file": (None, "text")})
    assert (answer.status_code, answer.json()["error"]) == (422, "the form holds no file")


def test_a_model_is_chosen_by_name() -> None:
    with serving(Colours(), Colours(("rot", "grün", "blau"))) as served:
        for model, label in (("colours", "red"), ("colours1", "rot")):
            answer = served.http.post(f"/predict?model={model}", content=RED)
            assert answer.json()["predictions"][0]["label"] == label


def test_a_token_is_needed() -> None:
    with serving(Colours(), token="secret") as served:
        for shown in ({}, {"Authorization": "Bearer secre"}, {"Authorization": "Basic secret"}):
            for method, path in (("POST", "/predict"), ("GET", "/metrics"), ("GET", "/v2"), ("POST", "/predict/")):
                answer = served.http.request(method, path, headers=shown)
                assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer")
        known = {"Authorization": "Bearer secret"}
        assert served.http.post("/predict", content=RED, headers=known).status_code == 200
        assert served.http.get("/metrics", headers=known).status_code == 200
        for path in ("/", "/v2/health/ready", "/v2/health/live", "/docs"):
            assert served.http.get(f"{path}").status_code == 200


def announce(served: Served, length: int) -> str:
    """What a client is told that sends the head of a request and no body."""
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
    with socket.create_connection(served.url.removeprefix("http://").split(":"), 30) as client:
        client.sendall(head.encode())
        return client.recv(4096).decode().lower()


def test_too_large_with_and_without_a_length() -> None:
    with serving(Colours(), most=1000) as served:
        assert served.http.post("/predict", content=bytes(1001)).status_code == 413
        assert announce(served, 1001).startswith("http/1.1 413")
        sent = []

        def pieces() -> Iterator[bytes]:  # httpx sends chunks, so no Content-Length
            for _ in range(4):
                sent.append(1)
                yield bytes(400)

        answer = served.http.post("/predict", content=pieces())
        assert answer.status_code == 413
        assert "1,000 bytes" in answer.json()["error"]
        assert served.http.post("/predict", content=RED).status_code == 200


def test_a_full_server_refuses_before_it_reads() -> None:
    engine = Colours()
    with serving(engine, places=2) as served, ThreadPoolExecutor(2) as pool:
        engine.go.clear()
        inside = [pool.submit(served.http.post, "/predict", content=RED) for _ in range(2)]
        wait_until(lambda: served.taken == 2)
        said = announce(served, 1000)
        assert said.startswith("http/1.1 429")
        assert "retry-after: 1" in said
        engine.go.set()
        assert [each.result().status_code for each in inside] == [200, 200]
        assert served.http.post("/predict", content=RED).status_code == 200
        assert served.number("effnet_requests_total", endpoint="predict", status="429") == 1


def test_bodies_that_come_together_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients who were let in while little was held send more than may be: the last of them is told to come again."""
    monkeypatch.setattr("effnet.serving.admission.MOST_HELD", 1000)
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 900\r\n\r\n"
    with serving(Colours(), most=1000) as served:
        address = served.url.removeprefix("http://").split(":")
        with socket.create_connection(address, 30) as first, socket.create_connection(address, 30) as second:
            for client in (first, second):
                client.sendall(head)
            first.sendall(bytes(600))
            second.sendall(bytes(600))
            said = {}
            for _ in range(100):
                for client in (first, second):
                    with suppress(TimeoutError):
                        client.settimeout(0.2)
                        said[client] = client.recv(4096)
                if said:
                    break
            assert [text[:12] for text in said.values()] == [b"HTTP/1.1 429"]
        wait_until(lambda: served.number("effnet_requests_total", endpoint="predict", status=str(LEFT)) == 1)
        assert served.http.post("/predict", content=RED).status_code == 200  # what was held is free again


def test_a_form_needs_no_disk(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    answer = served.http.post("/predict", files=[("file", ("large.png", RED + bytes(2_000_000)))])
    assert answer.status_code == 200
    assert answer.json()["images"][0]["predictions"][0]["label"] == "red"


def test_loading_and_draining() -> None:
    loading = threading.Event()
    with serving(Colours(), loading=loading) as served:
        for path, method in (("/v2/health/ready", "GET"), ("/predict", "POST")):
            assert served.http.request(method, path).status_code == 503
        assert served.http.get("/v2/health/live").status_code == 200
        loading.set()
        wait_until(lambda: served.catalogue.state == "ready")
        assert served.http.get("/v2/health/ready").status_code == 200
        served.catalogue.state = "leaving"
        assert served.http.get("/v2/health/ready").status_code == 503
        answer = served.http.post("/predict", content=RED)
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        served.catalogue.state = "draining"
        answer = served.http.post("/predict", content=RED)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def test_a_client_who_leaves_is_forgotten() -> None:
    engine = Colours()
    with serving(engine) as served, ThreadPoolExecutor(1) as pool:
        engine.go.clear()
        first = pool.submit(served.http.post, "/predict", content=RED)
        wait_until(lambda: engine.batches)
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(RED)}\r\n\r\n"
        with socket.create_connection(served.url.removeprefix("http://").split(":"), 30) as client:
            client.sendall(head.encode() + RED)
            wait_until(lambda: served.taken == 2)
        wait_until(lambda: served.taken == 1)
        engine.go.set()
        assert first.result().status_code == 200
        assert engine.batches == [1]
        wait_until(lambda: served.number("effnet_requests_total", endpoint="predict", status=str(LEFT)) == 1)


def test_a_client_who_leaves_while_it_sends(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_connection(served.url.removeprefix("http://").split(":"), 30) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nabc")
    wait_until(lambda: served.number("effnet_requests_total", endpoint="predict", status=str(LEFT)) == 1)
    assert served.taken == 0
    assert caplog.text == ""


@pytest.mark.parametrize("kind", ["image/jpeg", "multipart/form-data; boundary=x"])
def test_a_body_that_does_not_come(served: Served, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("effnet.serving.exchange.PATIENCE", 0.1)
    head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: 1000\r\n\r\n--x\r\n"
    with socket.create_connection(served.url.removeprefix("http://").split(":"), 30) as client:
        client.sendall(head.encode())
        said = client.recv(4096).decode()
    assert said.startswith("HTTP/1.1 408")
    assert "the body did not arrive within" in said
    assert served.engine.batches == []
    assert served.http.post("/predict", content=RED).status_code == 200
    assert served.number("effnet_requests_total", endpoint="predict", status="408") == 1


def test_an_engine_that_fails(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    served.engine.fails = True
    answer = served.http.post("/predict", content=RED)
    assert answer.status_code == 500
    assert "ArithmeticError" in answer.json()["error"]
    assert answer.headers["connection"] == "close"  # or the client would lose what it asked next
    wait_until(lambda: "the engine failed" in caplog.text)  # is written after the answer
    served.engine.fails = False
    assert served.http.post("/predict", content=RED).status_code == 200
    assert served.taken == 0


def test_documentation_and_page_need_nothing_from_elsewhere(served: Served) -> None:
    for path in ("/", "/docs", "/page.js", "/page.css", "/coffee.png"):
        answer = served.http.get(path)
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        if path != "/coffee.png":
            assert "https:" not in answer.text
            assert "<style" not in answer.text
            assert "<script>" not in answer.text
    paths = served.http.get("/openapi.json").json()["paths"]
    assert {"/predict", "/metrics", "/v2/models/{name}/infer"} <= set(paths)
    page = served.http.get("/docs").text
    assert all(path in page for path in paths)
    assert served.http.get("/nowhere").json() == {"error": "Not Found"}


@pytest.mark.parametrize("origin", ["https://shop.example", "https://other.example"])
def test_other_pages_ask_only_where_it_is_allowed(served: Served, origin: str) -> None:
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    assert "access-control-allow-origin" not in served.http.options("/predict", headers=asked).headers
    with serving(Colours(), origins=["https://shop.example"]) as other:
        allowed = other.http.options("/predict", headers=asked).headers.get("access-control-allow-origin")
        assert allowed == (origin if "shop" in origin else None)
        answer = other.http.post("/predict", content=RED, headers={"Origin": origin})
        assert answer.headers.get("access-control-allow-origin") == allowed


def test_metrics(served: Served) -> None:
    served.http.post("/predict", content=RED)
    text = served.http.get("/metrics").text
    for line in (
        'effnet_requests_total{endpoint="predict",status="200"} 1.0',
        'effnet_batch_images_sum{model="colours"} 1.0',
        'effnet_queue_seconds_count{model="colours"} 1.0',
        'effnet_engine_seconds_count{model="colours"} 1.0',
        'effnet_images_total{model="colours",result="answered"} 1.0',
        'effnet_places{model="colours"} 100.0',
        'effnet_places_taken{model="colours"} 0.0',
    ):
        assert line in text.splitlines()


def test_who_comes_together_is_computed_together() -> None:
    engine = Colours()
    with serving(engine) as served, ThreadPoolExecutor(9) as pool:
        engine.go.clear()
        first = pool.submit(served.http.post, "/predict", content=RED)
        wait_until(lambda: engine.batches)
        rest = [pool.submit(served.http.post, "/predict", content=RED) for _ in range(8)]
        wait_until(lambda: served.taken == 9)
        engine.go.set()
        assert {each.result().status_code for each in (first, *rest)} == {200}
        assert sum(engine.batches) == 9
        assert 4 in engine.batches

"""KServe v2, with Triton's own client and by hand."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from served import SIZE, Colours, Served, photo, serving

FILES = {colour: photo(colour) for colour in ("red", "lime", "blue")}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(Colours()) as server:
        yield server


@pytest.fixture
def client(served: Served) -> Iterator[Any]:
    with triton.InferenceServerClient(served.url.removeprefix("http://")) as client:
        yield client


def call(served: Served, body: Any, **headers: str) -> httpx.Response:
    return served.http.post("/v2/models/colours/infer", json=body, headers=headers)


def image(*files: bytes, **changes: Any) -> dict[str, Any]:
    data = [base64.b64encode(file).decode() for file in files]
    return {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [len(files)], "data": data} | changes]}


def test_health_and_metadata(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("colours")
    assert not client.is_model_ready("other")
    assert client.get_server_metadata()["name"] == "effnet"
    assert [each["name"] for each in client.get_model_repository_index()] == ["colours"]
    model = client.get_model_metadata("colours")
    assert [(each["name"], each["datatype"]) for each in model["inputs"]] == [("image", "BYTES"), ("pixels", "UINT8")]
    assert model["inputs"][1]["shape"] == [-1, SIZE, SIZE, 3]
    assert model["outputs"][2] == {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]}


@pytest.mark.parametrize("binary", [True, False])
def test_files(client: Any, binary: bool) -> None:
    tensor = triton.InferInput("image", [3], "BYTES")
    # what JSON takes is text
    files = list(FILES.values()) if binary else [base64.b64encode(file) for file in FILES.values()]
    tensor.set_data_from_numpy(np.array(files, dtype=np.object_), binary_data=binary)
    names = "label", "probability", "probabilities"
    outputs = [triton.InferRequestedOutput(name, binary_data=binary) for name in names]
    answer = client.infer("colours", [tensor], outputs=outputs, request_id="7")
    labels = [label.decode() if isinstance(label, bytes) else label for label in answer.as_numpy("label")]
    assert labels == ["red", "green", "blue"]
    shares = answer.as_numpy("probabilities")
    assert shares.shape == (3, 3)
    np.testing.assert_allclose(shares.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(answer.as_numpy("probability"), shares.max(1))
    assert answer.get_response()["id"] == "7"


@pytest.mark.parametrize("binary", [True, False])
def test_pixels(client: Any, binary: bool) -> None:
    pixels = np.zeros((2, SIZE, SIZE, 3), np.uint8)
    pixels[0, ..., 1], pixels[1, ..., 2] = 200, 200
    tensor = triton.InferInput("pixels", list(pixels.shape), "UINT8")
    tensor.set_data_from_numpy(pixels, binary_data=binary)
    answer = client.infer("colours", [tensor])
    assert [label.decode() for label in answer.as_numpy("label")] == ["green", "blue"]
    assert [bytes(error) for error in answer.as_numpy("error")] == [b"", b""]


def test_a_bad_image_costs_only_itself(served: Served) -> None:
    outputs = {each["name"]: each for each in call(served, image(FILES["red"], b"no photo")).json()["outputs"]}
    assert outputs["label"]["data"] == ["red", ""]
    assert outputs["probability"]["data"][1] == 0
    assert outputs["error"]["data"][0] == ""
    assert "not an image" in outputs["error"]["data"][1]
    alone = call(served, image(b"no photo"))
    assert alone.status_code == 422
    assert "not an image" in alone.json()["error"]


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], "inputs"),
        ({"inputs": []}, "inputs"),
        (image(FILES["red"], data=["***"]), "base64"),
        (image(FILES["red"], data=[7]), "base64"),
        (image(FILES["red"], shape=[2]), "holds 1 images"),
        (image(FILES["red"], datatype="FP32"), "image BYTES or pixels UINT8"),
        (image(FILES["red"], parameters={"binary_data_size": 5}), "0 bytes follow"),
        ({"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1]}]}, "data' is missing"),
        ({"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1, 8, 8, 3], "data": []}]}, f"{SIZE}, {SIZE}"),
        ({"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1, SIZE, SIZE, 3], "data": [1]}]}, "reshape"),
        (
            {"inputs": [{"name": "pixels", "datatype": "UINT8", "shape": [1, SIZE, SIZE, 3], "data": [256]}]},
            "from 0 to 255",
        ),
        (image(FILES["red"]) | {"outputs": [{"name": "logits"}]}, "choose from label"),
    ],
)
def test_what_cannot_be_used_is_named(served: Served, body: Any, words: str) -> None:
    answer = call(served, body)
    assert answer.status_code == 400
    assert words in answer.json()["error"]


def test_damaged_requests(served: Served) -> None:
    url = "/v2/models/colours/infer"
    for text in (b"{", b"[" * 100_000):
        answer = served.http.post(url, content=text)
        assert (answer.status_code, "not JSON" in answer.json()["error"]) == (400, True)
    short = {"Inference-Header-Content-Length": "99"}
    assert served.http.post(url, content=b"{}", headers=short).status_code == 400
    head = b'{"inputs":[{"name":"image","datatype":"BYTES","shape":[1],"parameters":{"binary_data_size":8}}]}'
    cut = {"Inference-Header-Content-Length": str(len(head))}
    answer = served.http.post(url, content=head + b"\x09\0\0\0abcd", headers=cut)
    assert (answer.status_code, "cut short" in answer.json()["error"]) == (400, True)
    assert served.http.post(url.replace("colours", "other"), json=image(b"")).status_code == 404


def test_of_versions_there_is_one(served: Served) -> None:
    answer = served.http.post("/v2/models/colours/versions/1/infer", json=image(FILES["blue"]))
    assert answer.json()["outputs"][0]["data"] == ["blue"]

"""Other parts of an answer: unsure, unfamiliar, label sets, and the map with the part of the photo it covers."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from limits import SETS, familiarity
from PIL import Image
from served import Colours, Served, photo, serving

import effnet
from effnet.arch.spec import Calibration, FitMode, InputSpec
from effnet.data.image import load_pixels
from effnet.serving.engine import seen_part

# red has the logits 5, 0, 0: probability .987, energy 5.01; grey 5, 5, 5: a third each, 6.1
LIMITS = {
    "calibration": Calibration(1.0, 0.9, 0.05, 100, "val"),
    "sets": SETS,
    "familiarity": familiarity(8, 3, "energy", threshold=5.5),
}


@pytest.fixture
def served() -> Iterator[Served]:
    with serving(Colours(**LIMITS)) as server:
        yield server


@pytest.mark.parametrize(
    ("colour", "unsure", "unfamiliar", "labels"),
    [("red", False, True, ["red"]), ("grey", True, False, ["red", "green", "blue"])],
)
def test_doubts_and_sets(served: Served, colour: str, unsure: bool, unfamiliar: bool, labels: list[str]) -> None:
    answer = served.http.post("/predict?sets=.9", content=photo(colour)).json()
    assert (answer["unsure"], answer["unfamiliar"], answer["labels"]) == (unsure, unfamiliar, labels)
    assert answer["familiarity"] == pytest.approx(5.0134 if colour == "red" else 5 + np.log(3), abs=1e-3)
    assert served.number("effnet_doubts_total", model="colours", kind="unsure") == unsure
    assert served.number("effnet_doubts_total", model="colours", kind="unfamiliar") == unfamiliar
    assert served.number("effnet_familiarity_sum", model="colours") == pytest.approx(answer["familiarity"])


def test_what_the_model_cannot_tell_is_left_out() -> None:
    with serving(Colours()) as served:
        assert list(served.http.post("/predict", content=photo("red")).json()) == ["predictions"]
        answer = served.http.post("/predict?sets=.9", content=photo("red"))
        assert (answer.status_code, "label sets" in answer.json()["error"]) == (422, True)
        names = [each["name"] for each in served.http.get("/v2/models/colours").json()["outputs"]]
        assert "unsure" not in names


def test_sets_that_cannot_be_promised(served: Served) -> None:
    answer = served.http.post("/predict?sets=.999", content=photo("red"))
    assert (answer.status_code, "sets" in answer.json()["error"]) == (422, True)


def test_kserve_has_them_too(served: Served) -> None:
    data = [base64.b64encode(photo(colour)).decode() for colour in ("red", "grey")]
    call = {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [3], "data": [*data, ""]}]}
    outputs = served.http.post("/v2/models/colours/infer", json=call).json()["outputs"]
    found = {each["name"]: (each["datatype"], each["data"]) for each in outputs}
    assert found["unsure"] == ("BOOL", [False, True, True])  # what cannot be read is in doubt
    assert found["unfamiliar"] == ("BOOL", [True, False, True])
    names = [each["name"] for each in served.http.get("/v2/models/colours").json()["outputs"]]
    assert names == list(found)


def gradient(width: int, height: int) -> Image.Image:
    """A photo whose red says how far right a pixel is, and whose green how far down, as shares of 250."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray((250 * np.stack([x, y, 0 * x], 2)).round().astype(np.uint8))


@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300), (200, 200)])
@pytest.mark.parametrize("fit", ["crop", "squash", "pad"])
def test_the_part_that_is_seen(width: int, height: int, fit: FitMode) -> None:
    spec = InputSpec(100, 120 if fit == "crop" else 100, fit=fit)
    pixels = load_pixels(gradient(width, height), spec).astype(float)
    left, top, right, bottom = seen_part(width, height, spec)
    middle = pixels[50, 50, :2] / 250
    assert middle == pytest.approx([0.5, 0.5], abs=0.02)
    for axis, (low, high) in enumerate(((left, right), (top, bottom))):
        line = pixels[50, :, 0] if axis == 0 else pixels[:, 50, 1]
        for place in (30, 70):  # inside of any border
            assert line[place] / 250 == pytest.approx(low + (high - low) * (place + 0.5) / 100, abs=0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    spec = effnet.spec("b0", width=0.25, depth=0.4, resolution=64, num_classes=3)
    network = effnet.EfficientNet(spec)
    return effnet.save(network, tmp_path_factory.mktemp("x") / "m", classes=list("abc"), input=InputSpec(64, 80))


def test_where_it_looked(folder: Path) -> None:
    engine = Colours()
    engine.classifier = effnet.load(folder, precision="fp32")
    rotated = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # shown upright it is 200 x 300
    gradient(300, 200).save(rotated, "JPEG", exif=exif)
    expected = engine.classifier.explain(io.BytesIO(rotated.getvalue()))
    order = [score.label for score in engine.classifier.predict(io.BytesIO(rotated.getvalue()), topk=3)]
    with serving(engine) as served:
        asked = served.http.post("/predict?explain=true", content=rotated.getvalue()).json()["explanation"]
        assert (asked["class"], asked["versus"]) == (order[0], None)
        assert asked["logit"] == pytest.approx(expected.logit, rel=1e-4)
        assert asked["residual"] < 1e-5
        np.testing.assert_allclose(asked["map"], expected.map, rtol=1e-3, atol=1e-6)
        assert asked["box"] == pytest.approx(seen_part(200, 300, InputSpec(64, 80)))
        url = f"/predict?explain=true&versus={order[1]}"
        against = served.http.post(url, content=rotated.getvalue()).json()["explanation"]
        assert against["versus"] == order[1]
        assert np.sum(against["map"]) != pytest.approx(np.sum(asked["map"]))
        wrong: httpx.Response = served.http.post("/predict?explain=true&versus=d", content=rotated.getvalue())
        assert (wrong.status_code, "versus" in wrong.json()["error"]) == (422, True)
        broken, text = io.BytesIO(), b"\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0"  # as the orientation
        gradient(300, 200).save(broken, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + text)
        answer = served.http.post("/predict?explain=true", content=broken.getvalue())
        assert answer.json()["explanation"]["box"] == pytest.approx(seen_part(300, 200, InputSpec(64, 80)))
        assert served.taken == 0


def test_a_model_that_gives_only_logits(served: Served) -> None:
    answer = served.http.post("/predict?explain=true", content=photo("red"))
    assert (answer.status_code, "only logits" in answer.json()["error"]) == (422, True)

"""The Open Inference Protocol of KServe, version 2, over HTTP, with its extension for binary tensors.

    inputs    image   BYTES [n]          photo files; base64 in JSON
              pixels  UINT8 [n, s, s, C] prepared images, at the model's size
    outputs   label BYTES [n], probability FP32 [n], probabilities FP32 [n, K], error BYTES [n],
              unsure and unfamiliar BOOL [n] if the model can tell

A request has one of the inputs. A photo that cannot be read gets an empty label, probabilities of 0 and the reason in
`error`; if it is the only photo, the request fails with 422.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, HTTPException, Request, Response
from numpy.typing import NDArray
from starlette.responses import JSONResponse

from effnet.errors import ImageError
from effnet.files import parse_json
from effnet.runtime.prediction import probabilities
from effnet.runtime.session import Pixels
from effnet.serving.catalogue import Catalogue
from effnet.serving.engine import Engine, PredictOptions, Reply
from effnet.serving.exchange import ask, enter, read_body
from effnet.version import __version__

HEADER = "inference-header-content-length"
BASIC = {"label": "BYTES", "probability": "FP32", "probabilities": "FP32", "error": "BYTES"}
DOUBTS = {"unsure": "BOOL", "unfamiliar": "BOOL"}
TYPES = BASIC | DOUBTS

Tensor = list[str] | NDArray[np.float32] | NDArray[np.bool_]


def make_router(catalogue: Catalogue) -> APIRouter:
    """The routes below /v2."""
    router = APIRouter(prefix="/v2", tags=["KServe v2"])

    @router.get("/health/live")
    async def live() -> dict[str, bool]:
        """Whether the server runs."""
        return {"live": True}

    @router.get("/health/ready")
    async def ready() -> Response:
        """Whether the server takes requests: 503 while models are being loaded, and once it is told to end."""
        return JSONResponse({"ready": catalogue.state == "ready"}, 200 if catalogue.state == "ready" else 503)

    @router.get("")
    async def server() -> dict[str, Any]:
        """Name, version and extensions."""
        return {"name": "effnet", "version": __version__, "extensions": ["binary_tensor_data"]}

    @router.get("/models/{name}")
    @router.get("/models/{name}/versions/{version}", include_in_schema=False)
    async def model(name: str) -> dict[str, Any]:
        """Inputs and outputs of a model."""
        engine = catalogue.engine(name)
        size, channels = engine.classifier.input.size, engine.classifier.input.channels
        names = _outputs([], engine)
        shapes = {"probabilities": [-1, engine.classifier.spec.num_classes]}
        return {
            "name": name,
            "versions": ["1"],
            "platform": "effnet",
            "inputs": [
                {"name": "image", "datatype": "BYTES", "shape": [-1]},
                {"name": "pixels", "datatype": "UINT8", "shape": [-1, size, size, channels]},
            ],
            "outputs": [{"name": each, "datatype": TYPES[each], "shape": shapes.get(each, [-1])} for each in names],
        }

    @router.post("/repository/index")
    async def index() -> list[dict[str, str]]:
        """The models; the first one answers requests that name none."""
        return [{"name": name, "version": "1", "state": "READY"} for name in catalogue.engines]

    @router.get("/models/{name}/ready")
    @router.get("/models/{name}/versions/{version}/ready", include_in_schema=False)
    async def model_ready(name: str) -> Response:
        """Whether a model takes requests."""
        catalogue.engine(name)
        return await ready()

    @router.post("/models/{name}/infer", openapi_extra=_BODY)
    @router.post("/models/{name}/versions/{version}/infer", include_in_schema=False)
    async def infer(name: str, request: Request) -> Response:
        """Classify images: BYTES or uint8 pixels, in JSON or in the binary extension."""
        body = await read_body(request)
        length = request.headers.get(HEADER, str(len(body)))
        if not length.isdigit() or int(length) > len(body):
            raise HTTPException(400, f"{HEADER} (={length}) must be the JSON's length in bytes, at most {len(body)}.")
        with enter(catalogue, name) as engine:
            call, images = await asyncio.to_thread(_parse, body, int(length), engine)  # JSON may be large
            answers = await ask(request, engine, images, PredictOptions(topk=1))
        catalogue.counters.count(name, answers)
        if len(answers) == 1 and isinstance(answers[0], ImageError):
            raise HTTPException(422, f"the image {answers[0]}")
        return _respond(call, name, _outputs(answers, engine))

    return router


def _parse(body: bytes, length: int, engine: Engine) -> tuple[Mapping[str, Any], Sequence[bytes | Pixels]]:
    """Parse a request and its images."""
    call = _parse_json(body[:length])
    return call, _read_images(call, memoryview(body)[length:], engine)


def _parse_json(text: bytes) -> Mapping[str, Any]:
    try:
        call = parse_json(text)
    except ValueError as error:
        raise HTTPException(400, f"the request is not JSON: {error}") from error
    if not isinstance(call, dict) or not isinstance(call.get("inputs"), list) or len(call["inputs"]) != 1:
        raise HTTPException(400, "the request must be an object with `inputs`, a list of one tensor: image or pixels.")
    return call


def _read_images(call: Mapping[str, Any], binary: memoryview, engine: Engine) -> Sequence[bytes | Pixels]:
    """The images of a request, in order."""
    try:
        return _images_of(call["inputs"][0], binary, engine)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise HTTPException(400, f"the input cannot be used: {what}.") from error


def _images_of(tensor: Mapping[str, Any], binary: memoryview, engine: Engine) -> Sequence[bytes | Pixels]:
    name, kind, shape = tensor["name"], tensor["datatype"], [int(side) for side in tensor["shape"]]
    size = tensor.get("parameters", {}).get("binary_data_size")
    if size is None and binary:
        raise ValueError("bytes follow the JSON, but it has no binary_data_size")
    if size not in (None, len(binary)):
        raise ValueError(f"its binary_data_size is {size}, but {len(binary)} bytes follow the JSON")
    if (name, kind) == ("image", "BYTES"):
        photos = [_decode(text) for text in _flat(tensor["data"])] if size is None else _split(binary)
        if len(photos) != np.prod(shape):
            raise ValueError(f"its shape is {shape}, but it holds {len(photos)} images")
        return photos
    if (name, kind) == ("pixels", "UINT8"):
        side, channels = engine.classifier.input.size, engine.classifier.input.channels
        if len(shape) != 4 or shape[1:] != [side, side, channels]:
            raise ValueError(f"its shape is {shape}; it must be [n, {side}, {side}, {channels}]")
        values = _whole(tensor["data"]) if size is None else np.frombuffer(binary, np.uint8)
        return list(values.reshape(shape))
    raise ValueError(f"it is {name} {kind}; it must be image BYTES or pixels UINT8")


def _whole(data: Any) -> NDArray[np.uint8]:
    values = np.array(data)
    if values.dtype.kind not in "iu" or (values.size and (values.min() < 0 or values.max() > 255)):
        raise ValueError("its values must be whole numbers from 0 to 255")
    return values.astype(np.uint8)


def _flat(data: Any) -> list[Any]:
    """The elements of a possibly nested list."""
    return [each for row in data for each in (row if isinstance(row, list) else [row])]


def _decode(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise ValueError(f"bytes in JSON must be base64 ({error})") from error


def _split(binary: memoryview) -> list[bytes]:
    """The elements of a binary BYTES tensor: each after its length as 4 bytes, little-endian."""
    found, place = [], 0
    while place < len(binary):
        length = int.from_bytes(binary[place : place + 4], "little")
        found.append(bytes(binary[place + 4 : place + 4 + length]))
        place += 4 + length
    if place != len(binary):
        raise ValueError("its last image was cut short")
    return found


def _outputs(answers: Sequence[Reply | ImageError], engine: Engine) -> dict[str, Tensor]:
    classifier = engine.classifier
    temperature = classifier.calibration.temperature if classifier.calibration else 1.0
    shares = np.zeros((len(answers), classifier.spec.num_classes), np.float32)
    labels, errors = [""] * len(answers), [""] * len(answers)
    for row, answer in enumerate(answers):
        if isinstance(answer, ImageError):
            errors[row] = str(answer)
        else:
            labels[row] = answer.prediction.label
            shares[row] = probabilities(answer.logits[None], temperature)[0]
    found: dict[str, Tensor] = {"label": labels, "probability": shares.max(1), "probabilities": shares, "error": errors}
    for name, known in zip(DOUBTS, (classifier.calibration, classifier.familiarity), strict=True):
        if known is not None:
            flags = [getattr(answer.prediction, name) if isinstance(answer, Reply) else None for answer in answers]
            found[name] = np.array([flag is not False for flag in flags], bool)  # unreadable images are flagged
    return found


def _respond(call: Mapping[str, Any], name: str, values: Mapping[str, Tensor]) -> Response:
    """The response to a request, with tensors in the JSON or after it, as requested."""
    asked = call.get("outputs") or [{"name": each} for each in values]
    binary_by_default = (call.get("parameters") or {}).get("binary_data_output", False)
    described, tail = [], b""
    for output in asked:
        each = str(output.get("name"))
        if each not in values:
            raise HTTPException(400, f"the output {each} is not known; choose from {', '.join(values)}.")
        value = values[each]
        shape = [len(value)] if isinstance(value, list) else list(value.shape)
        tensor: dict[str, Any] = {"name": each, "datatype": TYPES[each], "shape": shape}
        if (output.get("parameters") or {}).get("binary_data", binary_by_default):
            data = b"".join(map(_prefixed, value)) if isinstance(value, list) else value.tobytes()
            tensor["parameters"] = {"binary_data_size": len(data)}
            tail += data
        else:
            tensor["data"] = value if isinstance(value, list) else value.ravel().tolist()
        described.append(tensor)
    answer = {"model_name": name, "model_version": "1", "outputs": described}
    if "id" in call:
        answer["id"] = call["id"]
    head = json.dumps(answer).encode()
    if not tail:
        return Response(head, media_type="application/json")
    return Response(head + tail, headers={HEADER: str(len(head))}, media_type="application/octet-stream")


def _prefixed(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data


_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {"type": "object", "required": ["inputs"]},
                "example": {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": ["<base64>"]}]},
            }
        },
    }
}

"""The application: POST /predict, the page, /docs and /metrics; KServe's routes are in kserve.py."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, HTMLResponse, JSONResponse

from effnet.data.image import PHOTOS
from effnet.errors import ArgumentError, EffnetError, ImageError, UnknownNameError
from effnet.serving import kserve
from effnet.serving.admission import LEFT, Admission
from effnet.serving.catalogue import Catalogue
from effnet.serving.engine import PredictOptions, Reply
from effnet.serving.exchange import ask, enter, read_photos
from effnet.version import __version__

PAGE = Path(__file__).with_name("page")
# No external resources and no inline scripts; photos are shown from blob: URLs.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
_IMAGE = {"type": "string", "format": "binary"}
_FILES = {"type": "object", "properties": {"file": {"type": "array", "items": _IMAGE}}}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"image/*": {"schema": _IMAGE}, "multipart/form-data": {"schema": _FILES}},
    }
}


def build_app(
    catalogue: Catalogue,
    *,
    token: str = "",
    most: int = 20_000_000,
    origins: Sequence[str] = (),
    lifespan: Callable[[FastAPI], Any] | None = None,
) -> Any:
    """Build the ASGI application.

    Args:
        catalogue: the models.
        token: the token that clients must send; "" for none.
        most: most bytes of a body.
        origins: origins of web pages that may send requests, such as "https://shop.example"; by default only its own.
        lifespan: FastAPI's lifespan context.
    """
    app = FastAPI(title="effnet serve", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.include_router(kserve.make_router(catalogue))
    _handle_errors(app)

    @app.post("/predict", openapi_extra=_BODY, tags=["effnet"])
    async def predict(
        request: Request,
        model: str = "",
        topk: Annotated[int, Query(ge=1)] = 5,
        sets: float | None = None,
        explain: bool = False,
        versus: str = "",
    ) -> Response:
        """Classify a photo (the body is the file), or several (multipart/form-data).

        `sets=.9` adds a set of labels that contains the true one that often; `explain=true` adds where the network
        looked, and `versus` names a class to compare the best one to.
        """
        names, photos = await read_photos(request)
        with enter(catalogue, model) as engine:
            answers = await ask(request, engine, photos, PredictOptions(topk, sets, explain, versus))
        catalogue.counters.count(model or catalogue.first, answers)
        shown = [_shown(answer) for answer in answers]
        failed = all(isinstance(answer, ImageError) for answer in answers)
        if names == [""]:
            return _json(shown[0], 422 if failed else 200)
        listed = [{"file": name, **each} for name, each in zip(names, shown, strict=True)]
        return _json({"images": listed}, 422 if failed else 200)

    @app.get("/metrics", tags=["effnet"])
    async def metrics() -> Response:
        """The server's metrics, for Prometheus."""
        return Response(catalogue.counters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(_documentation(app.openapi()), headers=HEADERS)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE / "index.html", headers=HEADERS)

    for file in (PAGE / "page.css", PAGE / "page.js", *sorted(PHOTOS.glob("*.png"))):
        app.add_api_route(f"/{file.name}", _sends(file), include_in_schema=False)
    guarded = Admission(app, catalogue, token, most)
    if not origins:
        return guarded
    return CORSMiddleware(
        guarded, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["authorization"]
    )


def _sends(file: Path) -> Callable[[], Any]:
    async def send() -> Response:
        return FileResponse(file, headers=HEADERS)

    return send


def _shown(answer: Reply | ImageError) -> dict[str, Any]:
    """An answer for JSON, without what the model cannot tell."""
    if isinstance(answer, ImageError):
        return {"error": str(answer)}
    explained = {} if answer.explanation is None else {"explanation": answer.explanation}
    return answer.prediction.to_dict() | explained


def _json(value: object, status: int) -> Response:
    return Response(json.dumps(value), status, media_type="application/json")


def _handle_errors(app: FastAPI) -> None:
    """Every error is {"error": reason}."""

    @app.exception_handler(HTTPException)
    async def known(_: Request, error: HTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        return JSONResponse({"error": f"{first['loc'][-1]} (={first['input']}): {first['msg']}"}, 422)

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=LEFT)

    @app.exception_handler(UnknownNameError)
    async def unknown(_: Request, error: UnknownNameError) -> Response:
        return JSONResponse({"error": str(error)}, 404)

    @app.exception_handler(ArgumentError)
    async def wrong(_: Request, error: ArgumentError) -> Response:
        return JSONResponse({"error": str(error)}, 422)

    @app.exception_handler(EffnetError)
    async def failed(_: Request, error: EffnetError) -> Response:
        return JSONResponse({"error": str(error)}, 500)

    @app.exception_handler(Exception)  # Starlette raises it again; uvicorn logs it and closes the connection
    async def broken(_: Request, error: Exception) -> Response:
        reason = f"unexpected {type(error).__name__}: see the server's log"
        return JSONResponse({"error": reason}, 500, {"connection": "close"})


def _documentation(schema: dict[str, Any]) -> str:
    """The API as a page without scripts; the OpenAPI schema itself is at /openapi.json."""
    rows = []
    for path, methods in schema["paths"].items():
        for method, operation in methods.items():
            names = [f"{each['name']} ({each['in']})" for each in operation.get("parameters", ())]
            kinds = operation.get("requestBody", {}).get("content", {})
            cells = f"{method.upper()} {path}", operation.get("description", ""), ", ".join(names), ", ".join(kinds)
            code, *others = map(html.escape, cells)
            rows.append(f"<tr><th scope=row><code>{code}</code>" + "".join(f"<td>{cell}" for cell in others))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>effnet serve: API</title>"
        "<meta name=viewport content='width=device-width'><link rel=stylesheet href=/page.css>"
        "<main class=docs><h1>effnet serve</h1><p>As OpenAPI: <a href=/openapi.json>/openapi.json</a>."
        "<pre>curl --data-binary @photo.jpg http://HOST/predict\ncurl -F file=@a.jpg -F file=@b.jpg http://HOST/predict"
        "</pre><table><thead><tr><th>Request<th>What it does<th>Parameters<th>Body<tbody>"
        + "\n".join(rows)
        + "</table></main></html>"
    )

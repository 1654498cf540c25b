"""A model on Ray Serve with batching: pip install effnet 'ray[serve]', then MODEL=lite0 serve run ray_serve:app."""

import io
import os

from ray import serve
from starlette.requests import Request

import effnet
from effnet.errors import ImageError


@serve.deployment(num_replicas=2, max_queued_requests=200)  # further requests get 503
class Photos:
    """One single-threaded engine per replica."""

    def __init__(self, model: str) -> None:
        self.classifier = effnet.load(model, threads=1)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.005)
    async def answer(self, photos: list[bytes]) -> list[dict]:
        """Classify a batch; an unreadable photo gets an error, the others get their predictions."""
        found = self.classifier.stream(map(io.BytesIO, photos))
        return [{"error": str(a)} if isinstance(a, ImageError) else a.to_dict() for _, a in found]

    async def __call__(self, request: Request) -> dict:
        """Classify the photo in the request body."""
        return await self.answer(await request.body())


app = Photos.bind(os.environ.get("MODEL", "lite0"))

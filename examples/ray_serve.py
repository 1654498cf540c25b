"""A model behind Ray Serve, in batches: pip install effnet 'ray[serve]', then MODEL=lite0 serve run ray_serve:app."""

import io
import os

from ray import serve
from starlette.requests import Request

import effnet
from effnet.errors import ImageError


@serve.deployment(num_replicas=2, max_queued_requests=200)  # beyond that, requests are answered with 503
class Photos:
    """One engine of one thread in each replica."""

    def __init__(self, model: str) -> None:
        self.classifier = effnet.load(model, threads=1)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.005)
    async def answer(self, photos: list[bytes]) -> list[dict]:
        """A photo that cannot be read gets its reason, and the others of the batch their answers."""
        found = self.classifier.stream(map(io.BytesIO, photos))
        return [{"error": str(a)} if isinstance(a, ImageError) else a.to_dict() for _, a in found]

    async def __call__(self, request: Request) -> dict:
        """The answer to a photo in the body."""
        return await self.answer(await request.body())


app = Photos.bind(os.environ.get("MODEL", "lite0"))

"""Engine: a classifier that reads photos in threads and answers in batches, at a pace that keeps the budget."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from effnet.data.image import identify, views
from effnet.data.paths import READERS
from effnet.errors import EffnetError, ImageError
from effnet.metrics.timing import time_turn
from effnet.runtime.classifier import Classifier, Prediction
from effnet.runtime.load import load
from effnet.runtime.session import Logits, Pixels
from effnet.serving.batcher import Batcher, Observer
from effnet.serving.pace import Pace, measure_pace

PIXEL_LIMIT = 64_000_000  # of a photo: 0.26 GB once decoded; the largest of phones that are not joined have 50 million


@dataclass(frozen=True)
class Wish:
    """What is to be said about an image."""

    topk: int = 5


@dataclass(frozen=True)
class Answer:
    """What the model says about an image."""

    prediction: Prediction
    logits: Logits  # (K,)


class Engine:
    """A classifier with its batcher. Belongs to one event loop.

    Args:
        classifier: what answers; closed with the engine.
        pace: how many images are computed together and let in.
        observe: told about each batch.
    """

    def __init__(self, classifier: Classifier, pace: Pace, observe: Observer) -> None:
        self.classifier = classifier
        self.batcher: Batcher[tuple[Pixels, Wish], Answer] = Batcher(self._compute, pace, observe)
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="read")

    async def answer(self, images: Sequence[bytes | Pixels], wish: Wish) -> list[Answer | ImageError]:
        """What is in each photo or prepared image; the caller has a place.

        Several images take half of the places that are free as well, so they neither wait for each other nor leave
        nothing to others.
        """
        answers: list[Any] = [None] * len(images)
        left = iter(range(len(images)))

        async def work() -> None:
            for index in left:
                try:
                    answers[index] = await self._answer_one(images[index], wish)
                except ImageError as error:
                    answers[index] = ImageError(*error.args)  # without its traceback, whose frames keep pixels

        with ExitStack() as places:
            free = (self.batcher.pace.places - self.batcher.taken) // 2
            workers = 1 + max(0, min(len(images) - 1, free))
            for _ in range(workers - 1):
                places.enter_context(self.batcher.place())
            if workers == 1:
                await work()
                return answers
            tasks = [asyncio.create_task(work()) for _ in range(workers)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
        return answers

    async def close(self) -> None:
        """Answer everyone who has a place, then release the classifier."""
        await self.batcher.close()
        self._readers.shutdown(cancel_futures=True)
        self.classifier.close()

    async def _answer_one(self, image: bytes | Pixels, wish: Wish) -> Answer:
        if isinstance(image, bytes):
            image = await asyncio.get_running_loop().run_in_executor(self._readers, self._read, image)
        return await self.batcher((image, wish))

    def _read(self, photo: bytes) -> Pixels:
        file = io.BytesIO(photo)
        width, height = identify(file).size  # from its first bytes: nothing is decoded yet
        if width * height > PIXEL_LIMIT:
            raise ImageError(f"has {width} x {height} pixels; at most {PIXEL_LIMIT:,} are served")
        try:
            return self.classifier._load(file)
        except ImageError:
            raise
        except EffnetError as error:  # a network whose images are not photos
            raise ImageError(str(error)) from error

    def _compute(self, batch: list[tuple[Pixels, Wish]]) -> list[Answer]:
        logits = self.classifier.logits(np.stack([pixels for pixels, _ in batch]))
        answers = []
        for row, (_, wish) in zip(logits, batch, strict=True):
            (prediction,) = self.classifier._name(row[None], wish.topk)
            answers.append(Answer(prediction, row))
        return answers


def open_engine(model: str, options: dict[str, Any], budget: float) -> tuple[Classifier, Pace]:
    """Load a MODEL and measure it, which takes seconds; for the errors see effnet.load."""
    classifier = load(model, **options)
    images = views(classifier.input, classifier.group)
    return classifier, measure_pace(
        budget, classifier.group, lambda n: time_turn(lambda: classifier.logits(images[:n]))
    )


def probabilities(classifier: Classifier, logits: Logits) -> NDArray[np.float32]:
    """(N, K), at the temperature of the classifier's calibration."""
    temperature = classifier.calibration.temperature if classifier.calibration else 1.0
    shifted = np.exp((logits.astype(np.float64) - logits.max(1, keepdims=True)) / temperature)
    shares: NDArray[np.float32] = (shifted / shifted.sum(1, keepdims=True)).astype(np.float32)
    return shares

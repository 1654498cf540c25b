"""Engine: a classifier that reads photos in threads and answers in batches, at a pace that keeps the latency budget."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from effnet.arch.spec import InputSpec
from effnet.data.image import QUARTERS, identify, turn_of, views
from effnet.data.paths import READERS
from effnet.errors import ArgumentError, EffnetError, ImageError
from effnet.metrics.timing import time_turn
from effnet.runtime.classifier import Classifier
from effnet.runtime.load import load
from effnet.runtime.prediction import Prediction
from effnet.runtime.session import Logits, Pixels
from effnet.serving.batcher import Batcher, Observer
from effnet.serving.pace import Pace, measure_pace

PIXEL_LIMIT = 64_000_000  # per photo: 0.26 GB decoded, 3 times that for 16 bits; phones have up to 50 million


@dataclass(frozen=True)
class PredictOptions:
    """The content of an answer.

    Attributes:
        topk: the number of classes.
        sets: how often the label set has to contain the true label; None for no set.
        explain: whether to add where the network looked.
        versus: the class to compare the best one to in the explanation; "" for none.
    """

    topk: int = 5
    sets: float | None = None
    explain: bool = False
    versus: str = ""


@dataclass(frozen=True)
class Reply:
    """The model's answer for an image."""

    prediction: Prediction
    logits: Logits  # (K,)
    explanation: dict[str, Any] | None = None  # for JSON


class Engine:
    """A classifier with its batcher. Belongs to one event loop.

    Args:
        classifier: the classifier, which is closed with the engine.
        pace: how many images are computed together and admitted.
        observe: called for each batch.
    """

    def __init__(self, classifier: Classifier, pace: Pace, observe: Observer) -> None:
        self.classifier = classifier
        self.batcher: Batcher[tuple[Pixels, PredictOptions], Reply] = Batcher(self._compute, pace, observe)
        threads = classifier.selection.backend.threads if classifier.selection else None
        self._readers = ThreadPoolExecutor(min(threads or READERS, READERS), thread_name_prefix="read")

    async def answer(self, images: Sequence[bytes | Pixels], options: PredictOptions) -> list[Reply | ImageError]:
        """The answer for each photo or prepared image; the caller must have a place.

        Several images also take half of the free places, so that they need not wait for each other, and others still
        find places.

        Raises:
            ArgumentError: the model does not support an option.
        """
        if options.sets is not None:
            self._check_sets(options.sets)
        answers: list[Any] = [None] * len(images)
        left = iter(range(len(images)))

        async def work() -> None:
            for index in left:
                try:
                    answers[index] = await self._answer_one(images[index], options)
                except ImageError as error:
                    answers[index] = ImageError(*error.args)  # without its traceback, whose frames keep pixels alive

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
        """Answer every caller with a place, then release the classifier."""
        await self.batcher.close()
        self._readers.shutdown(cancel_futures=True)
        self.classifier.close()

    async def _answer_one(self, image: bytes | Pixels, options: PredictOptions) -> Reply:
        loop = asyncio.get_running_loop()
        pixels = await loop.run_in_executor(self._readers, self._read, image) if isinstance(image, bytes) else image
        answer = await self.batcher((pixels, options))
        if options.explain and isinstance(image, bytes):
            explanation = await loop.run_in_executor(
                self._readers, self._explain, image, pixels, options.versus or None
            )
            return replace(answer, explanation=explanation)
        return answer

    def _read(self, photo: bytes) -> Pixels:
        file = io.BytesIO(photo)
        width, height = identify(file).size  # from its first bytes, before decoding
        if width * height > PIXEL_LIMIT:
            raise ImageError(f"has {width} x {height} pixels; at most {PIXEL_LIMIT:,} are served")
        try:
            return self.classifier.read(file)
        except ImageError:
            raise
        except EffnetError as error:  # a network whose inputs are not photos
            raise ImageError(str(error)) from error

    def _compute(self, batch: list[tuple[Pixels, PredictOptions]]) -> list[Reply]:
        logits, familiarity = self.classifier.answer(np.stack([pixels for pixels, _ in batch]))
        answers = []
        for row, (_, options) in enumerate(batch):
            own = slice(row, row + 1)
            known = None if familiarity is None else familiarity[own]
            (prediction,) = self.classifier.describe(logits[own], known, options.topk, options.sets)
            answers.append(Reply(prediction, logits[row]))
        return answers

    def _explain(self, photo: bytes, pixels: Pixels, versus: str | None) -> dict[str, Any]:
        (found,) = self.classifier.explain_pixels(pixels, (), versus)
        image = identify(io.BytesIO(photo))
        width, height = image.size[::-1] if turn_of(image) in QUARTERS else image.size
        return {
            "class": found.label,
            "versus": found.versus_label,
            "logit": found.logit,
            "residual": found.residual,
            "map": found.map.tolist(),
            "box": seen_part(width, height, self.classifier.input),
        }

    def _check_sets(self, coverage: float) -> None:
        if self.classifier.sets is None:
            raise ArgumentError(
                "sets", coverage, "needs label sets, which effnet train calibrates; this model has none."
            )
        self.classifier.sets.floor(coverage)


def open_engine(model: str, options: dict[str, Any], budget: float) -> tuple[Classifier, Pace]:
    """Load a MODEL and measure its pace, which takes seconds; for errors see effnet.load."""
    classifier = load(model, **options)
    images = views(classifier.input, classifier.group)
    return classifier, measure_pace(
        budget, classifier.group, lambda n: time_turn(lambda: classifier.answer(images[:n]))
    )


def seen_part(width: int, height: int, spec: InputSpec) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what the network sees, relative to an upright photo; a border lies outside."""
    if spec.fit == "squash":
        return 0.0, 0.0, 1.0, 1.0
    side = max(width, height) if spec.fit == "pad" else min(width, height) * spec.size / spec.resize
    across, down = side / width / 2, side / height / 2
    return 0.5 - across, 0.5 - down, 0.5 + across, 0.5 + down

"""The Prometheus metrics of GET /metrics."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest

from effnet.errors import ImageError
from effnet.serving.batcher import Observer
from effnet.serving.engine import Reply

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
IMAGES = (1, 2, 4, 8, 16, 32, 64)


class Counters:
    """The metrics of a server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        # 499: the client has disconnected
        self.requests = Counter("effnet_requests", "Requests by result", ("endpoint", "status"), registry=self.registry)
        self.seconds = self._histogram(
            "effnet_request_seconds", "From the first byte to the answer", "endpoint", SECONDS
        )
        self.batches = self._histogram("effnet_batch_images", "Images that were computed together", "model", IMAGES)
        self.waits = self._histogram("effnet_queue_seconds", "What an image waited for its batch", "model", SECONDS)
        self.engine = self._histogram("effnet_engine_seconds", "What computing a batch took", "model", SECONDS)
        self.images = Counter("effnet_images", "Images by result", ("model", "result"), registry=self.registry)
        self.doubts = Counter("effnet_doubts", "Unsure or unfamiliar", ("model", "kind"), registry=self.registry)
        self.familiarity = Summary("effnet_familiarity", "Scores of it", ("model",), registry=self.registry)
        self.reloads = Counter("effnet_reloads", "Reloads by result", ("model", "result"), registry=self.registry)
        self._taken = Gauge("effnet_places_taken", "Images in flight", ("model",), registry=self.registry)
        self._places = Gauge("effnet_places", "Images that may be in flight", ("model",), registry=self.registry)

    def text(self) -> bytes:
        """All metrics in Prometheus's format."""
        return generate_latest(self.registry)

    def observer(self, model: str) -> Observer:
        """A function that records a model's batches."""
        batches, waits, engine = (each.labels(model) for each in (self.batches, self.waits, self.engine))

        def observe(waited: Sequence[float], seconds: float) -> None:
            batches.observe(len(waited))
            engine.observe(seconds)
            for wait in waited:
                waits.observe(wait)

        return observe

    def follow(self, model: str, taken: Callable[[], float], places: Callable[[], float]) -> None:
        """Export a model's places."""
        self._taken.labels(model).set_function(taken)
        self._places.labels(model).set_function(places)

    def count(self, model: str, answers: Sequence[Reply | ImageError]) -> None:
        """Count the results of images."""
        for answer in answers:
            if isinstance(answer, ImageError):
                self.images.labels(model, "unreadable").inc()
                continue
            self.images.labels(model, "answered").inc()
            prediction = answer.prediction
            for kind, found in (("unsure", prediction.unsure), ("unfamiliar", prediction.unfamiliar)):
                if found is not None:
                    self.doubts.labels(model, kind).inc(found)
            if prediction.familiarity is not None:
                self.familiarity.labels(model).observe(prediction.familiarity)

    def _histogram(self, name: str, text: str, label: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, (label,), buckets=buckets, registry=self.registry)

"""Classifier: photos in, class names out, with any engine."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, cast, overload

import numpy as np
from numpy.typing import NDArray

from effnet.data.paths import READERS, read_ahead
from effnet.errors import ArgumentError, CheckpointError, ImageError, nearest
from effnet.fields import one_of, positive_int
from effnet.runtime.cam import Explanation, decompose
from effnet.runtime.options import Decode
from effnet.runtime.prediction import Prediction as Prediction
from effnet.runtime.prediction import Score as Score
from effnet.runtime.prediction import best_classes as best_classes
from effnet.runtime.prediction import probabilities
from effnet.runtime.session import Linear, Logits, Maps, Pixels, Session
from effnet.weights.bundle import BundleConfig

if TYPE_CHECKING:
    from PIL.Image import Image

    from effnet.models.efficientnet import EfficientNet
    from effnet.runtime.select import Selection

    Photo = str | os.PathLike[str] | BinaryIO | Image | NDArray[Any]

GROUP = 16  # images that are read and classified together, rounded down to whole batches of the engine, at least one
# Times its final size that a JPEG keeps when it is halved while it is decoded. At 2 the agreement of the best class
# fell by 1.0 points (-0.2 to 2.2) in benchmarks/drafts.py, at 4 it did not.
SPARE = 4.0
# Times its final size to which a photo is first averaged (data.image.fit_photo); 4000 x 3000 pixels, halved, still are.
# Of 220 views of 2000 x 1500 the same benchmark lost none to it and won 2; of 100 of 4000 x 3000, both lost and won 3.
GAP = 2.9


class Classifier:
    """A model with its preprocessing and class names. Thread-safe.

    Attributes:
        spec: the network as plain numbers.
        input: how images are prepared.
        classes: the names of the outputs, or None.
        calibration: the temperature of its probabilities and the confidence below which to abstain, or None.
        sets: the calibration of label sets, or None.
        familiarity: the detector of images unlike the training images, or None.
        network: the torch module; None with another engine.
        selection: the backend and the reason for it; None unless `load` chose it.
        group: the best batch size.
        decode: "fast": large JPEGs are halved while they are decoded, and photos resized within 5 levels of 255;
            "exact": decoded in full, and resized as torchvision does, bit for bit.

    `close`, or leaving a with statement, releases its engine.

    Args:
        session: a Session, or any function from pixels (N, size, size, C) uint8 to logits (N, K) float32.
        config: the network, how images are prepared, classes and calibration.
        network, selection, decode: see the attributes.
    """

    def __init__(
        self,
        session: Callable[[Pixels], Logits],
        config: BundleConfig,
        *,
        network: EfficientNet | None = None,
        selection: Selection | None = None,
        decode: Decode = "fast",
    ) -> None:
        one_of("decode", decode, Decode)
        self.spec, self.input = config.spec, config.input
        self.classes, self.calibration = config.classes, config.calibration
        self.sets, self.familiarity = config.sets, config.familiarity
        self.network, self.selection, self.decode = network, selection, decode
        batch = getattr(session, "batch", 1)
        self.group = batch * max(1, GROUP // batch)
        threads = selection.backend.threads if selection else None
        self._readers = READERS if threads is None else min(threads, READERS)
        self._session = session

    def __enter__(self) -> Classifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the engine with its threads and memory; a closed classifier raises ArgumentError for images."""
        getattr(self._session, "close", lambda: None)()

    def logits(self, images: Pixels) -> Logits:
        """The raw outputs (N, K) float32 of pixels (N, size, size, C) uint8 at `input.size`, not normalised.

        Raises:
            ArgumentError: another shape or dtype.
        """
        self._check(images)
        return self._session(images) if len(images) else np.empty((0, self.spec.num_classes), np.float32)

    def maps(self, images: Pixels) -> tuple[Logits, Maps]:
        """The raw outputs, and the maps (N, C, h, w) float32 that the classifier averages; images as in `logits`.

        Raises:
            ArgumentError: another shape or dtype, no image, or the session is a function that gives only logits.
        """
        self._check(images)
        if not len(images):
            raise ArgumentError("images", "0 images", "must be at least one.")
        return self._opened().maps(images)

    @property
    def linear(self) -> Linear:
        """The layer that makes logits of averaged maps; for errors see `maps`."""
        return self._opened().linear

    def explain(
        self, image: Photo, label: str | int | None = None, versus: str | int | None = None, *, fine: bool = False
    ) -> Explanation:
        """Where the logit of a class comes from in an image, exactly; see runtime.cam.

        Args:
            image: see `predict`.
            label: a class by name or index; None: the most probable one.
            versus: a class to compare with: the map then shows what speaks for the one and against the other.
            fine: a finer map: the mean over 16 shifted inputs, exact only for each of them.

        Raises:
            ArgumentError: the model has no such class, or its session gives only logits.
            ImageError: the image cannot be read.
        """
        labels = () if label is None else (label,)
        (found,) = self.explain_pixels(self.read(image), labels, versus, fine=fine)
        return found

    def explain_pixels(
        self,
        pixels: NDArray[np.uint8],
        labels: Sequence[str | int] = (),
        versus: str | int | None = None,
        *,
        topk: int = 1,
        fine: bool = False,
    ) -> tuple[Explanation, ...]:
        """As `explain`, for an image from `read` and several classes: `labels`, or the `topk` most probable."""
        other = None if versus is None else self.index(versus, "versus")
        chosen = [self.index(label) for label in labels]
        logits, explain = decompose(self.maps, pixels, self.linear, fine)
        _check_finite(logits)
        chosen = chosen or [int(i) for i in np.argsort(-logits, kind="stable") if i != other][:topk]
        if other in chosen:
            raise ArgumentError("versus", versus, "is the class itself; name another one.")
        about = (other, None if other is None else self._label(other))
        found = []
        for index in chosen:
            logit, residual, cells = explain(index, other)
            found.append(Explanation(index, self._label(index), *about, logit, residual, cells, pixels, fine))
        return tuple(found)

    def index(self, label: str | int, argument: str = "label") -> int:
        """The index of a class, given by name or index.

        Raises:
            ArgumentError: there is no such class.
        """
        if self.classes and label in self.classes:
            return self.classes.index(str(label))
        count = self.spec.num_classes
        if str(label).isdecimal() and int(label) < count:
            return int(label)
        rule = f"is not one of the model's {count} classes.{nearest(label, self.classes or ())}"
        raise ArgumentError(argument, label, rule)

    def _opened(self) -> Session:
        if not hasattr(self._session, "maps"):
            raise ArgumentError(
                "session", type(self._session).__name__, "gives only logits; open a model for its maps."
            )
        return cast("Session", self._session)

    def _check(self, images: Pixels) -> None:
        size, channels = self.input.size, self.input.channels
        shape = getattr(images, "shape", None)
        if shape is None or len(shape) != 4 or shape[1:] != (size, size, channels) or images.dtype != np.uint8:
            found = f"{shape} {getattr(images, 'dtype', type(images).__name__)}"
            raise ArgumentError("images", found, f"must be (N, {size}, {size}, {channels}) uint8.")

    def answer(self, images: Pixels) -> tuple[Logits, NDArray[np.float64] | None]:
        """Logits, and the familiarity of each image, (N,), or None if the model has none. See `logits` for errors."""
        known = self.familiarity
        if known is None or not known.needs_features or not hasattr(self._session, "maps") or not len(images):
            logits = self.logits(images)
            return logits, None if known is None or known.needs_features else known.of(logits)
        logits, maps = self.maps(images)
        return logits, known.of(logits, maps.mean((2, 3)))

    @overload
    def predict(self, images: Photo, topk: int = 5, sets: float | None = None) -> Prediction: ...  # type: ignore[overload-overlap]  # a str is a sequence
    @overload
    def predict(self, images: Sequence[Photo], topk: int = 5, sets: float | None = None) -> list[Prediction]: ...
    def predict(
        self, images: Photo | Sequence[Photo], topk: int = 5, sets: float | None = None
    ) -> Prediction | list[Prediction]:
        """Classify images.

        Args:
            images: one or a sequence of paths, open binary files, PIL images or arrays (H, W), (H, W, C) uint8; or an
                array (N, H, W, C), or an array or a column of paths.
            topk: number of classes to return, at most all.
            sets: also return label sets with this coverage, such as .9.

        Returns:
            One Prediction for one image, a list for several.

        Raises:
            ImageError: an image cannot be read.
            ArgumentError: a value is outside its range.
        """
        from PIL.Image import Image

        if not isinstance(images, str) and getattr(getattr(images, "dtype", None), "kind", None) in ("U", "O"):
            images = np.ravel(images).tolist()  # type: ignore[arg-type]  # only arrays and columns have a dtype
        is_one = isinstance(images, (str, os.PathLike, Image)) or hasattr(images, "read")
        single = is_one or getattr(images, "ndim", 4) < 4
        if (not single and not isinstance(images, (Sequence, np.ndarray))) or isinstance(images, bytes):
            raise ArgumentError("images", type(images).__name__, "must be a path, a PIL image, an array, or several.")
        photos: Sequence[Any] = [images] if single else images  # type: ignore[assignment]  # `single` is not seen through
        predictions = []
        for photo, prediction in self.stream(photos, topk=topk, sets=sets):
            if isinstance(prediction, ImageError):
                named = isinstance(photo, (str, os.PathLike))
                raise ImageError(f"{photo or repr(photo)}: {prediction}" if named else str(prediction))
            predictions.append(prediction)
        return predictions[0] if single else predictions

    def stream(
        self, photos: Iterable[Photo], *, topk: int = 5, batch: int | None = None, sets: float | None = None
    ) -> Iterator[tuple[Photo, Prediction | ImageError]]:
        """Yield each photo with its prediction, or with the reason why it cannot be read, in order.

        Photos are decoded in threads ahead of the network; at most a few batches are in memory. The first answer comes
        when two batches of photos were read, or all; an error of `photos` comes after the answers to those before it.

        Args:
            photos: paths, PIL images or arrays, drawn as they are needed.
            topk, sets: see `predict`.
            batch: batch size; None: `group`.
        """
        if isinstance(photos, (str, bytes, os.PathLike)):  # of text, every letter would be one
            raise ArgumentError("photos", photos, "must be several, such as a list; `predict` takes one.")
        batch = self.group if batch is None else positive_int("batch", batch)
        if sets is not None:
            if self.sets is None:
                raise ArgumentError(
                    "sets", sets, "needs label sets, which effnet train calibrates; this model has none."
                )
            self.sets.floor(sets)
        return self._stream(photos, positive_int("topk", topk), batch, sets)

    def _stream(
        self, photos: Iterable[Photo], topk: int, batch: int, sets: float | None
    ) -> Iterator[tuple[Photo, Prediction | ImageError]]:
        reading = read_ahead(photos, self.read, threads=self._readers, window=2 * batch)
        failure: Exception | None = None
        began = os.getpid()
        while failure is None:
            if os.getpid() != began:  # the threads that read are not here
                raise ArgumentError("photos", "a stream", "was begun before this process was forked: begin it here.")
            group: list[tuple[Photo, Pixels | ImageError]] = []
            try:
                group.extend(itertools.islice(reading, batch))  # extend keeps the photos that came before an error
            except Exception as error:
                failure = error
            if not group:
                break
            pixels = [read for _, read in group if not isinstance(read, ImageError)]
            predictions = iter(self.describe(*self.answer(np.stack(pixels)), topk, sets) if pixels else ())
            for photo, read in group:
                yield photo, read if isinstance(read, ImageError) else next(predictions)
        if failure:
            raise failure

    def read(self, photo: Photo) -> NDArray[np.uint8]:
        """Read a photo as the network's input: (size, size, C) uint8, not normalised.

        Raises:
            ImageError: it cannot be read.
        """
        from effnet.data.image import load_pixels  # with Pillow, while the engine takes in the weights

        if isinstance(photo, str) and not photo:
            raise ImageError("is an empty name")  # which would mean this folder
        spare, gap = (SPARE, GAP) if self.decode == "fast" else (None, None)
        return load_pixels(photo, self.input, spare=spare, gap=gap)

    def describe(
        self, logits: Logits, familiarity: NDArray[np.float64] | None, topk: int = 5, sets: float | None = None
    ) -> list[Prediction]:
        """Predictions from the outputs of `answer`; for the other arguments see `predict`."""
        _check_finite(logits)
        calibration, known = self.calibration, self.familiarity
        chances = probabilities(logits, calibration.temperature if calibration else 1.0)
        members = None if sets is None or self.sets is None else self.sets.members(chances, sets)
        predictions = []
        for image, (row, order) in enumerate(zip(chances, best_classes(chances, topk), strict=True)):
            scores = tuple(Score(int(i), self._label(i), float(row[i])) for i in order)
            unsure = None if calibration is None else calibration.abstains(scores[0].probability)
            score = None if familiarity is None else float(familiarity[image])
            unfamiliar = None if score is None or known is None else score < known.threshold
            labels = None
            if members is not None:
                found = np.flatnonzero(members[image])
                labels = tuple(self._label(int(i)) for i in found[np.argsort(-row[found], kind="stable")])
            predictions.append(Prediction(scores, unsure, unfamiliar, score, labels))
        return predictions

    def _label(self, index: int) -> str:
        return self.classes[index] if self.classes else str(index)


def _check_finite(logits: Logits) -> None:
    if not np.isfinite(logits).all():
        raise CheckpointError("the network's outputs are not finite numbers: its weights are damaged")

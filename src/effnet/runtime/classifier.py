"""Classifier: one interface over every engine. It needs torch only for networks that run in torch.

An engine is a function from pixels (N, size, size, C) uint8 to logits (N, K) float32, both numpy; it normalises itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from effnet.arch.spec import Calibration, FitMode, InputSpec, NetworkSpec
from effnet.data.image import load_pixels
from effnet.data.paths import read_ahead
from effnet.errors import ArgumentError, CheckpointError, ImageError, MissingExtraError
from effnet.fields import one_of, positive_int
from effnet.machine import this_machine
from effnet.runtime import choice
from effnet.runtime.artifact import ENGINES, Artifact, about, artifact_path, open_artifact
from effnet.runtime.choice import Choice, Question, choose, ways_of_network
from effnet.runtime.engines import EngineName, Precision
from effnet.runtime.engines import engine as open_engine

if TYPE_CHECKING:
    from effnet.models.efficientnet import EfficientNet
    from effnet.weights.bundle import Bundle

Pixels = NDArray[np.uint8]
Logits = NDArray[np.float32]
Engine = Callable[[Pixels], Logits]
AnyEngine = Literal["auto", "torch", "openvino", "onnxruntime"]
AnyPrecision = Literal["auto", "fp32", "bf16", "int8"]
Decode = Literal["fast", "exact"]
Photo = str | os.PathLike[str] | Image.Image | NDArray[Any]

GROUP = 16  # images that go together: as many of the engine's batches as fit into it, and at least one
# Times its final size that a JPEG keeps when it is halved while it is decoded. At 2 the agreement of the best class
# fell by 1.0 points (-0.2 to 2.2) in benchmarks/drafts.py, at 4 it did not.
SPARE = 4.0
READERS = max(2, os.cpu_count() or 1)  # threads that decode photos ahead of the network; decoding releases the GIL


@dataclass(frozen=True)
class Score:
    """One class of a prediction."""

    index: int
    label: str  # the class's name, or its index where there are no names
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image, best first; its own index, label and probability are the best one's."""

    scores: tuple[Score, ...]

    def __iter__(self) -> Iterator[Score]:
        return iter(self.scores)

    def __len__(self) -> int:
        return len(self.scores)

    def __getitem__(self, rank: int) -> Score:
        return self.scores[rank]

    @property
    def index(self) -> int:
        """Index of the best class."""
        return self.scores[0].index

    @property
    def label(self) -> str:
        """Name of the best class."""
        return self.scores[0].label

    @property
    def probability(self) -> float:
        """Probability of the best class."""
        return self.scores[0].probability


class Classifier:
    """A model that knows how to prepare images and what its classes are called.

    Attributes:
        spec: the network as plain numbers.
        input: how images are prepared.
        classes: the names of the outputs, or None.
        network: the torch module; None where another engine runs.
        group: images that are best asked for together.
        calibration: the temperature of its probabilities and the confidence below which to abstain, or None.
        chosen: what runs it and why, where that is known.
        decode: "fast": large JPEGs are halved while they are decoded; "exact": decoded in full.

    Threads may share one. `close`, or a with statement, lets its engine go.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        spec: NetworkSpec,
        input: InputSpec,
        classes: Sequence[str] | None,
        network: EfficientNet | None = None,
        calibration: Calibration | None = None,
        batch: int = 1,
        chosen: Choice | None = None,
        threads: int | None = None,
        decode: Decode = "fast",
    ) -> None:
        self.spec, self.input, self.network, self.calibration = spec, input, network, calibration
        one_of("decode", decode, Decode)
        self.chosen, self.decode = chosen, decode
        self._readers = READERS if threads is None else min(threads, READERS)
        self.classes = None if classes is None else tuple(classes)
        self.group = batch * max(1, GROUP // batch)
        self._engine = engine

    def __enter__(self) -> Classifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the engine go, with its threads and its memory; a closed classifier refuses images."""
        getattr(self._engine, "close", lambda: None)()

    def logits(self, images: Pixels) -> Logits:
        """The raw outputs (N, K) float32 of pixels (N, size, size, C) uint8 at `input.size`, not normalised.

        Raises:
            ArgumentError: another shape or dtype.
        """
        size, channels = self.input.size, self.input.channels
        shape = getattr(images, "shape", None)
        if shape is None or len(shape) != 4 or shape[1:] != (size, size, channels) or images.dtype != np.uint8:
            found = f"{shape} {getattr(images, 'dtype', type(images).__name__)}"
            raise ArgumentError("images", found, f"must be (N, {size}, {size}, {channels}) uint8.")
        if not len(images):
            return np.empty((0, self.spec.num_classes), np.float32)
        return self._engine(images)

    @overload
    def predict(self, images: Photo, topk: int = 5) -> Prediction: ...  # type: ignore[overload-overlap]  # a str is a sequence
    @overload
    def predict(self, images: Sequence[Photo], topk: int = 5) -> list[Prediction]: ...
    def predict(self, images: Photo | Sequence[Photo], topk: int = 5) -> Prediction | list[Prediction]:
        """What is in the images.

        Args:
            images: one or a sequence of paths, PIL images or arrays (H, W), (H, W, C) uint8; or an array (N, H, W, C).
            topk: how many classes to return, at most all.

        Returns:
            One Prediction for one image, a list for several.

        Raises:
            ImageError: an image cannot be read.
            ArgumentError: a value is outside its range.
        """
        single = isinstance(images, (str, os.PathLike, Image.Image)) or getattr(images, "ndim", 4) < 4
        if (not single and not isinstance(images, (Sequence, np.ndarray))) or isinstance(images, bytes):
            raise ArgumentError("images", type(images).__name__, "must be a path, a PIL image, an array, or several.")
        photos: Sequence[Any] = [images] if single else images  # type: ignore[assignment]  # `single` is not seen through
        predictions = []
        for photo, prediction in self.stream(photos, topk=topk):
            if isinstance(prediction, ImageError):
                raise ImageError(f"{photo}: {prediction}" if isinstance(photo, (str, os.PathLike)) else str(prediction))
            predictions.append(prediction)
        return predictions[0] if single else predictions

    def stream(
        self, photos: Iterable[Photo], *, topk: int = 5, batch: int | None = None
    ) -> Iterator[tuple[Photo, Prediction | ImageError]]:
        """Each photo with its prediction, or with the reason why it cannot be read, in order.

        Photos are decoded in threads ahead of the network; no more than a few batches are in memory at any time. The
        first answer comes when two batches of photos were drawn, or all; an error of `photos` comes after the answers
        to those before it. A batch is `group`, unless it is said.
        """
        batch = self.group if batch is None else positive_int("batch", batch)
        return self._stream(photos, positive_int("topk", topk), batch)

    def _stream(
        self, photos: Iterable[Photo], topk: int, batch: int
    ) -> Iterator[tuple[Photo, Prediction | ImageError]]:
        reading = read_ahead(photos, self._load, threads=self._readers, window=2 * batch)
        failure: Exception | None = None
        while failure is None:
            group: list[tuple[Photo, Pixels | ImageError]] = []
            try:
                group.extend(itertools.islice(reading, batch))  # which keeps what came before an error
            except Exception as error:
                failure = error
            if not group:
                break
            pixels = [read for _, read in group if not isinstance(read, ImageError)]
            predictions = iter(self._name(self.logits(np.stack(pixels)), topk) if pixels else ())
            for photo, read in group:
                yield photo, read if isinstance(read, ImageError) else next(predictions)
        if failure:
            raise failure

    def _load(self, photo: Photo) -> Pixels:
        return load_pixels(photo, self.input, spare=SPARE if self.decode == "fast" else None)

    def _name(self, logits: Logits, topk: int) -> list[Prediction]:
        if not np.isfinite(logits).all():
            raise CheckpointError("the network's outputs are not finite numbers: its weights are damaged")
        temperature = self.calibration.temperature if self.calibration else 1.0
        shifted = np.exp((logits.astype(np.float64) - logits.max(1, keepdims=True)) / temperature)
        probabilities = shifted / shifted.sum(1, keepdims=True)
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :topk]
        return [
            Prediction(tuple(Score(int(i), self._label(i), float(row[i])) for i in order))
            for row, order in zip(probabilities, best, strict=True)
        ]

    def _label(self, index: int) -> str:
        return self.classes[index] if self.classes else str(index)


def load(
    weights: str | Path,
    /,
    *,
    model: str | NetworkSpec | None = None,
    source: str | None = None,
    fit: FitMode | None = None,
    engine: AnyEngine = "auto",
    precision: AnyPrecision = "auto",
    batch: int | None = None,
    threads: int | None = None,
    decode: Decode = "fast",
) -> Classifier:
    """The classifier of a MODEL, ready to predict.

    Args:
        weights: registered weights ("lite0", "b0"), a bundle, an artifact of effnet export, a file or hub folder of
            another library, "timm/NAME" or "hf:ORG/NAME". OpenVINO's and ONNX artifacts run without torch.
        model: the network that a file's weights are of ("b0"), where its tensors cannot tell.
        source: the library that wrote a file of weights, where its keys cannot tell (timm or timm-tf).
        fit: how a photo is made square, in place of the weights' own way: crop, pad or squash.
        engine: what runs it: torch, openvino or onnxruntime. auto: the fastest of those that are installed, measured
            once and remembered; an artifact is run by what knows its format.
        precision: what it computes with: fp32, or bf16, which is OpenVINO's alone. auto: bf16 where that is faster and
            names photos as fp32 does; an artifact's own.
        batch: images of a full batch, which may go through the network in parts; None: as many as take a second, at
            most 16.
        threads: how many the engine and the decoding of photos may use; None: one for each core.
        decode: fast: a large JPEG is halved while it is decoded, as long as it stays four times as large as the network
            sees it. exact: decoded in full, equal to torchvision's bit for bit.

    Raises:
        UnknownNameError: it is none of these.
        ArgumentError: a value is outside its range, or is an artifact's own.
        CheckpointError, BundleError, ArtifactError, DownloadError: it is one of these and cannot be used.
        MissingExtraError: torch or the engine is not installed.
    """
    if not isinstance(weights, (str, os.PathLike)):
        raise ArgumentError("weights", weights, "must be a name or a path.")
    one_of("engine", engine, AnyEngine)
    one_of("precision", precision, AnyPrecision)
    named_engine, named_precision = None if engine == "auto" else engine, None if precision == "auto" else precision
    batch, threads = (
        None if value is None else positive_int(name, value) for name, value in (("batch", batch), ("threads", threads))
    )
    if threads is not None and threads > this_machine().cores:
        raise ArgumentError("threads", threads, f"must be at most {this_machine().cores}, the cores of this machine.")
    network = None
    if artifact_path(weights) is not None:
        if source is not None or model is not None:
            raise ArgumentError("weights", str(weights), "is an artifact, which takes neither source nor model.")
        artifact = open_artifact(weights, threads=threads)
        config, question = artifact.config, _of_artifact(artifact, named_engine, named_precision, batch)
        chosen = choose(question, artifact.open)
        run = artifact.open(chosen.way, chosen.batch)
    else:
        ways = ways_of_network(named_engine, named_precision)
        bundle = _bundle(weights, model, source)
        config = bundle.config
        question = Question(_digest(bundle), config.input, ways, batch, threads=threads)
        chosen = choose(question, lambda way, size: open_engine(bundle, way, batch=size, threads=threads))
        run = open_engine(bundle, chosen.way, batch=chosen.batch, threads=threads)
        network = bundle.network if chosen.way.engine == "torch" else None
    return Classifier(
        run,
        spec=config.spec,
        input=config.input if fit is None else dataclasses.replace(config.input, fit=fit),
        classes=config.classes,
        network=network,
        calibration=config.calibration,
        batch=run.batch,
        chosen=chosen,
        threads=threads,
        decode=decode,
    )


def _bundle(weights: str | Path, model: str | NetworkSpec | None, source: str | None) -> Bundle:
    try:
        import torch

        from effnet.weights.load import open_model
    except ImportError as error:
        raise MissingExtraError(f"running {str(weights)!r}", "torch") from error
    bundle = open_model(weights, network=model, source=source)
    bundle.network.to(memory_format=torch.channels_last)
    return bundle


def _digest(bundle: Bundle) -> str:
    """Of all that a network's answers follow from."""
    config = bundle.config
    numbers = [dataclasses.asdict(each) for each in (config.spec, config.policy, config.input)]
    found = hashlib.sha256(json.dumps(numbers).encode())
    for tensor in bundle.network.state_dict().values():
        found.update(tensor.detach().cpu().numpy().tobytes())
    return found.hexdigest()


def _of_artifact(
    artifact: Artifact, engine: EngineName | None, precision: Precision | None, batch: int | None
) -> Question:
    """What there is to choose between for an artifact: the engines that know its format."""
    form, known = artifact.form, ENGINES[artifact.form.format]
    if form.batch is not None and batch is not None and batch % form.batch:
        rule = f"cannot be chosen: {artifact.path} was exported for {form.batch}; it takes a multiple of that."
        raise ArgumentError("batch", batch, rule)
    engines = [engine] if engine else list(filter(choice.installed, known)) or [known[0]]
    if precision == "bf16" and not engine:
        engines = [name for name in engines if name == "openvino"] or engines
    ways = tuple(artifact.way(name, precision) for name in engines)
    subject = hashlib.sha256(json.dumps(about(artifact.config, form)).encode()).hexdigest()
    return Question(subject, artifact.config.input, ways, batch, form.batch or 1, artifact.threads, artifact.fixed)


def torch_engine(network: EfficientNet, see: InputSpec, threads: int | None = None) -> Engine:
    """The network on the device where its parameters are, normalising there.

    Args:
        network: in eval mode.
        see: how images are prepared.
        threads: of torch while it computes; None: as many as it takes by itself. They are the process's own number:
            another thread that begins to use torch meanwhile inherits it.
    """
    import torch

    from effnet.metrics.timing import torch_threads

    mean, std = torch.tensor(see.mean).view(-1, 1, 1), torch.tensor(see.std).view(-1, 1, 1)

    @torch.inference_mode()
    def run(pixels: Pixels) -> Logits:
        weight = network.classifier.weight
        pixels = np.require(pixels, requirements=["C", "W"])
        images = torch.from_numpy(pixels).to(weight.device).permute(0, 3, 1, 2)  # a view: channels_last as it is
        with torch_threads(threads):
            images = images.to(torch.float32).div_(255).sub_(mean.to(weight.device)).div_(std.to(weight.device))
            logits: Logits = network(images.to(weight.dtype)).float().cpu().numpy()
        return logits

    return run

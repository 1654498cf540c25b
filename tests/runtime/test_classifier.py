from __future__ import annotations

import dataclasses
import io
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from limits import SETS, familiarity
from PIL import Image
from prepared import preprocess
from random_weights import shaken

import effnet
from effnet.arch.spec import Calibration, InputSpec
from effnet.errors import ArgumentError, CheckpointError, ImageError, MismatchError, UnknownNameError
from effnet.runtime.classifier import Classifier, Prediction, best_classes
from effnet.runtime.load import load
from effnet.weights.bundle import Record, read_config
from effnet.weights.sureness import ScoreName

TINY = effnet.spec("b0", width=0.25, depth=0.4, resolution=32, num_classes=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return load(effnet.save(effnet.EfficientNet(TINY), folder, classes=["a", "b", "c"], input=InputSpec(32, 40)))


@pytest.fixture(scope="module")
def lite0() -> Classifier:
    return load("lite0")


def test_lite0_names_the_two_photos(lite0: Classifier, photos: Path) -> None:
    cat, coffee = lite0.predict([photos / "chelsea.png", photos / "coffee.png"])
    assert {score.label for score in cat} >= {"tabby", "tiger cat", "Egyptian cat"}
    assert coffee.label == coffee[0].label == "espresso"
    assert coffee.index == 967
    assert coffee.probability > 0.9


def test_probabilities_are_the_softmax_of_what_torch_computes(lite0: Classifier, photos: Path) -> None:
    assert lite0.network is not None
    with torch.inference_mode():
        logits = lite0.network(torch.from_numpy(preprocess(photos / "coffee.png", lite0.input))[None])
    expected = logits.softmax(1)[0].topk(5)
    prediction = lite0.predict(photos / "coffee.png")
    assert [score.index for score in prediction] == expected.indices.tolist()
    np.testing.assert_allclose([score.probability for score in prediction], expected.values, rtol=1e-4)


def test_logits_take_pixels_that_are_not_normalised(tiny: Classifier) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    logits = tiny.logits(pixels)
    assert logits.shape == (3, 3)
    assert logits.dtype == np.float32
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    images = (images - torch.tensor(tiny.input.mean).view(3, 1, 1)) / torch.tensor(tiny.input.std).view(3, 1, 1)
    assert tiny.network is not None
    np.testing.assert_allclose(logits, tiny.network(images.float()).detach(), rtol=1e-4, atol=1e-6)
    pixels.flags.writeable = False  # as a memory map has it
    np.testing.assert_array_equal(tiny.logits(pixels), logits)
    assert tiny.logits(pixels[:0]).shape == (0, 3)


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((1, 33, 32, 3), np.uint8),
        np.zeros((32, 32, 3), np.uint8),
        np.zeros((1, 32, 32, 3), np.float32),
        "x.jpg",
    ],
)
def test_logits_refuse_other_pixels(tiny: Classifier, pixels: object) -> None:
    with pytest.raises(ArgumentError, match=r"must be \(N, 32, 32, 3\) uint8"):
        tiny.logits(pixels)  # type: ignore[arg-type]


def test_one_image_gives_one_prediction_and_many_a_list(tiny: Classifier, photos: Path) -> None:
    path = photos / "coffee.png"
    picture = Image.open(path)
    array = np.asarray(picture)
    one = tiny.predict(path)
    assert isinstance(one, Prediction)
    for same in (str(path), picture, array):
        assert tiny.predict(same) == one
    for several in ([path, path], (array, picture), np.stack([array, array])):
        for each in tiny.predict(several):  # a batch of two may round otherwise than a batch of one
            assert [score.index for score in each] == [score.index for score in one]
            assert each.probability == pytest.approx(one.probability, abs=1e-6)
    assert tiny.predict([]) == []
    assert tiny.predict([path]) == [one]


def test_open_files_and_arrays_of_paths(tiny: Classifier, photos: Path) -> None:
    paths = sorted(map(str, photos.glob("*.png")))
    expected = tiny.predict(paths)
    blob = io.BytesIO(Path(paths[0]).read_bytes())
    assert tiny.predict(blob) == tiny.predict(blob) == tiny.predict(paths[0])
    assert tiny.predict([blob, paths[1]]) == expected
    with Path(paths[1]).open("rb") as file:
        assert tiny.predict(file) == tiny.predict(paths[1])
    assert tiny.predict(np.array(paths)) == tiny.predict(np.array([Path(path) for path in paths])) == expected
    assert tiny.predict(np.array(paths)[0]) == tiny.predict(paths[0])  # one element is one path
    with pytest.raises(ImageError, match=r"nothing\.jpg: does not exist"):
        tiny.predict(np.array(["nothing.jpg"]))


@pytest.mark.parametrize("topk", [1, 5, 39, 40, 99])
@pytest.mark.parametrize("values", [3, 10**9])  # many ties, none
def test_of_equal_classes_the_first_is_named(topk: int, values: int) -> None:
    probabilities = np.random.default_rng(0).integers(0, values, (20, 40)) / values
    expected = [sorted(range(40), key=lambda k: (-row[k], k))[:topk] for row in probabilities]
    assert [list(found) for found in best_classes(probabilities, topk)] == expected


def test_topk(tiny: Classifier, photos: Path) -> None:
    everything = tiny.predict(photos / "coffee.png", topk=99)
    assert len(everything) == 3
    assert sum(score.probability for score in everything) == pytest.approx(1)
    assert everything[0].probability >= everything[1].probability >= everything[2].probability
    assert tiny.predict(photos / "coffee.png", topk=1)[0] == everything[0]
    with pytest.raises(ArgumentError, match=r"`topk` \(=0\) must be a positive whole number"):
        tiny.predict(photos / "coffee.png", topk=0)


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_stream_answers_every_photo_once_in_order(tiny: Classifier, photos: Path, tmp_path: Path, batch: int) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    good, bad = photos / "coffee.png", tmp_path / "broken.jpg"
    paths = [bad, good, bad, bad, good, good, bad]
    answers = list(tiny.stream(paths, batch=batch))
    assert [path for path, _ in answers] == paths
    assert [isinstance(answer, ImageError) for _, answer in answers] == [path == bad for path in paths]


def test_an_error_of_the_list_comes_after_the_answers_before_it(tiny: Classifier, photos: Path) -> None:
    def listed() -> Iterator[Path]:
        yield photos / "coffee.png"
        raise ArgumentError("sources", "zz*.jpg", "matches nothing.")

    answers = tiny.stream(listed())
    assert next(answers)[0] == photos / "coffee.png"
    with pytest.raises(ArgumentError, match="matches nothing"):
        next(answers)


def test_damaged_weights_predict_nothing(photos: Path, tmp_path: Path) -> None:
    network = effnet.EfficientNet(TINY)
    torch.nn.init.constant_(network.classifier.bias, float("nan"))
    with pytest.raises(CheckpointError, match="not finite"):
        load(effnet.save(network, tmp_path / "x")).predict(photos / "coffee.png")


@pytest.mark.parametrize("images", [None, 5, b"bytes"])
def test_predict_refuses_what_is_no_image(tiny: Classifier, images: object) -> None:
    with pytest.raises(ArgumentError, match="must be a path, a PIL image, an array"):
        tiny.predict(images)  # type: ignore[call-overload]


def test_a_photo_cannot_have_four_channels(photos: Path, tmp_path: Path) -> None:
    classifier = load(effnet.save(effnet.EfficientNet(effnet.spec(TINY, in_channels=4)), tmp_path / "x"))
    assert classifier.logits(np.zeros((1, 32, 32, 4), np.uint8)).shape == (1, 3)
    with pytest.raises(ArgumentError, match="arrays"):
        classifier.predict(photos / "coffee.png")


def test_stream_reads_only_a_little_ahead(tiny: Classifier) -> None:
    drawn = 0

    def endless() -> Iterator[Image.Image]:
        nonlocal drawn
        while True:
            drawn += 1
            yield Image.new("RGB", (40, 40))

    answers = tiny.stream(endless(), batch=4)
    for _ in range(20):
        next(answers)
    assert drawn <= 20 + 3 * 4
    before = threading.active_count()
    answers.close()
    assert threading.active_count() <= before


@pytest.mark.parametrize("nameless", ["", [""]])
def test_an_empty_name_is_not_this_folder(tiny: Classifier, nameless: str | list[str]) -> None:
    with pytest.raises(ImageError, match=r"^'': is an empty name$"):
        tiny.predict(nameless)
    with pytest.raises(ArgumentError, match="must be a name or a path"):
        load("")


@pytest.mark.parametrize("topk", [np.zeros(999), [5] * 9999, "5", 0, True])
def test_topk_is_a_number(tiny: Classifier, topk: object) -> None:
    with pytest.raises(ArgumentError, match=r"^`topk` .{,99} must be a positive whole number"):
        tiny.predict(np.zeros((9, 9, 3), np.uint8), topk=topk)  # type: ignore[arg-type]


def test_fit_replaces_the_weights_own_way(photos: Path, tmp_path: Path) -> None:
    effnet.save(effnet.EfficientNet(TINY), tmp_path / "x")
    assert load(tmp_path / "x").input.fit == "crop"
    assert load(tmp_path / "x", fit="pad").input.fit == "pad"
    with pytest.raises(UnknownNameError, match="choose from crop, pad, squash"):
        load(tmp_path / "x", fit="stretch")


def test_grey_networks_see_grey_photos(photos: Path, tmp_path: Path) -> None:
    grey = effnet.EfficientNet(effnet.spec(TINY, in_channels=1))
    classifier = load(effnet.save(grey, tmp_path / "x", input=InputSpec(32, 40, mean=(0.5,), std=(0.5,))))
    assert len(classifier.predict(photos / "coffee.png")) == 3
    assert classifier.logits(np.zeros((2, 32, 32, 1), np.uint8)).shape == (2, 3)


def test_probabilities_are_at_the_bundles_temperature(photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, calibration = effnet.EfficientNet(TINY), Calibration(0.05, 0.6, 0.05, 100, "val")
    plain = load(effnet.save(network, tmp_path / "plain"))
    calibrated = load(effnet.save(network, tmp_path / "calibrated", record=Record(calibration)))
    assert plain.calibration is None
    assert calibrated.calibration == calibration
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(plain.logits(pixels), calibrated.logits(pixels))  # raw
    before, after = (model.predict(photos / "coffee.png", topk=3) for model in (plain, calibrated))
    assert [score.index for score in before] == [score.index for score in after]
    logits = np.log([score.probability for score in before])
    expected = torch.from_numpy(logits / 0.05).softmax(0)
    np.testing.assert_allclose([score.probability for score in after], expected, rtol=1e-6)
    assert after.probability > before.probability


def test_an_answer_below_the_threshold_is_unsure(photos: Path, tmp_path: Path) -> None:
    network, coffee = effnet.EfficientNet(TINY), photos / "coffee.png"
    plain = load(effnet.save(network, tmp_path / "plain")).predict(coffee)
    assert (plain.unsure, plain.unfamiliar, plain.familiarity, plain.labels) == (None,) * 4
    assert list(plain.to_dict()) == ["predictions"]
    found = []
    for threshold in (0.0, plain.probability - 1e-6, plain.probability + 1e-6, None):  # None: never sure enough
        record = Record(Calibration(1.0, threshold, 0.05, 100, "val"))
        found.append(load(effnet.save(network, tmp_path / "x", record=record)).predict(coffee).unsure)
    assert found == [False, False, True, True]


@pytest.mark.parametrize("score", ["energy", "mahalanobis", "neighbours", "vim"])
@pytest.mark.parametrize("engine", ["native", "torch", "openvino", "onnxruntime"])
def test_every_engine_tells_unfamiliar_images(engine: str, score: ScoreName, photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = shaken(effnet.EfficientNet(TINY))
    known = familiarity(TINY.head_channels, 3, score)
    classifier = load(effnet.save(network, tmp_path / "x", record=Record(familiarity=known)), engine=engine)
    paths = [photos / "coffee.png", photos / "chelsea.png"]
    images = torch.stack([torch.from_numpy(preprocess(path, classifier.input)) for path in paths])
    with torch.inference_mode():
        features = network.embed(images)
        expected = known.of(network.classifier(features).numpy(), features.numpy())
    found = classifier.predict(paths)
    assert [each.familiarity for each in found] == pytest.approx(expected.tolist(), rel=1e-3)
    between = dataclasses.replace(known, threshold=float(expected.mean()))
    classifier.familiarity = between
    assert [each.unfamiliar for each in classifier.predict(paths)] == (expected < expected.mean()).tolist()


def test_maps_are_computed_only_for_a_score_that_needs_them(photos: Path, tmp_path: Path) -> None:
    asked: list[str] = []

    class Session:
        batch = 1

        def __call__(self, pixels: np.ndarray) -> np.ndarray:
            asked.append("logits")
            return np.zeros((len(pixels), 3), np.float32)

        def maps(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            asked.append("maps")
            return np.zeros((len(pixels), 3), np.float32), np.ones((len(pixels), TINY.head_channels, 1, 1), np.float32)

    config = read_config(effnet.save(effnet.EfficientNet(TINY), tmp_path / "x"))
    for score, expected in ((None, "logits"), ("energy", "logits"), ("vim", "maps")):
        known = familiarity(TINY.head_channels, 3, score) if score else None  # type: ignore[arg-type]
        classifier = Classifier(Session(), dataclasses.replace(config, familiarity=known))
        answer = classifier.predict(photos / "coffee.png")
        assert asked.pop() == expected
        assert (answer.familiarity is None) == (score is None)
    # a plain function gives logits only: nothing is said, rather than guessed
    known = familiarity(TINY.head_channels, 3, "vim")
    silent = Classifier(lambda pixels: Session()(pixels), dataclasses.replace(config, familiarity=known))
    assert silent.predict(photos / "coffee.png").unfamiliar is None


def test_label_sets_are_asked_for(photos: Path, tmp_path: Path) -> None:
    network, names = effnet.EfficientNet(TINY), ["a", "b", "c"]
    classifier = load(effnet.save(network, tmp_path / "x", classes=names, record=Record(sets=SETS)))
    coffee = photos / "coffee.png"
    ranked = classifier.predict(coffee, topk=3)
    assert ranked.labels is None
    for coverage in (0.5, 0.75, 0.9):
        floor = SETS.floor(coverage)
        expected = [score.label for score in ranked if score.probability >= floor] or [ranked.label]
        assert classifier.predict(coffee, topk=1, sets=coverage).labels == tuple(expected)
    assert classifier.predict(coffee, sets=0.9).to_dict()["labels"]
    with pytest.raises(ArgumentError, match=r"at least 49 images of val; there were 30"):
        classifier.stream([coffee], sets=0.98)
    with pytest.raises(ArgumentError, match="this model has none"):
        load(effnet.save(network, tmp_path / "plain")).predict(coffee, sets=0.9)


def test_a_file_of_weights_and_the_network_that_they_are_of(tmp_path: Path, photos: Path) -> None:
    import torchvision

    torch.manual_seed(0)
    theirs = torchvision.models.efficientnet_b0().eval()
    torch.save(theirs.state_dict(), tmp_path / "file.pth")
    classifier = load(tmp_path / "file.pth", model="b0", decode="exact")
    assert (classifier.spec.name, classifier.spec.resolution, classifier.input.size) == ("b0", 224, 224)
    image = torch.from_numpy(preprocess(photos / "coffee.png", classifier.input))[None]
    with torch.inference_mode():
        assert classifier.predict(photos / "coffee.png").index == int(theirs(image).argmax())
    with pytest.raises(MismatchError):
        load(tmp_path / "file.pth", model="b1")

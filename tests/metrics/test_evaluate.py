"""The report of a model against torchmetrics, by its formulas, and on real images."""

import csv
import json
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional import classification as oracle

from effnet.arch.spec import InputSpec
from effnet.data.dataset import Dataset, Sample
from effnet.data.image import load_pixels
from effnet.errors import ArgumentError, CheckpointError
from effnet.metrics.calibration import apply_threshold, reliability
from effnet.metrics.evaluate import Mistake, evaluate, predict_logits, write_per_class
from effnet.metrics.intervals import wilson


def made(n: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are right more often than not, of classes of different sizes."""
    random = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(k), (k * random.random(n - k) ** 1.5).astype(int)])
    logits = random.normal(0, 1, (n, k)).astype(np.float32)
    logits[np.arange(n), labels] += random.normal(2.5, 1, n)
    return logits, labels


def names(k: int) -> list[str]:
    return [f"class {i}" for i in range(k)]


@pytest.mark.parametrize(("n", "k"), [(200, 2), (400, 5), (1000, 40)])
def test_the_figures_are_torchmetrics(n: int, k: int) -> None:
    logits, labels = made(n, k)
    found = evaluate(logits, labels, names(k))
    scores, truth = torch.from_numpy(logits), torch.from_numpy(labels)

    def expected(name: str, **more: object) -> torch.Tensor:
        return getattr(oracle, f"multiclass_{name}")(scores, truth, num_classes=k, **more)

    right = logits.argmax(1) == labels
    assert (found.n, found.top1) == (n, wilson(int(right.sum()), n))
    assert found.scores[0].recall == wilson(int(right[labels == 0].sum()), int((labels == 0).sum()))
    assert found.top1.value == pytest.approx(float(expected("accuracy", average="micro")))
    if k > 5:
        assert found.top5 is not None
        assert found.top5.value == pytest.approx(float(expected("accuracy", average="micro", top_k=5)))
    else:
        assert found.top5 is None
    assert found.macro_f1.value == pytest.approx(float(expected("f1_score", average="macro")), abs=1e-6)
    np.testing.assert_array_equal(found.confusion, expected("confusion_matrix"))
    assert found.before.ece == pytest.approx(float(expected("calibration_error", n_bins=15)), abs=1e-6)
    assert found.before.loss == pytest.approx(float(torch.nn.functional.cross_entropy(scores, truth)), rel=1e-5)
    for name in ("precision", "recall", "f1_score"):
        each = expected(name, average="none").tolist()
        ours = [getattr(score, name.removesuffix("_score")) for score in found.scores]
        ours = [getattr(value, "value", value) for value in ours]
        assert [0 if value is None else value for value in ours] == pytest.approx(each, abs=1e-6)


def test_the_interval_of_macro_f1_is_a_bootstraps() -> None:
    logits, labels = made(500, 6)
    found = evaluate(logits, labels, names(6), seed=3).macro_f1
    assert found == evaluate(logits, labels, names(6), seed=3).macro_f1
    assert found != evaluate(logits, labels, names(6), seed=4).macro_f1
    random, said, means = np.random.default_rng(0), logits.argmax(1), []
    for _ in range(1500):
        drawn = random.integers(0, 500, 500)
        y, s = labels[drawn], said[drawn]
        f1 = [2 * ((y == i) & (s == i)).sum() / ((y == i).sum() + (s == i).sum()) for i in range(6)]
        means.append(np.mean(f1))
    low, high = np.quantile(means, (0.025, 0.975))
    reach = max(found.value - low, high - found.value)
    assert (found.low, found.high) == pytest.approx((found.value - reach, found.value + reach), abs=0.006)


def test_the_interval_of_macro_f1_holds_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    chances = np.array([[0.9, 0.1, 0], [0.05, 0.8, 0.15], [0.2, 0.1, 0.7]])
    true = np.mean([2 * chances[i, i] / (1 + chances[:, i].sum()) for i in range(3)])
    held = []
    for _ in range(300):
        labels = np.repeat(np.arange(3), 20)
        said = np.array([random.choice(3, p=chances[label]) for label in labels])
        found = evaluate(np.eye(3)[said], labels, names(3)).macro_f1
        held.append(found.low <= true <= found.high)
    assert np.mean(held) >= 0.92


def test_where_nothing_or_everything_is_wrong_macro_f1_is_as_unsure_as_accuracy() -> None:
    labels = np.arange(12) % 3
    found = evaluate(np.eye(3)[labels], labels, names(3))
    assert found.macro_f1 == found.top1 == wilson(12, 12)
    assert found.macro_f1.low < 0.8
    wrong = evaluate(np.eye(2)[[1, 1, 0, 0]], [0, 0, 1, 1], ["a", "b"])
    assert wrong.macro_f1.value == 0
    assert wrong.macro_f1.high == wrong.top1.high > 0.4
    assert evaluate(np.ones((1, 1)), [0], ["all"]).top1.value == 1


def test_a_class_without_images_does_not_count() -> None:
    labels = np.array([0] * 6 + [1] * 4)
    said = np.array([0, 0, 0, 0, 0, 2, 1, 1, 1, 0])
    found = evaluate(np.eye(4)[said], labels, names(4))
    f1 = [2 * 5 / (6 + 6), 2 * 3 / (4 + 3)]  # of the two classes with images
    assert found.macro_f1.value == pytest.approx(np.mean(f1))
    absent, never = found.scores[2], found.scores[3]
    assert (absent.n, absent.predicted, absent.precision, absent.recall, absent.f1) == (0, 1, 0.0, None, None)
    assert (never.n, never.predicted, never.precision, never.recall, never.f1) == (0, 0, None, None, None)
    assert found.mistakes == (Mistake("class 0", "class 2", 1), Mistake("class 1", "class 0", 1))


def test_among_equal_logits_the_first_is_named() -> None:
    found = evaluate(np.zeros((8, 8)), np.arange(8), names(8))
    assert found.top1.value == 1 / 8
    assert found.top5 is not None
    assert found.top5.value == 5 / 8


def test_the_report_as_json() -> None:
    logits, labels = made(100, 6)
    found = evaluate(logits, labels, names(6), temperature=2, threshold=0.5)
    assert (found.before, found.after) == (reliability(logits, labels), reliability(logits, labels, 2))
    assert found.abstention == apply_threshold(logits, labels, 2, 0.5)
    values = json.loads(json.dumps(found.to_dict()))
    assert values["n"] == 100
    for name in ("top1", "top5", "macro_f1"):
        assert set(values[name]) == {"value", "low", "high"}
    assert values["temperature"] == 2
    assert values["threshold"] == values["abstention"]["threshold"] == 0.5
    assert values["ece"] != values["ece_calibrated"]
    # the classes' numbers and the mistakes are the whole confusion matrix
    wrong = sum(mistake["count"] for mistake in values["mistakes"])
    assert wrong == 100 - round(100 * values["top1"]["value"])
    plain = evaluate(logits[:, :2], labels.clip(max=1), names(2)).to_dict()
    assert (plain["threshold"], plain["abstention"]) == (None, None)
    assert plain["top5"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    with pytest.raises(ArgumentError, match=r"'5 names'.* must name the 6 outputs"):
        evaluate(logits, labels, names(5))


def test_memory_does_not_grow_with_the_classes_squared() -> None:
    n, k = 600, 21_000
    logits, labels = np.random.default_rng(0).normal(size=(n, k)).astype(np.float32), np.arange(n) * 35
    tracemalloc.start()
    found = evaluate(logits, labels, names(k))
    assert (len(found.mistakes), len(found.scores)) == (n, k)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 200e6  # the matrix of confusions alone would be 3.5 GB, the logits in double precision 100 MB


def test_five_thousand_images_of_a_thousand_classes_are_quick() -> None:
    logits, labels = made(5000, 1000)
    started = time.process_time()
    evaluate(logits, labels, names(1000))
    assert time.process_time() - started < 5  # about half a second


INPUT = InputSpec(8, 8)


def brightness(images: np.ndarray) -> np.ndarray:
    """A network whose logits are the image's means of red, green and blue."""
    return images.mean((1, 2)).astype(np.float32)


@pytest.fixture
def colours(tmp_path: Path) -> Dataset:
    """Seven plain images; "red/x.jpg" is none."""
    samples = []
    for i in range(7):
        mode, colour = ("RGB", tuple(200 * (i % 3 == channel) for channel in range(3))) if i else ("L", 90)
        Image.new(mode, (20, 30), colour).save(tmp_path / f"{i}.png")
        samples.append(Sample(f"{i}.png", i % 3))
    (tmp_path / "x.jpg").write_bytes(b"no image")
    samples.insert(3, Sample("x.jpg", 1))
    samples.append(Sample("gone.jpg", 2))
    return Dataset(tmp_path, ("red", "green", "blue"), tuple(samples))


@pytest.mark.parametrize("batch", [1, 2, 99])
def test_every_readable_image_is_predicted_in_order(colours: Dataset, batch: int) -> None:
    batches, seen = [], []
    found = predict_logits(
        lambda images: batches.append(len(images)) or brightness(images),
        INPUT,
        colours,
        batch=batch,
        progress=SimpleNamespace(update=lambda task, *counts: seen.append(counts)),
    )
    assert list(found.unreadable) == ["x.jpg", "gone.jpg"]
    assert "not an image" in found.unreadable["x.jpg"]
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    expected = [load_pixels(colours.file(sample), INPUT).mean((0, 1)) for sample in found.readable(colours).samples]
    np.testing.assert_allclose(found.logits, expected, rtol=1e-5)
    assert found.logits[0].tolist() == [90, 90, 90]  # a grey file, as an RGB network sees it
    assert max(batches) <= batch
    assert seen[-1] == (9, 9)


def test_no_readable_image_and_damaged_weights(colours: Dataset) -> None:
    only = Dataset(colours.root, colours.classes, tuple(s for s in colours.samples if s.path == "x.jpg"))
    found = predict_logits(brightness, INPUT, only)
    assert found.logits.shape == (0, 3)
    assert len(found.unreadable) == 1
    with pytest.raises(CheckpointError, match="not finite"):
        predict_logits(lambda images: brightness(images) * np.float32("nan"), INPUT, colours)


def test_per_class(tmp_path: Path) -> None:
    found = evaluate(np.eye(3)[[0, 0, 1]], [0, 0, 0], ["a, b", "c", "d"])
    write_per_class(found, tmp_path / "per_class.csv")
    with (tmp_path / "per_class.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["a, b", "c", "d"]
    assert [row["images"] for row in rows] == ["3", "0", "0"]
    assert [row["predicted"] for row in rows] == ["2", "1", "0"]
    assert float(rows[0]["recall"]) == pytest.approx(2 / 3)
    recall = found.scores[0].recall
    assert recall is not None
    assert (float(rows[0]["recall_low"]), float(rows[0]["recall_high"])) == (recall.low, recall.high)
    assert (rows[1]["precision"], rows[1]["recall"], rows[1]["f1"]) == ("0.0", "", "")
    assert rows[2]["precision"] == ""

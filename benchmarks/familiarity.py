"""Detection of out-of-distribution images, and coverage of label sets, on real images.

    python benchmarks/familiarity.py fashion    a network trained on Fashion-MNIST; digits and photos are unfamiliar
    python benchmarks/familiarity.py tuxpaint   191 photo cut-outs of 6 classes; each class in turn is unfamiliar
        [--data benchmarks/data] [--run benchmarks/runs/15-minutes/best]

fashion uses the bundle and the split of a run of benchmarks/learning.py finetune. Scores are fitted to 2,000 of its
training images and the threshold to its val images; its test images are compared with unfamiliar ones: scikit-learn's
1,797 handwritten digits (8 x 8, enlarged to 28) and Tux Paint's photos. tuxpaint trains a linear classifier on the
features of Lite0's published weights without the class that is left out; five folds of the other classes give the
familiar images. "as chosen" is the score that effnet would select with a quarter of the training images as val. The
interval of a mean is Student's over the classes, that of a single AUROC Newcombe's.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import effnet
from effnet import console
from effnet.data.dataset import Dataset, match_classes, read_data
from effnet.data.image import load_pixels
from effnet.errors import RefusedError
from effnet.metrics.calibration import fit_temperature
from effnet.metrics.conformal import calibrate_sets, measure_sets
from effnet.metrics.familiarity import Seen, fit_familiarity, fit_scores, spread_classes
from effnet.metrics.intervals import Interval, auroc, mean_interval, wilson
from effnet.runtime.classifier import Classifier
from effnet.runtime.session import Linear
from effnet.training.sureness import IMAGES
from effnet.weights.bundle import find_splits
from effnet.weights.sureness import ScoreName, least_images, score_images

ROOT = Path(__file__).resolve().parent
SCORES: tuple[ScoreName, ...] = get_args(ScoreName)
CHOSEN = "as chosen"
FOLDS, PENALTY = 5, 0.3  # as in learning.py linear
COVERAGES = (0.8, 0.9, 0.95, 0.99)
BATCH = 64


def see(classifier: Classifier, pixels: Iterable[NDArray[np.uint8]], labels: Sequence[int]) -> Seen:
    """Logits and pooled features of images."""
    images, logits, features = list(pixels), [], []
    for first in range(0, len(images), BATCH):
        some, maps = classifier.maps(np.stack(images[first : first + BATCH]))
        logits.append(some)
        features.append(maps.mean((2, 3)))
    return Seen(np.concatenate(logits), np.concatenate(features), np.array(labels, np.int64))


def see_data(classifier: Classifier, data: Dataset) -> Seen:
    """Logits and pooled features of a data set's images."""
    pixels = (load_pixels(data.file(sample), classifier.input) for sample in data.samples)
    return see(classifier, pixels, [sample.label for sample in data.samples])


def digits() -> list[Image.Image]:
    """scikit-learn's digits, white on black like Fashion-MNIST's clothes."""
    from sklearn.datasets import load_digits

    images = np.clip(load_digits().images * (255 / 16), 0, 255).astype(np.uint8)
    return [Image.fromarray(image).resize((28, 28), Image.Resampling.BICUBIC) for image in images]


def figure(found: Interval) -> str:
    """A figure with its interval."""
    return f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"


def fashion(data: Path, run: Path) -> None:
    """Print the AUROC of each score on two kinds of unfamiliar images, what the threshold flags, and set coverage."""
    classifier = effnet.load(run)
    assert classifier.classes is not None
    clothes = match_classes(read_data(data / "fashion"), classifier.classes, "the run's")
    splits = find_splits(str(run), clothes)
    assert splits is not None, "the run has no split.csv of these images"
    parts = {name: [s for s in clothes.samples if splits.get(s.path) == name] for name in ("train", "val", "test")}
    rows = spread_classes(np.array([sample.label for sample in parts["train"]]), IMAGES)
    parts["train"] = [parts["train"][row] for row in rows]
    seen = {name: see_data(classifier, dataclasses.replace(clothes, samples=tuple(s))) for name, s in parts.items()}
    photos = read_data(data / "tuxpaint")
    strangers = {
        "digits": see(classifier, (load_pixels(image, classifier.input) for image in digits()), [0] * len(digits())),
        "Tux Paint": see_data(classifier, photos),
    }
    linear, test = classifier.linear, seen["test"]
    known = fit_familiarity(seen["train"], seen["val"], linear)
    fitted = fit_scores(seen["train"], linear)
    table = []
    for name in SCORES:
        own = score_images(name, fitted[name], test.logits, test.features)
        others = {kind: score_images(name, fitted[name], s.logits, s.features) for kind, s in strangers.items()}
        cells = [figure(auroc(own, scores)) for scores in others.values()]
        table.append((name + (" (kept)" if name == known.score else ""), figure(Interval(*known.aurocs[name])), *cells))
    counts = {kind: len(s.labels) for kind, s in {"val": seen["val"], "test": test, **strangers}.items()}
    console.table(("<score", "classes left out", *strangers), table, title=f"AUROC, {counts}")
    told = [
        (kind, *_share(known.of(s.logits, s.features) < known.threshold))
        for kind, s in {"test": test, **strangers}.items()
    ]
    console.table(("<images", "unfamiliar", "95 % interval"), told, title=f"At the threshold of {known.score}")
    _show_sets(seen["val"], test, f"Label sets, calibrated on {len(seen['val'].labels):,} val images")


def tuxpaint(data: Path, run: Path) -> None:
    """Leave out each class in turn, and test a linear classifier and scores that were fitted without it on it."""
    del run
    classifier, photos = effnet.load("lite0"), read_data(data / "tuxpaint")
    features = see_data(classifier, photos).features
    labels = np.array([sample.label for sample in photos.samples])
    fold_of = np.empty(len(labels), np.int64)
    for label in range(len(photos.classes)):
        fold_of[labels == label] = np.random.default_rng(label).permutation(np.arange((labels == label).sum()) % FOLDS)
    found: dict[str, list[float]] = {name: [] for name in (*SCORES, CHOSEN)}
    chosen: Counter[str] = Counter()
    rows: list[tuple[object, ...]] = []
    for label, name in enumerate(photos.classes):
        values: dict[str, list[float]] = {score: [] for score in found}
        stranger, others = labels == label, labels - (labels > label)
        for fold in range(FOLDS):
            learned, test = ~stranger & (fold_of != fold), ~stranger & (fold_of == fold)
            linear = probe(features[learned], others[learned])
            train, own, strange = (_seen(linear, features, others, rows_) for rows_ in (learned, test, stranger))
            for score, arrays in fit_scores(train, linear).items():
                pair = (score_images(score, arrays, each.logits, each.features) for each in (own, strange))
                values[score].append(auroc(*pair).value)
            score = _choose(features[learned], others[learned])
            chosen[score] += 1
            values[CHOSEN].append(values[score.split()[-1]][-1])
        means = {score: float(np.mean(each)) for score, each in values.items()}
        for score, mean in means.items():
            found[score].append(mean)
        rows.append((name, int(stranger.sum()), *(f"{means[score]:.3f}" for score in found)))
    rows.append(("mean", len(labels), *(f"{np.mean(each):.3f}" for each in found.values())))
    console.table(("<stranger", "photos", *found), rows, title="AUROC, mean of five folds")
    means_of = [(score, figure(mean_interval(each))) for score, each in found.items()]
    console.table(("<score", "<mean over the classes"), means_of, title=f"Chosen: {dict(chosen)}")

    counts = {coverage: np.zeros(3) for coverage in COVERAGES}  # hits, labels and images
    for fold in range(FOLDS):  # sets are calibrated on the previous fold
        val, test = fold_of == (fold - 1) % FOLDS, fold_of == fold
        linear = probe(features[~val & ~test], labels[~val & ~test])
        seen_val, seen = (_seen(linear, features, labels, rows_) for rows_ in (val, test))
        temperature = fit_temperature(seen_val.logits, seen_val.labels)
        sets = calibrate_sets(seen_val.logits, seen_val.labels, temperature)
        for coverage in COVERAGES:
            if sets.n >= least_images(round(100 * coverage)):
                covered, n = measure_sets(seen.logits, seen.labels, temperature, sets, coverage), test.sum()
                counts[coverage] += (covered.found.value * n, covered.labels * n, n)
    rows = [
        (f"{coverage:.0%}", *_share(np.arange(round(n)) < round(hits)), f"{size / n:.2f}")
        for coverage, (hits, size, n) in counts.items()
        if n
    ]
    title = "Label sets, calibrated on one fold of five"
    console.table(("coverage", "found", "95 % interval", "labels"), rows, title=title)


def probe(features: NDArray[np.float32], labels: NDArray[np.int64]) -> Linear:
    """Logistic regression with weight decay PENALTY, as in learning.py linear."""
    import torch

    inputs, truth = torch.from_numpy(features).double(), torch.from_numpy(labels)
    head = torch.nn.Linear(features.shape[1], int(labels.max()) + 1, dtype=torch.float64)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(head(inputs), truth)
        loss = loss + PENALTY * head.weight.square().sum() / len(inputs)
        loss.backward()
        return loss

    optimizer.step(closure)
    return Linear(*(part.detach().float().numpy() for part in (head.weight, head.bias)))


def _seen(linear: Linear, features: NDArray[np.float32], labels: NDArray[np.int64], rows: NDArray[np.bool_]) -> Seen:
    some = features[rows]
    return Seen((some @ linear.weight.T + linear.bias).astype(np.float32), some, labels[rows])


def _choose(features: NDArray[np.float32], labels: NDArray[np.int64]) -> str:
    """The score that effnet would select with every fourth image as val split; max-softmax if it refuses."""
    val = np.arange(len(labels)) % 4 == 0
    linear = probe(features[~val], labels[~val])
    try:
        return fit_familiarity(
            _seen(linear, features, labels, ~val), _seen(linear, features, labels, val), linear
        ).score
    except RefusedError as error:
        return f"refused ({str(error)[:30]}), so {SCORES[0]}"


def _share(flags: NDArray[np.bool_]) -> tuple[str, str]:
    found = wilson(int(flags.sum()), len(flags))
    return f"{found.value:.1%}", f"{found.low:.1%} to {found.high:.1%}"


def _show_sets(val: Seen, test: Seen, title: str) -> None:
    temperature = fit_temperature(val.logits, val.labels)
    sets = calibrate_sets(val.logits, val.labels, temperature)
    found = [measure_sets(test.logits, test.labels, temperature, sets, coverage) for coverage in COVERAGES]
    rows = [
        (
            f"{each.coverage:.0%}",
            f"{each.found.value:.1%}",
            f"{each.found.low:.1%} to {each.found.high:.1%}",
            f"{each.labels:.2f}",
        )
        for each in found
    ]
    console.table(("coverage", "found", "95 % interval", "labels"), rows, title=title)


PARTS: dict[str, Callable[[Path, Path], None]] = {"fashion": fashion, "tuxpaint": tuxpaint}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--data", type=Path, default=ROOT / "data")
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "15-minutes" / "best")
    options = parser.parse_args()
    PARTS[options.part](options.data, options.run)

"""Planted wrong labels: how many are found, compared with cleanlab, and whether the estimated number is right."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from random_weights import shaken
from sklearn.datasets import load_digits
from tiny import tiny_spec, write_spec

from effnet.checking.labels import LISTED, find_label_errors, judge_labels, without_suspects, write_review
from effnet.data.dataset import Dataset, read_data
from effnet.data.duplicates import find_duplicates
from effnet.errors import ArgumentError, RefusedError
from effnet.metrics.linear_probe import assign_folds, out_of_fold
from effnet.models.efficientnet import EfficientNet
from effnet.runtime.prediction import probabilities
from effnet.weights.bundle import save

COMMAND = "check"  # what `run` runs
COLOURS = ("red", "green", "blue")
PLANTED = 60


def digits(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """1,797 handwritten digits as features, their labels with 60 wrong ones, and which those are."""
    found = load_digits()
    random = np.random.default_rng(seed)
    rows = random.permutation(len(found.target))[:PLANTED]
    labels = found.target.copy()
    labels[rows] = (labels[rows] + random.integers(1, 10, PLANTED)) % 10
    planted = np.zeros(len(labels), bool)
    planted[rows] = True
    return found.data.astype(np.float32), labels, planted


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_errors_beside_cleanlab(seed: int) -> None:
    from cleanlab.filter import find_label_issues
    from cleanlab.rank import get_label_quality_scores

    features, labels, planted = digits(seed)
    judged = judge_labels(features, labels, 10, range(len(labels)))
    assert judged.rows.all()
    logits = out_of_fold(features, labels, 10, assign_folds(labels, range(len(labels))), judged.penalty)
    chances = probabilities(logits, judged.noise.temperature)
    np.testing.assert_allclose(judged.self_confidence, get_label_quality_scores(labels, chances), rtol=1e-6)
    order = np.argsort(judged.self_confidence, kind="stable")
    issues = find_label_issues(labels, chances, n_jobs=1)
    assert planted[order[: issues.sum()]].sum() >= planted[issues].sum()
    assert planted[order[:PLANTED]].sum() >= 50


@pytest.mark.parametrize("seed", [0, 1])
def test_as_many_are_wrong_as_was_said(seed: int) -> None:
    features, labels, planted = digits(seed)
    judged = judge_labels(features, labels, 10, range(len(labels)))
    listed = judged.wrong >= LISTED
    assert judged.wrong[listed].sum() == pytest.approx(planted[listed].sum(), rel=0.15)
    assert planted[listed].sum() > 50
    assert judged.noise.rate == pytest.approx(PLANTED / len(labels), rel=0.25)
    right = judge_labels(features, load_digits().target, 10, range(len(labels)))
    assert right.wrong[right.wrong >= LISTED].sum() < 3


def test_the_likely_label_is_the_most_probable_other_one() -> None:
    features, labels, planted = digits(0)
    judged = judge_labels(features, labels, 10, range(len(labels)))
    assert not (judged.likely == labels).any()
    sure = planted & (judged.wrong > 0.9)
    assert sure.sum() > 30
    assert (judged.likely == load_digits().target)[sure].mean() > 0.95


def test_a_copy_in_its_group_does_not_give_a_label_away() -> None:
    features, labels, planted = digits(0)
    row = int(np.flatnonzero(planted)[0])
    copies = np.full(40, row)
    features, labels = np.concatenate([features, features[copies]]), np.concatenate([labels, labels[copies]])
    own = [*range(len(labels) - 40), *copies]
    together = judge_labels(features, labels, 10, own)
    apart = judge_labels(features, labels, 10, range(len(labels)))
    assert together.self_confidence[row] < 0.1 < 0.5 < apart.self_confidence[row]


def test_the_seed_and_nothing_else_changes_the_answer() -> None:
    features, labels, _ = digits(0)
    first, again, other = (judge_labels(features, labels, 10, range(len(labels)), seed=seed) for seed in (3, 3, 4))
    assert np.array_equal(first.self_confidence, again.self_confidence)
    assert not np.array_equal(first.self_confidence, other.self_confidence)


def test_a_class_of_copies_cannot_be_judged() -> None:
    features, labels = np.random.default_rng(0).normal(size=(22, 3)).astype(np.float32), np.arange(22) % 2
    features[:10, 0] += 4 * labels[:10]
    labels[20:] = 2
    judged = judge_labels(features, labels, 3, [*range(20), 20, 20])
    assert judged.rows.tolist() == [True] * 20 + [False] * 2
    with pytest.raises(RefusedError, match="two classes"):
        judge_labels(features[18:], labels[18:], 3, [18, 18, 20, 20])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of a tiny network with random weights."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save(shaken(EfficientNet(tiny_spec())), folder)
    return folder


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """30 images of noise of each of three colours; of the red ones, two are labelled blue, and one is broken."""
    random, root = np.random.default_rng(0), tmp_path_factory.mktemp("colours")
    for channel, name in enumerate(COLOURS):
        (root / name).mkdir(exist_ok=True)
        for number in range(30):
            pixels = random.integers(0, 120, (32, 32, 3))
            pixels[:, :, channel] += 130
            folder = "blue" if (name, number) in (("red", 3), ("red", 14)) else name
            (root / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(root / folder / f"{name}{number}.png")
    (root / "red" / "broken.png").write_bytes(b"")
    return read_data(root)


def test_the_images_with_a_wrong_label_are_named(colours: Dataset, model: Path) -> None:
    found = find_label_errors(colours, model)
    assert [(each.given, each.likely) for each in found.suspects] == [("blue", "red")] * 2
    assert {each.path for each in found.suspects} == {"blue/red3.png", "blue/red14.png"}
    assert (found.judged, found.not_judged, found.resolution) == (90, 1, 32)
    assert found.accuracy.value == pytest.approx(88 / 90)
    assert found.expected == pytest.approx(2, abs=0.2)
    assert find_label_errors(colours, model, resolution=48).resolution == 48


def test_a_review_is_a_manifest_with_both_labels(colours: Dataset, model: Path, tmp_path: Path) -> None:
    found = find_label_errors(colours, model)
    write_review(colours, found, tmp_path / "review.csv")
    with (tmp_path / "review.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(colours)
    assert [(Path(row["path"]).name, row["label"], row["likely"]) for row in rows[:2]] == [
        (Path(each.path).name, "blue", "red") for each in found.suspects
    ]
    assert not any(row["likely"] for row in rows[2:])
    again = read_data(tmp_path / "review.csv")
    files = {colours.file(sample).resolve(): colours.classes[sample.label] for sample in colours.samples}
    assert {again.file(sample).resolve(): again.classes[sample.label] for sample in again.samples} == files
    left = without_suspects(colours, found)
    assert len(left) == len(colours) - 2
    assert not {sample.path for sample in left.samples} & {each.path for each in found.suspects}


def test_duplicates_of_other_images_are_refused(colours: Dataset, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="another data set"):
        find_label_errors(colours, model, duplicates=find_duplicates([]))


@pytest.fixture
def copied(colours: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same in the folder `photos`, without the broken image."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(colours.root, tmp_path / "photos")
    (tmp_path / "photos/red/broken.png").unlink()
    return tmp_path


def test_the_command_says_how_many_are_wrong(run: Any, copied: Path, model: Path) -> None:
    code, out, err = run("photos", "--labels", "--model", model, "--limit", 1)
    assert code == 0
    words = " ".join(out.split())
    assert "warning: 2 labels to look at, about 2 of these 2 are wrong" in words
    assert "features at 32 px predict 97.8% of 90 held-out labels" in words
    assert "labelled blue, rather red (wrong: " in out
    assert "... and 1 more" in out
    assert f"Next: effnet check photos --labels --model {model} --pictures labels.jpg --review labels.csv" in err
    assert "labels" not in run("photos", "--model", model)[1]


def test_the_command_writes_a_review_a_sheet_and_the_rest(
    run: Any, copied: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sheets: list[Any] = []
    monkeypatch.setattr("effnet.checking.command.draw_sheet", lambda cells, *_, **__: sheets.append(cells))
    files = "--review", "new/labels.csv", "--fix", "clean.csv", "--pictures", "labels.jpg"
    before = {path: path.read_bytes() for path in copied.rglob("*.png")}
    code, out, err = run("photos", "--labels", "--model", model, "--json", *files)
    labels = json.loads(out)["labels"]
    assert code == 0
    assert (labels["judged"], labels["not_judged"], len(labels["suspects"])) == (90, 0, 2)
    assert labels["expected"] == pytest.approx(sum(each["wrong"] for each in labels["suspects"]))
    assert "Written: clean.csv, 88 of 90 images" in err
    assert "Left out: 2 of 32 of blue" in err
    assert "Written: new/labels.csv, 90 images, the 2 suspects first" in err
    assert "Drawn: labels.jpg, 2 images" in err
    assert err.endswith("Next: effnet train new/labels.csv\n")
    assert [text for text, _ in sheets[0][0].lines[:2]] == ["labelled blue", "rather red"]
    assert len(read_data("new/labels.csv")) == 90
    assert len(read_data("clean.csv")) == 88
    assert {path: path.read_bytes() for path in copied.rglob("*.png")} == before


def test_nothing_stands_out(run: Any, copied: Path, model: Path) -> None:
    for path in (copied / "photos/blue").glob("red*"):
        path.unlink()
    code, out, err = run("photos", "--labels", "--model", model, "--pictures", "labels.jpg", "--review", "labels.csv")
    assert code == 0
    assert "No label stands out as wrong" in out
    assert "Nothing to draw: no label stands out." in err
    assert not (copied / "labels.jpg").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--review", "labels.csv"], "add --labels"),
        (["--labels", "--review", "labels.txt"], "must end in .csv"),
        (["--labels", "--review", "a.csv", "--fix", "a.csv"], "is also the file of --fix"),
        (["--labels", "--model", "spec.yaml"], "without weights"),
        (["--labels", "--model", "lite9"], "Did you mean 'lite4'"),
    ],
)
def test_wrong_usage(run: Any, copied: Path, words: list[str], message: str) -> None:
    write_spec(copied / "spec.yaml")
    code, out, err = run("photos", *words)
    assert (code, out) == (2, "")
    assert message in err


def test_one_class_is_refused(run: Any, copied: Path, model: Path) -> None:
    shutil.rmtree(copied / "photos/red")
    shutil.rmtree(copied / "photos/green")
    code, _, err = run("photos", "--labels", "--model", model)
    assert code == 1
    assert "two classes" in err

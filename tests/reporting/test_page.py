"""The contents and the size of a page."""

from __future__ import annotations

import dataclasses
import html
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from reported import CLASSES, draw

from effnet.data.dataset import Dataset, Sample
from effnet.metrics.evaluate import evaluate
from effnet.reporting import sections
from effnet.reporting.budget import tabulate_candidates
from effnet.reporting.page import LIMIT, write_report
from effnet.reporting.pictures import Pictures
from effnet.reporting.subject import Subject, suspect_labels


class Words(HTMLParser):
    """The text of a page, and its headings."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.ids, self.tags = "", set[str](), list[str]()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids |= {value or "" for name, value in attrs if name == "id"}

    def handle_data(self, data: str) -> None:
        self.text += data


def written(subject: Subject, folder: Path) -> Words:
    return Words(write_report(subject, folder / "report.html").read_text("utf-8"))


def test_every_part_has_its_place(subject: Subject, fitted: Subject, tmp_path: Path) -> None:
    common = {"threshold", "confusion", "mistakes", "labels", "calibration", "unfamiliar", "classes", "network"}
    found = written(subject, tmp_path)
    assert common | {"data", "origin"} <= found.ids
    assert not {"budget", "candidates"} & found.ids
    assert {"budget", "candidates"} <= written(fitted, tmp_path).ids
    bare = dataclasses.replace(subject, scores=None, suspects=[], neighbours=None, history=())
    found = written(bare, tmp_path)
    assert not {"unfamiliar", "labels"} & found.ids
    assert "Nearest training images" not in found.text
    assert "after each epoch" not in found.text


def test_the_verdict_has_the_interval(subject: Subject, fitted: Subject, tmp_path: Path) -> None:
    right = int((subject.logits.argmax(1) == subject.labels).sum())
    top1 = subject.evaluation.top1
    words = f"{right / 1.2:.1f}% ({100 * top1.low:.1f}% to {100 * top1.high:.1f}%) of 120 images of the test split"
    assert words in written(subject, tmp_path).text
    text = written(fitted, tmp_path).text
    assert "Does not keep the budget" in text
    assert "small needs 1 ms" in text
    assert "latency 30 ms, allowed 5 ms" in text
    assert "tiny is better than small by 3 points." in text
    on_val = written(dataclasses.replace(subject, split="val"), tmp_path).text
    assert "chosen on these images" in on_val


@pytest.mark.parametrize("split", ["all", "train"])
def test_labels_that_a_model_knows_by_heart_are_not_suspected(subject: Subject, tmp_path: Path, split: str) -> None:
    assert subject.suspects is None
    assert "labels" not in written(dataclasses.replace(subject, split=split), tmp_path).ids


def test_names_are_text(fitted: Subject, tmp_path: Path) -> None:
    found = written(fitted, tmp_path)
    assert found.tags.count("script") == 2  # the numbers of the slider, and the script
    assert "i" not in found.tags
    assert all(name in found.text for name in CLASSES)


def test_the_same_subject_gives_the_same_bytes(subject: Subject, tmp_path: Path) -> None:
    pages = [write_report(subject, tmp_path / f"{n}.html").read_bytes() for n in range(2)]
    assert pages[0] == pages[1]


def made_up(subject: Subject, data: Dataset, names: tuple[str, ...], count: int) -> Subject:
    """As many images of random classes, with random answers, of which a model of four classes knows nothing."""
    random = np.random.default_rng(0)
    labels, logits = random.integers(0, len(names), count), random.normal(size=(count, len(names))).astype(np.float32)
    samples = tuple(Sample(data.samples[i % len(data)].path, int(label), "test") for i, label in enumerate(labels))
    images = dataclasses.replace(data, classes=names, samples=samples)
    found = evaluate(logits, labels, names)
    return dataclasses.replace(subject, data=images, logits=logits, evaluation=found, scores=None, neighbours=None)


def test_a_page_stays_below_its_limit(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "explain_mistakes", lambda *_: [])
    names = tuple(f"{'<&>' * 70}{n}" for n in range(20))
    full = made_up(subject, draw(tmp_path / "photos", 20, size=(112, 112)), names, 8000)
    page = write_report(full, tmp_path / "report.html").read_bytes()
    assert 2_000_000 < len(page) <= LIMIT
    monkeypatch.setattr("effnet.reporting.page.LIMIT", 900_000)
    assert 700_000 < len(write_report(full, tmp_path / "report.html").read_bytes()) <= 900_000


def test_many_classes_are_cut_and_said(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "explain_mistakes", lambda *_: [])
    names = tuple(f"{'<&>' * 70}{n}" for n in range(1500))
    many = made_up(subject, dataclasses.replace(subject.data, root=tmp_path), names, 4000)  # no image is there
    page = write_report(many, tmp_path / "report.html").read_bytes()
    assert len(page) < 800_000
    text = Words(page.decode()).text
    assert re.search(r"Of 1,?\d+ classes, the \d+ that are mixed up most often", text)
    assert "The 300 classes of lowest F1, of 1" in text


def test_pictures_stop_where_there_is_no_room(subject: Subject) -> None:
    file = subject.data.file(subject.data.samples[0])
    full = Pictures(10**6).file(file)
    assert full is not None
    pictures = Pictures(2 * len(full.source))
    assert [pictures.file(file) is not None for _ in range(3)] == [True, True, False]
    assert Pictures(10**6).file(file.with_name("gone.png")) is None


def test_a_picture_that_is_gone_is_said(subject: Subject, tmp_path: Path) -> None:
    file = tmp_path / "gone.png"
    gone = dataclasses.replace(subject, suspects=[(str(file), "a", "b", 0.1)])
    assert "no picture" in written(gone, tmp_path).text


def test_file_names_that_are_not_utf_8(subject: Subject, tmp_path: Path) -> None:
    odd = dataclasses.replace(subject, suspects=[("b\udcff\u202e.png", "a", "b", 0.1)])
    assert "b\\udcff.png" in written(odd, tmp_path).text


def test_suspects_are_confident_mistakes(subject: Subject) -> None:
    chances = np.exp(subject.logits.astype(np.float64) / 0.5)
    chances /= chances.sum(1, keepdims=True)
    own = chances[np.arange(len(chances)), subject.labels]
    expected = np.flatnonzero((chances.argmax(1) != subject.labels) & (chances.max(1) >= 0.9))
    found = suspect_labels(subject.data, subject.logits, 0.5)
    assert len(found) > 2
    assert [each.path for each in found] == [subject.data.samples[i].path for i in sorted(expected, key=own.item)]
    assert [each.self_confidence for each in found] == pytest.approx(sorted(own[expected]))


def test_the_nearest_training_image_of_itself(subject: Subject) -> None:
    pictures = Pictures(10**6)
    first = next(sections.explain_mistakes(subject, pictures))
    row = subject.mistakes[0]
    near = first["nearest"][0]
    assert (near["name"], near["similarity"]) == (CLASSES[subject.labels[row]], "1.00")
    assert near["picture"] == Pictures(10**6).file(subject.data.file(subject.data.samples[row]))
    wrong = subject.predicted != subject.labels
    assert subject.confidence[row] == subject.confidence[wrong].max()


def test_the_slider_counts_as_numpy_does(subject: Subject) -> None:
    found = sections.tabulate_coverage(subject)
    right = subject.predicted == subject.labels
    assert found["points"][-1] == [round(subject.confidence.min(), 5), 120, int(right.sum())]
    for least, answered, correct in found["points"]:
        given = subject.confidence >= least - 1e-5
        assert (answered, correct) == (int(given.sum()), int(right[given].sum()))
    assert abs(found["points"][found["mark"]][0] - 0.6) < 0.02  # the model's own threshold


def test_many_classes_are_cut_to_those_that_are_mixed_up(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sections, "NAMED", 2)
    worst = subject.evaluation.mistakes[0]
    found = sections.tabulate_confusion(subject, Pictures(10**6))
    assert set(found["names"]) == {worst.true, worst.predicted}
    assert found["of"] == 4
    (row,) = [row for row in found["rows"] if row["name"] == worst.true]
    assert row["cells"][found["names"].index(worst.predicted)]["count"] == worst.count


def test_no_mistakes_and_one_image(subject: Subject, tmp_path: Path) -> None:
    data = dataclasses.replace(subject.data, samples=subject.data.samples[:1])
    logits = 9 * np.eye(4, dtype=np.float32)[subject.labels[:1]]
    alone = dataclasses.replace(
        subject,
        **{"data": data, "logits": logits, "scores": None, "sureness": None, "calibration": None},
        evaluation=evaluate(logits, subject.labels[:1], CLASSES),
    )
    found = written(alone, tmp_path)
    assert "100.0%" in found.text
    assert not {"mistakes", "labels", "unfamiliar"} & found.ids


def test_the_policy_names_what_is_in_the_page(subject: Subject, tmp_path: Path) -> None:
    import base64
    import hashlib

    page = write_report(subject, tmp_path / "report.html").read_text("utf-8")
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1])  # type: ignore[index]
    assert policy.startswith("default-src 'none'")
    for tag in ("style", "script"):
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"https?://", page)
    assert not re.search(r"<[^>]+\sstyle=", page)


def test_logits_of_other_images_are_refused(subject: Subject) -> None:
    with pytest.raises(ValueError, match="119 images"):
        dataclasses.replace(subject, logits=subject.logits[:-1])


@pytest.mark.parametrize("tried", [True, False])
def test_candidates_by_accuracy_else_by_two_costs(fitted: Subject, tried: bool) -> None:
    assert fitted.fit is not None
    rows = [row if tried else row | {"probe": None, "short": None} for row in fitted.fit["candidates"]]
    untimed = rows[1] | {"name": "huge", "latency": None}
    found = tabulate_candidates({**fitted.fit, "candidates": [*rows, untimed]})
    root = ElementTree.fromstring(found["svg"])
    texts = {each.text for each in root.iter("text")}
    assert ("right on val" in texts, "not tried" in texts) == (tried, tried)
    assert "your limit" in texts
    shapes = [each.get("class") or "" for each in root.iter("path")]
    assert sorted(shapes) == ["circle", "cross", "diamond"]
    titles = [each.text for each in root.iter("title")]
    assert "large: latency 30 ms, allowed 5 ms" in titles
    assert (found["of"], found["undrawn"]) == (4, 1)

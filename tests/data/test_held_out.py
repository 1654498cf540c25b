"""Which images are evaluated: DATA's splits, a model's split.csv, and what is said about the rest."""

import os
import unicodedata
from pathlib import Path

import pytest

from effnet.data.dataset import Dataset, Sample, split_data
from effnet.data.held_out import hold_out, match_split, train_and_val, trained_images
from effnet.errors import DataError, UnknownNameError


def dataset(**parts: str) -> Dataset:
    """Images by path, with their split; "" for none."""
    return Dataset(Path("photos"), ("a", "b"), tuple(Sample(path, 0, split) for path, split in parts.items()))


SPLIT = dataset(t1="train", t2="train", v1="val", e1="test", e2="test")
PLAIN = dataset(t1="", t2="", v1="", e1="", e2="", n1="")
KNOWN = {"t1": "train", "t2": "train", "v1": "val", "e1": "test", "e2": "test"}


def paths(data: Dataset | None) -> list[str]:
    return [sample.path for sample in data.samples] if data else []


@pytest.mark.parametrize(
    ("split", "judged", "val"),
    [
        (None, ["e1", "e2"], ["v1"]),
        ("test", ["e1", "e2"], ["v1"]),
        ("val", ["v1"], []),
        ("train", ["t1", "t2"], ["v1"]),
        ("all", ["t1", "t2", "v1", "e1", "e2"], []),
    ],
)
def test_the_datas_own_splits(split: str | None, judged: list[str], val: list[str]) -> None:
    chosen = hold_out(SPLIT, {"lite0": None}, split)
    assert chosen.split == (split or "test")
    assert paths(chosen.data) == judged
    assert paths(chosen.val) == val
    assert chosen.notes == ()
    assert chosen.trained == 0


def test_without_a_test_part_the_val_part_is_judged() -> None:
    chosen = hold_out(dataset(t1="train", v1="val"), {"m": None})
    assert (chosen.split, paths(chosen.data), chosen.val) == ("val", ["v1"], None)
    with pytest.raises(DataError, match="only train; --split train evaluates that, --split all everything"):
        hold_out(dataset(t1="train"), {"m": None})
    with pytest.raises(UnknownNameError, match="choose from train, val, all"):
        hold_out(dataset(t1="train", v1="val"), {"m": None}, "test")


@pytest.mark.parametrize(
    ("data", "known", "train", "val"),
    [
        (SPLIT, KNOWN, ["t1", "t2"], ["v1"]),
        (PLAIN, KNOWN, ["t1", "t2"], ["v1"]),
        (SPLIT, None, ["t1", "t2"], ["v1"]),
        (SPLIT, {"x": "train"}, ["t1", "t2"], ["v1"]),  # of other images
        # training took v1 out of the train split; what it does not know, n1, is in the data's train split
        (dataset(t1="train", v1="train", n1="train", e1="test"), KNOWN, ["t1", "n1"], ["v1"]),
        # trained on v2 and v3: they cannot judge, and what the data calls val or test does not calibrate
        (dataset(t1="train", v1="val", v2="val", v3="test"), KNOWN | {"v2": "train", "v3": "train"}, ["t1"], ["v1"]),
        (dataset(t1="train", v1="test", v2="val"), KNOWN, ["t1"], ["v2"]),
    ],
)
def test_what_calibrates_and_what_judges(data: Dataset, known: dict | None, train: list[str], val: list[str]) -> None:
    found = train_and_val(data, "best", known)
    assert paths(found.train) == train
    assert paths(found.val) == val
    listed = known is not None and "t1" in known
    assert [note.partition(" has no split.csv")[0] for note in found.notes] == ([] if listed else ["best"])


def test_unsplit_data_is_split_as_in_training() -> None:
    whole = dataset(**{f"i{number}": "" for number in range(40)})
    found = train_and_val(whole, "lite0", None)
    parts = split_data(whole)
    assert paths(found.train) == paths(parts.subset("train"))
    assert paths(found.val) == paths(parts.subset("val"))
    assert (len(found.train), len(found.val)) == (28, 6)
    with pytest.raises(DataError, match="has no image to evaluate best with: its val split is empty"):
        train_and_val(dataset(t1="", e1=""), "best", KNOWN)
    with pytest.raises(DataError, match="has no image to calibrate best with: its train split is empty"):
        train_and_val(dataset(v1="", e1=""), "best", KNOWN)
    with pytest.raises(DataError, match="has 'test' and no train split"):
        train_and_val(dataset(e1="test"), "lite0", None)


def test_a_models_own_parts_where_the_data_has_none() -> None:
    chosen = hold_out(PLAIN, {"best": KNOWN})
    assert (chosen.split, paths(chosen.data), paths(chosen.val)) == ("test", ["e1", "e2"], ["v1"])
    assert chosen.notes == (
        "the splits are those of split.csv in best",
        "1 image of photos is not in it and left out; --split new evaluates them",
    )
    gone = hold_out(dataset(t1="", e1=""), {"best": KNOWN})
    assert "1 image of its test split is not in photos any more" in gone.notes
    (*_, selected) = hold_out(PLAIN, {"best": KNOWN}, "val").notes
    assert selected.startswith("best was selected and calibrated on 1 of these images")
    new = hold_out(PLAIN, {"best": KNOWN}, "new")
    assert (paths(new.data), paths(new.val), new.trained) == (["n1"], ["v1"], 0)


def test_training_images_are_a_finding_unless_they_are_chosen() -> None:
    for split in ("train", "all"):
        chosen = hold_out(PLAIN, {"best": KNOWN}, split)
        assert f"trained on 2 of these {len(chosen.data)} images: the figures are too good" in chosen.notes
        assert chosen.trained == 0
    leaking = dataset(t1="test", e1="test", t2="val", v1="val", n1="train")
    chosen = hold_out(leaking, {"best": KNOWN})
    assert chosen.trained == 1
    assert "trained on 1 of these 2 images: the figures are too good" in chosen.notes
    assert paths(chosen.val) == ["v1"]  # a temperature is not fitted on what it was trained on


def test_the_images_that_a_model_was_trained_on() -> None:
    assert paths(trained_images(PLAIN, KNOWN)) == ["t1", "t2"]
    assert paths(trained_images(dataset(t1="train", e1="test"), None)) == ["t1"]
    assert paths(trained_images(dataset(t1="test", e1="train"), KNOWN)) == ["t1"]  # the model's own word counts
    assert not len(trained_images(PLAIN, None))


@pytest.mark.parametrize("known", [None, {"other/1.jpg": "test"}])
def test_unsplit_data_that_nobody_knows(known: dict[str, str] | None) -> None:
    words = "has no split.csv" if known is None else "split.csv in m lists none of its images"
    for split in (None, "test"):
        with pytest.raises(DataError, match=f"photos is not split, and .*{words}") as caught:
            hold_out(PLAIN, {"m": known}, split)
        for way in ("--split all evaluates all 6 images", "folders train, val and test", "a column split"):
            assert way in str(caught.value)
    chosen = hold_out(PLAIN, {"m": known}, "all")
    assert len(chosen.data) == 6
    assert chosen.val is None


def test_two_models_are_judged_on_what_neither_has_seen() -> None:
    other = {"t1": "test", "t2": "train", "v1": "test", "e1": "train", "e2": "test", "n1": "test"}
    chosen = hold_out(PLAIN, {"a": KNOWN, "b": other})
    assert paths(chosen.data) == ["e2", "n1"]
    assert chosen.trained == 0
    stranger = hold_out(PLAIN, {"a": KNOWN, "lite0": None})
    assert paths(stranger.data) == ["e1", "e2"]
    assert stranger.notes[-1].startswith("lite0 has no split.csv that lists these images")


def test_images_are_matched_by_absolute_path_or_by_path_and_size(tmp_path: Path) -> None:
    for folder in ("old", "new"):
        for number in range(3):
            file = tmp_path / folder / "a" / f"{number}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"x" * (10 if folder == "old" or number < 2 else 11))
    rows = [("old/a/0.jpg", "train"), ("old/a/1.jpg", "val"), ("old/a/2.jpg", "test")]
    parts = {}
    for root in (tmp_path, tmp_path / "old"):  # by a manifest beside the folder, and by the folder itself
        text = "path,label,split,group,bytes\n"
        text += "".join(f"{os.path.relpath(tmp_path / path, root)},a,{part},,10\n" for path, part in rows)
        for folder in ("old", "new"):
            here = Dataset(tmp_path / folder, ("a",), tuple(Sample(f"a/{number}.jpg", 0) for number in range(3)))
            found = match_split(text, root, here)
            parts[root.name == "old", folder] = [found.get(sample.path) for sample in here.samples]
    assert parts[False, "old"] == parts[True, "old"] == ["train", "val", "test"]
    assert parts[False, "new"] == [None, None, None]
    assert parts[True, "new"] == ["train", "val", None]  # one of the new images is another


def test_images_are_matched_in_any_form_of_unicode(tmp_path: Path) -> None:
    composed, decomposed = (unicodedata.normalize(form, "café/é.jpg") for form in ("NFC", "NFD"))
    (tmp_path / composed).parent.mkdir()
    (tmp_path / composed).write_bytes(b"x" * 10)
    (tmp_path / decomposed).parent.mkdir()
    (tmp_path / decomposed).write_bytes(b"x" * 10)
    for there, here in ((decomposed, composed), (composed, decomposed)):
        data = Dataset(tmp_path, ("café",), (Sample(here, 0),))
        text = f"path,label,split,group,bytes\n{there},café,train,,10\n"
        assert match_split(text, tmp_path / "mac", data) == {here: "train"}

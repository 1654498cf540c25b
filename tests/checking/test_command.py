"""The command effnet check."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import ImageOps
from planted import scaled, sound_data, textures

from effnet.data.dataset import read_data
from effnet.plots.style import RED

COMMAND = "check"  # what `run` runs


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    return sound_data(tmp_path_factory.mktemp("sound"), 10)


@pytest.fixture(autouse=True)
def folder(sound, tmp_path, monkeypatch):
    """photos: a sound data set of two classes."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(sound, tmp_path / "photos")
    return tmp_path


@pytest.fixture
def spoiled(folder):
    """A leak, a contradiction, five broken files and a mirror image with another label."""
    new = list(textures(4, seed=3))
    new[0].save(folder / "photos/val/cat/new.png")
    scaled(new[0], 0.7).save(folder / "photos/train/cat/leaked.jpg", quality=80)
    new[1].save(folder / "photos/train/cat/both.png")
    new[1].save(folder / "photos/train/dog/both.png")
    new[2].save(folder / "photos/train/cat/b.png")
    ImageOps.mirror(new[2]).save(folder / "photos/train/dog/d.png")
    for number in range(5):
        (folder / f"photos/train/dog/empty{number}.jpg").touch()
    return folder


def test_sound_data(run):
    code, out, err = run("photos")
    assert code == 0
    assert "photos: 40 images, 2 classes" in out
    assert "lite0 sees 224 x 224" in out
    assert "No faults were found" in out
    assert err == "Next: effnet train photos\n"


def test_spoiled_data(run, spoiled):
    code, out, err = run("photos", "--limit", 2)
    assert code == 1
    lines = out.splitlines()
    assert "error: 5 unreadable files. Replace them or leave them out: training needs every image." in lines
    assert "  train/dog/empty0.jpg: is empty: 0 bytes" in lines
    assert "  ... and 3 more" in lines
    assert "  train/cat/both.png = train/dog/both.png: the same file" in lines
    assert any(line.startswith("  train/cat/leaked.jpg = val/cat/new.png: alike (") for line in lines)
    assert "warning: 1 mirror image with another label" in out
    assert out.index("error: 1 image in several splits") < out.index("warning:")
    assert err == "Next: effnet check photos --pictures copies.jpg --fix clean.csv\n"
    assert not (spoiled / "clean.csv").exists()


def test_fix_writes_a_manifest_that_is_clean(run, spoiled):
    before = sorted(path for path in spoiled.rglob("*"))
    code, _, err = run("photos", "--fix", "lists/clean.csv")
    assert code == 1
    assert err.splitlines() == [
        "Written: lists/clean.csv, 43 of 51 images",
        "Left out: 6 of 27 of dog, 2 of 24 of cat",
        "Next: effnet train lists/clean.csv",
    ]
    assert len(read_data("lists/clean.csv")) == 43
    assert sorted(path for path in spoiled.rglob("*") if "lists" not in path.parts) == before
    code, out, err = run("lists/clean.csv", "--fix", "again.csv")
    assert code == 0
    assert "lists/clean.csv: 43 images" in out
    assert "error" not in out
    assert "43 of 43 images" in err


def test_what_is_passed_over_and_taken_away(run, folder):
    for path in (folder / "photos/train/cat").iterdir():
        if path.name != "00.png":
            shutil.copy(folder / "photos/train/cat/00.png", path)
    for number in range(5):
        (folder / f"photos/train/cat/file{number}").touch()
    code, out, err = run("photos", "--fix", "clean.csv")
    assert code == 0
    assert "warning: 5 files passed over." in out
    assert "  train/cat/file0, train/cat/file1, train/cat/file2, 2 more: no suffix" in out.splitlines()
    assert "Left out: 9 of 20 of cat" in err
    for name in ("train", "val"):
        for path in (folder / "photos" / name / "dog").iterdir():
            path.write_bytes(b"")
    _, _, err = run("photos", "--fix", "clean.csv")
    assert "Left out: 20 of 20 of dog (none is left), 9 of 20 of cat" in err


def test_json_has_everything(run, spoiled):
    code, out, err = run("photos", "--json", "--resolution", 64, "--limit", 1)
    values = json.loads(out)
    assert code == 1
    assert (values["data"], values["images"], values["resolution"]) == ("photos", 51, 64)
    assert values["errors"] == 7
    assert sum(row["kind"] == "unreadable" for row in values["findings"]) == 5
    assert "Next:" in err


def test_pictures(run, spoiled, monkeypatch):
    sheets = []
    monkeypatch.setattr("effnet.checking.command.draw_sheet", lambda cells, *_, **__: sheets.append(cells))
    code, _, err = run("photos", "--pictures", "new/pairs.jpg")
    assert code == 1
    assert "Drawn: new/pairs.jpg, 3 pairs" in err
    conflict, leak, mirror = sheets[0]
    assert [path.as_posix() for path in conflict.photos] == ["photos/train/cat/both.png", "photos/train/dog/both.png"]
    assert [text for text, _ in leak.lines[1:]] == ["1: train/cat/leaked.jpg", "2: val/cat/new.png"]
    assert conflict.lines[0] == ("image with several labels: the same file", RED)
    assert mirror.lines[0][0].startswith("mirror image with another label: mirrored")


def test_nothing_to_draw(run, folder):
    code, _, err = run("photos", "--pictures", "pairs.png")
    assert code == 0
    assert "Nothing to draw: no copies." in err
    assert not (folder / "pairs.png").exists()


def test_the_models_resolution_is_what_counts(run):
    _, out, _ = run("photos", "--model", "b7")
    assert "b7 sees 600 x 600" in out
    assert "train with --resolution" in " ".join(out.split())
    assert "train with" not in run("photos", "--model", "b7", "--resolution", 128)[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["phtos"], "Did you mean 'photos'?"),
        (["photos/train/cat"], "has no sub-folders"),
        (["notes.txt"], "notes.txt"),
        (["photos", "--fix", "clean.txt"], "must end in .csv"),
        (["photos", "--fix", "folder.csv"], "is a folder"),
        (["list.csv", "--fix", "list.csv"], "is the data itself"),
        (["photos", "--pictures", "pairs.gif"], "must end in .jpg, .jpeg, .png"),
        (["photos", "--limit", "0"], "`limit`"),
        (["photos", "--resolution", "0"], "`resolution`"),
        (["photos", "--resolution", "big"], "'big'"),
        (["photos", "--model", "b9"], "Did you mean 'b8'?"),
        ([], "data"),
    ],
)
def test_wrong_usage(run, folder, words, message):
    (folder / "folder.csv").mkdir()
    (folder / "notes.txt").write_text("hello\nworld\n")
    (folder / "list.csv").write_text("path,label\nphotos/train/cat/00.png,cat\n")
    code, out, err = run(*words)
    assert code == 2
    assert message in err
    assert out == ""

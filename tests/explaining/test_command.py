"""The command effnet explain."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from effnet.explaining.command import _gain, _verdict
from effnet.explaining.faithfulness import Faithfulness, summarise
from effnet.metrics.intervals import Interval
from effnet.plots.contact_sheet import TILE

COMMAND = "explain"  # what `run` runs
BLOCKED = "import sys; sys.modules |= dict.fromkeys(('torch', 'torchvision', 'matplotlib', 'onnx', 'openvino'))\n"


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Few levels and orders, so that a photo takes a moment; the working folder is empty."""
    monkeypatch.setattr("effnet.explaining.faithfulness.LEVELS", 3)
    monkeypatch.setattr("effnet.explaining.faithfulness.ORDERS", 2)
    monkeypatch.chdir(tmp_path)


def test_a_photo(run, photos) -> None:
    code, out, err = run(photos / "coffee.png")
    assert code == 0
    head, *lines = out.splitlines()
    assert head.split()[:4] == ["file", "class", "logit", "residual"]
    assert "espresso" in lines[1]
    assert float(lines[1].split()[2]) < 1e-5
    assert "chance" in out
    assert f"Written: {Path('runs/explain/coffee')}" in err
    assert "Next: effnet val lite0" in err
    with Image.open("runs/explain/coffee/coffee.jpg") as picture:
        assert picture.size[0] > 2 * picture.size[1] / 2
        colours = np.asarray(picture, np.int64)
    assert sorted(path.name for path in Path("runs/explain/coffee").iterdir()) == ["coffee.jpg"]
    assert (colours[..., 0] - colours[..., 2]).max() > 100  # orange


def test_json_has_a_line_for_each_file_and_the_map_sums_to_the_logit(run, photos, tmp_path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    code, out, err = run(photos, tmp_path / "broken.jpg", "--json")
    assert code == 1
    *found, broken = map(json.loads, out.splitlines())
    assert broken.keys() == {"file", "error"}
    for values in found:
        assert list(values) == ["file", "class", "logit", "residual", "map", "deletion", "insertion", "gain"]
        assert np.shape(values["map"]) == (7, 7)
        assert np.sum(values["map"]) == pytest.approx(values["logit"], rel=1e-5)
        assert values["residual"] < 1e-5
        gain = values["gain"]
        assert gain["low"] < gain["value"] < gain["high"]
        assert gain["value"] == pytest.approx(values["insertion"] - values["deletion"])
    assert "2 maps, mean gain" in err
    assert not Path("runs").exists()


def test_classes_and_a_sheet(run, photos) -> None:
    code, out, _ = run(photos, "--class", "tabby", "--versus", "tiger cat", "--out", "drawn", "--fine")
    assert code == 0
    assert out.count("tabby against tiger cat") == 2
    assert {path.name for path in Path("drawn").iterdir()} == {"coffee.jpg", "chelsea.jpg", "sheet.jpg"}
    with Image.open("drawn/sheet.jpg") as sheet:
        assert sheet.width > 4 * TILE
    code, out, _ = run(photos / "coffee.png", "--topk", 3, "--check")
    assert code == 0
    assert len(out.split("gain over chance")[1].splitlines()) > 3
    assert not Path("runs").exists()


def test_names_of_one_stem_are_numbered(run, photos, tmp_path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        Image.open(photos / "coffee.png").save(tmp_path / folder / "x.png")
    run("a/x.png", "b/x.png", "--out", "drawn")
    assert {path.name for path in Path("drawn").iterdir()} == {"x.jpg", "x-2.jpg", "sheet.jpg"}


def test_after_a_kill_the_same_command_can_be_given_again(run, photos, tmp_path, tmp_path_factory, monkeypatch) -> None:
    killed = tmp_path_factory.mktemp("killed") / "there"

    def stop(*_, **__) -> None:
        shutil.copytree(tmp_path, killed)  # what kill -9 leaves once all pictures but the sheet are written

    with monkeypatch.context() as patch:
        patch.setattr("effnet.plots.contact_sheet.draw_sheet", stop)
        run(photos, "--out", "drawn")
    assert [each.name for each in killed.rglob("chelsea.jpg")]
    monkeypatch.chdir(killed)
    code, _, err = run(photos, "--out", "drawn")
    assert (code, "Written: drawn" in err) == (0, True)
    assert {path.name for path in Path("drawn").iterdir()} == {"coffee.jpg", "chelsea.jpg", "sheet.jpg"}
    code, _, err = run(photos / "coffee.png", "--out", "drawn")
    said = "effnet: `out` (='drawn') exists and holds something else; choose another folder."
    assert (code, err.splitlines()[-1]) == (2, said)  # not: go on with it by --resume, which explain does not have


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "must name a file"),
        (("x.jpg", "--check", "--out", "o"), "--check draws none"),
        (("x.jpg", "--class", "tabby", "--topk", 2), "--class names one"),
        (("x.jpg", "--class", "tabi"), "`class` (='tabi') is not one of the model's 1000 classes. Did you"),
        (("x.jpg", "--versus", "espreso"), "Did you mean 'espresso'"),
    ],
)
def test_what_is_refused_in_one_line(run, words, said) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_what_cannot_be_read_leaves_no_folder(run) -> None:
    code, out, err = run("x.jpg")
    assert (code, out.splitlines()[1]) == (1, "x.jpg unreadable: does not exist")
    assert "Written" not in err
    assert not list(Path("runs/explain").glob("*"))


def test_the_plain_install_is_enough(photos) -> None:
    program = BLOCKED + "from effnet.cli import main; main(sys.argv[1:])"
    words = [sys.executable, "-c", program, "explain", str(photos / "coffee.png"), "--json", "--out", "drawn"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["class"] == "espresso"
    assert Path("drawn/coffee.jpg").exists()


def true(value: float, reach: float, centre: float = 0.0) -> Faithfulness:
    return Faithfulness(0.1, 0.1 + value, Interval(value, value - reach, value + reach), centre)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([true(0.1, 0.2)], "is no better than chance"),
        ([true(0.3, 0.2)], "is better than chance"),
        ([true(0.1, 0.2), true(-0.1, 0.2)], "not shown to be better than chance; 0 beat it"),
        ([true(0.3, 0.2, 0.1), true(0.31, 0.4, 0.1)], ": better than chance; 1 beat it"),
        ([true(0.3, 0.2, 0.1), true(0.31, 0.4, 0.1)], "more than a subject in the middle explains"),
        ([true(0.3, 0.2, 0.3), true(0.31, 0.4, 0.3)], "not shown to be more than a subject"),
    ],
)
def test_the_verdict(found: list[Faithfulness], said: str) -> None:
    assert said in _verdict(summarise(found))
    assert ("no better than chance" in _gain(found[0])) == (found[0].gain.low <= 0)


def test_a_sheet_of_the_first_photos(run, photos, monkeypatch: pytest.MonkeyPatch) -> None:
    titles: list[str] = []
    monkeypatch.setattr("effnet.explaining.command.SHOWN", 2)
    monkeypatch.setattr("effnet.plots.contact_sheet.draw_sheet", lambda cells, title, out, across: titles.append(title))
    run(photos / "coffee.png", photos / "chelsea.png", photos / "coffee.png", "--out", "drawn")
    assert "the first 2 of 3 photos" in titles[0]
    assert len(list(Path("drawn").iterdir())) == 3

"""The command effnet search: its output, its files and its errors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ran import Run

COMMAND = "search"

pytestmark = pytest.mark.usefixtures("in_this_process")
BASELINE = str(Path(__file__).parents[2] / "examples" / "baselines" / "separable.yaml")
QUICK = ("--from", BASELINE, "--epochs", 0.5, "--workers", 2, "--val", 0.3)
TRIPLES = ("--triple", "1,1.4,1", "--triple", "1.7,1.1,1", "--triple", "1,1,1.4")
FEW = (*TRIPLES, "--rungs", 2, "--seeds", 2, "--finalists", 2)


@pytest.fixture(autouse=True)
def folder(shapes, tmp_path, monkeypatch):
    """The working directory, with the images in it."""
    (tmp_path / "shapes").symlink_to(shapes, target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_search_its_answer_and_its_next_command(run, folder, capsys):
    code, out, err = run("shapes", *QUICK, *FEW, "--trials", 2)
    assert code == 0
    assert "7 trainings of 3 networks, the longest 0.5 epochs of 84 images; 0 are done" in err
    where = "runs/search/shapes-separable"
    assert "1 of rung 1, 4 of rung 2" in err
    assert f"Next: effnet search --resume {where} --minutes" in err
    assert "Candidates at rung 1 of 2" in out
    assert "always guessing the most common class (33.33%)" in out
    code, out, err = run("run", "--resume", where, "--workers", 1)
    assert code == 0
    assert "; 2 are done" in err
    assert err.endswith(f"Next: effnet scale --from {where}/baseline.yaml --rule {where}/rule.yaml\n")
    assert "Finalists of 3 networks of separable" in out
    assert "Kendall's tau between the rankings of two rungs" in out
    assert "Standard deviation of a score over seeds" in out
    code, out, _ = run("--resume", where, "--json")
    assert code == 0
    assert json.loads(out) == json.loads((folder / where / "verdict.json").read_text())
    scaled = Run(capsys, "scale", "--from", f"{where}/baseline.yaml", "--rule", f"{where}/rule.yaml")
    assert scaled.code == 0
    assert "separable" in scaled.out
    code, _, err = run("--resume", where, "--seeds", 3)
    assert code == 2
    assert "`seeds` (=3)" in err
    assert (folder / "runs" / "search" / "latest").resolve().name == "shapes-separable"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "`data`"),
        (["--resume", "shapes"], "not a search's folder"),
        (["run", "shapse"], "Did you mean 'shapes'?"),
        (["run", "shapes", "--from", "b99"], "b99"),
        (["run", "shapes", *QUICK, "--triple", "1,2"], "1,2"),
        (["run", "shapes", *QUICK, "--triple", "0.5,2,1"], "`alpha`"),
        (["run", "shapes", *QUICK, "--step", "0"], "`step`"),
        (["run", "shapes", *QUICK, "--latency", "soon"], "soon"),
        (["run", "shapes", *QUICK, "--triple", "1,1,1.8"], "has alpha beta^2 gamma^2 = 3.24, more than 0.1 from 2"),
        (["run", "shapes", *QUICK, "--phi", "1e9"], "`phi` (=1000000000.0) must be more than 0 and at most 16"),
        (["run", "shapes", *QUICK, "--recipe", "finetune"], "`recipe` (='finetune') is for pretrained networks"),
        (["run", "shapes", *QUICK, "--out", "shapes/disc/000.png"], "exists and holds something else"),
        (["run", "shapes", *QUICK, "--finalists", "0"], "`finalists` (=0)"),
        (["run", "shapes", *QUICK, "--recipe", "scrach"], "Did you mean 'scratch'?"),
    ],
)
def test_wrong_usage_leaves_nothing(run, folder, words, message):
    before = sorted(folder.rglob("*"))
    code, out, err = run(*words)
    assert code in (1, 2)
    assert message in err
    assert out == ""
    assert sorted(folder.rglob("*")) == before

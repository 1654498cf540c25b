"""`effnet search run` and `compare` as they are typed: what they print, what they leave, how they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny import draw_images

COMMAND = "search"
BASELINE = str(Path(__file__).parents[2] / "examples" / "baselines" / "separable.yaml")
QUICK = ("--from", BASELINE, "--epochs", 0.5, "--workers", 2, "--val", 0.3)
FEW = (
    "--triple",
    "1,1.4,1",
    "--triple",
    "1.7,1.1,1",
    "--triple",
    "1,1,1.4",
    "--rungs",
    2,
    "--seeds",
    2,
    "--finalists",
    2,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("typed")
    draw_images(root / "shapes", 40)
    return root


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_a_search_its_answer_and_its_next_command(run, folder):
    code, out, err = run("run", "shapes", *QUICK, *FEW, "--trials", 2)
    assert (code, out) == (1, "")
    assert "7 trainings of 3 networks, the longest 0.5 epochs of 84 images; 0 are done" in err
    assert err.endswith("2 trainings are done and some are left; the same command goes on.\n")
    code, out, err = run("run", "shapes", *QUICK, *FEW)
    assert code == 0
    assert "; 2 are done" in err
    where = "runs/search/search-shapes-separable"
    assert err.endswith(f"Next: effnet scale --from {where}/baseline.yaml --rule {where}/rule.yaml --phi 2\n")
    assert "Finalists of 3 networks of separable" in out
    assert "Kendall's tau between the rankings of two rungs" in out
    assert "A seed moves a score by" in out
    assert "The family of alpha" in out
    code, out, _ = run("run", "shapes", *QUICK, *FEW, "--json")
    assert code == 0
    assert json.loads(out) == json.loads((folder / where / "verdict.json").read_text())


def test_the_rule_is_one_for_scale(run, folder, capsys, request):
    from ran import Run

    assert run("run", "shapes", *QUICK, *FEW, "--out", "found")[0] == 0
    scaled = Run(capsys, "scale", "--from", "found/baseline.yaml", "--rule", "found/rule.yaml", "--phi", 2)
    assert scaled.code == 0
    assert "separable" in scaled.out


def test_a_comparison_and_its_verdict(run):
    code, out, err = run("compare", "shapes", *QUICK, "--seeds", 2, "--rule", "1.2,1.2,1.2")
    assert code == 0
    assert "separable: ways to scale" in out
    lines = [line for line in out.splitlines() if line.startswith(("At 2x the multiply-adds", "At 4x"))]
    assert len(lines) == 6
    assert all("compound" in line for line in lines)
    assert err.endswith(f"Next: effnet search run shapes --from {BASELINE}\n")
    code, out, _ = run("compare", "shapes", *QUICK, "--seeds", 2, "--rule", "1.2,1.2,1.2", "--json")
    assert {row["against"] for row in json.loads(out)["compound"]} == {"width", "depth", "resolution"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "shapse"], "Did you mean 'shapes'?"),
        (["run", "shapes", "--from", "b99"], "b99"),
        (["run", "shapes", *QUICK, "--triple", "1,2"], "1,2"),
        (["run", "shapes", *QUICK, "--triple", "0.5,2,1"], "`alpha`"),
        (["run", "shapes", *QUICK, "--step", "0"], "`step`"),
        (["run", "shapes", *QUICK, "--step", "0.7", "--tolerance", "0.01"], "leaves no triple on a grid of 0.7"),
        (["run", "shapes", *QUICK, "--params", "1k"], "they take at least"),
        (["run", "shapes", *QUICK, "--latency", "soon"], "soon"),
        (["run", "shapes", *QUICK, "--resolution", "33"], "is beyond the images' own 32 px"),
        (["run", "shapes", *QUICK, "--triple", "1,1,1.8"], "has alpha beta^2 gamma^2 = 3.24, more than 0.1 from 2"),
        (["run", "shapes", *QUICK, "--phi", "1e9"], "`phi` (=1000000000.0) must be more than 0 and at most 16"),
        (["run", "shapes", *QUICK, "--recipe", "finetune"], "`recipe` (='finetune') is for networks with weights"),
        (["run", "shapes", *QUICK, "--out", "shapes/disc/000.png"], "exists and holds something else"),
        (["run", "shapes", *QUICK, "--out", "what?"], "must have no question mark"),
        (["run", "shapes", *QUICK, "--storage", "postgresql://me:secret@nowhere/x"], "me:***@nowhere"),
        (["run", "shapes", *QUICK, "--finalists", "0"], "`finalists` (=0)"),
        (["run", "shapes", *QUICK, "--rungs", "0"], "`rungs`"),
        (["run", "shapes", *QUICK, "--recipe", "scrach"], "Did you mean 'scratch'?"),
        (["run", "shapes", *QUICK, "--storage", "nonsense://x"], "`storage`"),
        (
            ["run", "shapes", "--from", BASELINE, "--out", "m", "--minutes", "0.001"],
            "fewer candidates or seeds, or a smaller baseline",
        ),
        (["compare", "shapes", *QUICK, "--factor", "1"], "`factor` (=1.0) must be more than 1"),
        (["compare", "shapes", *QUICK, "--factor", "40"], "cannot be reached by resolution"),
        (["compare", "shapes", *QUICK, "--device", "cuda"], "`device` (='cuda') is not there"),
        (["compare", "shapes", *QUICK, "--rule", "papre"], "Did you mean 'paper'?"),
    ],
)
def test_wrong_usage_leaves_nothing(run, folder, words, message):
    before = sorted(folder.rglob("*"))
    code, out, err = run(*words)
    assert code in (1, 2)
    assert message in err
    assert out == ""
    assert sorted(folder.rglob("*")) == before

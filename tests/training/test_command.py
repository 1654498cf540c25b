"""The command effnet train: its options, its output and its errors."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from forked import Forked
from tiny import draw_images, write_spec

COMMAND = "train"
QUICK = ("--batch", 8, "--epochs", 1, "--workers", 0, "--threads", 1, "--recipe", "scratch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("typed")
    draw_images(root / "shapes")
    write_spec(root / "tiny.yaml")
    return root


@pytest.fixture(autouse=True)
def there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_a_run_and_its_next_command(run, folder):
    code, out, err = run(
        "shapes", "--model", "tiny.yaml", *QUICK, "--set", "mixup=0.2", "--set", "augmentation=randaugment"
    )
    assert code == 0
    assert "On the 9 images of the test split" in out
    assert "Memory: " in out
    assert "tiny.yaml starts from scratch" in err
    assert err.endswith("Next: effnet predict PHOTO --model runs/train/shapes-tiny/best\n")
    assert (folder / "runs" / "train" / "latest").resolve().name == "shapes-tiny"
    recipe = yaml.safe_load((folder / "runs/train/latest/args.yaml").read_text())["recipe"]
    assert (recipe["mixup"], recipe["augmentation"], recipe["name"]) == (0.2, "randaugment", "scratch")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--resume RUN"),
        (["shapse"], "Did you mean 'shapes'?"),
        (["shapes", "--model", "b99"], "`model` (='b99')"),
        (["shapes", "--recipe", "scrach"], "Did you mean 'scratch'?"),
        (["shapes", "--epochs", 3, "--minutes", 3], "give one of them"),
        (["shapes", "--freeze", 10], "stages"),
        (["shapes", "--out", "."], "exists"),
        (["shapes", "--minutes", 0], "`minutes`"),
        (["shapes", "--seed", -1], "seed"),
        (["shapes", "--set", "mixup=abc"], "`mixup` (='abc') must be a number"),
        (["shapes", "--set", "mixpu=1"], "mixpu"),
        (["shapes", "--set", "mixup"], "`set` (='mixup') must be NAME=VALUE"),
        (["shapes", "--set", "mixup="], "`set` (='mixup=') must be NAME=VALUE"),
        (["shapes", "--seed", "4294967296"], "`seed` (=4294967296) must be at most 4294967295"),
        (["shapes", "--resolution", "999999"], "`resolution` (=999999) is too large: one map takes"),
        (["shapes", "--set", "model=b0"], "`set` (='model') is not known"),
        (["shapes", "--batch", 8, "--set", "batch=9"], "gives batch twice"),
        (["shapes", "--set", "class_weights=maybe"], "must be true or false"),
        (["shapes", "--device", "gpu"], "`device` (='gpu') is not one that torch can use here: cpu"),
        (["shapes", "--model", "tiny.yaml", "--recipe", "few"], "needs weights, and tiny.yaml has none"),
        (["shapes", "--train-memory", "1kB", "--model", "tiny.yaml"], "is too little for"),
        (["--resume", "nothing"], "nothing is not a run"),
        (["--resume", "shapes", "--model", "b0"], "`model` (='b0') cannot be changed"),
        (["shapes", "--resume", "shapes"], "shapes is not a run"),
    ],
)
def test_wrong_usage(run, folder, words, message):
    before = sorted(folder.rglob("*"))
    code, out, err = run(*words)
    assert code in (1, 2)
    assert message in err
    assert out == ""
    assert sorted(folder.rglob("*")) in (before, sorted({*before, folder / "runs", folder / "runs" / "train"}))


def start(*words: object, blocked: str = "") -> subprocess.Popen[str]:
    """The command in a process of its own, with packages that cannot be imported."""
    code = f"import sys; sys.modules.update(dict.fromkeys({blocked.split()}))\nfrom effnet.cli import main\nmain()"
    command = [sys.executable, "-c", code, COMMAND, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("blocked", ["torch torchvision", "lightning_fabric"])
def test_what_is_not_installed_is_named_with_its_extra(blocked):
    process = start("shapes", blocked=blocked)
    assert "pip install 'effnet[train]'" in process.communicate(timeout=150)[1]
    assert process.returncode == 2


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_it_starts_without_what_it_does_not_need(tmp_path):
    """Lightning would import torchmetrics, and that all of these."""
    slow = "torchmetrics", "torchvision", "transformers", "scipy"
    process = Forked(tmp_path / "log", exec, f"import sys; print([name for name in {slow} if name in sys.modules])", {})
    assert process.communicate(60) == ("[]\n", "")


def test_the_same_command_gives_the_same_bits_and_prints_only_its_own_lines(folder, tmp_path):
    """Three processes with what the rules choose, of which one is as fresh as a user's."""
    options = ["--model", "tiny.yaml", "--recipe", "scratch", "--epochs", 2, "--set", "augmentation=randaugment"]
    forked = (
        Forked.command(tmp_path / f"{number}.log", "train", "shapes", "--out", tmp_path / str(number), *options)
        for number in (1, 2)
    )
    for process in [start("shapes", "--out", tmp_path / "0", *options), *forked]:
        lines = process.communicate(timeout=300)[1].splitlines()
        assert process.returncode == 0, lines
        rest = [line for line in lines if not line.startswith(" ")]
        assert len(lines) - len(rest) == 3  # the columns and two epochs
        expected = (
            "batch of",
            "from scratch",
            "unfamiliar images will not be detected",
            "results.png",
            "Next: effnet predict",
        )
        assert all(any(text in line for text in expected) for line in rest), rest
    weights = [tmp_path / str(number) / "best" / "model.safetensors" for number in range(3)]
    assert len({path.read_bytes() for path in weights}) == 1

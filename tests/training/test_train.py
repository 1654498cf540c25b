"""Runs from the first step to the last: what they write, how they go on, what they refuse."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from tiny import same, weights
from torch.nn.functional import cross_entropy

import effnet
from effnet.errors import ArgumentError, DataError, TrainingError, UnknownNameError
from effnet.metrics.evaluate import predict_logits
from effnet.progress import Silent
from effnet.training.checkpoint import load_checkpoint
from effnet.training.loop import Loop
from effnet.training.module import Answering, score
from effnet.training.optimizer import ENDING
from effnet.training.recipe import Recipe
from effnet.training.run import LAST, PREVIOUS, RunPlan
from effnet.training.start import read_split
from effnet.training.train import batch_for, resume, sort_settings, train
from effnet.weights.bundle import open_bundle

QUICK: dict[str, Any] = {"batch": 8, "epochs": 3, "workers": 0, "threads": 1, "lr": 0.02, "save_seconds": 0.0}
HARD: dict[str, Any] = {  # all that could disturb a resumed run
    **QUICK,
    "augmentation": "autoaugment",
    "mixup": 0.2,
    "cutmix": 0.5,
    "head_first": 0.3,
    "precision": "fp32",  # bf16, where a machine has it, would fit without parts
    "train_memory": "1.3MB",  # a plan, and parts
    "class_weights": True,
}


class CrashError(Exception):
    """The machine fell off the desk."""


class Recorder(Silent):
    """Keeps what it is told, and stops the run after a step, or after an epoch's validation."""

    def __init__(self, stop: int | None = None, stop_epoch: int | None = None) -> None:
        self.messages: list[str] = []
        self.stop, self.stop_epoch = stop, stop_epoch

    def message(self, text: str) -> None:
        self.messages.append(text)
        if text.startswith("  ") and text.split()[0] == str(self.stop_epoch):
            raise CrashError

    def update(self, task: str, done: float, total: float, detail: str = "") -> None:
        if (task, done) == ("training", self.stop):
            raise CrashError

    def heard(self, text: str) -> bool:
        return any(text in message for message in self.messages)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first run draws: pictures take longer than these trainings."""
    monkeypatch.setattr("effnet.training.result._draw", lambda *_: None)


def rows_of(folder: Path) -> list[dict[str, float]]:
    with (folder / "results.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(shapes: Path, spec_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("runs") / "first"
    return train(shapes, spec_file, "scratch", out=out, **{**QUICK, "epochs": 12})


def test_it_learns(finished: Any) -> None:
    assert finished.split == "test"
    assert finished.evaluation.n == 9
    rows = rows_of(finished.folder)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert max(row["val_top1"] for row in rows) > 0.5  # a third is guessing
    assert finished.steps == 12 * (42 // 8)


def test_the_folder_has_everything(finished: Any) -> None:
    folder = finished.folder
    names = {path.name for path in folder.iterdir()}
    files = (
        "args.yaml split.csv results.csv results.png confusion_matrix.png per_class.csv reliability.png mistakes.jpg"
    )
    assert names == {*files.split(), "metrics.json", "best", LAST, PREVIOUS}
    assert [row["epoch"] for row in rows_of(folder)] == list(range(1, 13))
    for name in ("results.png", "confusion_matrix.png", "reliability.png"):
        with Image.open(folder / name) as picture:
            picture.load()
    assert json.loads((folder / "metrics.json").read_text())["n"] == 9


def test_the_bundle_is_the_best_epochs_and_knows_its_context(finished: Any, shapes: Path) -> None:
    classifier = effnet.load(finished.bundle)
    assert classifier.classes == ("disc", "ring", "square")
    assert classifier.input.size == 32
    photo = shapes / "disc" / "000.png"
    assert classifier.predict(photo).label in classifier.classes
    best = {"val_top1": 0.0}
    rows = rows_of(finished.folder)
    for row in rows:  # of equals the later one: equal is what differs by less than a standard error
        highest = max(row["val_top1"], *(earlier["val_top1"] for earlier in rows[: int(row["epoch"])]))
        if row["val_top1"] >= highest - math.sqrt(highest * (1 - highest) / 9):
            best = row
    config = json.loads((finished.bundle / "config.json").read_text())
    assert config["metrics"]["val_top1"] == best["val_top1"]
    network, plan = open_bundle(finished.bundle).network, RunPlan.read(finished.folder)[0]
    val = read_split(plan.data, finished.folder, plan.classes).part("val")
    found = predict_logits(Answering(network, plan.input, plan.classes).logits, plan.input, val)
    assert float(cross_entropy(torch.from_numpy(found.logits), torch.from_numpy(found.labels))) == pytest.approx(
        best["val_loss"], rel=1e-4
    )
    assert config["provenance"]["recipe"]["name"] == "scratch"
    assert config["calibration"]["temperature"] > 0
    assert (finished.bundle / "split.csv").read_text() == (finished.folder / "split.csv").read_text()


def test_args_hold_all_that_a_run_used(finished: Any) -> None:
    args = yaml.safe_load((finished.folder / "args.yaml").read_text())
    assert (args["execution"]["threads"], args["execution"]["part"], args["execution"]["recompute"]) == (1, 8, None)
    assert args["recipe"]["lr"] == 0.02
    assert args["versions"]["effnet"] == effnet.__version__


def test_the_head_goes_first_for_a_share_of_the_run_and_at_most_some_steps(
    shapes: Path, spec_file: Path, tmp_path: Path
) -> None:
    for most, share in ((100, 0.5), (3, 0.2)):
        with pytest.raises(CrashError):
            train(
                shapes, spec_file, "scratch", out=tmp_path / str(most), progress=Recorder(stop=1),
                head_first=0.5, head_steps=most, **QUICK,
            )  # fmt: skip
        assert RunPlan.read(tmp_path / str(most))[0].recipe.head_first == pytest.approx(share)


def test_few_images_are_gone_through_more_often(shapes: Path, spec_file: Path, tmp_path: Path) -> None:
    own = {**QUICK, "epochs": None}
    with pytest.raises(CrashError):
        train(shapes, spec_file, Recipe(epochs=2, least_steps=30), out=tmp_path, progress=Recorder(stop=1), **own)
    assert RunPlan.read(tmp_path)[0].steps == 30
    assert sort_settings("finetune", {})[1].least_steps > 0
    assert sort_settings("finetune", {"epochs": 3})[1].least_steps == 0


@pytest.mark.parametrize(("images", "world", "batch"), [(60_000, 1, 64), (511, 1, 32), (134, 2, 16), (9, 2, 8)])
def test_few_images_make_small_batches(images: int, world: int, batch: int) -> None:
    recipe = sort_settings("finetune", {})[1]
    assert batch_for(recipe, images, world) == batch
    given = sort_settings("finetune", {"batch": 60})[1]
    assert batch_for(given, images, world) == (60 if images > 60 else 8)


def test_another_run_is_taken_again_but_for_what_is_named(finished: Any, shapes: Path, tmp_path: Path) -> None:
    train(shapes, like=finished.folder, out=tmp_path / "again")
    assert same(weights(tmp_path / "again"), weights(finished.folder))
    before, again = (RunPlan.read(folder)[0] for folder in (finished.folder, tmp_path / "again"))
    assert (again.execution, again.recipe) == (before.execution, dataclasses.replace(before.recipe, epoch_steps=0))
    train(shapes, like=finished.folder, out=tmp_path / "other", seed=4, epochs=1)
    other = RunPlan.read(tmp_path / "other")[0]
    assert (other.settings.seed, other.recipe.epochs, other.recipe.lr) == (4, 1, 0.02)
    assert other.settings.threads == 1


@pytest.fixture
def unsorted(shapes: Path, tmp_path: Path) -> Path:
    """The shapes as a manifest whose lines, paths and classes stand in three different orders."""
    names = {"disc": "b", "ring": "a-b", "square": "a"}
    files = [(path, names[path.parent.name]) for path in sorted(shapes.rglob("*.png"), reverse=True)]
    manifest = tmp_path / "unsorted.csv"
    manifest.write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in files[::2] + files[1::2]))
    return manifest


class Copying(Silent):
    """Copies the run's folder after its first step, which leaves the checkpoint that was written before it."""

    def __init__(self, folder: Path, copy: Path) -> None:
        self.folder, self.copy = folder, copy

    def update(self, task: str, done: float, total: float, detail: str = "") -> None:
        if (task, done) == ("training", 1):
            shutil.copytree(self.folder, self.copy)


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [("scratch", HARD), ("finetune", HARD), ("finetune", QUICK), ("paper", QUICK), ("few", QUICK)],
)
def test_interrupted_runs_end_as_undisturbed_ones(
    finished: Any, unsorted: Path, spec_file: Path, tmp_path: Path, recipe: str, settings: dict[str, Any]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    model = finished.bundle if recipe == "few" else spec_file  # which needs weights
    train(unsorted, model, recipe, out=whole, progress=Copying(whole, broken), **settings)
    assert load_checkpoint(broken)[0]["step"] == 0
    # Within an epoch, within the next, between that one's validation and the checkpoint behind it, and in the last.
    for recorder in (Recorder(stop=2), Recorder(stop=7), Recorder(stop_epoch=2), Recorder(stop=11)):
        with pytest.raises(CrashError):
            resume(broken, progress=recorder)
    result = resume(broken)
    assert result.steps == 15
    assert same(weights(whole), weights(broken))
    assert (whole / "best" / "model.safetensors").read_bytes() == (broken / "best" / "model.safetensors").read_bytes()
    if settings is HARD:
        assert result.execution.parts > 1
        assert result.execution.plan is not None


def test_a_finished_run_can_be_resumed_and_stays(finished: Any) -> None:
    before = weights(finished.folder)
    result = resume(finished.folder)
    assert same(weights(finished.folder), before)
    assert result.evaluation.top1 == finished.evaluation.top1


def test_a_damaged_checkpoint_falls_back(finished: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    (folder / LAST).write_bytes((folder / LAST).read_bytes()[:-100])
    recorder = Recorder()
    resume(folder, progress=recorder)
    assert recorder.heard("last.ckpt is damaged")
    assert same(weights(folder), weights(finished.folder))


def test_changed_data_is_refused(finished: Any, shapes: Path, tmp_path: Path) -> None:
    folder, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(finished.folder, folder)
    shutil.copytree(shapes, data)
    args = yaml.safe_load((folder / "args.yaml").read_text())
    args["data"] = str(data)
    args["versions"]["torch"] = "1.0"
    (folder / "args.yaml").write_text(yaml.safe_dump(args))
    recorder = Recorder()
    resume(folder, progress=recorder)
    assert recorder.heard("torch was '1.0' and is")
    (data / "disc" / "003.png").unlink()
    with pytest.raises(TrainingError, match=r"1 images of .* are gone, such as disc/003.png: put them back"):
        resume(folder)
    shutil.copy(shapes / "ring" / "004.png", data / "disc" / "003.png")
    resume(folder, progress=recorder)
    assert recorder.heard("1 images have another size than when the run began, such as disc/003.png")


def test_memory_that_runs_out_makes_the_plan_stricter_once(
    shapes: Path, spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, full = Loop._gradients, iter([False, True, False])

    def tight(self: Loop, taken: Any) -> Any:
        if next(full, False):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return real(self, taken)

    monkeypatch.setattr(Loop, "_gradients", tight)
    recorder = Recorder()
    result = train(shapes, spec_file, "scratch", out=tmp_path / "run", progress=recorder, **QUICK)
    assert recorder.heard("memory ran out at step 1")
    assert set((result.execution.recompute or {}).values()) == {"convolutions"}
    full = iter([True, True, True])
    with pytest.raises(TrainingError, match=r"memory ran out at step 0.*--train-memory"):
        train(shapes, spec_file, "scratch", out=tmp_path / "again", **QUICK)
    assert load_checkpoint(tmp_path / "again")[0]["step"] == 0


def test_early_stopping(shapes: Path, spec_file: Path, tmp_path: Path) -> None:
    settings = {**QUICK, "epochs": 40, "lr": 1e-7, "patience": 2, "ema": 0.0}
    result = train(shapes, spec_file, "scratch", out=tmp_path / "run", **settings)
    assert result.epochs < 40


def test_minutes_end_the_run(shapes: Path, spec_file: Path, tmp_path: Path) -> None:
    settings = {name: value for name, value in QUICK.items() if name != "epochs"}
    result = train(shapes, spec_file, "scratch", out=tmp_path / "run", minutes=0.3, **settings)
    assert result.steps > 15
    assert result.evaluation.n == 9


def test_minutes_are_kept_where_the_pace_is_not_what_was_measured(
    shapes: Path, spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    real_step = Loop._step

    def step(self: Loop, parts: Any) -> float:
        clock[0] += 0.1 if clock[0] < 30 else 0.2  # seconds; somebody else begins to work
        return real_step(self, parts)

    def slow_score(*args: Any, **how: Any) -> tuple[float, float]:
        clock[0] += 0.7
        return score(*args, **how)

    monkeypatch.setattr(Loop, "_step", step)
    monkeypatch.setattr("effnet.training.loop.score", slow_score)
    for module in ("loop", "train"):
        monkeypatch.setattr(f"effnet.training.{module}.time", SimpleNamespace(monotonic=lambda: clock[0]))
    settings = {name: value for name, value in QUICK.items() if name != "epochs"}
    train(shapes, spec_file, "scratch", out=tmp_path / "run", minutes=1, **settings)
    assert 0.95 * 60 <= clock[0] + ENDING + 0.7 <= 1.05 * 60


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(
    shapes: Path, spec_file: Path, finished: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("args.yaml", "split.csv"):
        shutil.copy(finished.folder / name, folder)
    train(shapes, spec_file, "scratch", out=folder, **{**QUICK, "epochs": 1})
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "split.csv").write_text("path,label,split,group\n")  # a manifest of the user's
    with pytest.raises(ArgumentError, match="holds something else"):
        train(mine / "split.csv", spec_file, "scratch", out=mine, **QUICK)
    assert (mine / "split.csv").exists()
    (folder / "best").rename(tmp_path / "old")  # killed while best was replaced
    (folder / ".best.abc").mkdir()
    (tmp_path / "old").rename(folder / ".best.abc" / "old")
    resume(folder)
    assert (folder / "best" / "config.json").exists()
    assert not (folder / ".best.abc").exists()


def test_what_else_can_be_asked_for(finished: Any, unsorted: Path, spec_file: Path, tmp_path: Path) -> None:
    start, recorder = finished.bundle, Recorder()
    options = {**QUICK, "epochs": 1, "workers": 1, "init": str(start), "freeze": 9, "tensorboard": True, "ema": 0.0}
    result = train(unsorted, spec_file, "finetune", out=tmp_path / "run", progress=recorder, **options)
    assert recorder.heard("inherited from")
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    before, after = (open_bundle(folder).network.state_dict() for folder in (start, result.bundle))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    with pytest.raises(ArgumentError, match="has weights"):
        train(unsorted, start, "finetune", out=tmp_path / "twice", **options)
    assert not (tmp_path / "twice").exists()


def test_broken_images_are_named_before_the_first_step(shapes: Path, spec_file: Path, tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    shutil.copytree(shapes, data)
    for number in range(2):
        (data / "ring" / f"00{number}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"ring/000.png is not an image.*, and 1 other images.*--fix clean.csv"):
        train(data, spec_file, "scratch", out=out, **QUICK)
    assert not out.exists()


def test_an_unreadable_image_leaves_the_checkpoint(shapes: Path, spec_file: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    with pytest.raises(CrashError):
        train(data, spec_file, "scratch", out=tmp_path / "run", progress=Recorder(stop=2), **QUICK)
    for path in data.rglob("*.png"):
        path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match=r"\.png: is not an image"):
        resume(tmp_path / "run")
    assert load_checkpoint(tmp_path / "run")[0]["step"] == 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"epoch": 3}, UnknownNameError, "Did you mean 'epochs'"),
        ({"minutes": 1}, ArgumentError, "excludes --epochs"),
        ({"recipe": "tune"}, UnknownNameError, "recipe"),
        ({"train_memory": "1kB"}, ArgumentError, "too little"),
        ({"model": "b99"}, UnknownNameError, "b9|b8"),
        ({"freeze": 10}, ArgumentError, "stages"),
        ({"lr": 1e9, "clip": 0.0, "warmup": 0.0}, TrainingError, "learning rate"),
    ],
)
def test_what_cannot_begin_says_why(
    shapes: Path, spec_file: Path, tmp_path: Path, arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    model, recipe = arguments.pop("model", spec_file), arguments.pop("recipe", "scratch")
    with pytest.raises(error, match=words):
        train(shapes, model, recipe, out=tmp_path / "run", **{**QUICK, **arguments})


def test_a_folder_in_use_is_not_touched(shapes: Path, spec_file: Path, tmp_path: Path, finished: Any) -> None:
    with pytest.raises(ArgumentError, match="holds a run; go on with it: effnet train --resume"):
        train(shapes, spec_file, out=finished.folder)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ArgumentError, match="holds something else"):
        train(shapes, spec_file, out=tmp_path)
    with pytest.raises(TrainingError, match="is not a run"):
        resume(tmp_path)

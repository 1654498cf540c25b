"""Whole runs: what they write, how they resume, what they refuse."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from short_run import QUICK, CrashError, Recorder
from tiny import same, weights
from torch.nn.functional import cross_entropy

import effnet
from effnet.data.loader import Loader
from effnet.errors import ArgumentError, DataError, EffnetError, TrainingError
from effnet.metrics.evaluate import predict_logits
from effnet.runtime.torch import compile_network
from effnet.training.learner import score
from effnet.training.loop import ENDING, Interrupted, Loop, TimeBudget
from effnet.training.recipe import Recipe
from effnet.training.result import Result
from effnet.training.run_folder import LAST, PREVIOUS, RunPlan, load_checkpoint, read_split
from effnet.training.train import batch_for, resume, sort_settings, train
from effnet.weights.bundle import open_bundle

HARD: dict[str, Any] = {  # all that could disturb a resumed run
    **QUICK,
    "augmentation": "autoaugment",
    "mixup": 0.2,
    "cutmix": 0.5,
    "head_first": 0.3,
    "precision": "fp32",  # bf16, where a machine has it, would fit without parts
    "train_memory": "1MB",  # a plan, and parts
    "class_weights": True,
}


PICTURES = ("results.png", "confusion_matrix.png", "reliability.png")


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first run draws: pictures take longer than these trainings."""
    for name in ("_draw", "write_report"):
        monkeypatch.setattr(f"effnet.training.result.{name}", lambda *_: None)


@pytest.fixture
def go(shapes: Path, spec_file: Path, tmp_path: Path) -> Callable[..., Any]:
    """Train the tiny network on the shapes, quickly, to tmp_path/run."""

    def quick(data: Path = shapes, model: Path = spec_file, recipe: Any = "scratch", **settings: Any) -> Result:
        return train(data, model, recipe, **{"out": tmp_path / "run", **QUICK, **settings})

    return quick


def rows_of(folder: Path) -> list[dict[str, float]]:
    with (folder / "results.csv").open() as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def finished(shapes: Path, spec_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("runs") / "first"
    return train(shapes, spec_file, "scratch", out=out, **{**QUICK, "epochs": 8})


def test_freed_memory_is_kept_during_the_run(go: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, bool]] = []

    @contextmanager
    def recorded(execution: Any, settings: Any, *, world: int) -> Iterator[bool]:
        seen.append((world, True))
        yield True
        seen.append((world, False))

    monkeypatch.setattr("effnet.training.train.keep_freed_memory", recorded)
    go()
    assert seen == [(1, True), (1, False)]


def test_torch_has_as_many_threads_as_before(go: Callable[..., Any]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(CrashError):
            go(progress=Recorder(stop=1))  # on one thread
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_it_learns(finished: Any) -> None:
    assert (finished.split, finished.evaluation.n, finished.steps) == ("test", 9, 8 * (42 // 8))
    rows = rows_of(finished.folder)
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert max(row["val_top1"] for row in rows) > 0.5  # a third is guessing


def test_the_folder_has_everything(finished: Any) -> None:
    folder = finished.folder
    names = {path.name for path in folder.iterdir()}
    tables = {"args.yaml", "split.csv", "results.csv", "per_class.csv", "metrics.json"}
    assert names == {*tables, *PICTURES, "mistakes.jpg", "cams.jpg", "report.html", "best", LAST, PREVIOUS}
    assert "9 images of the test split" in finished.report.read_text("utf-8")
    assert (finished.bundle / "README.md").read_text("utf-8").startswith("---\nlibrary_name: effnet")
    assert [row["epoch"] for row in rows_of(folder)] == list(range(1, 9))
    for name in PICTURES:
        with Image.open(folder / name) as picture:
            picture.load()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["n"] == 9
    assert [each["coverage"] for each in metrics["sureness"]["sets"]] == [0.9]


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
    val = read_split(plan.data, finished.folder, plan.classes).subset("val")
    found = predict_logits(compile_network(network, plan.input), plan.input, val)
    assert float(cross_entropy(torch.from_numpy(found.logits), torch.from_numpy(found.labels))) == pytest.approx(
        best["val_loss"], rel=1e-4
    )
    assert config["provenance"]["recipe"]["name"] == "scratch"
    assert config["calibration"]["temperature"] > 0
    assert classifier.sets is not None
    assert (classifier.sets.n, len(classifier.sets.floors)) == (9, 41)  # up to a coverage of 90 %
    assert classifier.familiarity is None  # 9 images are too few for its threshold
    assert classifier.predict(photo, sets=0.9).labels
    assert (finished.bundle / "split.csv").read_text() == (finished.folder / "split.csv").read_text()


@pytest.mark.parametrize(("most", "share"), [(100, 0.5), (3, 0.2)])
def test_the_head_goes_first_for_a_share_of_the_run_and_at_most_some_steps(
    go: Any, tmp_path: Path, most: int, share: float
) -> None:
    with pytest.raises(CrashError):
        go(progress=Recorder(stop=1), head_first=0.5, head_steps=most)
    assert RunPlan.read(tmp_path / "run")[0].recipe.head_first == pytest.approx(share)


def test_few_images_are_used_more_often(go: Any, tmp_path: Path) -> None:
    with pytest.raises(CrashError):
        go(recipe=Recipe(epochs=2, least_steps=30), progress=Recorder(stop=1), epochs=None)
    assert RunPlan.read(tmp_path / "run")[0].steps == 30
    assert sort_settings("finetune", {})[1].least_steps > 0
    assert sort_settings("finetune", {"epochs": 3})[1].least_steps == 0


@pytest.mark.parametrize(("images", "world", "batch"), [(60_000, 1, 64), (511, 1, 32), (134, 2, 16), (9, 2, 8)])
def test_few_images_make_small_batches(images: int, world: int, batch: int) -> None:
    assert batch_for(sort_settings("finetune", {})[1], images, world) == batch
    given = sort_settings("finetune", {"batch": 60})[1]
    assert batch_for(given, images, world) == (60 if images > 60 else 8)


@given(st.integers(1, 3000), st.integers(1, 5), st.integers(5, 300))
def test_every_process_gets_the_same_number_of_images(images: int, world: int, batch: int) -> None:
    recipe = Recipe(batch=batch)
    if images < world:
        with pytest.raises(TrainingError, match=f"{images} images cannot be shared among {world} processes"):
            batch_for(recipe, images, world)
    else:
        chosen = batch_for(recipe, images, world)
        assert 0 < chosen <= min(images, batch)
        assert chosen % world == 0
        assert chosen == batch // world * world or chosen % (8 * world) == 0 or chosen < 8 * world


def test_like_uses_the_settings_of_another_run(finished: Any, shapes: Path, tmp_path: Path) -> None:
    train(shapes, like=finished.folder, out=tmp_path / "again")
    assert same(weights(tmp_path / "again"), weights(finished.folder))
    before, again = (RunPlan.read(folder)[0] for folder in (finished.folder, tmp_path / "again"))
    assert (before.execution.threads, before.execution.part, before.recipe.lr) == (1, 8, 0.02)
    assert (again.execution, again.recipe) == (before.execution, dataclasses.replace(before.recipe, epoch_steps=0))
    with pytest.raises(CrashError):
        train(shapes, like=finished.folder, out=tmp_path / "other", seed=4, epochs=1, progress=Recorder(stop=1))
    other = RunPlan.read(tmp_path / "other")[0]
    assert (other.settings.seed, other.recipe.epochs, other.recipe.lr, other.settings.threads) == (4, 1, 0.02, 1)


@pytest.fixture
def unsorted(shapes: Path, tmp_path: Path) -> Path:
    """The shapes as a manifest whose lines, paths and classes stand in three different orders."""
    names = {"disc": "b", "ring": "a-b", "square": "a"}
    files = [(path, names[path.parent.name]) for path in sorted(shapes.rglob("*.png"), reverse=True)]
    manifest = tmp_path / "unsorted.csv"
    manifest.write_text("path,label\n" + "".join(f"{path},{label}\n" for path, label in files[::2] + files[1::2]))
    return manifest


@pytest.mark.parametrize(("recipe", "settings"), [("finetune", HARD), ("paper", QUICK), ("few", QUICK)])
def test_interrupted_runs_end_as_undisturbed_ones(
    finished: Any, unsorted: Path, spec_file: Path, tmp_path: Path, recipe: str, settings: dict[str, Any]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    model = finished.bundle if recipe == "few" else spec_file  # which needs weights
    train(unsorted, model, recipe, out=whole, **settings)
    with pytest.raises(CrashError):
        train(unsorted, model, recipe, out=broken, progress=Recorder(stop=2), **settings)
    # Within the next epoch, between that one's validation and the checkpoint behind it, and in the last.
    for recorder in (Recorder(stop=7), Recorder(stop_epoch=2), Recorder(stop=11)):
        with pytest.raises(CrashError):
            resume(broken, progress=recorder)
    result = resume(broken)
    assert result.steps == 15
    assert same(weights(whole), weights(broken))
    assert (whole / "best" / "model.safetensors").read_bytes() == (broken / "best" / "model.safetensors").read_bytes()
    if settings is HARD:
        assert result.execution.parts > 1
        assert result.execution.plan is not None


def test_a_finished_run_stays_when_resumed_and_a_damaged_checkpoint_falls_back(finished: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished.folder, folder)
    assert resume(folder).evaluation.top1 == finished.evaluation.top1
    assert same(weights(folder), weights(finished.folder))
    (folder / LAST).write_bytes((folder / LAST).read_bytes()[:-100])
    recorder = Recorder()
    resume(folder, progress=recorder)
    assert recorder.has("last.ckpt is damaged")
    assert same(weights(folder), weights(finished.folder))


def test_changed_data_is_refused(finished: Any, shapes: Path, tmp_path: Path) -> None:
    folder, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(finished.folder, folder)
    shutil.copytree(shapes, data)
    args = yaml.safe_load((folder / "args.yaml").read_text())
    args |= {"data": str(data), "versions": {**args["versions"], "torch": "1.0"}}
    (folder / "args.yaml").write_text(yaml.safe_dump(args))
    (data / "disc" / "003.png").unlink()
    with pytest.raises(TrainingError, match=r"1 image is gone from .*, such as disc/003.png: put them back"):
        resume(folder)
    shutil.copy(shapes / "ring" / "004.png", data / "disc" / "003.png")
    recorder = Recorder()
    resume(folder, progress=recorder)
    assert recorder.has("torch was '1.0' and is")
    assert recorder.has("1 image has another size than when the run began, such as disc/003.png")


def test_memory_that_runs_out_is_explained(go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(Loop, "_gradients", full)
    with pytest.raises(TrainingError, match=r"memory ran out at step 0.*--train-memory"):
        go()
    assert load_checkpoint(tmp_path / "run")[0]["step"] == 0


def test_a_signal_that_also_ends_the_workers_saves_first(
    go: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Loader.epoch

    def ended(self: Loader, *position: int) -> Iterator[Any]:
        parts = real(self, *position)
        yield from (next(parts) for _ in range(3))
        os.kill(os.getpid(), signal.SIGTERM)
        raise TrainingError("a process that loads images died")

    monkeypatch.setattr(Loader, "epoch", ended)
    with pytest.raises(Interrupted, match="saved after 3 steps"):
        go(save_seconds=60)
    assert load_checkpoint(tmp_path / "run")[0]["step"] == 3


def test_early_stopping(go: Any) -> None:
    assert go(epochs=40, lr=1e-7, patience=2, ema=0.0, save_seconds=60).epochs < 40


def test_a_budget_keeps_time_for_what_follows_the_last_step() -> None:
    budget = TimeBudget(100 + ENDING, validation_steps=4, final=2.5)
    assert budget.end(per_step=1.5) == pytest.approx(100 - 3.5 * 4 * 1.5)
    assert budget.end(per_step=1.5, validation=2.0) == pytest.approx(100 - 3.5 * 2)


def test_minutes_are_kept_where_the_pace_changes(go: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    real_step = Loop._step

    def step(self: Loop, images: Any) -> None:
        clock[0] += 0.3 if clock[0] < 30 else 0.6  # seconds; another program begins to work
        real_step(self, images)

    def slow_score(*args: Any, **how: Any) -> tuple[float, float]:
        clock[0] += 0.7
        return score(*args, **how)

    monkeypatch.setattr(Loop, "_step", step)
    monkeypatch.setattr("effnet.training.loop.score", slow_score)
    for module in ("loop", "train"):
        monkeypatch.setattr(f"effnet.training.{module}.time", SimpleNamespace(monotonic=lambda: clock[0]))
    result = go(epochs=None, minutes=1, save_seconds=60)
    assert 0.95 * 60 <= clock[0] + ENDING + 0.7 <= 1.05 * 60
    rates = [row["lr"] for row in rows_of(result.folder)]
    assert rates[-1] < 0.1 * max(rates)  # the schedule came to its end


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(go: Any, finished: Any, tmp_path: Path) -> None:
    folder, mine = tmp_path / "run", tmp_path / "mine"
    folder.mkdir()
    mine.mkdir()
    for name in ("args.yaml", "split.csv"):
        shutil.copy(finished.folder / name, folder)
    (folder / ".args.yaml.abcdefgh").mkdir()  # killed while it was written
    (folder / ".last.ckpt.part").write_bytes(b"cut")
    go(epochs=1)
    assert not list(folder.glob(".*"))
    (mine / "split.csv").write_text("path,label,split,group\n")  # a manifest of the user's
    with pytest.raises(EffnetError, match="exists"):
        go(mine / "split.csv", out=mine)
    assert (mine / "split.csv").exists()
    (folder / "best").rename(tmp_path / "old")  # killed while best was replaced
    (folder / ".best.abc").mkdir()
    (tmp_path / "old").rename(folder / ".best.abc" / "old")
    (folder / ".best.abc" / "old" / ".README.md.abcdefgh").mkdir()  # killed while the model card was written
    resume(folder)
    assert (folder / "best" / "config.json").exists()
    assert not list(folder.rglob(".*"))


def test_a_run_with_only_the_checkpoint_before_the_last_is_gone_on_with(go: Any, tmp_path: Path) -> None:
    """As a run is left that is killed between the two renames of a checkpoint."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "previous.ckpt").write_bytes(b"")
    with pytest.raises(EffnetError, match=f"holds a run; .*effnet train --resume {folder}"):
        go(epochs=1)


def test_other_settings(go: Any, finished: Any, unsorted: Path, tmp_path: Path) -> None:
    start, recorder = finished.bundle, Recorder()
    options = {"epochs": 1, "init": str(start), "freeze": 9, "tensorboard": True, "ema": 0.0}
    result = go(unsorted, recipe="finetune", progress=recorder, **options)
    assert recorder.has("inherited from")
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    before, after = (open_bundle(folder).network.state_dict() for folder in (start, result.bundle))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"}
    with pytest.raises(ArgumentError, match="has weights"):
        go(unsorted, start, "finetune", out=tmp_path / "twice", **options)
    assert not (tmp_path / "twice").exists()


def test_broken_images_are_named_before_the_first_step(go: Any, shapes: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(shapes, data)
    for number in range(2):
        (data / "ring" / f"00{number}.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"ring/000.png is not an image.*, and 1 other images.*--fix clean.csv"):
        go(data)
    assert not (tmp_path / "run").exists()


def test_a_run_that_diverges_stops(go: Any) -> None:
    with pytest.raises(TrainingError, match="learning rate"):
        go(lr=1e9, clip=0.0, warmup=0.0)

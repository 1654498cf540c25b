"""What may change between a run that stopped and its continuation, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from short_run import QUICK, CrashError, Recorder
from tiny import same, weights

from effnet.errors import ArgumentError, DataError, TrainingError
from effnet.files import hold_lock
from effnet.training.loop import Loop
from effnet.training.run_folder import load_checkpoint, save_checkpoint
from effnet.training.train import resume, train
from effnet.weights.bundle import open_bundle


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the first run draws: pictures take longer than these trainings."""
    monkeypatch.setattr("effnet.training.result._draw", lambda *_: None)


@pytest.fixture(scope="module")
def stopped(shapes: Path, spec_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped within its second epoch."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(CrashError):
        train(shapes, spec_file, "scratch", out=out, progress=Recorder(stop=7), **QUICK)
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("recipe", "optimizer", "sgd"), "recipe.optimizer was 'adamw' and is 'sgd'"),
        (("recipe", "lr", 0.5), "recipe.lr was 0.02 and is 0.5"),
        (("spec", "head", 48), "spec.head was 32 and is 48"),
        (("steps", None, 40), "steps was 15 and is 40"),
        (("classes", None, ["disc", "rung", "square"]), "classes was .* and is .*'rung'"),
    ],
)
def test_an_edited_run_is_not_gone_on_with(stopped: Path, tmp_path: Path, change: Any, message: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped, folder)
    args = yaml.safe_load((folder / "args.yaml").read_text())
    name, field, value = change
    args |= {name: {**args[name], field: value} if field else value}
    (folder / "args.yaml").write_text(yaml.safe_dump(args))
    with pytest.raises(TrainingError, match=f"args.yaml was changed .*{message}.*--like"):
        resume(folder)


def test_what_else_is_edited_between(stopped: Path, shapes: Path, tmp_path: Path) -> None:
    folder, data, moved = tmp_path / "run", tmp_path / "data", tmp_path / "moved"
    shutil.copytree(stopped, folder)
    split = folder / "split.csv"
    lines = split.read_text().splitlines(keepends=True)
    split.write_text("".join(lines[:-1]))
    with pytest.raises(TrainingError, match=r"split\.csv was changed"):
        resume(folder)
    split.unlink()
    with pytest.raises(TrainingError, match=r"cannot be resumed: split\.csv cannot be read"):
        resume(folder)
    split.write_text("".join(lines))
    shutil.copytree(shapes, data)
    (data / "disc" / "003.png").rename(data / "disc" / "new.png")
    with pytest.raises(
        TrainingError, match=r"disc/003\.png: .*1 image is new, such as disc/new\.png.*effnet train DATA"
    ):
        resume(folder, data=data)
    shutil.copy(data / "disc" / "new.png", data / "disc" / "003.png")
    data.rename(moved)
    shutil.rmtree(folder / "best")
    with hold_lock(folder / "args.yaml"), pytest.raises(ArgumentError, match="is in use by another process"):
        resume(folder, data=moved)
    recorder = Recorder()
    result = resume(folder, data=moved, workers=0, progress=recorder)
    assert recorder.has("1 image is new, such as disc/new.png; this run does not use them")
    assert recorder.has("best is gone: the best of the remaining epochs will replace it")
    assert result.bundle.exists()
    assert not recorder.has("digits")
    shutil.rmtree(folder / "best")
    with pytest.raises(TrainingError, match="best is gone, and no epoch is left"):
        resume(folder, data=moved)


def test_an_unreadable_image_leaves_the_checkpoint(stopped: Path, shapes: Path, tmp_path: Path) -> None:
    folder, data = tmp_path / "run", tmp_path / "data"
    shutil.copytree(stopped, folder)
    shutil.copytree(shapes, data)
    for path in data.rglob("*.png"):
        path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(DataError, match=r"\.png: is not an image"):
        resume(folder, data=data)
    assert load_checkpoint(folder)[0]["step"] == load_checkpoint(stopped)[0]["step"]


def test_checkpoints_are_as_rare_as_they_are_slow(
    shapes: Path, spec_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Epochs of ten seconds, a second for a checkpoint; what was trained behind the last one is trained again."""
    clock, written = [0.0], list[int]()
    step = Loop._step

    def slow_step(self: Loop, images: Any) -> None:
        clock[0] += 2
        step(self, images)

    def slow_save(folder: Path, state: dict[str, Any]) -> None:
        clock[0] += 1
        written.append(state["step"])
        save_checkpoint(folder, state)

    monkeypatch.setattr(Loop, "_step", slow_step)
    monkeypatch.setattr("effnet.training.loop.save_checkpoint", slow_save)
    for module in ("loop", "train"):
        monkeypatch.setattr(f"effnet.training.{module}.time", SimpleNamespace(monotonic=lambda: clock[0]))
    options = {**QUICK, "epochs": 6, "save_seconds": 1000.0}
    train(shapes, spec_file, "scratch", out=tmp_path / "whole", **options)
    assert written == [0, 10, 20, 30, 30]
    written.clear()
    with pytest.raises(CrashError):
        train(shapes, spec_file, "scratch", out=tmp_path / "broken", progress=Recorder(stop=28), **options)
    assert written == [0, 10, 20]
    assert open_bundle(tmp_path / "broken" / "best").config.metrics["epoch"] > 4
    resume(tmp_path / "broken")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "broken"))
    one, other = (tmp_path / run / "best" / "model.safetensors" for run in ("whole", "broken"))
    assert one.read_bytes() == other.read_bytes()

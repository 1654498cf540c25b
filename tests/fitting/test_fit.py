"""A whole fit, from images and a budget to a measured model; and what happens if a limit is exceeded."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shlex
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked
from ranges import serve
from short_run import QUICK
from tiny import same, weights, write_spec

import effnet
from effnet.arch.cost import cost
from effnet.arch.spec import NetworkSpec
from effnet.data.dataset import read_data
from effnet.data.shards import absolute
from effnet.errors import ArgumentError, DataError, RefusedError
from effnet.fitting import candidates, verdict
from effnet.fitting import fit as fitting
from effnet.fitting.candidates import FitCandidate
from effnet.fitting.fit import Fitted
from effnet.fitting.measurement import Measurement
from effnet.fitting.settings import FitPlan, options_of
from effnet.packing.pack import pack
from effnet.progress import SILENT
from effnet.runtime import select
from effnet.training.recipe import RECIPES
from effnet.training.train import train

COMMAND = "fit"
# One network of ImageNet's weights and two that are sliced from it; its recipe takes less than the minutes.
BUDGET: dict[str, Any] = {
    "params": "3.5M",
    "macs": "8M",
    "minutes": 10,
    "resolution": 32,
    "threads": 1,
    "fit": "squash",
}
WORDS = ("--params", "3.5M", "--macs", "8M", "--minutes", "10", "--resolution", "32", "--threads", "1")
STEPS = 12  # in place of 150: the classifier, which is fitted before the first one, is right for most of the images


@contextmanager
def shortened() -> Iterator[None]:
    """Trainings of few images take fewer steps, on one thread: two test processes would fight for two cores."""
    settings = FitCandidate.settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECIPES, "few", dataclasses.replace(RECIPES["few"], least_steps=STEPS))
        patch.setattr(FitCandidate, "settings", functools.partialmethod(settings, threads=1))
        yield


@pytest.fixture(scope="module", autouse=True)
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """And a network of random weights is written in 8 bits once, not by each fit that wants to know its size."""
    root, write = tmp_path_factory.mktemp("int8"), candidates.write_random_int8
    written = dict[NetworkSpec, Path]()

    def write_once(spec: NetworkSpec, out: Path) -> None:
        if spec not in written:
            write(spec, root / str(len(written)))
            written[spec] = root / str(len(written))
        shutil.copytree(written[spec], out)

    with shortened(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "write_random_int8", write_once)
        yield


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the trainings, which take as long to draw as they last; those of `fitted` are drawn."""
    monkeypatch.setattr("effnet.training.result._draw", lambda *_: None)


@pytest.fixture(scope="module")
def fitted(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    return effnet.fit(shapes, out=tmp_path_factory.mktemp("fit") / "run", **BUDGET)


def test_the_budget_is_kept_and_the_images_are_learned(fitted: Fitted, shapes: Path) -> None:
    assert fitted.kept
    result = fitted.result
    assert result["chosen"] == "lite0-32"
    assert result["measured"]["macs"] == cost(effnet.spec("lite0", num_classes=3, resolution=32)).macs <= 8_000_000
    assert result["measured"]["file_size"] == (fitted.model / "model.safetensors").stat().st_size
    assert fitted.metrics["top1"]["low"] > 1 / 3
    with effnet.load(fitted.model) as classifier:
        assert classifier.classes == tuple(sorted(folder.name for folder in shapes.iterdir()))
        assert classifier.predict(next((shapes / "disc").iterdir())).label in classifier.classes


def test_fit_json_holds_what_was_asked_and_found(fitted: Fitted) -> None:
    result = json.loads((fitted.folder / "fit.json").read_text())
    assert result["budget"] == {"macs": 8_000_000, "params": 3_500_000}
    names = {each["name"]: each for each in result["candidates"]}
    assert names["lite1-32"]["refused"]["limit"] in ("macs", "params")
    assert {"look", "candidates", "choice", "training", "total"} <= set(result["seconds"])
    assert result["test"]["split"] == "test"
    assert result["test"]["n"] == len(read_data(fitted.folder / "data.csv").subset("test"))


def test_the_split_is_made_once(fitted: Fitted) -> None:
    ours = {s.path.rpartition("/")[2] + s.split for s in read_data(fitted.folder / "data.csv").samples}
    theirs = {s.path.rpartition("/")[2] + s.split for s in read_data(fitted.folder / "training" / "split.csv").samples}
    assert ours == theirs


def test_a_finished_fit_is_read(fitted: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "_finish", lambda *_: pytest.fail("done twice"))
    assert fitting.resume(fitted.folder) == fitted


def fit_in_torch(shapes: Path, folder: Path) -> None:
    """A fit as this process makes it."""
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch, shortened():
        patch.setattr(select, "installed", lambda name: name == "torch")
        effnet.fit(shapes, out=folder, **BUDGET)


def test_a_killed_fit_goes_on_to_the_same_weights(fitted: Fitted, shapes: Path, tmp_path: Path) -> None:
    """Its recipe has a number of epochs here, so no clock decides."""
    folder = tmp_path / "run"
    process = Forked(tmp_path / "log", fit_in_torch, shapes, folder)
    end = time.monotonic() + 120
    while not (folder / "training" / "results.csv").is_file() and time.monotonic() < end:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(60)
    assert not (folder / "fit.json").exists()
    choice = (folder / "choice.json").read_bytes()
    again = fitting.resume(folder)
    assert (folder / "choice.json").read_bytes() != choice or again.result["chosen"] == fitted.result["chosen"]
    assert (again.model / "model.safetensors").read_bytes() == (fitted.model / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kept", ["last.ckpt", "previous.ckpt"])
def test_a_training_that_was_killed_is_gone_on_with(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    """Also where only its report is lacking, and where it was killed while a checkpoint was written."""
    plan, run, resumed = FitPlan(tmp_path, shapes, options_of(None, **BUDGET)), tmp_path / "training", list[Path]()
    plan.write()
    data, found = fitting.consider(plan)
    run.mkdir()
    (run / kept).touch()
    (run / "metrics.json").write_text('{"cost": {"seconds": 7}}')
    monkeypatch.setattr(fitting.training, "resume", lambda folder, **_: resumed.append(folder))
    assert fitting._train(plan, data, found[0], run, 0.0, SILENT) == 7
    assert resumed == [run]


@pytest.mark.parametrize("where", ["shards", "url"])
def test_shards_are_split_and_learned_from_as_the_folder(
    shapes: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_draw", "write_report"):
        monkeypatch.setattr(f"effnet.training.result.{name}", lambda *_: None)
    spec, quick = write_spec(tmp_path / "spec.yaml"), {**QUICK, "epochs": 1}
    pack(read_data(shapes), tmp_path / "shards", 30_000)
    with serve(tmp_path) as (address, _):
        packed = str(tmp_path / "shards") if where == "shards" else f"{address}/shards"
        looked, learned = [], []
        for name, data in (("folder", str(shapes)), ("packed", packed)):
            (tmp_path / name).mkdir()
            FitPlan(tmp_path / name, absolute(data), options_of(None, **BUDGET)).write()
            plan = FitPlan.read(tmp_path / name)
            assert (plan.source, shlex.split(plan.command)[:3]) == (data, ["effnet", "fit", data])
            first, found = fitting.consider(plan)
            assert fitting.consider(plan)[0].digest == first.digest  # a resumed fit compares them
            looked.append(([(s.name, s.label, s.split) for s in first.samples], [each.name for each in found]))
            train(tmp_path / name / "data.csv", spec, "scratch", out=tmp_path / name / "training", **quick)
            learned.append(weights(tmp_path / name / "training"))
        assert looked[0] == looked[1]
        assert same(*learned)


def test_changed_data_are_noticed(shapes: Path, tmp_path: Path) -> None:
    copy, run = shutil.copytree(shapes, tmp_path / "shapes"), tmp_path / "run"
    plan = FitPlan(run, copy, options_of(None, **BUDGET))
    run.mkdir()
    plan.write()
    fitting.consider(plan)
    changed = next((copy / "disc").iterdir())
    changed.write_bytes(changed.read_bytes() + b"more")
    with pytest.raises(DataError, match="has changed"):
        fitting.resume(run)


def slow(monkeypatch: pytest.MonkeyPatch, *latencies: float) -> None:
    """Let the finished models take so long, one after the other."""
    left = list(latencies)

    def measured(model: Path, backend: dict[str, Any], *, latency: float | None = None) -> Measurement:
        taken = left.pop(0)
        return Measurement(taken, taken, 1, "native, fp32")

    monkeypatch.setattr(verdict, "measure", measured)


def quick(folder: Path, shapes: Path | str, **options: Any) -> Fitted:
    return effnet.fit(shapes, out=folder, **{**BUDGET, "minutes": 0.05, **options})


def test_what_breaks_a_limit_goes_back_one_network(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow(monkeypatch, 20.0, 0.001)
    found = quick(tmp_path / "run", shapes, latency="10s")
    assert found.kept
    assert found.result["chosen"] != "lite0-32"
    assert "lite0-32 was trained and broke latency" in found.result["reason"]
    assert (tmp_path / "run" / "training-2" / "metrics.json").is_file()


def test_shards_behind_a_url_are_fitted_to_the_end(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is measured in a process of its own, which has nothing to do with the data."""
    slow(monkeypatch, 0.001)
    pack(read_data(shapes), tmp_path / "shards", 30_000)
    with serve(tmp_path) as (address, _):
        found = quick(tmp_path / "run", f"{address}/shards")
    assert found.kept
    assert found.metrics["n"] == len(read_data(tmp_path / "run" / "data.csv").subset("test"))
    page = found.report.read_text()
    assert f"effnet fit {address}/shards" in page
    assert page.count("data:image/") > 3


def test_a_budget_that_is_not_kept_says_so(
    shapes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run: Callable[..., tuple[int, str, str]],
) -> None:
    slow(monkeypatch, 20.0, 19.0)
    code, out, _ = run(shapes, *WORDS[:4], *WORDS[6:], "--minutes", "0.05", "--latency", "10s", "--out", tmp_path / "r")
    assert code == 1
    assert "does not keep the budget" in out
    assert "latency is broken" in out
    result = json.loads((tmp_path / "r" / "fit.json").read_text())
    assert result["broken"] == [{"limit": "latency", "value": 19.0, "allowed": 10.0}]
    assert result["nearest"]


LOST = "int8 was not written: it loses more than 0.5 points of top-1"


@pytest.fixture
def few_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    """One in place of three, since each is written in 8 bits."""
    monkeypatch.setattr(candidates, "WIDTHS", (0.5,))


@pytest.fixture
def lossy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets 8 bits lose too much."""

    def refuse(*_: object, **__: object) -> None:
        raise RefusedError(LOST)

    monkeypatch.setattr(verdict, "export_int8", refuse)


@pytest.mark.usefixtures("lossy")
def test_eight_bits_that_lose_too_much_go_back(shapes: Path, tmp_path: Path) -> None:
    found = quick(tmp_path / "run", shapes, file_size="4.5MB")  # Lite0 in 8 bits, or half of its width
    names = {each["name"] for each in found.result["candidates"] if each["refused"] is None}
    assert "lite0-32-int8" in names
    assert found.result["chosen"] == "lite0-w0.5-32"
    assert "accuracy in 8 bits" in found.result["reason"]
    assert found.kept


@pytest.mark.usefixtures("lossy", "few_widths")
def test_where_8_bits_were_asked_for_and_lose_too_much_the_model_stays_as_it_was_trained(
    shapes: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    given = ("--params", "3.5M", "--file-size", "4.1MB", "--precision", "int8", "--resolution", "32")
    code, out, _ = run(shapes, *given, "--minutes", "0.05", "--out", tmp_path / "run")
    assert code == 1
    assert LOST in " ".join(out.split())
    result = json.loads((tmp_path / "run" / "fit.json").read_text())
    assert [each["limit"] for each in result["broken"]] == ["accuracy in 8 bits", "file_size"]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


@pytest.mark.usefixtures("few_widths")
def test_eight_bits_keep_a_small_file(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lenient = functools.partial(verdict.export_int8, max_drop=99)  # so few steps may not survive 8 bits
    monkeypatch.setattr(verdict, "export_int8", lenient)
    found = quick(tmp_path / "run", shapes, file_size="4.1MB", precision="int8")
    assert found.kept
    assert (found.model / "model.xml").is_file()
    assert found.result["measured"]["file_size"] <= 4_100_000


def test_an_impossible_budget_leaves_nothing(
    shapes: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, err = run(shapes, "--params", "10k", "--out", tmp_path / "run")
    assert code == 2
    assert "params" in err
    assert "lite0-w0.35" in err
    assert not (tmp_path / "run").exists()


def test_without_a_budget_three_are_named(shapes: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = run(shapes)
    assert code == 2
    assert all(option in err for option in ("--latency ", "--macs ", "--file-size "))


def test_a_dry_run_trains_nothing(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., tuple[int, str, str]]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(shapes, *WORDS, "--dry-run")
    assert code == 0
    assert "lite0-32" in out
    assert "keep the budget" in out
    assert "Next: effnet fit" in err
    assert not list(tmp_path.iterdir())


def test_a_resumed_fit_keeps_its_arguments(fitted: Fitted, run: Callable[..., tuple[int, str, str]]) -> None:
    code, _, err = run("--resume", fitted.folder, "--macs", "1G")
    assert code == 2
    assert "macs" in err
    code, out, err = run("--resume", fitted.folder)
    assert code == 0
    assert "keeps the budget" in out
    assert "Next: effnet predict" in err


def test_data_that_cannot_be_trained_with_stops_it(shapes: Path, tmp_path: Path) -> None:
    only = tmp_path / "data"
    (only / "disc").mkdir(parents=True)
    for file in sorted((shapes / "disc").iterdir())[:3]:
        (only / "disc" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match="class"):
        effnet.fit(only, macs="8M", out=tmp_path / "run")
    (only / "ring").mkdir()
    (only / "ring" / "broken.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"broken\.png"):
        effnet.fit(only, macs="8M", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_budget_is_needed(shapes: Path) -> None:
    with pytest.raises(ArgumentError, match="must limit something"):
        effnet.fit(shapes)

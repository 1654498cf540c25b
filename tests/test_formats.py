"""Files of earlier versions of effnet: they open and give the same answers, or one line says what to do instead.

tests/formats/ keeps one of each, made by the code of that time (its README.md says how). The answers beside them were
given by the code that wrote them.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ran import Run
from tiny import tiny_spec

import effnet
from effnet.data.dataset import read_data
from effnet.errors import ArgumentError, ArtifactError, BundleError, DataError, TrainingError
from effnet.fitting.settings import FitPlan
from effnet.searching.plan import SearchPlan
from effnet.training.run_folder import RunPlan, load_checkpoint
from effnet.training.train import sort_settings
from effnet.weights.bundle import open_bundle

FORMATS = Path(__file__).with_name("formats")
PHOTO = Path(effnet.__file__).parent / "data" / "photos" / "coffee.png"
BUNDLES = sorted(FORMATS.glob("bundle-*.zip"))
ARTIFACTS = sorted(FORMATS.glob("artifacts-*.zip"))
OLDER_RUNS = [FORMATS / f"run-{number}.zip" for number in (1, 2, 3)]
CURRENT_RUN = FORMATS / "run-4.zip"
NEWER = "made by a newer effnet"


def unpack(file: Path, folder: Path) -> Path:
    """What a sample holds, under its name in a folder."""
    with zipfile.ZipFile(file) as members:
        members.extractall(folder / file.stem)
    return folder / file.stem


def check_answer(model: Path, answer: Path) -> None:
    """Whether a model names the photo as the code that wrote it did, which read and resized photos less exactly."""
    expected = json.loads(answer.read_text())
    found = effnet.load(str(model)).predict(PHOTO)
    assert found.label == expected["label"]
    assert found.probability == pytest.approx(expected["probability"], abs=2e-3)


@pytest.mark.parametrize("file", BUNDLES, ids=lambda file: file.stem)
def test_a_bundle_answers_as_it_did(file: Path, tmp_path: Path) -> None:
    folder = unpack(file, tmp_path)
    check_answer(folder / "bundle", folder / "answer.json")
    ramp = torch.linspace(-2, 2, 3 * 32 * 32).reshape(1, 3, 32, 32)
    expected = torch.tensor(json.loads((folder / "answer.json").read_text())["logits_of_ramp"])
    assert torch.allclose(open_bundle(folder / "bundle").network(ramp)[0], expected, atol=1e-5)


@pytest.mark.parametrize("name", ["small.onnx", "small", "small.pt2"])
@pytest.mark.parametrize("file", ARTIFACTS, ids=lambda file: file.stem)
def test_an_artifact_answers_as_it_did(file: Path, name: str, tmp_path: Path) -> None:
    folder = unpack(file, tmp_path)
    check_answer(folder / name, folder / "answer.json")


@pytest.mark.parametrize("file", OLDER_RUNS, ids=lambda file: file.stem)
def test_an_older_run_is_refused_and_its_model_opens(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = unpack(file, tmp_path)
    check_answer(folder / "best", folder / "answer.json")
    for broken, advice in ((False, f"--like {folder}"), (True, f"--model {folder / 'best'}")):
        if broken:
            plan = folder / "args.yaml"
            plan.write_text(plan.read_text().replace("settings:\n", "settings:\n  colour: 1\n", 1))
        refused = Run(capsys, "train", "--resume", folder)
        assert refused.code == 2
        assert refused.err.count("\n") == 1
        assert "older effnet" in refused.err
        assert f"effnet train DATA {advice}" in refused.err


@pytest.mark.parametrize("file", OLDER_RUNS, ids=lambda file: file.stem)
def test_an_older_run_can_be_begun_anew(file: Path, tmp_path: Path) -> None:
    folder = unpack(file, tmp_path)
    plan, _ = RunPlan.read(folder)
    settings, recipe = sort_settings(None, {}, plan)
    assert (settings.resolution, recipe.epochs, recipe.name) == (32, 2, plan.recipe.name)


def test_the_current_run_can_be_read(tmp_path: Path) -> None:
    folder = unpack(CURRENT_RUN, tmp_path)
    plan, _ = RunPlan.read(folder)
    state, problem = load_checkpoint(folder)
    assert (problem, state["inputs"]["plan"]["recipe"]) == ("", plan.to_dict()["recipe"])
    check_answer(folder / "best", folder / "answer.json")


def test_shards_are_read(tmp_path: Path) -> None:
    data = read_data(unpack(FORMATS / "shards-1.zip", tmp_path))
    assert [len(data), *data.classes] == [6, "disc", "ring", "square"]


def test_a_network_of_its_first_format() -> None:
    assert effnet.spec(str(FORMATS / "spec-1.yaml")) == tiny_spec()


def test_an_older_search_is_refused(tmp_path: Path) -> None:
    folder = unpack(FORMATS / "search-unsigned.zip", tmp_path)
    with pytest.raises(ArgumentError, match=r"older effnet .* start over: effnet search DATA"):
        SearchPlan.read(folder)


# Newer ones, made from what this version writes


def rewrite(path: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_newer_bundle_is_refused(tmp_path: Path) -> None:
    folder = unpack(BUNDLES[-1], tmp_path) / "bundle"
    config = folder / "config.json"
    whole = config.read_text()
    rewrite(config, lambda values: values.update(format=2, effnet="99.1.0"))
    with pytest.raises(BundleError, match=rf"{NEWER} \(99\.1\.0\).*format 2"):
        effnet.load(str(folder))

    def add(values: dict[str, Any]) -> None:
        values.pop("digest")
        values |= {"effnet": "99.1.0", "scent": 1}
        values["digest"] = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    config.write_text(whole)
    rewrite(config, add)
    with pytest.raises(BundleError, match=rf"{NEWER} \(99\.1\.0\).*scent"):
        effnet.load(str(folder))


@pytest.mark.parametrize("name", ["small.onnx", "small"])
def test_a_newer_artifact_is_refused(name: str, tmp_path: Path) -> None:
    path = unpack(ARTIFACTS[-1], tmp_path) / name
    file = path / "model.xml" if path.is_dir() else path
    whole = file.read_bytes()
    quote = b"&quot;" if path.is_dir() else b'"'
    for old, new in ((b"format%s: 1", b"format%s: 2"), (b"resize%s:", b"resise%s:")):
        old, new = old % quote, new % quote
        assert old in whole
        file.write_bytes(whole.replace(old, new, 1).replace(b": %s0.1.0" % quote, b": %s9.1.0" % quote))
        with pytest.raises(ArtifactError, match=rf"{NEWER} \(9\.1\.0\)"):
            effnet.load(str(path))


def test_a_newer_run_is_refused(tmp_path: Path) -> None:
    folder = unpack(CURRENT_RUN, tmp_path)
    last, plan = folder / "last.ckpt", folder / "args.yaml"
    last.write_bytes(last.read_bytes().replace(b"checkpoint 4", b"checkpoint 5", 1))
    with pytest.raises(TrainingError, match=rf"{NEWER}.*format 5"):
        load_checkpoint(folder)
    last.unlink()
    text = plan.read_text().replace("settings:\n", "settings:\n  scent: 1\n", 1)
    plan.write_text(text.replace("effnet: 0.9.0", "effnet: 99.1.0"))
    with pytest.raises(TrainingError, match=rf"{NEWER} \(99\.1\.0\).*scent"):
        RunPlan.read(folder)


def test_newer_plans_are_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").write_text("effnet: 99.1.0\ndata: photos\noptions: {scent: 1}\n")
    with pytest.raises(ArgumentError, match=rf"{NEWER} \(99\.1\.0\)"):
        FitPlan.read(tmp_path)
    (tmp_path / "args.yaml").write_text("effnet: 99.1.0\ncandidates: []\n")
    with pytest.raises(ArgumentError, match=rf"{NEWER} \(99\.1\.0\)"):
        SearchPlan.read(tmp_path)


def test_newer_shards_and_networks_are_refused(tmp_path: Path) -> None:
    folder = unpack(FORMATS / "shards-1.zip", tmp_path)
    rewrite(folder / "shards.json", lambda values: values.update(format=2, effnet="99.1.0"))
    with pytest.raises(DataError, match=rf"{NEWER} \(99\.1\.0\).*format 2"):
        read_data(folder)
    network = tmp_path / "spec.yaml"
    network.write_text((FORMATS / "spec-1.yaml").read_text().replace("format 1", "format 2", 1))
    with pytest.raises(ArgumentError, match=rf"{NEWER}.*format 2"):
        effnet.spec(str(network))

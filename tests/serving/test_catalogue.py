"""The models of a server: their names, and their reload."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path

import pytest
from served import Colours, photo

from effnet.errors import ArgumentError, BundleError, UnknownNameError
from effnet.runtime.classifier import Classifier
from effnet.serving import catalogue as module
from effnet.serving.catalogue import Catalogue, name_models
from effnet.serving.counters import Counters
from effnet.serving.engine import PredictOptions, Reply
from effnet.serving.pace import Pace


def test_models_are_named_after_the_last_part_of_their_path(tmp_path: Path) -> None:
    folder, file = tmp_path / "best.v2", tmp_path / "a=b.onnx"
    folder.mkdir()
    file.touch()
    models = ["lite0", "timm/tf_efficientnet_b0.in1k", f"mine={file}", str(folder)]
    assert name_models(models) == {
        "lite0": "lite0",
        "tf_efficientnet_b0.in1k": "timm/tf_efficientnet_b0.in1k",
        "mine": str(file),
        "best.v2": str(folder),
    }
    assert name_models([str(tmp_path / "a.onnx")]) == {
        "a.onnx": str(tmp_path / "a.onnx")
    }  # is not there, which load says


@pytest.mark.parametrize(
    ("models", "words"),
    [([], "at least one"), (["a b"], "NAME=MODEL"), (["=lite0"], "NAME=MODEL"), (["x=lite0", "x=b0"], "as lite0")],
)
def test_names_that_cannot_be_served(models: list[str], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        name_models(models)


class Shelf:
    """What `open_engine` finds: one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *engines: Colours | Exception) -> None:
        self._left = iter(engines)
        self.notes: list[str] = []
        self.counters = Counters()
        monkeypatch.setattr(module, "open_engine", self.open)
        self.catalogue = Catalogue({"colours": "path"}, 1.0, {}, self.counters, self.notes.append)

    def open(self, *_: object) -> tuple[Classifier, Pace]:
        found = next(self._left)
        if isinstance(found, Exception):
            raise found
        return found.classifier, Pace(1.0, {1: 0.001}, 4)

    async def ask(self) -> str:
        engine = self.catalogue.engine()
        with engine.batcher.place():
            (answer,) = await engine.answer([photo("red")], PredictOptions())
        assert isinstance(answer, Reply)
        return answer.prediction.label

    def reloads(self, result: str) -> float | None:
        return self.counters.registry.get_sample_value("effnet_reloads_total", {"model": "colours", "result": result})


def test_a_reload_loses_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = Colours(), Colours(("rot", "grün", "blau"))
    shelf = Shelf(monkeypatch, old, new)

    async def scene() -> None:
        catalogue = shelf.catalogue
        await catalogue.load()
        old.go.clear()
        inside = [asyncio.create_task(shelf.ask()) for _ in range(3)]
        while not old.batches:
            await asyncio.sleep(0.001)
        await catalogue.reload()
        assert await shelf.ask() == "rot"  # while the old one still computes
        assert not old.closed
        old.go.set()
        assert await asyncio.gather(*inside) == ["red"] * 3
        await catalogue.close()
        assert old.closed
        assert new.closed

    asyncio.run(scene())
    assert shelf.reloads("done") == 1


def test_a_replaced_model_goes_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(monkeypatch, Colours(), Colours())

    async def scene() -> None:
        await shelf.catalogue.load()
        await shelf.ask()
        old = weakref.ref(shelf.catalogue.engine())
        await shelf.catalogue.reload()
        while shelf.catalogue._closing:
            await asyncio.sleep(0.001)
        assert old() is None  # though nothing looked for cycles
        await shelf.catalogue.close()

    gc.disable()
    try:
        asyncio.run(scene())
    finally:
        gc.enable()


def test_a_broken_model_is_refused_and_the_old_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(monkeypatch, Colours(), BundleError("path was changed"), Colours(("rot", "grün", "blau")))

    async def scene() -> None:
        await shelf.catalogue.load()
        await shelf.catalogue.reload()
        assert await shelf.ask() == "red"
        assert "path was changed" in shelf.notes[-1]
        await shelf.catalogue.reload()
        assert await shelf.ask() == "rot"
        await shelf.catalogue.close()

    asyncio.run(scene())
    assert (shelf.reloads("refused"), shelf.reloads("done")) == (1, 1)


def test_an_unknown_name_is_answered_with_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(monkeypatch, Colours())

    async def scene() -> None:
        await shelf.catalogue.load()
        with pytest.raises(UnknownNameError, match="colours"):
            shelf.catalogue.engine("colour")
        await shelf.catalogue.close()

    asyncio.run(scene())

"""The model card, as huggingface_hub reads it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from effnet.reporting.card import write_card
from effnet.reporting.subject import Subject
from effnet.weights.bundle import open_bundle, save


def test_the_hub_reads_the_header(subject: Subject, tmp_path: Path) -> None:
    card = ModelCard.load(write_card(subject, tmp_path))
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("effnet", "image-classification")
    results = {each.metric_type: each for each in card.data.eval_results or ()}
    assert results["accuracy"].metric_value == pytest.approx(subject.evaluation.top1.value, abs=1e-6)
    assert results["f1"].metric_value == pytest.approx(subject.evaluation.macro_f1.value, abs=1e-6)
    assert (results["accuracy"].dataset_name, results["accuracy"].dataset_split) == ("images & more", "test")


def test_names_are_text_and_folders_stay_at_home(subject: Subject, tmp_path: Path) -> None:
    text = write_card(subject, tmp_path).read_text("utf-8")
    assert "\\<script\\>alert\\(1\\)\\</script\\>" in text
    assert text.count("<script") == text.count("\\<script")
    assert "/home/me" not in text  # whoever uploads the folder does not say where it lay
    assert "Abstaining below 60.0% confidence" in text


def test_a_bundle_with_a_card_is_a_bundle(subject: Subject, bundle: Path, tmp_path: Path) -> None:
    opened = open_bundle(bundle)
    folder = save(opened.network, tmp_path / "m", classes=opened.config.classes, input=opened.config.input)
    card = write_card(dataclasses.replace(subject, split="val"), folder)
    assert "chosen on these images" in card.read_text("utf-8")
    assert open_bundle(folder).config.classes == opened.config.classes
    save(opened.network, folder, classes=opened.config.classes, input=opened.config.input)  # replaced, card and all
    assert not card.exists()

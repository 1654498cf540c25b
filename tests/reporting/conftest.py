"""A model with odd class names, its answers and its images, made up: opening it takes a fraction of a second."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from limits import SETS, familiarity
from reported import CLASSES, SPEC, N, answers, draw

import effnet
from effnet.arch.spec import Calibration, InputSpec
from effnet.metrics.evaluate import evaluate
from effnet.metrics.sureness import measure_sureness
from effnet.reporting.subject import Neighbours, Subject
from effnet.weights.bundle import Record


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    network = effnet.EfficientNet(SPEC)
    known = familiarity(SPEC.head_channels, len(CLASSES), "energy", threshold=0.0)
    record = Record(calibration=Calibration(1.2, 0.6, 0.05, 60, "val"), sets=SETS, familiarity=known)
    folder = tmp_path_factory.mktemp("model") / "m"
    return effnet.save(network, folder, classes=CLASSES, input=InputSpec(32, 36), record=record)


@pytest.fixture(scope="session")
def subject(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """Everything but what only a fit has."""
    data = draw(tmp_path_factory.mktemp("data") / "images", N)
    labels = np.array([sample.label for sample in data.samples])
    logits, classifier = answers(labels, len(CLASSES)), effnet.load(bundle, precision="fp32")
    calibration = classifier.calibration
    assert calibration is not None
    pixels = np.stack([classifier.read(data.file(sample)) for sample in data.samples])
    evaluation = evaluate(logits, labels, CLASSES, temperature=1.2, threshold=0.6)
    scores = np.linspace(-2, 8, N)  # a fifth is unfamiliar
    told = None if classifier.familiarity is None else (classifier.familiarity, scores)
    return Subject(
        name="tiny",
        source="images & more",
        data=data,
        split="test",
        logits=logits,
        evaluation=evaluation,
        classifier=classifier,
        calibration=calibration,
        calibrated_on="the 60 images of the val split",
        sureness=measure_sureness(logits, labels, 1.2, sets=SETS, told=told),
        scores=scores,
        neighbours=Neighbours(data, classifier.maps(pixels)[1].mean((2, 3))),
        history=[{"epoch": epoch, "val_top1": 0.5 + 0.1 * epoch} for epoch in (1, 2, 3)],
        splits={"train": 400, "val": 60, "test": N},
        notes=["4 classes."],
        commands=[("Classify photos:", "effnet predict PHOTO --model m")],
        facts={"seed": "0", "data": "/home/me/images", "machine": "a processor"},
    )


@pytest.fixture(scope="session")
def fitted(subject: Subject) -> Subject:
    """The same of a fit whose budget is not kept."""
    share = {"value": 0.7, "low": 0.6, "high": 0.8}
    costs = {"macs": 4e6, "params": 5e5, "file_size": 2e6, "latency": 0.004, "slowest_tenth": 0.005, "memory": 8e6}
    kept = {"start": "random", **costs, "refused": None, "probe": None, "short": None}
    rows = [
        kept | {"name": "tiny", "probe": share, "short": share},
        kept | {"name": "<i>small</i>", "macs": 1e6},
        kept | {"name": "large", "latency": 0.03, "refused": {"limit": "latency", "value": 0.03, "allowed": 0.005}},
    ]
    fit = {
        "budget": {"latency": 0.005, "macs": 1e8},
        "predicted": {"latency": 0.004, "macs": 4e6},
        "measured": {"latency": 0.0052, "slowest_tenth": 0.006, "macs": 4e6},
        "kept": False,
        "broken": [{"limit": "latency", "value": 0.006, "allowed": 0.005}],
        "nearest": "small needs 1 ms",
        "candidates": rows,
        "chosen": "tiny",
        "reason": "tiny is better than small by 3 points.",
        "bought": ["Ten minutes more would buy a point."],
    }
    return dataclasses.replace(subject, fit=fit, suspects=[(subject.data.samples[0].path, "a & b", "<i>", 0.004)])

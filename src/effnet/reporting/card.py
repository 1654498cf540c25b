"""The model card: README.md in a bundle's folder, with a YAML header for the Hugging Face hub.

It names no licence, which depends on the images and the initial weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from effnet import console
from effnet.arch.cost import cost
from effnet.files import write_text
from effnet.metrics.intervals import Interval
from effnet.reporting.sections import clean, tell_verdict
from effnet.reporting.subject import Subject
from effnet.reporting.words import between, describe_threshold

CARD = "README.md"
CLASSES = 1000  # most classes to list
EXAMPLE = """```python
import effnet

classifier = effnet.load("FOLDER")  # the folder of this file
print(classifier.predict("photo.jpg"))
```"""
SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~&-])")  # characters to escape in markdown


def write_card(subject: Subject, folder: str | Path) -> Path:
    """Write README.md to the folder of a bundle, and return its path."""
    header = yaml.safe_dump(_metadata(subject), sort_keys=False, allow_unicode=True)
    path = Path(folder) / CARD
    write_text(path, f"---\n{header}---\n\n{_text(subject)}")
    return path


def _metadata(subject: Subject) -> dict[str, Any]:
    """The header that the hub shows and searches, with the figures as a model index."""
    found = subject.evaluation
    values = {"accuracy": found.top1, "f1": found.macro_f1}
    names = {"accuracy": "Accuracy", "f1": "Macro F1"}
    figures = [{"type": kind, "value": round(it.value, 6), "name": names[kind]} for kind, it in values.items()]
    data = {"name": clean(subject.source), "type": "imagefolder", "split": subject.split}
    task = {"type": "image-classification", "name": "Image classification"}
    return {
        "library_name": "effnet",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "efficientnet", "effnet"],
        "metrics": ["accuracy", "f1"],
        "model-index": [
            {"name": clean(subject.title), "results": [{"task": task, "dataset": data, "metrics": figures}]}
        ],
    }


def _text(subject: Subject) -> str:
    spec, found = subject.classifier.spec, subject.evaluation
    price = cost(spec)
    figures: list[tuple[str, Interval | None]] = [
        ("top-1", found.top1),
        ("top-5", found.top5),
        ("macro F1", found.macro_f1),
    ]
    rows = [f"| {name} | {between(it, 2)} |" for name, it in figures if it is not None]
    names = [_plain(name) for name in subject.data.classes[:CLASSES]]
    more = f", and {len(subject.data.classes) - CLASSES} more" if len(subject.data.classes) > CLASSES else ""
    verdict = tell_verdict(subject)
    lines = [
        f"# {_plain(subject.title)}",
        verdict["sentence"],
        f"{_plain(spec.name)} at {subject.classifier.input.size} px: {console.millions(price.macs)} multiply-adds, "
        f"{console.millions(price.params)} parameters.",
        "## How to use it",
        EXAMPLE,
        f"## How good it is: {found.n:,} images, {subject.split}",
        "\n".join(("| figure | value, 95 % interval |", "| :--- | :--- |", *rows)),
        *verdict["cautions"],
        "## What it knows of its limits",
        "\n".join(f"- {text}" for text in _limits(subject)),
        f"## Classes: {len(subject.data.classes)}",
        ", ".join(names) + more,
        "## How it was made",
        "\n".join(f"- {_plain(name)}: {_plain(value)}" for name, value in subject.facts.items() if name != "data"),
    ]
    return "\n\n".join(line for line in lines if line) + "\n"


def _limits(subject: Subject) -> list[str]:
    calibration, known = subject.calibration, subject.classifier.familiarity
    texts = ["It predicts one of its classes for any image."]
    if calibration is not None:
        texts.append(f"Its confidence was calibrated on {calibration.n:,} {calibration.split} images.")
        texts.append(f"{describe_threshold(subject.evaluation, calibration)} Predictions below it are `unsure`.")
    if known is not None:
        texts.append(f"{_plain(str(known))}. Images below it are called `unfamiliar`.")
    return texts


def _plain(text: str) -> str:
    """A text escaped for markdown."""
    return SPECIAL.sub(r"\\\1", clean(text)) if len(text) <= 60 else SPECIAL.sub(r"\\\1", " ".join(text.split()))

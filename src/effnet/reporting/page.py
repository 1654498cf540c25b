"""The report: one HTML file of at most 3 MB that works without network, server and JavaScript.

Its content comes from a Subject; page/ has the template, and the style and script that are inlined. The content
security policy allows these two by their hashes, so nothing else in the page can run, whatever a class is called.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from effnet.files import write_text
from effnet.progress import SILENT, Progress
from effnet.reporting import budget, charts, sections
from effnet.reporting.pictures import Pictures
from effnet.reporting.subject import Subject
from effnet.version import __version__

LIMIT = 3_000_000  # bytes per page
ROOM = 2_200_000  # bytes of them for pictures, less if the rest is large


def write_report(subject: Subject, out: str | Path, progress: Progress = SILENT) -> Path:
    """Write a page about a model on labelled images, and return its path.

    The same subject gives the same bytes. The page includes small copies of some images: mind whom you give it to.

    Raises:
        ArgumentError: `out` is a folder.
    """
    page, room = render(subject, ROOM, progress), ROOM
    while (excess := len(page.encode()) - LIMIT) > 0 and room > 0:
        room = max(0, room - excess)
        page = render(subject, room, progress)
    write_text(Path(out), page)
    return Path(out)


def render(subject: Subject, room: int, progress: Progress = SILENT) -> str:
    """The page as HTML, with at most `room` bytes of pictures."""
    environment = Environment(
        loader=PackageLoader("effnet.reporting", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = files("effnet.reporting") / "page"
    style, script = ((page / name).read_text("utf-8") for name in ("report.css", "report.js"))
    values: dict[str, Any] = {"style": Markup(style), "script": Markup(script)}
    values |= {"policy": f"style-src '{_hash(style)}'; script-src '{_hash(script)}'"}
    return environment.get_template("report.html").render(
        values, subject=subject, version=__version__, **_fill(subject, Pictures(room), progress)
    )


def _fill(subject: Subject, pictures: Pictures, progress: Progress) -> dict[str, Any]:
    """Every part of the page; pictures are allotted in this order."""
    fit, history = subject.fit or {}, subject.history
    parts: dict[str, Callable[[], Any]] = {
        "verdict": lambda: sections.tell_verdict(subject),
        "budget": lambda: budget.tabulate_budget(fit),
        "candidates": lambda: budget.tabulate_candidates(fit),
        "coverage": lambda: sections.tabulate_coverage(subject),
        "mistakes": lambda: list(sections.explain_mistakes(subject, pictures)),
        "suspects": lambda: sections.list_suspects(subject, pictures),
        "strange": lambda: sections.list_strange(subject, pictures),
        "confusion": lambda: sections.tabulate_confusion(subject, pictures),
        "calibration": lambda: sections.tell_calibration(subject),
        "classes": lambda: sections.tabulate_classes(subject),
        "network": lambda: sections.count_network(subject),
        "splits": lambda: sections.split_rows(subject),
        "history": lambda: charts.draw_history(history) if len(history) > 1 else None,
    }
    filled = dict[str, Any]()
    for done, (name, make) in enumerate(parts.items(), start=1):
        filled[name] = make()
        progress.update("report", done, len(parts))
    return filled


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"

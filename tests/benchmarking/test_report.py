"""The picture of a bench: what is on it."""

import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from effnet.benchmarking.report import BatchTime, BenchReport, BenchRow
from effnet.machine import Machine
from effnet.metrics.intervals import Interval
from effnet.metrics.timing import Conditions, Timing
from effnet.runtime.select import Selection
from effnet.runtime.session import Backend

TORCH, BF16, ONNX = Backend("torch"), Backend("openvino", "bf16"), Backend("onnxruntime")


def row(backend: Backend, *milliseconds: float, agreement: float) -> BenchRow:
    time = BatchTime(4, backend, Timing(tuple(each / 1e3 for each in milliseconds)))
    same = Interval(agreement, agreement - 0.05, agreement + 0.05)
    return BenchRow(backend, (time,), 0.01, same, cold_start_seconds=0.5)


def test_every_figure_is_drawn_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (row(TORCH, 2000, 2000, 2000, agreement=0.95), row(BF16, 200, 200, 200, agreement=0.75), BenchRow(ONNX))
    conditions = Conditions(2, ("torch 9",), machine=Machine("Processor X", 2, None, ()), load=None)
    report = BenchReport("m", 32, conditions, (4,), rows, TORCH, {4: Selection(BF16, 4, "")}, ())
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **kw: (figures.append(figure), save(figure, *a, **kw)))
    report.draw(tmp_path / "x.svg")
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", (tmp_path / "x.svg").read_text("utf-8"))
    assert {"torch fp32", "OpenVINO bf16", "ONNX Runtime fp32", "200", "2,000", "0.5", "75"} <= set(texts)
    assert any("2 threads, torch 9" in text for text in texts)
    speed, starts, memory, share = (axes for axes in figures[0].axes if axes.get_visible())
    assert [bar.get_width() for bar in speed.patches] == pytest.approx([2000, 200])
    assert speed.get_xlim()[0] == 0
    assert [bar.get_width() for bar in starts.patches] == [0.5, 0.5]
    assert not memory.patches  # not reported
    assert not share.patches
    assert [line.get_xdata()[0] for line in share.lines] == pytest.approx([95, 75])
    assert share.get_xlim()[0] > 60
    assert [label.get_text() for label in speed.get_yticklabels()] == [
        "torch fp32",
        "OpenVINO bf16",
        "ONNX Runtime fp32",
    ]
    assert speed.yaxis_inverted()

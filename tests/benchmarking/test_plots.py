"""The picture of a bench: what is on it."""

import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from effnet.benchmarking.cold_start import ColdStart
from effnet.benchmarking.plots import draw_bench
from effnet.benchmarking.report import Answers, BatchTime, BenchReport, BenchRow
from effnet.machine import Machine
from effnet.metrics.intervals import Interval
from effnet.metrics.timing import Conditions, Timing
from effnet.runtime.select import Selection
from effnet.runtime.session import Backend

TORCH, BF16, ONNX = Backend("torch"), Backend("openvino", "bf16"), Backend("onnxruntime")


def row(backend: Backend, *milliseconds: float, agreement: float) -> BenchRow:
    time = BatchTime(4, backend, Timing(tuple(each / 1e3 for each in milliseconds)))
    answers = Answers(0.1, 0.01, Interval(agreement, agreement - 0.05, agreement + 0.05))
    return BenchRow(backend, (time,), answers, cold_starts=(ColdStart(0.5, 0),))


def test_every_figure_is_drawn_and_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (row(TORCH, 200, 200, 200, agreement=0.95), row(BF16, 2, 2, 2, agreement=0.75), BenchRow(ONNX))
    conditions = Conditions(Machine("Processor X", 2, None, ()), 2, None, None, ("torch 9",), None, None)
    report = BenchReport("m", 32, conditions, (4,), rows, TORCH, {4: Selection(BF16, 4, "")}, ())
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **kw: (figures.append(figure), save(figure, *a, **kw)))
    draw_bench(report, tmp_path / "x.svg")
    texts = re.findall(r"<text[^>]*>([^<]+)</text>", (tmp_path / "x.svg").read_text("utf-8"))
    assert {"torch fp32", "OpenVINO bf16", "ONNX Runtime fp32", "20", "2,000", "0.5", "75.0"} <= set(texts)
    assert any("2 threads, torch 9" in text for text in texts)
    speed, starts, memory, share = (axes for axes in figures[0].axes if axes.get_visible())
    assert [bar.get_width() for bar in speed.patches] == pytest.approx([20, 2000])
    assert speed.patches[0].get_facecolor() != speed.patches[1].get_facecolor()
    assert speed.get_xlim()[0] == 0
    assert [bar.get_width() for bar in starts.patches] == [0.5, 0.5]
    assert not memory.patches  # nothing told it
    assert not share.patches
    assert [line.get_xdata()[0] for line in share.lines] == pytest.approx([95, 90, 75, 70])
    assert share.get_xlim()[0] > 60
    names = ["torch fp32", "OpenVINO bf16", "ONNX Runtime fp32"]
    assert [label.get_text() for label in speed.get_yticklabels()] == names
    assert [label.get_text() for label in share.get_yticklabels()] == names  # a row of its own
    assert [label.get_text() for label in starts.get_yticklabels()] == ["", "", ""]
    assert speed.yaxis_inverted()

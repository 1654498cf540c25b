"""The picture of a run: what is on it."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from effnet.training.result import draw_learning_curves

COLUMNS = "epoch", "seconds", "lr", "train_loss", "val_loss", "val_top1"
ROWS = [dict(zip(COLUMNS, (i, 12.5 * i, 1e-3 / i, 2 / i, 2.2 / i, 1 - 0.5 / i), strict=True)) for i in range(1, 5)]


def test_learning_curves(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_learning_curves(ROWS, tmp_path / "results.png")
    curves = {
        (axes.get_ylabel(), line.get_label()): list(line.get_ydata()) for axes in drawn[0].axes for line in axes.lines
    }
    assert curves["loss", "training"] == [row["train_loss"] for row in ROWS]
    assert curves["loss", "validation"] == [row["val_loss"] for row in ROWS]
    assert curves["top-1 of the validation split, %", "validation"] == [100 * row["val_top1"] for row in ROWS]
    (seconds,) = [values for (label, _), values in curves.items() if label.startswith("seconds")]
    assert seconds == [12.5] * 4  # of each epoch, not since the start
    (rates,) = [values for (label, _), values in curves.items() if label == "learning rate"]
    assert rates == [row["lr"] for row in ROWS]

"""The charts of a report, as SVG without matplotlib: text stays text, and the page's style sets the colours.

Every chart has a name for screen readers, and a table of its numbers beside it. Shapes differ as well as colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.etree.ElementTree import Element, SubElement, tostring

from markupsafe import Markup

from effnet.metrics.calibration import Reliability
from effnet.metrics.intervals import Interval

WIDTH, HEIGHT = 480.0, 300.0
LEFT, RIGHT, TOP, BOTTOM = 58.0, 26.0, 14.0, 44.0  # margins of the axes
STRIP = 34.0  # below the axes, for points without a y value
STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)  # between the ticks of an axis, times a power of ten
NAME = 26  # letters


class Axis:
    """Maps values to coordinates, linearly or logarithmically."""

    def __init__(self, low: float, high: float, start: float, end: float, *, log: bool = False) -> None:
        self.low, self.high = (low, high) if high > low else (low * 0.9, low * 1.1 or 1.0)
        self.start, self.end, self.log = start, end, log

    def __call__(self, value: float) -> float:
        """The coordinate of a value."""
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 2)

    @property
    def marks(self) -> list[float]:
        """Values of the ticks: 1, 2 and 5 of each decade, or about five at equal steps."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
        else:
            rough = (self.high - self.low) / 5
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(each * power for each in STEPS if each * power >= rough * 0.999)
            first = math.ceil(self.low / step - 1e-9)
            found = [round(step * n, 12) for n in range(first, first + 12)]
        found = [value for value in found if self.low * (1 - 1e-9) <= value <= self.high * (1 + 1e-9)]
        return found[:: 1 + len(found) // 9]


class Drawing:
    """Axes with a grid, to draw points, lines and bars on."""

    def __init__(self, name: str, x: Axis, y: Axis, height: float = HEIGHT) -> None:
        self.root = Element("svg", viewBox=f"0 0 {WIDTH:g} {height:g}", role="img", attrib={"aria-label": name})
        self.x, self.y, self.height = x, y, height

    def axes(self, x: tuple[str, str], y: tuple[str, str]) -> Drawing:
        """Draw the grid. Each axis has a title and a number format."""
        for value in self.x.marks:
            self.line([(self.x(value), TOP), (self.x(value), HEIGHT - BOTTOM)], "grid")
            self.text(write(value, x[1]), self.x(value), HEIGHT - BOTTOM + 17, "mark", "middle")
        for value in self.y.marks:
            self.line([(LEFT, self.y(value)), (WIDTH - RIGHT, self.y(value))], "grid")
            self.text(write(value, y[1]), LEFT - 6, self.y(value) + 4, "mark", "end")
        self.text(x[0], (LEFT + WIDTH - RIGHT) / 2, self.height - 6, "title", "middle")
        self.text(y[0], 0, 0, "title", "middle", f"translate(13 {(TOP + HEIGHT - BOTTOM) / 2:g}) rotate(-90)")
        return self

    def add(self, tag: str, kind: str, **values: object) -> Element:
        """Add an element with a class of the style sheet."""
        return SubElement(self.root, tag, {"class": kind, **{key: str(value) for key, value in values.items()}})

    def line(self, points: Iterable[tuple[float, float]], kind: str) -> None:
        """Draw a line through coordinates."""
        self.add("polyline", kind, points=" ".join(f"{x:g},{y:g}" for x, y in points))

    def curve(self, points: Iterable[tuple[float, float]], kind: str) -> None:
        """Draw a line through values."""
        self.line([(self.x(x), self.y(y)) for x, y in points], kind)

    def text(self, text: str, x: float, y: float, kind: str, anchor: str = "start", move: str = "") -> None:
        """Write a text at coordinates."""
        values = {"text-anchor": anchor} | ({"transform": move} if move else {})
        self.add("text", kind, x=f"{x:g}", y=f"{y:g}", **values).text = text

    def point(self, x: float, y: float, shape: str) -> None:
        """Draw a circle, a cross or a diamond at coordinates."""
        r = {"circle": 4.0, "cross": 4.5, "diamond": 7.0}[shape]
        path = {
            "circle": f"M{x - r} {y}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
            "cross": f"M{x - r} {y - r}l{2 * r} {2 * r}m0 {-2 * r}l{-2 * r} {2 * r}",
            "diamond": f"M{x} {y - r}l{r} {r}l{-r} {r}l{-r} {-r}z",
        }[shape]
        self.add("path", shape, d=path)

    def done(self) -> Markup:
        """The chart as markup, with all text escaped."""
        return Markup(tostring(self.root, encoding="unicode"))


def write(value: float, form: str) -> str:
    """Format a number of an axis as "%", or with a unit and an SI prefix."""
    if form == "%":
        return f"{100 * value:g}%"
    for prefix, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0), ("m", 1e-3), ("µ", 1e-6)):
        if abs(value) >= factor * 0.9999 and (form or factor >= 1):
            return f"{value / factor:.4g} {prefix}{form}".rstrip()
    return f"{value:g} {form}".rstrip()


def draw_coverage(curve: Sequence[tuple[float, int, int]], n: int, mark: int | None) -> Markup:
    """Draw accuracy against coverage, with a mark at the chosen threshold.

    Args:
        curve: (threshold, number of images answered, number of correct answers), by threshold.
        n: number of images.
        mark: index of the chosen threshold in `curve`.
    """
    points = [(answered / n, right / answered) for _, answered, right in curve if answered]
    low = max(0.0, math.floor(20 * min(y for _, y in points) - 1e-9) / 20)
    x, y = Axis(0, 1, LEFT, WIDTH - RIGHT), Axis(min(low, 0.95), 1, HEIGHT - BOTTOM, TOP)
    drawing = Drawing("Accuracy of the answers over the share of images that are answered", x, y)
    drawing.axes(("images answered, the most confident first", "%"), ("answers that are right", "%"))
    drawing.curve(points, "line first")
    shown = points[mark] if mark is not None else points[0]
    drawing.add("circle", "handle", id="handle", cx=x(shown[0]), cy=y(shown[1]), r=7)
    return drawing.done()


def draw_reliability(before: Reliability, after: Reliability) -> Markup:
    """Draw accuracy against confidence in bins, calibrated as bars, uncalibrated as circles."""
    x, y = Axis(0, 1, LEFT, WIDTH - RIGHT), Axis(0, 1, HEIGHT - BOTTOM, TOP)
    drawing = Drawing("Accuracy over confidence, in bins", x, y)
    drawing.axes(("confidence", "%"), ("images that are right", "%"))
    bins = len(after.counts)
    for place, (count, accuracy) in enumerate(zip(after.counts, after.accuracy, strict=True)):
        if count:
            left, right, top = x(place / bins), x((place + 1) / bins), y(accuracy)
            drawing.add("rect", "bar", x=left + 1, y=top, width=right - left - 2, height=HEIGHT - BOTTOM - top)
    drawing.curve([(0, 0), (1, 1)], "line ideal")
    if before.temperature != after.temperature:
        for count, sure, accuracy in zip(before.counts, before.confidence, before.accuracy, strict=True):
            if count:
                drawing.point(x(sure), y(accuracy), "circle")
    return drawing.done()


def draw_history(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """Draw the accuracy on the val split after each epoch."""
    points = [(float(row["epoch"]), float(row["val_top1"])) for row in rows]
    values = [value for _, value in points]
    spread = max(values) - min(values) or 0.1
    x = Axis(min(0.0, points[0][0]), points[-1][0], LEFT, WIDTH - RIGHT)
    y = Axis(max(0.0, min(values) - 0.1 * spread), min(1.0, max(values) + 0.1 * spread), HEIGHT - BOTTOM, TOP)
    drawing = Drawing("Accuracy on the val split after each epoch", x, y)
    drawing.axes(("epoch", ""), ("right on val", "%")).curve(points, "line first")
    for epoch, value in points:
        drawing.point(x(epoch), y(value), "circle")
    return drawing.done()


def draw_candidates(rows: Sequence[Mapping[str, Any]], costs: Sequence[tuple[str, str]], limit: float | None) -> Markup:
    """Draw accuracy against a cost, with untried networks below the axis; or one cost against another.

    Args:
        rows: each with `name`, `costs`, `accuracy` (an Interval or None), `refused` (a reason or ""), `said`, `chosen`.
        costs: title and unit of one cost, and of another that replaces the accuracy if nothing was tried.
        limit: the budget for the first cost.
    """
    x, y = costs[0], costs[1] if len(costs) > 1 else None
    across = [row["costs"][0] for row in rows] + ([limit] if limit else [])
    axis = Axis(min(across) / 1.3, max(across) * 1.3, LEFT, WIDTH - RIGHT, log=True)
    if y is None:
        tried = [row["accuracy"] for row in rows if row["accuracy"]]
        low, high = min((each.low for each in tried), default=0.0), max((each.high for each in tried), default=1.0)
        upward = Axis(max(0.0, low - 0.02), min(1.0, high + 0.02), HEIGHT - BOTTOM, TOP)
    else:
        values = [row["costs"][1] for row in rows]
        upward = Axis(min(values) / 1.3, max(values) * 1.3, HEIGHT - BOTTOM, TOP, log=True)
    strip = STRIP if y is None else 0.0
    what = "Accuracy" if y is None else y[0].capitalize()
    drawing = Drawing(f"{what} of the candidates over {x[0]}", axis, upward, HEIGHT + strip)
    drawing.axes(x, ("right on val", "%") if y is None else y)
    if limit:
        drawing.line([(axis(limit), TOP), (axis(limit), HEIGHT - BOTTOM)], "limit")
        side, anchor = (4.0, "start") if axis(limit) < WIDTH / 2 else (-4.0, "end")
        drawing.text("your limit", axis(limit) + side, TOP + 11, "note", anchor)
    below = HEIGHT - BOTTOM + 34
    if y is None:
        drawing.text("not tried", LEFT - 6, below + 4, "note", "end")
    for row in sorted(rows, key=lambda row: bool(row["chosen"])):
        place, found = axis(row["costs"][0]), row["accuracy"]
        height = upward(row["costs"][1]) if y else upward(found.value) if found else below
        if found:
            drawing.line([(place, upward(found.low)), (place, upward(found.high))], "whisker")
        drawing.point(place, height, "cross" if row["refused"] else "diamond" if row["chosen"] else "circle")
        drawing.root[-1].append(_title(f"{row['name']}: {row['refused'] or row['said']}"))
        if row["chosen"]:
            side, anchor = (10.0, "start") if place < WIDTH * 0.6 else (-10.0, "end")
            drawing.text(row["name"][:NAME], place + side, height - 8, "note strong", anchor)
    return drawing.done()


def draw_interval(figure: Interval) -> Markup:
    """Draw a bar from 0 to 1 with the interval of its value, for a table cell."""
    root = Element("svg", {"viewBox": "0 0 100 14", "class": "cell", "aria-hidden": "true"})
    value, low, high = (f"{100 * each:.1f}" for each in (figure.value, figure.low, figure.high))
    SubElement(root, "rect", {"class": "bar", "x": "0", "y": "2", "width": value, "height": "10"})
    SubElement(root, "polyline", {"class": "whisker", "points": f"{low},7 {high},7"})
    return Markup(tostring(root, encoding="unicode"))


def _title(text: str) -> Element:
    found = Element("title")
    found.text = text
    return found

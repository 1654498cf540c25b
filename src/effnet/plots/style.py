"""What all plots share: files, colours, fonts. The suffix chooses between png, svg and pdf.

Needs the extra `plots`. No window is opened, and matplotlib's settings stay unchanged. Files have neither date nor
version, so the same numbers give the same bytes; text in svg stays text.

Colours are from the colour-blind safe palette of Okabe and Ito; shapes and labels differ as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effnet.errors import ArgumentError, missing
from effnet.files import write_file
from effnet.plots.fonts import choose_fonts, drawable_text, on_one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GREY, PALE = "#222222", "#666666", "#DDDDDD"
BLUE, ORANGE, GREEN, SKY, RED = "#0072B2", "#E69F00", "#009E73", "#56B4E9", "#D55E00"

STYLE: dict[Any, Any] = {
    "font.size": 12,
    "text.parse_math": False,  # names may contain dollar signs
    "text.color": INK,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "xtick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.color": GREY,
    "ytick.labelcolor": INK,
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    "svg.hashsalt": "effnet",
}
UNDATED: dict[str, dict[str, Any]] = {  # metadata without matplotlib's version and the date
    ".png": {"Software": None},
    ".svg": {"Creator": None, "Date": None},
    ".pdf": {"Creator": None, "Producer": None, "CreationDate": None},
}

LEFT, RIGHT = -1, 1


def drawable(out: Path) -> str:
    """The suffix of `out` in lower case. Call it before long work, to fail early.

    Raises:
        ArgumentError: `out` does not end in .png, .svg or .pdf.
        MissingExtraError: matplotlib is not installed.
    """
    suffix = out.suffix.lower()
    if suffix not in UNDATED:
        raise ArgumentError("out", str(out), f"must end in {', '.join(UNDATED)}.")
    if find_spec("matplotlib") is None:
        raise missing("drawing", "matplotlib")
    return suffix


@contextmanager
def picture(out: Path, width: float, height: float, title: str, names: Sequence[str] = ()) -> Iterator[Figure]:
    """A figure of this size in inches with a title, written to `out` if the block ends without an error.

    Its fonts have the characters of the title and of `names`, which the block writes, if such fonts are installed.

    Raises:
        ArgumentError, MissingExtraError: see `drawable`.
    """
    suffix = drawable(out)
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    fonts, title_fonts = choose_fonts(on_one_line("".join(names))), choose_fonts(on_one_line(title))
    with rc_context(STYLE | {"font.family": [font.family for font in fonts]}):
        figure = Figure(figsize=(width, height), layout="constrained")
        font: dict[str, Any] = {"family": [font.family for font in title_fonts], "size": 15}
        font["weight"] = "bold" if len(title_fonts) == 1 else "normal"  # other fonts may have no bold
        figure.suptitle(drawable_text(title, title_fonts), x=0.012, ha="left", fontproperties=font)
        yield figure
        with write_file(out) as temporary:
            figure.savefig(temporary, format=suffix[1:], metadata=UNDATED[suffix])


def footnote(figure: Figure, text: str) -> None:
    """Write small grey text at the bottom."""
    figure.supxlabel(text, x=0.012, ha="left", fontsize=10, color=GREY)


def decades(axes: Axes) -> None:
    """Put ticks at 1, 2 and 5 of each decade of both logarithmic axes, in plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())


def name_point(axes: Axes, text: str, point: tuple[float, float], place: tuple[int, float], **font: Any) -> None:
    """Write `text` beside its point; `place` is the side, LEFT or RIGHT, and typographic points above the middle."""
    side, above = place
    offset, align = (side * 7, above), "left" if side == RIGHT else "right"
    axes.annotate(text, point, offset, textcoords="offset points", ha=align, va="center", **font)

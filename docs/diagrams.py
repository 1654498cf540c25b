"""The diagrams of docs/pictures: blocks, kernels and networks as boxes, arrows and bars. draw.py writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from counted import GROWN, SHOWN, grown, ratio

from effnet.arch.cost import cost
from effnet.arch.variants import B0
from effnet.plots.style import BLUE, GREEN, GREY, INK, ORANGE, PALE, SKY, picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def mbconv(out: Path) -> None:
    """The MBConv block, its tensors as tall as their channels."""
    wide, side, middle = SHOWN.expanded_channels, SHOWN.input_size, 17.0
    kernel = f"{SHOWN.kernel_size}×{SHOWN.kernel_size}"
    steps = (
        (wide, SKY, f"expand\n1×1, ×{SHOWN.expand_ratio}\nnorm, SiLU"),
        (wide, GREEN, f"depthwise\n{kernel}, stride {SHOWN.stride}\nnorm, SiLU"),
        (wide, ORANGE, f"squeeze-and-\nexcitation\n{wide} → {SHOWN.squeeze_channels} → {wide}"),
        (SHOWN.out_channels, SKY, "project\n1×1\nnorm"),
        (SHOWN.out_channels, GREY, f"stochastic\ndepth,\nrate {SHOWN.drop_rate:g}"),
    )
    with _diagram(out, 132, 43, f"MBConv{SHOWN.expand_ratio}, k{kernel}: block {SHOWN.name} of B0") as axes:
        x = 3.0
        _tensor(axes, x, middle, SHOWN.in_channels, side)
        for channels, colour, words in steps:
            _arrow(axes, (x + 3, middle), (x + 5, middle))
            _box(axes, x + 5, middle - 5, 15.5, 10, words, colour)
            _arrow(axes, (x + 20.5, middle), (x + 22.5, middle))
            x += 22.5
            _tensor(axes, x, middle, channels, side)
        plus = x + 8
        _arrow(axes, (x + 3, middle), (plus - 2, middle))
        _circle(axes, (plus, middle), "+")
        _arrow(axes, (plus + 2, middle), (plus + 5, middle))
        axes.plot([4.5, 4.5, plus], [middle + SHOWN.in_channels / 24, 33, 33], color=INK, linewidth=1.5)
        _arrow(axes, (plus, 33), (plus, middle + 2))
        axes.text(64, 34, "shortcut: only where the stride is 1 and the channels agree", ha="center", va="bottom")


def squeeze(out: Path) -> None:
    """Squeeze-and-excitation in the same block."""
    wide, few, side = SHOWN.expanded_channels, SHOWN.squeeze_channels, SHOWN.output_size
    top, below = 26.0, 9.0
    with _diagram(out, 132, 42, f"Squeeze-and-excitation: {SHOWN.name}.se of B0") as axes:
        _tensor(axes, 3, top, wide, side)
        _arrow(axes, (6, top), (115, top))
        _circle(axes, (117, top), "×")
        _arrow(axes, (119, top), (124, top))
        _tensor(axes, 124, top, wide, side)
        axes.plot([11, 11], [top, below], color=INK, linewidth=1.5)
        _arrow(axes, (11, below), (15, below))
        _box(axes, 15, below - 4, 14, 8, f"mean over\n{side}×{side}", GREY)
        _arrow(axes, (29, below), (40, below), f"{wide}")
        _box(axes, 40, below - 4, 22, 8, f"squeeze: 1×1, SiLU\n{wide} → {few}", ORANGE)
        _arrow(axes, (62, below), (71, below), f"{few}")
        _box(axes, 71, below - 4, 24, 8, f"excite: 1×1, sigmoid\n{few} → {wide}", ORANGE)
        axes.plot([95, 117], [below, below], color=INK, linewidth=1.5)
        axes.text(106, below + 1, f"{wide} factors, 0 to 1", ha="center", va="bottom", fontsize=11)
        _arrow(axes, (117, below), (117, top - 2))
        note = f"{few} = {SHOWN.in_channels} / 4: a quarter of the block's input channels, not of the {wide} here"
        axes.text(40, 1, note, va="bottom", fontsize=11, color=GREY)


def kernels(out: Path) -> None:
    """The way of an image through native/, and of the same block in it."""
    kernel = f"{SHOWN.kernel_size}×{SHOWN.kernel_size}"
    middle, low, wide = 28.0, 9.0, SHOWN.expanded_channels
    with _diagram(out, 132, 62, f"The kernels: an image, and inside it block {SHOWN.name} of B0") as axes:
        ways = (
            ("image\nuint8, NHWC", PALE),
            ("image minus the\nmean, padded", GREY),
            ("block 1, with the\nstem instead of\nthe expansion", GREEN),
            (f"more blocks,\n{SHOWN.name} below", GREEN),
            ("head with the\nmean of its map", SKY),
            ("classifier", SKY),
            ("logits", PALE),
        )
        for place, (words, colour) in enumerate(ways):
            _box(axes, 2 + 18.6 * place, 49.5, 15.2, 7.5, words, colour)
            if place:
                _arrow(axes, (18.6 * place - 1.4, 53.25), (18.6 * place + 2, 53.25))
        for left, right, words in (
            (1, 74, "phase 1: one chunk of channels after another, each row by row"),
            (75, 104, "phase 2: the gate"),
            (105, 131, "phase 3: groups of pixels"),
        ):
            axes.add_patch(_rectangle(left, 1, right - left, 44.5, (PALE, 0.35)))
            axes.text((left + right) / 2, 44, words, ha="center", va="top", fontsize=11, color=GREY)

        _tensor(axes, 3, middle, SHOWN.in_channels, SHOWN.input_size)
        _arrow(axes, (6, middle), (9, middle))
        _box(axes, 9, middle - 5, 14, 10, "expand: a row\nof the chunk\n1×1, SiLU", SKY)
        _arrow(axes, (23, middle), (27, middle))
        for row in range(SHOWN.kernel_size):
            axes.add_patch(_rectangle(27, middle + 3.4 - 2 * row, 10, 1.5, BLUE if row else SKY))
        axes.text(32, middle - 6, f"ring of {SHOWN.kernel_size}\nrows, floats", ha="center", va="top", fontsize=11)
        _arrow(axes, (37, middle), (41, middle))
        _box(axes, 41, middle - 5, 15, 10, f"depthwise: a row\nof the chunk\n{kernel}, SiLU", GREEN)
        _arrow(axes, (56, middle), (60, middle))
        for band in range(8):
            axes.add_patch(_rectangle(60, middle + 6.1 - 2 * band, 10, 1.8, (BLUE, SKY)[band % 2]))
        axes.text(65, middle + 8.6, "depthwise map", ha="center", va="bottom", fontsize=11)
        side = SHOWN.output_size
        axes.text(66, middle - 8.6, f"{side}×{side}×{wide}", ha="right", va="top", fontsize=11)
        axes.text(32, low, "the expanded map is never held whole", ha="center", va="center", fontsize=11, color=GREY)

        axes.plot([67, 67], [middle - 8.4, low], color=INK, linewidth=1.5)
        axes.text(65.5, low + 3.5, "sums of\n8 bands", ha="right", va="center", fontsize=11)
        _arrow(axes, (67, low), (77, low))
        _box(axes, 77, low - 4, 11, 8, f"squeeze\n{wide} → {SHOWN.squeeze_channels}", ORANGE)
        _arrow(axes, (88, low), (91, low))
        _box(axes, 91, low - 4, 11, 8, f"excite\n{SHOWN.squeeze_channels} → {wide}", ORANGE)
        _arrow(axes, (96.5, low + 4), (96.5, middle - 10.5))
        axes.text(95.5, middle - 12.6, "gate", ha="right", va="center", fontsize=11)
        _circle(axes, (96.5, middle - 8.5), "×")
        _box(axes, 88, middle - 4.5, 15, 8, "projection's\nweights, or the\nmap if smaller", PALE)
        axes.plot([96.5, 96.5], [middle - 6.5, middle - 4.5], color=INK, linewidth=1.5)
        _arrow(axes, (103, middle), (107, middle))
        axes.plot([70, 109, 109], [middle + 7, middle + 7, middle + 5], color=INK, linewidth=1.5)
        _arrow(axes, (109, middle + 7), (109, middle + 5))
        _box(axes, 107, middle - 5, 12, 10, "project\n1×1,\n+ shortcut", SKY)
        _arrow(axes, (119, middle), (124, middle))
        _tensor(axes, 124, middle, SHOWN.out_channels, SHOWN.output_size)
        if SHOWN.has_shortcut:
            axes.plot([4.5, 4.5, 115, 115], [middle + SHOWN.in_channels / 24, 40, 40, 34], color=INK, linewidth=1.5)
            _arrow(axes, (115, 36), (115, middle + 5))


def training(out: Path) -> None:
    """What the block's training step keeps, and what it computes again."""
    block, wide = B0.blocks[1], B0.blocks[1].expanded_channels
    large, small = block.input_size, block.output_size
    steps = (  # of each: what is computed, the map that comes of it, its side and channels, whether it is kept
        ("", "x", large, block.in_channels, True),
        ("expand", "expanded", large, wide, True),
        ("norm, SiLU", "activated", large, wide, False),
        ("depthwise", "filtered", small, wide, True),
        ("norm, SiLU,\ngate", "gated", small, wide, False),
        ("project", "projected", small, block.out_channels, True),
        ("norm", "y: the next x", small, block.out_channels, True),
    )
    with _diagram(out, 132, 40, f"A training step with the kernels: block {block.name} of B0") as axes:
        for place, (words, name, side, channels, kept) in enumerate(steps):
            x, megabytes = 4 + 19.5 * place, 4 * side**2 * channels / 1e6
            tall = 4 + 4 * megabytes
            if place:
                _arrow(axes, (x - 13, 20), (x - 1, 20), words)
            axes.add_patch(_rectangle(x, 20 - tall / 2, 4, tall, BLUE if kept else "white", INK))
            axes.text(x + 2, 20 - tall / 2 - 1, f"{name}\n{megabytes:.1f} MB", ha="center", va="top", fontsize=11)
        for x, face, words in ((24, BLUE, "kept until the backward pass"), (64, "white", "made a few rows at a time")):
            axes.add_patch(_rectangle(x, 1, 2, 2, face, INK))
            axes.text(x + 3, 2, words, va="center", fontsize=11)


def scaling(out: Path) -> None:
    """B0 and four ways to grow it: a bar is a block, as long as its output channels."""
    with _diagram(out, 132, 80, "B0, and four ways to spend about four times its multiply-adds") as axes:
        for column, (name, depth, width, resolution, *_) in enumerate(GROWN):
            network = grown(depth, width, resolution)
            centre, photo = 13 + 26.5 * column, resolution / 32
            axes.add_patch(_rectangle(centre - photo / 2, 30 - photo, photo, photo, PALE, GREY))
            axes.text(centre, 30 - photo / 2, f"{resolution}²", ha="center", va="center", fontsize=11)
            for number, block in enumerate(network.blocks):
                length, colour = block.out_channels / 27, (BLUE, SKY)[block.stage % 2]
                axes.add_patch(_rectangle(centre - length / 2, 32 + 0.66 * number, length, 0.5, colour))
            given = {"d": (depth, 1), "w": (width, 1), "r": (resolution, B0.resolution)}
            changes = ", ".join(f"{key} = {value / rest:.3g}" for key, (value, rest) in given.items() if value != rest)
            axes.text(centre, 11.5, name, ha="center", fontweight="bold")
            axes.text(centre, 8.7, changes or "d = w = r = 1", ha="center", fontsize=11)
            macs = f"{cost(network).macs / 1e9:.2f} G multiply-adds\n×{ratio(network):.1f}"
            axes.text(
                centre, 7, f"{len(network.blocks)} blocks\n{macs}", ha="center", va="top", fontsize=11, linespacing=1.4
            )


DIAGRAMS: dict[str, Callable[[Path], None]] = {
    "mbconv": mbconv,
    "squeeze": squeeze,
    "kernels": kernels,
    "training": training,
    "scaling": scaling,
}


@contextmanager
def _diagram(out: Path, width: float, height: float, title: str) -> Iterator[Axes]:
    """Axes without a frame, in tenths of an inch."""
    with picture(out, width / 10, height / 10, title) as figure:
        figure.set_layout_engine("none")
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
        axes.axis("off")
        yield axes


def _rectangle(x: float, y: float, width: float, height: float, face: Any, edge: str = "none") -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=face, edgecolor=edge)


def _tensor(axes: Axes, x: float, middle: float, channels: int, side: int) -> None:
    """A feature map: a bar as tall as its channels, with its shape below."""
    tall = channels / 12
    axes.add_patch(_rectangle(x, middle - tall / 2, 3, tall, BLUE))
    axes.text(x + 1.5, middle - tall / 2 - 1, f"{side}×{side}\n×{channels}", ha="center", va="top", fontsize=11)


def _box(axes: Axes, x: float, y: float, width: float, height: float, words: str, colour: str) -> None:
    axes.add_patch(_rectangle(x, y, width, height, (colour, 0.4), INK))
    axes.text(x + width / 2, y + height / 2, words, ha="center", va="center", fontsize=11, linespacing=1.3)


def _circle(axes: Axes, centre: tuple[float, float], sign: str) -> None:
    from matplotlib.patches import Circle

    axes.add_patch(Circle(centre, 2, facecolor="white", edgecolor=INK, linewidth=1.5))
    axes.text(*centre, sign, ha="center", va="center_baseline", fontsize=18)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], above: str = "") -> None:
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0, "lw": 1.5})
    axes.text((start[0] + end[0]) / 2, end[1] + 1, above, ha="center", va="bottom", fontsize=11)

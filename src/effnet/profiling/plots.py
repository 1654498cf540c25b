"""The pictures of profiling: each block's share of the time, and time against counted work. Needs the extra `plots`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from effnet.arch.variants import VARIANTS
from effnet.plots.style import BLUE, LEFT, ORANGE, RED, RIGHT, decades, footnote, name_point, picture

if TYPE_CHECKING:
    from effnet.profiling.compare import Comparison
    from effnet.profiling.profile import Profile


def draw_profile(profile: Profile, out: Path) -> None:
    """Draw each block's share of the time and its share of the multiply-adds. See `picture` for errors."""
    blocks = profile.blocks
    title = (
        f"{profile.name}, {profile.resolution} px: where {profile.sum_ms:.1f} ms and {profile.macs / 1e9:.3g} GMACs go"
    )
    with picture(out, 9, 2 + 0.32 * len(blocks), title) as figure:
        axes = figure.subplots()
        for side, colour, label, share in (
            (-0.2, ORANGE, "time", profile.time_share),
            (0.2, BLUE, "multiply-adds", profile.macs_share),
        ):
            places = [place + side for place in range(len(blocks))]
            axes.barh(places, [100 * share(block) for block in blocks], 0.4, color=colour, label=label)
        axes.set_yticks(
            range(len(blocks)), [f"{block.row.name}   {block.row.operator}" for block in blocks], fontsize=10
        )
        axes.set(xlabel="share, %", ylim=(len(blocks) - 0.4, -0.6))
        axes.grid(visible=False, axis="y")
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
        footnote(figure, str(profile.conditions))


def draw_comparison(comparison: Comparison, out: Path) -> None:
    """Draw measured time against multiply-adds and against activations. See `picture` for errors."""
    rows = comparison.rows
    title = f"Measured time against counted work: {len(rows)} networks, batch {comparison.conditions.batch}"
    with picture(out, 13, 6.6, title) as figure:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, key, work in zip(panels, ("macs", "activations"), ("multiply-adds", "activations"), strict=True):
            axes.set(xscale="log", yscale="log", xlabel=f"{work} per image, millions")
            axes.set_title(f"log time with log {work}: r = {comparison.correlations[key]:.3f}", loc="left", fontsize=12)
            for number, row in enumerate(sorted(rows, key=lambda row: row.cost.macs)):
                point = getattr(row.cost, key) / 1e6, row.time.median_ms
                ours = row.cost.name in VARIANTS
                axes.scatter(*point, 45, BLUE if ours else RED, marker="o" if ours else "D")
                name_point(axes, row.cost.name, point, ((LEFT, RIGHT)[number % 2], 0), fontsize=11)
            axes.margins(x=0.25)
            decades(axes)
        for label, colour, mark in (("EfficientNet", BLUE, "o"), ("other networks", RED, "D")):
            panels[1].scatter([], [], 45, colour, marker=mark, label=label)
        panels[0].set_ylabel("median time, ms")
        panels[1].legend(loc="lower right", frameon=False)
        footnote(figure, str(comparison.conditions))

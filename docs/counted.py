"""The numbers of method.md: each function returns what stands between two markers of the page.

Counted numbers come from effnet.arch. What only the paper says is a literal table below, in the paper's words.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from effnet.arch.cost import cost
from effnet.arch.memory import inference_memory, kept_per_image, largest_batch
from effnet.arch.segments import Keep
from effnet.arch.spec import NetworkSpec
from effnet.arch.variants import B0, PAPER, VARIANTS, spec
from effnet.describing import RIVALS
from effnet.scaling.compound import RULES, implied_phis, nominal_ratio, realised_ratio, scale
from effnet.weights.layouts import LAYOUTS, NATIVE, walk

FAMILY = tuple(row.spec for row in VARIANTS.values() if row.source == PAPER)
SHOWN = next(block for block in B0.blocks if block.name == "stages.4.1")  # the example: a block with all its parts
MIB = 2**20
FLOAT = 4  # bytes

# Table 2 of the paper (v5), the columns that it prints for EfficientNet.
PRINTED = {
    # parameters in millions, multiply-adds in billions; the paper calls those FLOPS
    "b0": ("5.3", "0.39"),
    "b1": ("7.8", "0.70"),
    "b2": ("9.2", "1.0"),
    "b3": ("12", "1.8"),
    "b4": ("19", "4.2"),
    "b5": ("30", "9.9"),
    "b6": ("43", "19"),
    "b7": ("66", "37"),
}

# Table 7 of the paper (v5): four ways to grow B0.
GROWN = (
    # name, depth, width, resolution, multiply-adds (B), top-1
    ("B0", 1.0, 1.0, 224, 0.4, 77.3),
    ("deeper", 4.0, 1.0, 224, 1.8, 79.0),
    ("wider", 1.0, 2.0, 224, 1.8, 78.9),
    ("higher resolution", 1.0, 1.0, 448, 1.9, 79.1),
    ("compound", 1.4, 1.2, 291, 1.8, 81.1),  # the paper's r = 1.3, times 224
)


def grown(depth: float, width: float, resolution: int) -> NetworkSpec:
    """B0 with these coefficients."""
    return spec("b0", depth=depth, width=width, resolution=resolution)


def ratio(network: NetworkSpec) -> float:
    """Its counted multiply-adds, B0's being 1."""
    return realised_ratio(B0, network)


def feature_maps(network: NetworkSpec) -> int:
    """Bytes of the feature maps that are alive together at the worst moment of inference."""
    return inference_memory(network) - FLOAT * (cost(network).params + network.in_channels * network.resolution**2)


def peak_block(network: NetworkSpec) -> str:
    """The block where that moment is: the one with the largest input and expanded maps."""
    return max((b.input_size**2 * (b.in_channels + 2 * b.expanded_channels), b.name) for b in network.blocks)[1]


def makeup(network: NetworkSpec) -> tuple[float, float, float]:
    """Shares of what training keeps: expanded maps, the copies that SiLU costs, squeeze-and-excitation's product."""
    expanded = wide = 0
    for block in network.blocks:
        wide += block.expanded_channels * block.output_size**2
        if block.expand_ratio != 1:
            expanded += block.expanded_channels * block.input_size**2
    ends = network.stem_channels * network.shape.stem_size**2 + network.head_channels * network.final_size**2
    total = kept_per_image(network, kernels=False) / FLOAT
    return (3 * expanded + 4 * wide) / total, (expanded + wide + ends) / total, wide / total


@dataclass(frozen=True)
class Row:
    """A stage of B0 as Table 1 of the paper has it, and its path in the module."""

    operator: str
    size: int  # height and width of its input
    channels: int
    layers: int
    path: str


def stage_rows() -> list[Row]:
    """Table 1 of the paper."""
    first = {block.stage: block for block in reversed(B0.blocks)}
    rows = [
        Row(
            f"MBConv{block.expand_ratio} {block.kernel_size}×{block.kernel_size}",
            block.input_size,
            block.out_channels,
            layers,
            f'`stages["{number}"]`',
        )
        for (number, block), layers in zip(sorted(first.items()), B0.layers, strict=True)
    ]
    stem = Row("Conv 3×3", B0.resolution, B0.stem_channels, 1, "`stem`")
    head = Row("Conv 1×1, FC", B0.final_size, B0.head_channels, 1, "`head`, `classifier`")
    return [stem, *rows, head]


def table_1() -> str:
    """Table 1 of the paper, with what each stage costs."""
    rows = zip(stage_rows(), cost(B0).stages, strict=True)
    return table(
        "stage | operator | input | channels | layers | in `effnet` | parameters | multiply-adds",
        (
            (
                number,
                row.operator,
                f"{row.size}×{row.size}",
                row.channels,
                row.layers,
                row.path,
                f"{part.params:,}",
                f"{part.macs / 1e6:.1f} M",
            )
            for number, (row, part) in enumerate(rows, start=1)
        ),
        left=(1, 5),
    )


def family() -> str:
    """B0-B7: coefficients, what is counted and what the paper prints."""
    rows = []
    for network in FAMILY:
        price, (params, macs) = cost(network), PRINTED[network.name]
        rows.append(
            (
                network.name.upper(),
                f"{network.width:.1f}",
                f"{network.depth:.1f}",
                network.resolution,
                network.dropout,
                len(network.blocks),
                f"{price.params:,}",
                _billions(price.macs),
                _billions(price.flops),
                f"{params} M, {macs} B",
            )
        )
    header = "name | w | d | r | dropout | blocks | parameters | multiply-adds | FLOPs | the paper prints"
    return table(header, rows)


def published() -> str:
    """Table 2 of the paper: each network of the family, then those that it is compared with."""
    rows: list[Sequence[object]] = []
    for network in FAMILY:
        variant, (params, macs) = VARIANTS[network.name], PRINTED[network.name]
        rows.append([f"**EfficientNet-{network.name.upper()}**", variant.top1, variant.top5, params, macs])
        rows += [
            (
                rival.name,
                rival.top1,
                rival.top5,
                f"{rival.params_millions:g} ({rival.params_millions / float(params):.1f}×)",
                f"{rival.macs_billions:g} ({rival.macs_billions / float(macs):.1f}×)" if rival.macs_billions else "-",
            )
            for rival in RIVALS
            if rival.compared_with == network.name
        ]
    return table("network | top-1, % | top-5, % | parameters, M | multiply-adds, B", rows)


def phi() -> str:
    """What the coefficients of B1-B7 promise, what is built, and the phi that each of them implies."""
    rows = []
    for network in FAMILY[1:]:
        step, counted = implied_phis(B0, network), ratio(network)
        promise = nominal_ratio(B0, network)
        rows.append(
            (
                network.name.upper(),
                f"{network.depth:.1f} → {len(network.blocks) / len(B0.blocks):.2f}",
                f"{promise:.2f}",
                f"{counted:.2f}",
                f"{counted / promise - 1:+.0%}",
                *(f"{phi:.2f}" for phi in (step.depth, step.width, step.resolution, step.macs)),
            )
        )
    return table(
        "name | depth: d → built | d·w²·r² | counted | excess | φ from d | φ from w | φ from r | φ from counted", rows
    )


def memory() -> str:
    """Bytes for one image, in inference and in training, and the batch that they leave room for."""
    plans = (None, Keep.CONVOLUTIONS, Keep.BOTTLENECKS)
    rows = [
        (
            network.name.upper(),
            f"{cost(network).params * FLOAT / MIB:.0f}",
            f"{feature_maps(network) / MIB:.1f}",
            f"{kept_per_image(network, kernels=False) / MIB:.0f}",
            *(largest_batch(network, 24 * 2**30, plan=plan, kernels=False) for plan in plans),
        )
        for network in FAMILY
    ]
    header = "name | weights, MiB | inference peak, MiB | kept for backward, MiB per image | largest batch in 24 GiB"
    return table(f"{header} | keeping convolutions | keeping bottlenecks", rows)


def hungry() -> str:
    """Where training's memory goes, beside two residual networks."""
    rows: list[Sequence[object]] = []
    for name in ("b0", "b4", "b7"):
        for network in dict.fromkeys((spec(name, resolution=224), spec(name))):
            macs, kept = f"{cost(network).macs / 1e9:.2f} G", f"{kept_per_image(network, kernels=False) / MIB:.0f}"
            shares = (f"{share:.0%}" for share in makeup(network))
            rows.append((name.upper(), network.resolution, macs, kept, *shares))
    rows += [(name, 224, f"{macs} G", f"{kept / MIB:.0f}", "", "", "") for name, (macs, kept) in RESNETS.items()]
    header = "network | pixels | multiply-adds | kept, MiB per image | in expanded maps | SiLU's copies | SE's products"
    return table(header, rows)


def table_7() -> str:
    """Table 7 of the paper beside the count."""
    rows = []
    for name, depth, width, resolution, printed, top1 in GROWN:
        macs = cost(grown(depth, width, resolution)).macs / 1e9
        counted = f"{macs:.3f} G", f"{macs / printed - 1:+.0%}"
        rows.append((name, depth, width, resolution, f"{printed} B", *counted, top1))
    header = "network | d | w | r | the paper prints | counted | off by | published top-1, %"
    return table(header, rows)


def keys() -> str:
    """The tutorial's names of the convolutions beside ours, in the order of computation."""
    shown = [step for step in walk(B0) if step.block in (None, SHOWN)]
    layouts = (LAYOUTS["tutorial"], NATIVE)
    return table(
        "the tutorial's key | ours", ([f"`{each.prefixes(step)[0]}`" for each in layouts] for step in shown), left=(1,)
    )


def letters() -> str:
    """The names that the tutorial gives to the blocks past 'z' of its deepest stage at d = 8."""
    count = max(spec("b0", depth=8).layers)
    beyond = [chr(97 + index) for index in range(26, count)]
    names = ", ".join(f"`{name!r}`" for name in beyond).replace("|", r"\|")  # the page has them in a table
    return f"{count} blocks, and the last {len(beyond)} are named {names}"


def depthwise_start() -> str:
    """How wide the depthwise filters are drawn by the tutorial and by the official code, in two blocks of B0."""
    return " and ".join(
        f"{(2 / (block.kernel_size**2 * block.expanded_channels)) ** 0.5:.3f} instead of "
        f"{(2 / block.kernel_size**2) ** 0.5:.3f} in `{block.name}` ({block.expanded_channels} channels)"
        for block in B0.blocks
        if block.name in ("stages.3.0", "stages.8.0")
    )


# Counted on torchvision 0.29 at 224 px: multiply-adds in billions, bytes per image that autograd keeps, image included
RESNETS = {"ResNet-50": (4.09, 85_909_504), "ResNet-152": (11.51, 177_430_528)}

BLOCKS: dict[str, Callable[[], str]] = {
    "table-1": table_1,
    "family": family,
    "published": published,
    "phi": phi,
    "memory": memory,
    "hungry": hungry,
    "table-7": table_7,
    "keys": keys,
    "letters": letters,
    "product": lambda: f"{RULES['paper'].product:.3f}",
    "double-depth": lambda: f"{ratio(grown(2, 1, 224)):.2f}",
    "double-width": lambda: f"{ratio(grown(1, 2, 224)):.2f}",
    "double-resolution": lambda: f"{ratio(grown(1, 1, 448)):.2f}",
    "phi-1": lambda: f"{ratio(scale(B0, 1, resolution_step=1)):.2f}",
    "plateau": lambda: ", ".join(sorted({str(len(grown(d / 100, 1, 224).blocks)) for d in range(101, 126)})),
    "b0-flops": lambda: f"{_billions(cost(B0).macs)} multiply-adds, {_billions(cost(B0).flops)} FLOPs",
    "last-rate": lambda: f"{B0.blocks[-1].drop_rate:g}",
    "se-share": lambda: f"{1 - cost(replace(B0, squeeze_ratio=0)).params / cost(B0).params:.0%}",
    "short": lambda: "by {}, {} and {}".format(*(_printed_short(name) for name in ("b4", "b5", "b7"))),
    "convolutions": lambda: str(sum(step.role != "classifier" for step in walk(B0))),
    "depthwise-start": depthwise_start,
    "peak-block": lambda: ", ".join(sorted({f"`{peak_block(network)}`" for network in FAMILY})),
}


def _printed_short(name: str) -> str:
    return f"{1 - float(PRINTED[name][1]) * 1e9 / cost(VARIANTS[name].spec).macs:.0%}"


def _billions(count: int) -> str:
    return f"{count / 1e9:.3f} G"


def table(header: str, rows: Iterable[Sequence[object]], left: Sequence[int] = ()) -> str:
    """A markdown table: the first column and those in `left` flush left, the others right."""
    names = header.split(" | ")
    rule = [":---" if i == 0 or i in left else "---:" for i in range(len(names))]
    lines = (" | ".join(str(cell) for cell in row) for row in (names, rule, *rows))
    return "\n" + "\n".join(f"| {line} |" for line in lines) + "\n"

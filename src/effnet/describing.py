"""effnet info: the family, one network with its costs and training memory, and the networks of the paper's Table 2."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated, Any

from cyclopts import Parameter

from effnet import console
from effnet.arch.cost import Cost, block_rows, cost, stage_rows
from effnet.arch.memory import inference_memory, kept_per_image, largest_batch, training_memory
from effnet.arch.recompute import RecomputePlan, extra_work, find_plan, levels
from effnet.arch.segments import Keep, uses_kernels
from effnet.arch.spec import NetworkSpec
from effnet.arch.variants import PAPER, VARIANTS, spec
from effnet.console import MACS, OK, PUBLISHED, Amount, Flag
from effnet.errors import ArgumentError
from effnet.fields import parse_bytes
from effnet.machine import Precision, StepPrecision, choose_precision
from effnet.native import instruction_set
from effnet.runtime import native
from effnet.weights.bundle import read_network


@dataclass(frozen=True)
class Rival:
    """A published network in Table 2 (v5) of the paper, grouped with the EfficientNet that it is compared with."""

    name: str
    compared_with: str
    top1: float  # per cent on the ImageNet validation set, single crop, single model
    top5: float
    params_millions: float
    macs_billions: float | None  # the paper omits GPipe's


# Nothing here was measured by us. The paper calls multiply-adds FLOPS.
RIVALS = (
    # name, compared with, top-1, top-5, parameters (M), multiply-adds (B)
    Rival("ResNet-50", "b0", 76.0, 93.0, 26, 4.1),
    Rival("DenseNet-169", "b0", 76.2, 93.2, 14, 3.5),
    Rival("ResNet-152", "b1", 77.8, 93.8, 60, 11),
    Rival("DenseNet-264", "b1", 77.9, 93.9, 34, 6.0),
    Rival("Inception-v3", "b1", 78.8, 94.4, 24, 5.7),
    Rival("Xception", "b1", 79.0, 94.5, 23, 8.4),
    Rival("Inception-v4", "b2", 80.0, 95.0, 48, 13),
    Rival("Inception-resnet-v2", "b2", 80.1, 95.1, 56, 13),
    Rival("ResNeXt-101", "b3", 80.9, 95.6, 84, 32),
    Rival("PolyNet", "b3", 81.3, 95.8, 92, 35),
    Rival("SENet", "b4", 82.7, 96.2, 146, 42),
    Rival("NASNet-A", "b4", 82.7, 96.2, 89, 24),
    Rival("AmoebaNet-A", "b4", 82.8, 96.1, 87, 23),
    Rival("PNASNet", "b4", 82.9, 96.2, 86, 23),
    Rival("AmoebaNet-C", "b5", 83.5, 96.5, 155, 41),
    Rival("GPipe", "b7", 84.3, 97.0, 557, None),
)


@dataclass(frozen=True)
class SpecChanges:
    """Changes to the named network."""

    width: float | None = None
    """Factor on the baseline's channels, instead of the variant's."""
    depth: float | None = None
    """Factor on the baseline's layers, instead of the variant's."""
    resolution: int | None = None
    """Height and width of the input in pixels."""
    num_classes: int | None = None
    """Outputs of the classifier."""
    stem_stride: int | None = None
    """1 for small images, which makes every feature map twice as high and wide; 2 in every published network."""


@dataclass(frozen=True)
class TrainingStep:
    """The training step whose memory is shown."""

    batch: int | None = None
    """Images per training step. Default: as many as fit in --train-memory."""
    train_memory: Amount | None = None
    """Memory for training, such as 8GB, to show the largest batch that fits."""
    optimizer: str = "rmsprop"
    """rmsprop, sgd, momentum, adam or adamw."""
    precision: Precision | None = None
    """Precision of the feature maps. Default: the faster one on this processor."""

    def __post_init__(self) -> None:
        if self.batch is None and self.train_memory is None:
            raise ArgumentError("batch", self.batch, "is missing: give the images per step, or --train-memory.")


def info(
    model: str | None = None,
    *,
    blocks: Flag = False,
    rivals: Flag = False,
    json: Flag = False,
    changes: Annotated[SpecChanges, Parameter(name="*", group="Changes")] = SpecChanges(),
    step: Annotated[TrainingStep | None, Parameter(name="*", group="Training memory")] = None,
) -> int:
    """Show the family, or one network stage by stage: sizes, parameters, multiply-adds and activations.

    With --batch or --train-memory: what training this network keeps in memory, with and without recomputing some of it.

    Args:
        model: A variant (b0 ... b8, l2, lite0 ... lite4), a bundle or a spec.yaml. Default: the whole family.
        blocks: Show every block instead of every stage.
        rivals: Show the paper's Table 2: the family beside the networks that it is compared with, as published.
        json: JSON instead of a table.
    """
    given = console.given(changes)
    if model is None or rivals:
        of_one = given | ({"blocks": True} if blocks else {}) | ({} if step is None else console.given(step))
        for name, value in of_one.items():
            example = console.command_line("info b0", {name: value})
            raise ArgumentError(name, value, f"applies to one network; name it, as in: {example}")
        if model is not None:
            raise ArgumentError("model", model, "does not go with --rivals, which shows the whole family.")
        _show_rivals(as_json=json) if rivals else _show_family(as_json=json)
    elif step is None:
        _show_network(model, given, blocks=blocks, as_json=json)
    elif blocks:
        raise ArgumentError("blocks", blocks, "does not go with --batch or --train-memory.")
    else:
        _show_training(spec(read_network(model), **given), model, step, as_json=json)
    return OK


def _show_family(*, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(console.json_text([_values(row.spec) for row in VARIANTS.values()]))
        return
    columns = "<name", "width", "depth", "px", "dropout", "drop\nconnect", "params", "MACs", "FLOPs", "top-1\n%"
    rows = []
    sources: dict[str, list[str]] = {}
    for row in VARIANTS.values():
        network, price = row.spec, cost(row.spec)
        sizes = row.name, row.width, row.depth, row.resolution, row.dropout, network.drop_connect
        costs = console.millions(price.params), console.billions(price.macs), console.billions(price.flops)
        rows.append((*sizes, *costs, row.top1))
        sources.setdefault(row.source, []).append(row.name)
    published = [f"{names[0]}{' ... ' + names[-1] if names[1:] else ''}: {source}" for source, names in sources.items()]
    note = "\n".join((MACS, f"{PUBLISHED} Sources:", *published))
    console.table(columns, rows, title="The EfficientNet family, one image each", note=note)
    console.remark("Next: effnet info b4")


def _show_network(model: str, given: dict[str, Any], *, blocks: bool, as_json: bool) -> None:
    network = spec(read_network(model), **given)
    rows = block_rows(network) if blocks else stage_rows(network)
    if as_json:
        values = {"blocks" if blocks else "stages": [row.to_dict() for row in rows]}
        sys.stdout.write(console.json_text(_values(network) | values))
        return
    price = cost(network)
    columns = ("<block" if blocks else "<stage", "<operator", "input px", "channels", "layers", "stride")
    sizes = attrgetter("name", "operator", "input_size", "channels", "layers", "stride")
    lines: list[tuple[object, ...]] = [(*sizes(row), *_costs(row.cost)) for row in rows]
    layers = sum(row.layers for row in stage_rows(network))
    lines.append(("total", "", "", "", layers, "", *_costs(price)))
    title = (
        f"{network.name}: width {network.width:g}, depth {network.depth:g}, {network.resolution} px, "
        f"dropout {network.dropout:g}, drop-connect {network.drop_connect:g}, {network.num_classes} classes"
    )
    note = f"{price.flops:,} FLOPs. {MACS}"
    weights, arena = native.memory(network)
    if weights:
        note += f"\nMemory in native ({instruction_set()}, fp32): {console.size(weights)} of weights, "
        note += f"{console.size(arena)} for each thread."
    console.table((*columns, "params", "MACs", "activations"), lines, title=title, note=note)
    whole = console.command_line("info", {**given, "blocks": True}).replace("info", f"info {shlex.quote(model)}", 1)
    console.remark(f"Next: {'effnet info --rivals' if blocks else whole}")


def _show_training(network: NetworkSpec, model: str, step: TrainingStep, *, as_json: bool) -> None:
    limit = None if step.train_memory is None else parse_bytes("train_memory", step.train_memory)
    kernels = uses_kernels(network)
    precision: StepPrecision | None = step.precision
    reason = "chosen by --precision"
    if precision is None:
        precision, reason = choose_precision(kernels=kernels)
    settings: dict[str, Any] = {"optimizer": step.optimizer, "precision": precision}
    keeps: dict[str, Keep | None] = {"everything": None}
    # The highest level is what the kernels keep without a plan.
    keeps |= {keep.name.lower(): keep for keep in levels(network)[kernels:]}
    largest = {}
    if limit is not None:
        largest = {name: largest_batch(network, limit, plan=keep, **settings) for name, keep in keeps.items()}
    images = max(1, *largest.values()) if step.batch is None else step.batch
    plans = {name: None if keep is None else RecomputePlan.uniform(network, keep) for name, keep in keeps.items()}
    if step.batch is not None and limit is not None and largest["bottlenecks"] >= step.batch:
        plans["least work"] = find_plan(network, limit, step.batch, **settings)
    held = {name: training_memory(network, images, plan=plan, **settings) for name, plan in plans.items()}
    macs = cost(network).macs
    again = {name: 0 if plan is None else extra_work(network, plan).macs / macs for name, plan in plans.items()}
    if as_json:
        rows = [
            {"keep": name, "extra_macs_share": again[name], "largest_batch": largest.get(name)} | vars(held[name])
            for name in plans
        ]
        values = {"batch": images, "train_memory_bytes": limit, **settings, "precision_because": reason}
        values["kernels"] = kernels
        sys.stdout.write(console.json_text(_values(network) | values | {"training": rows}))
        return
    terms = "weights", "gradients", "optimizer", "ema", "images", "activations", "peak"
    columns = ["<kept", *terms[:3], "EMA", *terms[4:6], "at the peak", "MACs again", *["largest batch"] * bool(largest)]
    lines = []
    for name, memory in held.items():
        sizes = (console.size(getattr(memory, term)) for term in terms)
        lines.append((name, *sizes, f"{again[name]:.0%}", *[largest.get(name, images) or "none"] * bool(largest)))
    title = f"Training {network.name} at {network.resolution} px, {step.optimizer}, {precision}: "
    computed = "by effnet's kernels; for a GPU's step: EFFNET_NATIVE=0" if kernels else "by torch's modules"
    least = list(keeps)[-1] if kernels else "convolutions"
    note = (
        f"{precision}: {reason}. Computed {computed}.\n"
        "Activations are kept from the forward to the backward pass and gradients replace them, so the peak is below\n"
        f"the sum. To keep less: network.recompute(RecomputePlan.uniform(spec, '{least}')). Torch is not counted."
    )
    if "least work" in plans:
        note += f"\nLeast work: find_plan(spec, limit, batch) for {step.train_memory}: {plans['least work']}."
    console.table(columns, lines, title=f"{title}{images:,} image{'s' * (images > 1)} a step", note=note)
    options = {"from_": model, "train_memory": step.train_memory or "8GB", "batch": images}
    console.remark(f"Next: {console.command_line('scale', options)}")


def _show_rivals(*, as_json: bool) -> None:
    groups = [(row, [rival for rival in RIVALS if rival.compared_with == row.name]) for row in VARIANTS.values()]
    groups = [(ours, rivals) for ours, rivals in groups if ours.source == PAPER]
    if as_json:
        values = [_values(ours.spec) | {"rivals": [vars(rival) for rival in rivals]} for ours, rivals in groups]
        sys.stdout.write(console.json_text(values))
    else:
        columns = "<name", "top-1\n%", "top-5\n%", "params", "", "MACs", "FLOPs", ""
        lines: list[tuple[object, ...]] = []
        for ours, theirs in groups:
            price = cost(ours.spec)
            counted = console.millions(price.params), "", console.billions(price.macs), console.billions(price.flops)
            lines.append((f"EfficientNet-{ours.name.upper()}", ours.top1, ours.top5, *counted, ""))
            for rival in theirs:
                params, macs = rival.params_millions, rival.macs_billions
                sizes = [f"{params:g} M", f"{1e6 * params / price.params:.1f}x"]
                sizes += [f"{macs:g} G", f"{2 * macs:g} G", f"{1e9 * macs / price.macs:.1f}x"] if macs else ["-"] * 3
                lines.append((f"  {rival.name}", rival.top1, rival.top5, *sizes))
        note = f"EfficientNet's sizes are computed here, the others are the paper's (Table 2, v5).\n{PUBLISHED}\n{MACS}"
        console.table(columns, lines, title="The family beside the networks of its time", note=note)
    console.remark("Next: effnet info b0")


def _values(network: NetworkSpec) -> dict[str, Any]:
    sizes = "name", "width", "depth", "resolution", "dropout", "drop_connect"
    price = cost(network)
    values = {name: getattr(network, name) for name in (*sizes, "num_classes", "in_channels", "stem_stride")}
    values |= {name: getattr(price, name) for name in ("params", "macs", "flops", "activations")}
    values["inference_memory_bytes"] = inference_memory(network)
    values["training_memory_bytes_per_image"] = kept_per_image(network)
    values["native_weights_bytes"], values["native_thread_bytes"] = native.memory(network)
    if row := VARIANTS.get(network.name):
        values |= {"published_top1": row.top1, "published_top5": row.top5, "published_in": row.source}
    return values


def _costs(price: Cost) -> tuple[str, str, str]:
    return f"{price.params:,}", f"{price.macs:,}", f"{price.activations:,}"

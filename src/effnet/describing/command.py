"""effnet info: the family, one network, or the networks of the paper's Table 2."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from effnet import console
from effnet.arch.cost import Cost, cost
from effnet.arch.memory import Keep, inference_memory, kept_per_image, largest_batch, training_memory
from effnet.arch.recompute import RecomputePlan, extra_work, find_plan
from effnet.arch.spec import NetworkSpec
from effnet.arch.table import block_rows, stage_rows
from effnet.arch.variants import PAPER, VARIANTS, spec
from effnet.console import MACS, OK, PUBLISHED, Flag, Whole
from effnet.describing.rivals import RIVALS
from effnet.errors import ArgumentError
from effnet.fields import parse_bytes
from effnet.machine import Choice, Precision
from effnet.machine import precision as best_precision
from effnet.weights.bundle import read_network


def info(
    model: str | None = None,
    *,
    blocks: Flag = False,
    rivals: Flag = False,
    json: Flag = False,
    width: float | None = None,
    depth: float | None = None,
    resolution: Whole | None = None,
    num_classes: Whole | None = None,
    stem_stride: Whole | None = None,
    batch: Whole | None = None,
    train_memory: str | None = None,
    optimizer: str | None = None,
    precision: Precision | None = None,
) -> int:
    """The family, or one network stage by stage: sizes, parameters, multiply-adds and activations.

    With --batch or --train-memory: what training that network holds in memory, with and without a plan that computes
    part of it again.

    Args:
        model: A variant (b0 ... b8, l2, lite0 ... lite4), a bundle or a spec.yaml; without it, the whole family.
        blocks: Every block instead of every stage.
        rivals: The paper's Table 2: the family beside the networks that it is compared with, all figures published.
        json: JSON instead of a table.
        width: Factor on the baseline's channels, in place of the variant's.
        depth: Factor on the baseline's layers, in place of the variant's.
        resolution: Height and width of the input in pixels.
        num_classes: Outputs of the classifier.
        stem_stride: 1 for small images, which makes every map twice as high and wide; 2 in every published network.
        batch: Images per training step.
        train_memory: Memory for training, such as 8GB: the largest batch that fits.
        optimizer: rmsprop (default), sgd, momentum, adam or adamw.
        precision: fp32 or bf16; by default what this processor trains in faster.
    """
    changes: dict[str, Any] = {"width": width, "depth": depth, "resolution": resolution, "num_classes": num_classes}
    changes |= {"stem_stride": stem_stride}
    given = {name: value for name, value in changes.items() if value is not None}
    training = {"batch": batch, "train_memory": train_memory, "optimizer": optimizer, "precision": precision}
    asked: dict[str, Any] = {name: value for name, value in training.items() if value is not None}
    if model is not None and not rivals and asked:
        if blocks:
            raise ArgumentError("blocks", blocks, "does not go with --batch or --train-memory.")
        return _info_training(spec(read_network(model), **given), model, as_json=json, **asked)
    given |= asked
    if model is not None and not rivals:
        return _info_network(spec(read_network(model), **given), model, blocks=blocks, as_json=json)
    for name, value in (given | {"blocks": True} if blocks else given).items():
        option = name.replace("_", "-")
        raise ArgumentError(name, value, f"is about one network; name it, as in: effnet info b0 --{option} {value}")
    if model is not None:
        raise ArgumentError("model", model, "does not go with --rivals, which shows the whole family.")
    return _info_rivals(as_json=json) if rivals else _info_family(as_json=json)


def _info_family(*, as_json: bool) -> int:
    """The published variants side by side."""
    if as_json:
        sys.stdout.write(console.json_text([_values(row.spec) for row in VARIANTS.values()]))
        return OK
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
    return OK


def _info_network(network: NetworkSpec, model: str, *, blocks: bool, as_json: bool) -> int:
    """One network as the paper's Table 1 has it, with what each row costs."""
    rows = block_rows(network) if blocks else stage_rows(network)
    if as_json:
        parts = [row.to_dict() for row in rows]
        sys.stdout.write(console.json_text(_values(network) | {"blocks" if blocks else "stages": parts}))
        return OK
    price = cost(network)
    columns = ("<block" if blocks else "<stage", "<operator", "input px", "channels", "layers", "stride")
    costs = "params", "MACs", "activations"
    lines: list[tuple[object, ...]] = [
        (row.name, row.operator, row.input_size, row.channels, row.layers, row.stride, *_costs(row.cost))
        for row in rows
    ]
    layers = sum(row.layers for row in stage_rows(network))
    lines.append(("total", "", "", "", layers, "", *_costs(price)))
    title = (
        f"{network.name}: width {network.width:g}, depth {network.depth:g}, {network.resolution} px, "
        f"dropout {network.dropout:g}, drop-connect {network.drop_connect:g}, {network.num_classes} classes"
    )
    console.table((*columns, *costs), lines, title=title, note=f"{price.flops:,} FLOPs. {MACS}")
    console.remark(f"Next: effnet info {model} --blocks" if not blocks else "Next: effnet info --rivals")
    return OK


def _info_training(
    network: NetworkSpec,
    model: str,
    *,
    batch: int | None = None,
    train_memory: str | None = None,
    optimizer: str = "rmsprop",
    precision: Precision | None = None,
    as_json: bool,
) -> int:
    """What a training step holds, in its parts, at each level of keeping."""
    if batch is None and train_memory is None:
        raise ArgumentError("batch", batch, "is missing: name the images per step, or --train-memory.")
    limit = None if train_memory is None else parse_bytes("train_memory", train_memory)
    choice = best_precision() if precision is None else Choice(precision, "as asked")
    how: dict[str, Any] = {"optimizer": optimizer, "precision": choice.value}
    levels: list[tuple[str, Keep | None]] = [("everything", None)]
    levels += [(keep.name.lower(), keep) for keep in sorted(Keep, reverse=True)]
    fitting = {} if limit is None else {name: largest_batch(network, limit, plan=keep, **how) for name, keep in levels}
    images = max(1, *fitting.values()) if batch is None else batch
    plans: dict[str, RecomputePlan | Keep | None] = dict(levels)
    if batch is not None and limit is not None and fitting["bottlenecks"] >= batch:
        plans["least work"] = find_plan(network, limit, batch, **how)
    held = {name: training_memory(network, images, plan=plan, **how) for name, plan in plans.items()}
    whole = {
        name: RecomputePlan.uniform(network, plan) if isinstance(plan, Keep) else plan for name, plan in plans.items()
    }
    again = {name: extra_work(network, plan).macs for name, plan in whole.items() if plan is not None}
    share = {name: again.get(name, 0) / cost(network).macs for name in plans}
    if as_json:
        rows = [
            {"keep": name, "extra_macs_share": share[name], "largest_batch": fitting.get(name)} | vars(held[name])
            for name in plans
        ]
        values = {"batch": images, "train_memory_bytes": limit, **how, "precision_because": choice.reason}
        sys.stdout.write(console.json_text(_values(network) | values | {"training": rows}))
        return OK
    columns = [
        "<kept",
        "weights",
        "gradients",
        "optimizer",
        "EMA",
        "images",
        "activations",
        "at the peak",
        "MACs again",
    ]
    columns += ["largest batch"] * (limit is not None)
    lines = []
    for name, part in held.items():
        parts = (part.weights, part.gradients, part.optimizer, part.ema, part.images, part.activations, part.peak)
        last = [fitting.get(name, images) or "none"] if fitting else []
        lines.append((name, *map(console.size, parts), f"{share[name]:.0%}", *last))
    many = f"{images:,} image{'s' if images > 1 else ''} a step"
    title = f"Training {network.name} at {network.resolution} px: {many}, {optimizer}, {choice.value}"
    note = (
        f"{choice.value}: {choice.reason}.\n"
        "Activations are kept from the forward to the backward pass; gradients come as they go, so the peak is below\n"
        "the sum. To keep less: network.recompute(RecomputePlan.uniform(spec, 'convolutions')). Torch is not counted."
    )
    if "least work" in plans:
        note += f"\nLeast work: find_plan(spec, limit, batch) for {train_memory}: {plans['least work']}."
    console.table(columns, lines, title=title, note=note)
    memory = train_memory or "8GB"
    console.remark(f"Next: effnet scale --from {shlex.quote(model)} --train-memory {memory} --batch {images}")
    return OK


def _info_rivals(*, as_json: bool) -> int:
    """Table 2 of the paper, group by group."""
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
            counted = (
                console.millions(price.params),
                "",
                console.billions(price.macs),
                console.billions(price.flops),
                "",
            )
            lines.append((f"EfficientNet-{ours.name.upper()}", ours.top1, ours.top5, *counted))
            for rival in theirs:
                params, macs = rival.params_millions, rival.macs_billions
                sizes = [f"{params:g} M", f"{1e6 * params / price.params:.1f}x"]
                sizes += [f"{macs:g} G", f"{2 * macs:g} G", f"{1e9 * macs / price.macs:.1f}x"] if macs else ["-"] * 3
                lines.append((f"  {rival.name}", rival.top1, rival.top5, *sizes))
        note = f"EfficientNet's sizes are counted, its rivals' are the paper's (Table 2, v5).\n{PUBLISHED}\n{MACS}"
        console.table(columns, lines, title="The family beside the networks of its time", note=note)
    console.remark("Next: effnet info b0")
    return OK


def _values(network: NetworkSpec) -> dict[str, Any]:
    """A network's sizes and costs under the names of the attributes."""
    sizes = "name", "width", "depth", "resolution", "dropout", "drop_connect", "num_classes"
    built = "in_channels", "stem_stride"
    price = cost(network)
    values = {name: getattr(network, name) for name in (*sizes, *built)}
    values |= {name: getattr(price, name) for name in ("params", "macs", "flops", "activations")}
    values["inference_memory_bytes"] = inference_memory(network)
    values["training_memory_bytes_per_image"] = kept_per_image(network)
    if row := VARIANTS.get(network.name):
        values |= {"published_top1": row.top1, "published_top5": row.top5, "published_in": row.source}
    return values


def _costs(part: Cost) -> tuple[str, str, str]:
    return f"{part.params:,}", f"{part.macs:,}", f"{part.activations:,}"

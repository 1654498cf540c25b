"""A network of another width, depth or resolution starts from the weights of one that is trained already.

Blocks are matched by the number of their stage and their place in it; where kernel, stride, expansion or
squeeze-and-excitation differ, a block stays fresh. Resolution needs nothing: no tensor depends on it.

- Wider (Net2Net, Chen et al. 2016): channels are repeated, and what reads a channel is divided by its copies, so the
  logits are the source's. Copies that are equal in all stay equal in training, so a little noise tells them apart.
- Narrower: of each group of channels those stay that matter most. The stream that all blocks of a stage add to is one
  group; the inner channels of a block, its squeezed ones and the head's are others.
- Deeper: an added block starts as the identity, its last normalisation at 0, so the logits are the source's.
- Shallower: the last blocks of a stage are left out.

A channel matters by the spread that its normalisation gives it times the norm of the weights that read it, each as its
own normalisation scales them. Sliced so to nine tenths of its width, Lite0 gives 49 % of 191 photos the label that it
gave before; by the spread only it is 1 %, with the first channels 2 %, and training from there is slower.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from effnet.arch.blocks import FIRST_STAGE, Activation, BlockSpec
from effnet.arch.spec import NetworkSpec
from effnet.errors import ArgumentError
from effnet.models.blocks import ACTIVATIONS
from effnet.models.efficientnet import EfficientNet
from effnet.weights.convert import COUNTER, adapt_stem
from effnet.weights.layouts import NATIVE, LayoutStep, walk

# fresh: as it was; added: an identity; sliced: channels left out; grown: channels repeated and none left out
Outcome = Literal["fresh", "added", "sliced", "grown", "copied"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)  # a part has the first one that one of its tensors has
TAKEN = OUTCOMES[2:]

NOISE = 0.001  # of a tensor's standard deviation: after 80 steps of AdamW, copies differ as much as with 0.01
STEM = FIRST_STAGE - 1
SHOWN = 6  # names in the line that a report prints


@dataclass(frozen=True)
class InheritedPart:
    """What became of the stem, a block, the head or the classifier."""

    name: str
    outcome: Outcome
    params: int


@dataclass(frozen=True)
class Inheritance:
    """What a network took over, and what not."""

    source: str  # the name of the network that it came from
    parts: tuple[InheritedPart, ...]  # from input to output
    dropped: tuple[str, ...]  # the source's blocks that have no place here
    rewired: tuple[str, ...]  # blocks taken over whose input is added to their output in one of the networks only

    @property
    def share(self) -> float:
        """Parameters that came from the source, of all."""
        taken = sum(part.params for part in self.parts if part.outcome in TAKEN)
        return taken / sum(part.params for part in self.parts)

    def names(self, outcome: Outcome) -> tuple[str, ...]:
        """The parts with this outcome."""
        return tuple(part.name for part in self.parts if part.outcome == outcome)

    def __str__(self) -> str:
        """The report in one line."""
        counts = Counter(part.outcome for part in self.parts)
        taken = [f"{counts[outcome]} {outcome}" for outcome in reversed(OUTCOMES[1:]) if counts[outcome]]
        lists = {"fresh": self.names("fresh"), "left out": self.dropped, "other shortcut": self.rewired}
        phrases = [f"parts: {', '.join(taken)}"] if taken else []
        for title, names in lists.items():
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            phrases += [f"{title}: {', '.join(names[:SHOWN])}{more}"] if names else []
        total = sum(part.params for part in self.parts) / 1e6
        share = f"{math.floor(100 * self.share)} % of {total:.3g} M parameters"
        return f"inherited from {self.source}: {share} ({'; '.join(phrases)})"


def inherit(
    network: EfficientNet,
    source: EfficientNet,
    *,
    classes: tuple[Sequence[str], Sequence[str]] | None = None,
    noise: float = NOISE,
    seed: int = 0,
) -> Inheritance:
    """Start `network` from the weights of `source`; it is changed in place, and computes with the source's policy.

    Args:
        network: of any width, depth, resolution, classes and input channels, built with the source's padding.
        source: where the weights come from; it stays as it is.
        classes: the names of the classes of `network` and of `source`. The classifier is taken over where the source
            has all of them; without names, where their numbers agree.
        noise: on the weights of repeated channels, as a share of their tensor's standard deviation. With 0 the logits
            are the source's up to rounding, and copies never learn anything of their own.
        seed: of the noise.

    Raises:
        ArgumentError: padding or activation differ, a normalisation is not batch normalisation, or an argument is
            outside its range. Nothing was changed then.
    """
    old = {key: tensor.detach() for key, tensor in source.state_dict().items()}
    _check(network, source, noise)
    matched = _match_classes(network.spec, source.spec, classes)
    network.use_policy(source.policy)
    lineage = _Lineage(network.spec, source, old, matched)
    random = torch.Generator().manual_seed(seed)
    state = network.state_dict()  # the network's own tensors
    outcomes, sizes = defaultdict[str, set[Outcome]](set), Counter[str]()
    for step in walk(network.spec):
        name, outcome = step.block.name if step.block else step.role, lineage.outcome(step)
        keys = [key for key, _ in NATIVE.keys(step)]
        outcomes[name].add(outcome)
        sizes[name] += sum(state[key].numel() for key in keys[: 3 if step.has_norm else 2])
        if outcome == "added" and step.block and step.role == step.block.path[-1].name:
            for key in keys[1:3]:  # weight and bias of its normalisation
                state[key].zero_()
        elif outcome in TAKEN:
            for key in keys:
                if key in state and key in old:  # a frozen normalisation counts no batches
                    tensor = lineage.tensor(step, old[key])
                    state[key].copy_(lineage.add_noise(step, tensor, noise, random) if key == keys[0] else tensor)
    parts = (InheritedPart(name, min(found, key=OUTCOMES.index), sizes[name]) for name, found in outcomes.items())
    return Inheritance(source.spec.name, tuple(parts), lineage.dropped, lineage.rewired)


@dataclass(frozen=True)
class _Channels:
    """A group of channels: where in the source each comes from."""

    index: Tensor  # (channels,) int64
    old: int  # channels of the source

    @property
    def outcome(self) -> Outcome:
        """Whether some are left out or repeated."""
        return _compare_sizes(len(self.index), self.old)

    def take_rows(self, tensor: Tensor) -> Tensor:
        """A tensor with these channels as rows, from the source's."""
        return tensor[self.index.to(tensor.device)]

    def take_columns(self, weight: Tensor) -> Tensor:
        """A weight with these channels as columns, from the source's, shared out between the copies of a channel."""
        copies = torch.bincount(self.index, minlength=self.old)[self.index]
        weight = weight[:, self.index.to(weight.device)]
        divide = self.outcome == "grown"
        return weight / copies.to(weight).view(1, -1, *[1] * (weight.dim() - 2)) if divide else weight


class _Lineage:
    """Which block and which channels of the source each tensor of a network comes from."""

    def __init__(
        self, new: NetworkSpec, source: EfficientNet, state: Mapping[str, Tensor], classes: _Channels | None
    ) -> None:
        old = self.old = source.spec
        self.eps = source.policy.bn_eps
        known = {(block.stage, block.index): block for block in old.blocks}
        ends = {block.stage: block for block in old.blocks}

        # blocks
        self.kept, self.added, rewired = set[str](), set[str](), list[str]()
        self.streams = {STEM: STEM} | {stage: stage for stage in ends}
        for block in new.blocks:
            parent = known.get((block.stage, block.index))
            if parent and (parent.stride, *_make(parent)) == (block.stride, *_make(block)):
                self.kept.add(block.name)
                if block.has_shortcut != parent.has_shortcut:
                    rewired.append(block.name)
                elif block.has_shortcut and block.index == 0:  # two stages that add to one stream
                    self.streams[block.stage] = self.streams[block.stage - 1]
            elif not parent and block.has_shortcut and block.stage in ends and _make(ends[block.stage]) == _make(block):
                self.added.add(block.name)
        heirs = {block.name for block in new.blocks}
        self.dropped = tuple(block.name for block in old.blocks if block.name not in heirs)
        self.rewired = tuple(rewired)

        # channels
        self.end, self.same_end = self.streams[old.blocks[-1].stage], new.blocks[-1].stage == old.blocks[-1].stage
        sizes = [{self.groups(step)[0]: step.shape[0] for step in walk(spec)} for spec in (new, old)]
        shrunk = any(sizes[0][group] < size for group, size in sizes[1].items() if group in sizes[0])
        importance = self._importance(state, heirs) if shrunk else {}
        self.channels: dict[Hashable, _Channels] = {}
        for group in sizes[0].keys() & sizes[1].keys() - {"classes"}:
            many, few = sizes[1][group], sizes[0][group]
            best = importance[group].topk(few).indices.sort().values.cpu() if few < many else torch.arange(few) % many
            self.channels[group] = _Channels(best, many)
        if classes:
            self.channels["classes"] = classes

    def groups(self, step: LayoutStep) -> tuple[Hashable, Hashable]:
        """The groups of channels that a step writes and reads; None where it reads each of them alone, or the image.

        Within a block each layer writes a group of its own, but for depthwise ones, which write what they read, and for
        the last and the shortcut's, which write the stage's stream.
        """
        if step.block is None:
            pooled = "head" if self.old.head else self.end
            return {"stem": (STEM, None), "head": ("head", self.end), "classifier": ("classes", pooled)}[step.role]
        block = step.block
        writes: Hashable = self.streams.get(block.stage, block.stage)
        stage_before = block.stage - (block.index == 0)
        reads: Hashable = self.streams.get(stage_before, stage_before)
        groups: dict[str, tuple[Hashable, Hashable]] = dict.fromkeys(
            (layer.name for layer in block.layers), (writes, reads)
        )
        *before, last = block.path
        for layer in before:
            written = reads if layer.depthwise else (block.name, layer.name)
            groups[layer.name] = written, None if layer.depthwise else reads
            reads = written
        groups[last.name] = writes, reads
        squeezed = (block.name, "squeeze")
        return {"squeeze": (squeezed, reads), "excite": (reads, squeezed), **groups}[step.role]

    def outcome(self, step: LayoutStep) -> Outcome:
        """What becomes of a step."""
        if step.block and step.block.name not in self.kept:
            return "added" if step.block.name in self.added else "fresh"
        found = [self.channels.get(group) for group in self.groups(step) if group is not None]
        if None in found or (step.role in ("head", "classifier") and not self.same_end):
            return "fresh"
        outcomes = [channels.outcome for channels in found if channels]
        if step.role == "stem":
            outcomes.append(_compare_sizes(step.shape[1], self.old.in_channels))
        return min(outcomes, key=OUTCOMES.index)

    def tensor(self, step: LayoutStep, tensor: Tensor) -> Tensor:
        """One of a step's tensors, from the source's."""
        writes, reads = self.groups(step)
        if tensor.dim() == 0:
            return tensor
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()
        tensor = self.channels[writes].take_rows(tensor)
        if tensor.dim() > 1 and step.role == "stem" and step.shape[1] != tensor.shape[1]:
            return adapt_stem(tensor, step.shape[1])
        return self.channels[reads].take_columns(tensor) if tensor.dim() > 1 and reads is not None else tensor

    def add_noise(self, step: LayoutStep, weight: Tensor, noise: float, random: torch.Generator) -> Tensor:
        """A step's weight with noise on its repeated rows."""
        written = self.channels[self.groups(step)[0]]
        if noise and written.outcome == "grown":
            drawn = torch.randn(weight[written.old :].shape, generator=random).to(weight)
            weight[written.old :] += noise * weight.std() * drawn
        return weight

    def _importance(self, state: Mapping[str, Tensor], heirs: set[str]) -> dict[Hashable, Tensor]:
        """How much each channel of the source matters, group by group, in the blocks that have an heir."""
        spreads, weights = defaultdict[Hashable, list[Tensor]](list), defaultdict[Hashable, list[Tensor]](list)
        for step in walk(self.old):
            if step.block and step.block.name not in heirs:
                continue
            layers = step.block.layers if step.block else ()
            linear = {layer.name for layer in layers if not layer.activation}
            rescaled = {"excite", *(layer.name for layer, after in pairwise(layers) if after.depthwise)}
            writes, reads = self.groups(step)
            weight, *rest = (state[key].float() for key, _ in NATIVE.keys(step) if not key.endswith(COUNTER))
            weight = weight.reshape(*weight.shape[:2], -1)  # (out, in / groups, kernel^2)
            if step.has_norm:
                scale, shift, _, variance = rest
                weight = weight * (scale / (variance + self.eps).sqrt())[:, None, None]
                spread = _spread(scale, shift, None if step.role in linear else self.old.activation)
            else:
                spread = weight.norm(dim=(1, 2))
            if step.role not in rescaled:  # what these write is normalised or scaled once more
                spreads[writes].append(spread)
            if reads is not None:
                weights[reads].append(weight.norm(dim=(0, 2)))
        unread = [torch.ones(())]  # the last stream, where another stage or another head comes behind it
        return {group: _norm(rows) * _norm(weights.get(group, unread)) for group, rows in spreads.items()}


def _check(network: EfficientNet, source: EfficientNet, noise: float) -> None:
    """Raise ArgumentError where weights of one cannot serve the other."""
    ours, theirs = network.policy.padding, source.policy.padding
    if ours != theirs:
        raise ArgumentError(
            "padding", ours, f"is built in, and the source has {theirs!r}: EfficientNet(spec, policy=source.policy)."
        )
    activation, other = network.spec.activation, source.spec.activation
    if activation != other:
        raise ArgumentError("activation", activation, f"differs from the source's {other}.")
    for argument, each in (("network", network), ("source", source)):
        state = each.state_dict()
        if lost := [key for key in NATIVE.shapes(each.spec) if key not in state and not key.endswith(COUNTER)]:
            raise ArgumentError(argument, each.spec.name, f"needs batch normalisation, and lacks {lost[0]}.")
    if not (noise >= 0 and math.isfinite(noise)):
        raise ArgumentError("noise", noise, "must be at least 0 and finite.")


def _match_classes(
    new: NetworkSpec, old: NetworkSpec, classes: tuple[Sequence[str], Sequence[str]] | None
) -> _Channels | None:
    """Where in the source's classifier each class is; None where it is not taken over.

    Raises:
        ArgumentError: there are not as many names as classes.
    """
    if classes is None:
        return _Channels(torch.arange(new.num_classes), old.num_classes) if new.num_classes == old.num_classes else None
    for names, spec in zip(classes, (new, old), strict=True):
        if len(names) != spec.num_classes:
            raise ArgumentError("classes", len(names), f"must be {spec.num_classes} names, one for each class.")
    places = {name: place for place, name in enumerate(classes[1])}
    if not places.keys() >= set(classes[0]):
        return None
    return _Channels(torch.tensor([places[name] for name in classes[0]]), old.num_classes)


def _make(block: BlockSpec) -> tuple[str, int, int, bool]:
    """What blocks of a stage have in common, beside their channels."""
    return block.op, block.kernel_size, block.expand_ratio, block.squeeze_channels > 0


def _compare_sizes(new: int, old: int) -> Outcome:
    return "copied" if new == old else "sliced" if new < old else "grown"


def _spread(scale: Tensor, shift: Tensor, activation: Activation | None) -> Tensor:
    """The standard deviation behind a normalisation and its activation, where what is normalised is normal."""
    if activation is None:
        return scale.abs()
    points = torch.linspace(-4, 4, 81, device=scale.device)
    density = torch.softmax(-points.square() / 2, 0)
    values: Tensor = ACTIVATIONS[activation]()(shift[:, None] + scale[:, None] * points)
    mean = values @ density
    return ((values - mean[:, None]).square() @ density).sqrt()


def _norm(rows: Sequence[Tensor]) -> Tensor:
    """The root of the sum of squares."""
    return torch.stack(tuple(rows)).square().sum(0).sqrt()

"""EfficientNet as a torch module, built from a NetworkSpec.

Departures from the tutorial's network (and its reasons to differ from the official code):
- weights are initialised as in the official code; the tutorial's depthwise filters start up to 50 times too small, so
  that batch normalisation's eps dominates the first activations;
- batch normalisation's momentum is .01 in torch's terms, as the official .99; the tutorial has .1 (see NumericPolicy);
- the dropout layer is always present, so the classifier's key does not change if its rate is 0;
- blocks are numbered, not lettered: letters run out after the 26th block of a stage;
- the shortcut is not added in place, and the classifier is drawn from the official uniform distribution.
As in the tutorial: symmetric padding (TensorFlow pads SAME, and its weights set that, see NumericPolicy), eps 1e-3,
shortcut only if stride is 1 and channels match, stochastic depth growing linearly from block to block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, TypedDict, cast

from torch import Tensor, nn

from effnet.arch.recompute import RecomputePlan
from effnet.arch.spec import NetworkSpec, NumericPolicy
from effnet.arch.variants import spec as make_spec
from effnet.errors import ArgumentError
from effnet.fields import positive_int
from effnet.models.blocks import BLOCKS, ConvNormAct, Norm, batch_norm, initialise
from effnet.models.native import covers
from effnet.models.recompute import follow_plan


class ParameterGroup(TypedDict):
    """Parameters of one stage or layer; torch optimizers take a list of these."""

    name: str
    params: list[nn.Parameter]


class EfficientNet(nn.Module):
    """The network of `spec`, freshly initialised.

    Stages are numbered as in Table 1 of the paper: `network.stages["2"]` ... `network.stages["8"]` hold the
    blocks, `stem` is stage 1, `head` with `classifier` stage 9. Images may have any height and width.

    Args:
        spec: what to build.
        policy: batch normalisation's constants and the kind of padding; by default those of a new network.
        norm: builds a normalisation layer for a number of channels, instead of BatchNorm2d: frozen
            (`torchvision.ops.FrozenBatchNorm2d`), synchronised (`nn.SyncBatchNorm`), group
            (`lambda channels: nn.GroupNorm(8, channels)`; all channels are multiples of 8).
    """

    def __init__(self, spec: NetworkSpec, *, policy: NumericPolicy | None = None, norm: Norm | None = None) -> None:
        super().__init__()
        if not isinstance(spec, NetworkSpec):
            rule = "must be a NetworkSpec: effnet.spec('b0') returns one, effnet.create('b0') a network."
            raise ArgumentError("spec", spec, rule)
        self.spec = spec
        self.policy = policy or NumericPolicy()
        norm = norm or batch_norm(self.policy.bn_eps, self.policy.bn_momentum)
        act, padding = spec.activation, self.policy.padding

        # stage 1: 3x3 convolution
        stem = (spec.in_channels, spec.stem_channels)
        how: dict[str, Any] = {"norm": norm, "activation": act, "padding": padding}
        self.stem = ConvNormAct(stem, spec.stem_kernel, stride=spec.stem_stride, **how)
        self.stem_pool = nn.MaxPool2d(3, 2, 1) if spec.stem_pool else nn.Identity()

        # stages 2-8: blocks
        self.stages = nn.ModuleDict({str(block.stage): nn.Sequential() for block in spec.blocks})
        for block in spec.blocks:
            stage = cast(nn.Sequential, self.stages[str(block.stage)])
            stage.append(BLOCKS[block.op](block, **how))

        # stage 9: 1x1 convolution, pooling, fully connected layer
        head = (spec.blocks[-1].out_channels, spec.head_channels)
        self.head = ConvNormAct(head, **how) if spec.head else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(spec.dropout)
        self.classifier = nn.Linear(spec.head_channels, spec.num_classes)

        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W), normalised by the InputSpec of the weights."""
        x = self.embed(images)
        x = self.dropout(x)
        return self.classifier(x)

    def embed(self, images: Tensor) -> Tensor:
        """Pooled features (N, head_channels), the classifier's input."""
        x = self.forward_features(images)
        x = self.pool(x)
        return x.flatten(1)

    def forward_features(self, images: Tensor) -> Tensor:
        """The last feature map (N, head_channels, H / 32, W / 32), sizes rounded up; / 16 with a stem stride of 1."""
        x = self.stem_pool(self.stem(images))
        for stage in self.stages.values():
            x = stage(x)
        return self.head(x)

    def pyramid(self, images: Tensor) -> tuple[Tensor, ...]:
        """The deepest map of each stride 2, 4, 8, 16, 32, finest first, for detectors and segmenters.

        Map i has shape (N, pyramid_channels[i], H / 2^(i+1), W / 2^(i+1)), sizes rounded up. The last one is stage 8's
        output, since the head belongs to the classifier. With a stem stride of 1 the strides are 1, 2, 4, 8, 16.
        """
        strided = {str(block.stage) for block in self.spec.blocks if block.stride > 1}
        maps = []
        x = self.stem(images)
        if self.spec.stem_pool:
            maps.append(x)
            x = self.stem_pool(x)
        for number, stage in self.stages.items():
            if number in strided:
                maps.append(x)
            x = stage(x)
        return *maps, x

    @property
    def pyramid_channels(self) -> tuple[int, ...]:
        """Channels of the maps that `pyramid` returns."""
        before = [block.in_channels for block in self.spec.blocks if block.stride > 1]
        before = [self.spec.stem_channels, *before] if self.spec.stem_pool else before
        return *before, self.spec.blocks[-1].out_channels

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the classifier with a new one for `num_classes` classes."""
        num_classes = positive_int("num_classes", num_classes)
        old = self.classifier
        self.classifier = nn.Linear(old.in_features, num_classes, device=old.weight.device, dtype=old.weight.dtype)
        initialise(self.classifier)
        self.spec = dataclasses.replace(self.spec, num_classes=num_classes)

    def use_policy(self, policy: NumericPolicy) -> None:
        """Change the constants of batch normalisation, such as to a momentum of .1 for a short run.

        Raises:
            ArgumentError: `policy` has another padding, which is built in, or the norm is not batch normalisation.
        """
        if policy.padding != self.policy.padding:
            raise ArgumentError("padding", policy.padding, f"is built in, and here it is {self.policy.padding}.")
        norms = [module.norm for module in self.modules() if isinstance(module, ConvNormAct)]
        for norm in norms:
            if not hasattr(norm, "running_var") or not hasattr(norm, "eps"):
                raise ArgumentError("norm", type(norm).__name__, "has no running statistics, so it has no policy.")
            norm.eps = policy.bn_eps  # type: ignore[assignment]  # torch types every attribute as Tensor | Module
            if hasattr(norm, "momentum"):
                norm.momentum = policy.bn_momentum  # type: ignore[assignment]  # as above
        self.policy = policy

    def recompute(self, plan: RecomputePlan | None) -> None:
        """Keep fewer activations for the backward pass; None keeps all. See models.recompute.follow_plan."""
        follow_plan(self, self.spec, plan)

    def native(self, on: bool = True) -> None:
        """Train with the compiled kernels where possible (models/native.py), or with torch only if `on` is False.

        The kernels are the default, and compute the same up to rounding. Use torch for second derivatives, or to
        compare. EFFNET_NATIVE=0 disables them for every network of a process.
        """
        for module in self.modules():
            if hasattr(type(module), "native") and module is not self:
                module.native = on  # type: ignore[assignment]  # torch types every attribute as Tensor | Module

    def extra_repr(self) -> str:
        """What computes a training step on a CPU; shown by print."""
        segments = [self.stem, *(block for stage in self.stages.values() for block in stage.children()), self.head]
        found = {covers(segment) for segment in segments if not isinstance(segment, nn.Identity)}
        return f"training={' and '.join(('torch', 'native')[one] for one in sorted(found, reverse=True))}"

    def parameter_groups(self) -> list[ParameterGroup]:
        """All parameters by stage, from input to classifier, to freeze some or set learning rates by depth."""
        groups: list[tuple[str, nn.Module]] = [("stem", self.stem)]
        groups += [(f"stages.{number}", stage) for number, stage in self.stages.items()]
        groups += [("head", self.head), ("classifier", self.classifier)]
        return [{"name": name, "params": list(module.parameters())} for name, module in groups]


def unwrap_network(model: Any) -> EfficientNet:
    """The network itself, or the one inside DataParallel, AveragedModel or torch.compile; ArgumentError for others."""
    inner = model
    while isinstance(inner, nn.Module) and not isinstance(inner, EfficientNet):
        inner = getattr(inner, "_orig_mod", None) or getattr(inner, "module", None)
    if isinstance(inner, EfficientNet):
        return inner
    rule = "must be an effnet.EfficientNet."
    if isinstance(model, Mapping):
        rule += " A state dict does not say which network it is for: load it into one with network.load_state_dict."
    raise ArgumentError("network", type(model).__name__, rule)


class VariantBuilder(Protocol):
    """Builds a variant."""

    def __call__(
        self,
        num_classes: int = 1000,
        in_channels: int = 3,
        *,
        policy: NumericPolicy | None = None,
        norm: Norm | None = None,
    ) -> EfficientNet:
        """A new network; `effnet.create("b0", weights=...)` returns one with weights."""


def _builder(name: str) -> VariantBuilder:
    def build(num_classes: int = 1000, in_channels: int = 3, **options: Any) -> EfficientNet:
        return EfficientNet(make_spec(name, num_classes=num_classes, in_channels=in_channels), **options)

    build.__name__ = build.__qualname__ = f"efficientnet_{name}"
    build.__doc__ = f"{name.upper()}, freshly initialised; `options` are those of EfficientNet: policy and norm."
    return build


efficientnet_b0 = _builder("b0")
efficientnet_b1 = _builder("b1")
efficientnet_b2 = _builder("b2")
efficientnet_b3 = _builder("b3")
efficientnet_b4 = _builder("b4")
efficientnet_b5 = _builder("b5")
efficientnet_b6 = _builder("b6")
efficientnet_b7 = _builder("b7")

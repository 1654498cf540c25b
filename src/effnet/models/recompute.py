"""Training with less memory: a network follows a plan (arch/recompute.py) segment by segment.

Autograd saves every tensor that the backward pass will read. Most of them can be recomputed from a few others: a
normalised map from the convolution's output, an activation from that, a whole block from its input. A segment under a
plan saves the outputs of the convolutions that its level names, and a recipe for everything else. A recipe runs when
the backward pass needs its tensor, and the tensor is freed after its last reader.

It costs little time. Normalisation and activation are fused here, which saves a copy of each map, and on a CPU writing
a map costs more than its arithmetic. benchmarks/memory.py measures memory and time of every level.

- Batch normalisation computes its statistics in the forward pass only, and recipes use those. Running statistics and
  their counter are updated once per step, as without a plan; torch.utils.checkpoint would update them twice.
- Nothing random is drawn again: stochastic depth is never recomputed.
- Outputs and statistics are bitwise those of the plain network; gradients differ in their last digits.
- The backward pass runs only once and cannot be differentiated: no retain_graph, no create_graph.
- Hooks of a segment (stem, a block, head) are called; hooks of the layers inside it are not.

All this applies to torch's modules. The compiled kernels (native.py) compute the same under a plan as without one;
below the level CONVOLUTIONS a segment saves only its input and recomputes its forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional

from effnet.arch.blocks import OPS, BlockSpec
from effnet.arch.recompute import RecomputePlan
from effnet.arch.segments import Keep, check_plan, keeps_output
from effnet.arch.spec import NetworkSpec
from effnet.errors import ArgumentError
from effnet.models import native
from effnet.models.blocks import ConvNormAct, SqueezeExcitation, activate

aten = torch.ops.aten


class Source:
    """A tensor of the forward pass: saved, or recomputed when it is needed and kept until it is released."""

    def __init__(self, recipe: Callable[[], Tensor] | None = None, kept: Tensor | None = None) -> None:
        self.recipe, self.value = recipe, kept

    def get(self) -> Tensor:
        """The tensor, without gradient."""
        if self.value is None:
            if self.recipe is None:
                raise RuntimeError("a network under a plan goes backward once: retain_graph does not work with it")
            with torch.no_grad():
                self.value = self.recipe()
        return self.value

    def release(self) -> None:
        """Free the tensor and everything that its recipe refers to; called after its last reader."""
        self.recipe = self.value = None


def follow_plan(network: nn.Module, spec: NetworkSpec, plan: RecomputePlan | None) -> None:
    """Follow `plan` in every training step; None saves everything, as in a new network.

    Raises:
        ArgumentError: the plan is for another network, or a block or normalisation cannot be recomputed.
    """
    forwards: dict[str, Callable[..., Tensor]] = {"stem": _end}
    forwards |= {block.name: partial(_block, block) for block in spec.blocks}
    if spec.head:
        forwards["head"] = _end
    if plan is not None:
        check_plan(spec, plan)
        for module in network.modules():
            if isinstance(module, ConvNormAct):
                _check_norm(module.norm)
    for name, forward in forwards.items():
        segment = network.get_submodule(name)
        vars(segment).pop("forward", None)
        if plan is not None:  # else the class's own method applies
            again = plan[name] < Keep.CONVOLUTIONS
            vars(segment)["forward"] = partial(_forward, segment, partial(forward, segment, plan[name]), again)


def _forward(segment: Any, planned: Callable[[Tensor], Tensor], again: bool, x: Tensor) -> Tensor:
    """A segment's forward pass, under its plan if anything would be saved for the backward pass."""
    if not (segment.training and torch.is_grad_enabled()):
        return cast(Tensor, type(segment).forward(segment, x))
    covered = hasattr(segment, "native")
    y = native.run(segment, x, getattr(segment, "has_shortcut", False), again) if covered else None
    return planned(x) if y is None else y


def _check_norm(norm: nn.Module) -> None:
    """Raise ArgumentError unless this is torch's batch normalisation with weight and bias."""
    if type(norm).forward is not nn.BatchNorm2d.forward or getattr(norm, "weight", None) is None:
        rule = "is not BatchNorm2d with weight and bias, the only one that a plan can recompute."
        raise ArgumentError("norm", str(norm), rule)


def _end(layer: ConvNormAct, keep: Keep, x: Tensor) -> Tensor:
    return _conv_norm_act(layer, x, conv=keep > Keep.BOTTLENECKS, act=keep is Keep.ACTIVATIONS)


def _block(block: BlockSpec, module: Any, keep: Keep, x: Tensor) -> Tensor:
    """Compute a block from its description in arch/blocks.py, with the result of its module's own forward pass."""
    full = keep is Keep.ACTIVATIONS
    *before, last = block.path
    shortcuts = [layer.name for layer in block.layers if layer.shortcut]
    y = x
    for layer in before:
        y = _conv_norm_act(getattr(module, layer.name), y, conv=keeps_output(block, layer, keep), act=full)
    if block.squeeze_channels:
        y = _squeeze_excite(module.se, y, keep=full)
    summed = bool(shortcuts) or block.has_shortcut  # a sum keeps nothing of what it adds
    y = _conv_norm_act(getattr(module, last.name), y, conv=True, act=full or summed)
    for name in shortcuts:
        x = _conv_norm_act(getattr(module, name), x, conv=True, act=True)
    if summed:
        y = x + module.drop(y)
    return activate(module.act, y) if OPS[block.op].activates_sum else y


def _conv_norm_act(layer: ConvNormAct, x: Tensor, *, conv: bool, act: bool) -> Tensor:
    """One layer. `conv` and `act`: whether to save the outputs of its convolution and of its activation."""
    source, precision = _source_of(x), _autocast(x)
    pad: nn.Module | None = getattr(layer, "pad", None)
    # The weights of this forward pass: later the module may have others, as under torch.func.functional_call.
    weight, bias = cast(Tensor, layer.norm.weight), cast(Tensor, layer.norm.bias)
    conv2d = partial(layer.conv._conv_forward, weight=layer.conv.weight.detach(), bias=None)

    def padded() -> Tensor:
        return source.get() if pad is None else pad(source.get())

    def convolved() -> Tensor:
        with precision():
            return conv2d(padded())

    entering = x if pad is None else pad(x)
    with nullcontext() if x is entering and source.recipe is None else _replace_saved(entering, padded):
        z = layer.conv(entering)
    after_conv = Source(kept=z.detach()) if conv else Source(convolved)
    after_act = Source()
    y, mean, scale = _NormAct.apply(z, weight, bias, layer, after_conv, after_act)
    affine = weight.detach(), bias.detach()
    after_act.recipe = lambda: _act(layer, _norm(after_conv.get(), mean, scale, *affine))
    return y if act else _attach(y, after_act)


def _squeeze_excite(se: SqueezeExcitation, x: Tensor, *, keep: bool) -> Tensor:
    """Squeeze-and-excitation. `keep`: whether to save its input and its product."""
    scale = se.scale(x)
    if keep:
        return x * scale
    source, factor = _source_of(x), scale.detach()
    product = Source(lambda: source.get() * factor)

    def again() -> Tensor:
        product.release()  # the projection, which reads it, comes first in the backward pass
        return source.get()

    with _replace_saved(x, again):
        y = x * scale
    return _attach(y, product)


class _NormAct(torch.autograd.Function):
    """Fused batch normalisation and activation, which save only two numbers per channel."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weight: Tensor, bias: Tensor, layer: ConvNormAct, after_conv: Source, after_act: Source
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(N, C, H, W) -> the same, and the mean and 1 / sqrt(variance + eps) of each channel."""
        _check_norm(layer.norm)
        norm = cast(nn.BatchNorm2d, layer.norm)
        batch = norm.training or norm.running_mean is None
        if batch and z.numel() == z.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(z.shape)}")
        momentum = norm.momentum if norm.momentum is not None else 0.0
        if norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
            if norm.momentum is None:  # torch's cumulative average
                momentum = 1 / float(norm.num_batches_tracked)
        y, mean, scale = torch.native_batch_norm(
            z, weight, bias, norm.running_mean, norm.running_var, batch, momentum, norm.eps
        )
        if not batch:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            mean, scale = norm.running_mean.clone(), (norm.running_var + norm.eps).rsqrt_()
        ctx.layer, ctx.batch, ctx.after_conv, ctx.after_act = layer, batch, after_conv, after_act
        ctx.save_for_backward(weight, bias, mean, scale)
        ctx.mark_non_differentiable(mean, scale)
        return _act(layer, y), mean, scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of the map and of the normalisation's weight and bias."""
        weight, bias, mean, scale = ctx.saved_tensors
        layer, batch = ctx.layer, ctx.batch
        ctx.after_act.release()
        z = ctx.after_conv.get()
        ctx.after_conv.release()
        known = (None, None) if batch else (mean, scale.reciprocal().square_().sub_(layer.norm.eps))
        arguments = (*known, mean, scale, batch, layer.norm.eps)
        if not hasattr(layer, "act"):
            grads = aten.native_batch_norm_backward(grad, z, weight, *arguments, [True, True, True])
            return *grads, None, None, None
        normalised = _norm(z, mean, scale, weight, bias)
        # The gradient overwrites the normalised map: allocating a new map would cost more than its arithmetic.
        grad = _act_backward(layer, grad, normalised)
        _, by_weight, by_bias = aten.native_batch_norm_backward(grad, z, weight, *arguments, [False, True, True])
        slope = scale * weight
        if not batch:
            return grad.mul_(_per_channel(slope)), by_weight, by_bias, None, None, None
        count = z.numel() // z.shape[1]
        tilt = slope * scale * by_weight / -count
        shift = slope * by_bias / -count - tilt * mean
        grad = grad.mul_(_per_channel(slope)).addcmul_(z, _per_channel(tilt).to(z.dtype)).add_(_per_channel(shift))
        return grad, by_weight, by_bias, None, None, None


def _norm(z: Tensor, mean: Tensor, scale: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    variance = scale.reciprocal().square_()  # includes eps
    return functional.batch_norm(z, mean, variance, weight, bias, False, 0.0, 0.0)


def _act(layer: ConvNormAct, y: Tensor) -> Tensor:
    return activate(layer.act, y, layer) if hasattr(layer, "act") else y


def _act_backward(layer: ConvNormAct, grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of the activation's input `x`, written over `x`."""
    if isinstance(layer.act, nn.ReLU):
        return aten.threshold_backward.grad_input(grad, x, 0.0, grad_input=x)
    if isinstance(layer.act, nn.ReLU6):
        return aten.hardtanh_backward.grad_input(grad, x, 0.0, 6.0, grad_input=x)
    return aten.silu_backward.grad_input(grad, x, grad_input=x)


def _per_channel(channels: Tensor) -> Tensor:
    return channels.view(1, -1, 1, 1)


def _attach(x: Tensor, source: Source) -> Tensor:
    """`x` with its source attached, for the layer that reads it."""
    x.source = source, x._version  # type: ignore[attr-defined]  # an attribute of our own
    return x


def _source_of(x: Tensor) -> Source:
    """The source of `x`: the layer before, or the map itself, if it is saved anyway or was modified since."""
    source, version = getattr(x, "source", (None, None))
    return source if source is not None and version == x._version else Source(kept=x.detach())


def _replace_saved(kept: Tensor, again: Callable[[], Tensor]) -> AbstractContextManager[None]:
    """Make autograd save `again` instead of this tensor."""
    address, shape = kept.untyped_storage()._cdata, kept.shape  # a closure would keep the tensor itself in memory
    return saved_tensors_hooks(
        lambda tensor: again if tensor.untyped_storage()._cdata == address and tensor.shape == shape else tensor,
        lambda packed: packed if isinstance(packed, Tensor) else packed(),
    )


def _autocast(x: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """A factory of the current autocast context, since the backward pass runs outside of it."""
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return nullcontext
    return partial(torch.autocast, device, dtype=torch.get_autocast_dtype(device), cache_enabled=False)

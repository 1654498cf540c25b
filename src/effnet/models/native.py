"""Which modules train with the compiled kernels, and when.

A block, or a layer with its normalisation and activation, is then one autograd function, which saves the input and the
outputs of the convolutions; the backward pass recomputes normalised, activated and gated maps as it reads them.
Gradients and running statistics are those of torch's own modules up to rounding. Weights, statistics and gradients of
parameters are float32; maps are float32, or bfloat16 inside autocast.

The modules compute what the kernels do not support: other devices and types, other normalisations, normalisation in
eval mode, and anything that observes inner layers (hooks, compilers, tracers, functorch). With EFFNET_NATIVE=0 they
compute everything, as in a network after `native(False)`.
"""

from __future__ import annotations

from operator import itemgetter
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from effnet.models.depthwise import DepthwiseConv2d, is_eager
from effnet.models.kernels import ACTIVATIONS, LAYERS, Plan, Step, count_batch, open_library
from effnet.native import KERNEL_SIZES, STRIDES, trains

_CONV = itemgetter(
    "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "in_channels", "out_channels"
)
_SETTINGS = {
    nn.Conv2d: _CONV,
    DepthwiseConv2d: _CONV,
    nn.BatchNorm2d: itemgetter("eps", "momentum", "track_running_stats"),
}
_PLANS: WeakKeyDictionary[nn.Module, tuple[list[Any] | None, Plan | None]] = WeakKeyDictionary()


def run(module: Any, x: Tensor, shortcut: bool = False, again: bool = False) -> Tensor | None:
    """Run a segment's training pass: (N, C, H, W) -> (N, C', H', W'); None if its modules have to compute it.

    Args:
        module: an MBConv or a SeparableConv, or a ConvNormAct.
        x: its input.
        shortcut: whether the input is added to the output.
        again: keep only the input, and recompute the convolutions' outputs in the backward pass.
    """
    if not (module.training and module.native and torch.is_grad_enabled() and is_eager(x) and _is_on()):
        return None
    if _has_any_global_hook() or torch._C._len_torch_dispatch_stack():  # type: ignore[no-untyped-call]
        return None
    low = torch.is_autocast_enabled("cpu")
    if low and torch.get_autocast_dtype("cpu") is not torch.bfloat16:
        return None
    if x.dtype is not torch.float32 and not (low and x.dtype is torch.bfloat16):
        return None
    if low and shortcut and x.dtype is torch.float32:  # torch adds it in float32
        return None
    plan = _plan(module, shortcut)
    tensors = plan.tensors() if plan is not None and plan.takes(x, low) else None
    if plan is None or tensors is None:
        return None
    parameters, running, counters = tensors
    count_batch(counters)
    return cast(Tensor, Step.apply(plan, running, x, plan.draw(x.shape[0]), low, again or plan.again, *parameters))


def covers(module: Any) -> bool:
    """Whether the kernels would compute a segment's training pass on a CPU."""
    if not (getattr(module, "native", False) and _is_on()):
        return False
    plan = _plan(module, getattr(module, "has_shortcut", False))
    return plan is not None and plan.tensors() is not None


def _is_on() -> bool:
    return trains() and open_library() is not None


def _plan(module: nn.Module, shortcut: bool) -> Plan | None:
    """The segment's plan, cached until one of the facts that determine it changes."""
    facts = _facts(module, shortcut)
    if facts is None:
        return None
    known, plan = _PLANS.get(module, (None, None))
    if known != facts:
        plan = _make_plan(module, shortcut)
        _PLANS[module] = facts, plan
    return plan


def _facts(module: nn.Module, shortcut: bool) -> list[Any] | None:
    """What determines a plan: inner modules and their settings; None if they have hooks or replaced methods."""
    facts: list[Any] = [shortcut]
    modules = [*module._modules.values()]
    for each in modules:
        if each is None:
            return None
        own, kind = each.__dict__, type(each)
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return None
        if "forward" in own:
            return None
        facts += each, kind
        if kind in _SETTINGS:
            facts.append(_SETTINGS[kind](own))
        if own["_modules"]:
            modules += own["_modules"].values()
    return facts


def _make_plan(module: nn.Module, shortcut: bool) -> Plan | None:
    """The plan of a segment, or None if the kernels do not support its modules."""
    children: dict[str, Any] = {
        name: child for name, child in module._modules.items() if type(child) is not nn.Identity
    }
    if "norm" in children:
        known = _is_layer(module) and children["conv"].groups == 1
        return Plan({"project": module}) if known else None
    if "pointwise" in children:
        children["project"] = children.pop("pointwise")
    layers = {name: children[name] for name in LAYERS if name in children}
    if [*layers][-2:] != ["depthwise", "project"] or not all(map(_is_layer, layers.values())):
        return None
    wide = layers["depthwise"].conv.in_channels
    for name, layer in layers.items():
        conv = layer.conv
        if name == "depthwise":
            known = conv.groups == conv.out_channels and conv.kernel_size[0] in KERNEL_SIZES
        else:
            known = conv.groups == 1 and conv.kernel_size == conv.stride == (1, 1)
            known = known and (conv.out_channels if name == "expand" else conv.in_channels) == wide
        if not known or _part(layer) != "layer":
            return None
    inputs, strides = next(iter(layers.values())).conv.in_channels, layers["depthwise"].conv.stride
    if shortcut and (inputs, strides) != (layers["project"].conv.out_channels, (1, 1)):
        return None
    se, drop = children.get("se"), children.get("drop") if shortcut else None
    if (se and not _is_squeeze(se, layers["depthwise"])) or (drop and _part(drop) != "drop"):
        return None
    return Plan(layers, se, drop, shortcut)


def _part(module: nn.Module) -> str | None:
    """The module's part in a segment; not inherited, since a subclass may compute something else."""
    return cast("str | None", vars(type(module)).get("PART"))


def _is_layer(layer: Any) -> bool:
    """Whether it is a convolution, batch normalisation and an activation, with symmetric or SAME padding."""
    children = layer._modules
    if [*children] != [name for name in ("pad", "conv", "norm", "act") if name in children]:
        return False
    conv, norm, act, pad = (children.get(name) for name in ("conv", "norm", "act", "pad"))
    if type(conv) not in (nn.Conv2d, DepthwiseConv2d) or type(norm) is not nn.BatchNorm2d:
        return False
    if norm.momentum is None or not norm.track_running_stats or (act is not None and type(act) not in ACTIVATIONS):
        return False
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    padding = (kernel - 1) // 2
    if pad is not None:
        if _part(pad) != "pad" or (pad.kernel_size, pad.stride) != (kernel, stride):
            return False
        padding = 0
    square = conv.kernel_size == (kernel, kernel) and conv.stride == (stride, stride) and kernel % 2
    usual = conv.padding == (padding, padding) and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    return bool(square and usual and stride in STRIDES)


def _is_squeeze(se: Any, depthwise: Any) -> bool:
    """Whether it is a SqueezeExcitation of the depthwise convolution's output, with the same activation."""
    children = se._modules
    if _part(se) != "se" or [*children] != ["pool", "squeeze", "act", "excite", "gate"]:
        return False
    kinds = [type(child) for child in children.values()]
    if kinds != [nn.AdaptiveAvgPool2d, nn.Conv2d, type(depthwise._modules.get("act")), nn.Conv2d, nn.Sigmoid]:
        return False
    wide, squeezed = depthwise.conv.out_channels, se.squeeze.out_channels
    sizes = _CONV(vars(se.squeeze)), _CONV(vars(se.excite))
    usual = (1, 1), (1, 1), (0, 0), (1, 1), 1, "zeros"
    return se.pool.output_size in (1, (1, 1)) and sizes == ((*usual, wide, squeezed), (*usual, squeezed, wide))

"""effnet: the EfficientNet that fits your images and your budget.

    effnet.spec("b0", resolution=260)         a network as plain numbers
    effnet.cost(spec)                         its parameters, multiply-adds and activations
    effnet.scale(spec, 1.5)                   a larger network by compound scaling
    effnet.fit_spec(effnet.Budget(macs="1G"))  the network that fits a budget, and why
    effnet.create("b0", num_classes=10)       the network as a torch module, with random or pretrained weights
    effnet.fit("photos", latency="20ms")      the network that learns these images best within a budget, trained
    effnet.train("photos", "lite0")           a trained bundle in a run folder
    effnet.load("lite0").predict("photo.jpg") a classifier that prepares photos itself and names what it sees
    effnet.save(network, "folder")            a bundle: weights and everything that belongs to them

Names are resolved when they are first used, so `import effnet` is fast and does not need torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from effnet.version import __version__

if TYPE_CHECKING:
    from effnet.arch.blocks import BlockSpec as BlockSpec
    from effnet.arch.cost import Cost as Cost
    from effnet.arch.cost import NetworkCost as NetworkCost
    from effnet.arch.cost import cost as cost
    from effnet.arch.spec import InputSpec as InputSpec
    from effnet.arch.spec import NetworkSpec as NetworkSpec
    from effnet.arch.spec import NumericPolicy as NumericPolicy
    from effnet.arch.spec import StageSpec as StageSpec
    from effnet.arch.variants import spec as spec
    from effnet.errors import EffnetError as EffnetError
    from effnet.fitting.fit import Fitted as Fitted
    from effnet.fitting.fit import fit as fit
    from effnet.models.efficientnet import EfficientNet as EfficientNet
    from effnet.models.efficientnet import efficientnet_b0 as efficientnet_b0
    from effnet.models.efficientnet import efficientnet_b1 as efficientnet_b1
    from effnet.models.efficientnet import efficientnet_b2 as efficientnet_b2
    from effnet.models.efficientnet import efficientnet_b3 as efficientnet_b3
    from effnet.models.efficientnet import efficientnet_b4 as efficientnet_b4
    from effnet.models.efficientnet import efficientnet_b5 as efficientnet_b5
    from effnet.models.efficientnet import efficientnet_b6 as efficientnet_b6
    from effnet.models.efficientnet import efficientnet_b7 as efficientnet_b7
    from effnet.runtime.classifier import Classifier as Classifier
    from effnet.runtime.classifier import Prediction as Prediction
    from effnet.runtime.load import load as load
    from effnet.scaling.budget import Budget as Budget
    from effnet.scaling.compound import Rule as Rule
    from effnet.scaling.compound import scale as scale
    from effnet.scaling.fit import fit_spec as fit_spec
    from effnet.training.train import train as train
    from effnet.weights.bundle import save as save
    from effnet.weights.load import create as create


_HOMES = {
    "effnet.arch.cost": ("Cost", "NetworkCost", "cost"),
    "effnet.arch.blocks": ("BlockSpec",),
    "effnet.arch.spec": ("InputSpec", "NetworkSpec", "NumericPolicy", "StageSpec"),
    "effnet.arch.variants": ("spec",),
    "effnet.runtime.classifier": ("Classifier", "Prediction"),
    "effnet.runtime.load": ("load",),
    "effnet.errors": ("EffnetError",),
    "effnet.fitting.fit": ("Fitted", "fit"),
    "effnet.models.efficientnet": ("EfficientNet", *(f"efficientnet_b{i}" for i in range(8))),
    "effnet.scaling.budget": ("Budget",),
    "effnet.scaling.compound": ("Rule", "scale"),
    "effnet.scaling.fit": ("fit_spec",),
    "effnet.training.train": ("train",),
    "effnet.weights.bundle": ("save",),
    "effnet.weights.load": ("create",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}
_TRAINING = ("Fitted", "fit", "train")  # need more than torch
__all__ = ["__version__", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        from effnet.errors import nearest

        raise AttributeError(f"module 'effnet' has no attribute {name!r}.{nearest(name, _HOME_OF)}")
    try:
        value = getattr(importlib.import_module(_HOME_OF[name]), name)
    except Exception as error:
        from effnet.errors import translated

        extra = "train" if name in _TRAINING else "torch"
        if (found := translated(error, f"effnet.{name}", torch_extra=extra)) is error:
            raise
        raise found from error
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME_OF})

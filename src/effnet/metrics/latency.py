"""Latency: the time of one image on this machine, in the engine that would run the network.

The weights are random, since time does not depend on their values. Needs torch, which makes them.
"""

from __future__ import annotations

import torch

from effnet.arch.spec import InputSpec, NetworkSpec
from effnet.data.views import views
from effnet.metrics.timing import Timing, measure
from effnet.models.efficientnet import EfficientNet
from effnet.runtime.select import Selection, open_session, select
from effnet.weights.bundle import Bundle, BundleConfig

RUNS, WARMUP = 15, 3


def time_network(spec: NetworkSpec, selection: Selection | None = None, *, runs: int = RUNS) -> Timing:
    """Time a network of random weights with single images; by default the rules of `runtime.select` say how it runs.

    Raises:
        ArgumentError: `runs` is not a positive whole number.
        MissingExtraError: the engine is not installed.
    """
    bundle = random_bundle(spec)
    image = views(bundle.config.input, 1)
    with open_session(bundle, selection or select(spec, batch=1)) as session:
        return measure(lambda: session(image), runs=runs, warmup=WARMUP)


def random_bundle(spec: NetworkSpec) -> Bundle:
    """A network of random weights in eval mode, whose images have its resolution."""
    network = EfficientNet(spec).eval().to(memory_format=torch.channels_last)
    input_spec = InputSpec(spec.resolution, spec.resolution).with_channels(spec.in_channels)
    return Bundle(network, BundleConfig(spec, network.policy, input_spec))

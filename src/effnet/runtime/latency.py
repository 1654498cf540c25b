"""How long networks of random weights take for one image, in the engine that one of them is fastest in."""

from __future__ import annotations

import torch

from effnet.arch.spec import InputSpec, NetworkSpec
from effnet.metrics.timing import Timing, measure
from effnet.models.efficientnet import EfficientNet
from effnet.runtime.choice import Choice, Question, choose, views, ways_of_network
from effnet.runtime.engines import EngineName, Way, engine
from effnet.weights.bundle import Bundle, BundleConfig

RUNS, WARMUP = 15, 3


def choose_for(spec: NetworkSpec, name: EngineName | None, threads: int | None = None) -> Choice:
    """The fastest way for single images of a network of random weights.

    Whether a lower precision names photos as fp32 does can only be asked of a trained network, when it is loaded.

    Args:
        spec: the network.
        name: the only engine that may run it; None: whatever is installed.
        threads: that it may use; None: one for each core.

    Raises:
        MissingExtraError: the engine is not installed.
    """
    bundle = fresh(spec)
    see, ways = bundle.config.input, ways_of_network(name, None)
    question = Question(f"random weights of {spec}", see, ways, 1, threads=threads, agree=0)
    return choose(question, lambda way, batch: engine(bundle, way, batch=batch, threads=threads))


def time_network(spec: NetworkSpec, way: Way, *, threads: int | None = None, runs: int = RUNS) -> Timing:
    """How long a network of random weights takes for one image.

    Raises:
        ArgumentError: a number is no positive whole number.
        MissingExtraError: the engine is not installed.
    """
    bundle = fresh(spec)
    run, image = engine(bundle, way, batch=1, threads=threads), views(bundle.config.input, 1)
    return measure(lambda: run(image), runs=runs, warmup=WARMUP)


def fresh(spec: NetworkSpec) -> Bundle:
    """A network of random weights in eval mode, and how it sees images of its resolution."""
    network = EfficientNet(spec).eval().to(memory_format=torch.channels_last)
    see = InputSpec(spec.resolution, spec.resolution).with_channels(spec.in_channels)
    return Bundle(network, BundleConfig(spec, network.policy, see))

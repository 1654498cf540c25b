"""What the commands share: kinds of options, exit codes, MODEL as a network, remarks that stand under tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, Token

from effnet.arch.baselines import BASELINES
from effnet.arch.spec import NetworkSpec
from effnet.arch.specfile import SUFFIXES
from effnet.arch.variants import VARIANTS, spec
from effnet.errors import ArgumentError
from effnet.weights.bundle import is_bundle, read_config

OK, FINDING, ERROR, INTERRUPTED = 0, 1, 2, 130
STDIN = "\0-"  # how a lone hyphen travels past cyclopts, which takes it for an option; no path can have this name

MACS = "MACs are multiply-adds, what the paper calls FLOPS; FLOPs are twice as many."
PUBLISHED = "Accuracies are published ones on ImageNet, not measured here."


def _whole(_: type, tokens: Sequence[Token]) -> int:
    """A whole number as it is written; cyclopts would cut 1.5 down to 1."""
    try:
        return int(tokens[0].value)
    except ValueError as error:
        raise ValueError(f"{tokens[0].value!r} is no whole number") from error


Whole = Annotated[int, Parameter(converter=_whole)]
Flag = Annotated[bool, Parameter(negative=())]


def network_of(model: str) -> NetworkSpec:
    """The network of a variant, a bundle or a spec.yaml, read without torch."""
    if is_bundle(Path(model)):
        return read_config(model).spec
    described = model in VARIANTS or model in BASELINES or Path(model).suffix.lower() in SUFFIXES
    if Path(model).exists() and not described:
        raise ArgumentError("model", model, f"is no bundle; make one with: effnet convert {model}")
    return spec(model)

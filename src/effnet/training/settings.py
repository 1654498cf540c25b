"""The settings of a run: what is trained, on which data, and within which limits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self

from cyclopts import Parameter

from effnet.arch.spec import FitMode
from effnet.console import Amount, Flag
from effnet.errors import ArgumentError
from effnet.fields import (
    check_fields,
    non_negative_float,
    non_negative_int,
    one_of,
    parse_bytes,
    positive_float,
    positive_int,
    seed_number,
    set_field,
)

PrecisionOption = Literal["auto", "fp32", "bf16", "fp16", "tf32"]
Shuffle = Literal["full", "block"]
STAGES = 9  # of the paper's Table 1
CHECKS: dict[str, Callable[[str, Any], object]] = {
    "minutes": positive_float,
    "resolution": positive_int,
    "threads": positive_int,
    "train_memory": parse_bytes,
    "workers": non_negative_int,
    "seed": seed_number,
    "save_seconds": non_negative_float,
}


@Parameter(name="*")
@dataclass(frozen=True)
class Settings:
    """What is trained, and within which limits; the recipe holds the hyper-parameters.

    These are options of `effnet train` and keyword arguments of `effnet.train`. `given` names the fields that were set
    explicitly; only these override the settings of a `like` run.
    """

    model: str = "lite0"
    """A variant (lite0, b0), a bundle, a weight file, or a spec.yaml."""

    minutes: float | None = None
    """Time for the whole run, instead of epochs. The schedule follows the clock, so the weights differ from run to
    run."""

    resolution: int | None = None
    """Height and width of the images in pixels. Default: the model's."""

    fit: FitMode | None = None
    """How photos become square: crop, pad or squash. Default: as the weights expect, mostly crop. For objects that
    fill the frame, pad and squash cut nothing off."""

    stem_stride: int | None = None
    """1 suits images of up to 64 px: with 2, the last feature map has one pixel at 32 px, two by two at 64. Default:
    the model's."""

    init: str | None = None
    """Network to start from, as far as its blocks match or can be sliced or grown."""

    freeze: int = 0
    """Freeze stages 1 to N; with 9, only the classifier is trained."""

    train_memory: Amount | None = None
    """Memory limit of a training step, such as 4GB; torch itself is not counted. Kept by recomputing feature maps and
    by splitting batches."""

    seed: int = 0
    """Seed of the split, the initial weights, the order of the images and the augmentation."""

    device: str = "cpu"
    """cpu, cuda, cuda:1 or mps."""

    precision: PrecisionOption = "auto"
    """Precision of the feature maps; auto takes the fastest on this processor or GPU. fp16 (with loss scaling) and
    tf32 (fp32 maps, products with 10 bits) are for GPUs."""

    compile: Flag = False
    """Compile the network with torch.compile: minutes before the first step, faster steps on a GPU. If that fails, the
    run goes on uncompiled."""

    shuffle: Shuffle = "full"
    """Order of the images: full, or block for disks with slow random access, which reads 8 MB at a time and mixes
    256 MB."""

    workers: int | None = None
    """Processes that load images. Default: derived from image size, network and cores."""

    threads: int | None = None
    """Threads that torch may use. Default: one per core without a worker."""

    val: float = 0.15
    """Share of the images for validation, if the data has no val split."""

    test: float = 0.15
    """Share of the images for the final evaluation, if the data is not split."""

    sync_bn: Flag = False
    """Synchronise batch normalisation over all of torchrun's processes; CUDA only."""

    tensorboard: Flag = False
    """Also write curves for TensorBoard."""

    save_seconds: float = 60.0
    """Longest time between two checkpoints."""

    def __new__(cls, *_: Any, **named: Any) -> Self:
        """Record the names of the fields that are given."""
        self = super().__new__(cls)
        set_field(self, "given", frozenset(named))
        return self

    given = frozenset[str]()  # without an annotation, so that it is not a field

    def __post_init__(self) -> None:
        """Check what needs neither model nor data; an ArgumentError names the first value outside its range."""
        one_of("precision", self.precision, PrecisionOption)
        one_of("shuffle", self.shuffle, Shuffle)
        if self.fit is not None:
            one_of("fit", self.fit, FitMode)
        for field, check in CHECKS.items():
            if getattr(self, field) is not None:
                check_fields(self, check, field)
        if self.freeze not in range(STAGES + 1):
            raise ArgumentError("freeze", self.freeze, f"must be a number of stages, 0 to {STAGES}.")
        if self.precision in ("fp16", "tf32") and self.device.partition(":")[0] in ("cpu", "mps"):
            raise ArgumentError("precision", self.precision, f"needs --device cuda; {self.device} has bf16 and fp32.")
        if self.compile and self.train_memory is not None:
            raise ArgumentError("compile", True, "excludes --train-memory, whose plan torch cannot compile.")
        if self.sync_bn and not self.device.startswith("cuda"):
            raise ArgumentError("sync_bn", True, "needs --device cuda: torch synchronises batch statistics only there.")

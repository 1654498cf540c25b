"""What a user says about a run, beside the recipe: the data, the model, the limits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from effnet.arch.spec import FitMode
from effnet.errors import ArgumentError
from effnet.fields import one_of, positive_float, positive_int

PrecisionChoice = Literal["auto", "fp32", "bf16"]
FROZEN = range(10)  # stages of the paper's Table 1 that can keep their weights


@dataclass(frozen=True)
class Settings:
    """What is trained, with what, and within which limits."""

    data: str  # a folder or a manifest
    model: str = "lite0"  # a variant, a bundle, a spec.yaml, a file of weights
    init: str | None = None  # weights of another network to start from, as far as they fit
    minutes: float | None = None  # of everything, from the first reading to the last picture; None: the recipe's epochs
    train_memory: int | None = None  # bytes that a training step may hold, torch itself apart
    resolution: int | None = None  # pixels; None: the model's own
    fit: FitMode | None = None  # how photos become square: crop, pad or squash; None: as the weights want it
    stem_stride: int | None = None  # 1 keeps the size of small images in the stem; None: the model's own
    freeze: int = 0  # stages 1 ... N of Table 1 keep their weights; 9 leaves the classifier alone
    seed: int = 0
    device: str = "cpu"
    precision: PrecisionChoice = "auto"
    workers: int | None = None  # processes that load images; None: measured
    threads: int | None = None  # of torch; None: measured
    val: float = 0.15  # share of unsplit data
    test: float = 0.15
    sync_bn: bool = False  # batch statistics over all processes
    tensorboard: bool = False
    save_seconds: float = 60.0  # between two checkpoints, at most

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ArgumentError: a value is outside its range.
        """
        one_of("precision", self.precision, PrecisionChoice)
        if self.fit is not None:
            one_of("fit", self.fit, FitMode)
        if self.minutes is not None:
            positive_float("minutes", self.minutes)
        for field in ("train_memory", "resolution", "threads"):
            if getattr(self, field) is not None:
                positive_int(field, getattr(self, field))
        if self.workers is not None and (isinstance(self.workers, bool) or self.workers < 0):
            raise ArgumentError("workers", self.workers, "must be a whole number from 0 on.")
        if self.freeze not in FROZEN:
            raise ArgumentError(
                "freeze", self.freeze, "must be a number of stages, 0 to 9; 9 is all but the classifier."
            )
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ArgumentError("seed", self.seed, "must be a whole number from 0 on.")
        if self.save_seconds < 0:
            raise ArgumentError("save_seconds", self.save_seconds, "must be at least 0.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for args.yaml."""
        return dataclasses.asdict(self)

"""A run: its settings, its plan, and its folder, in which every file is whole or absent.

args.yaml              settings, recipe, network, how steps are computed, versions: all that a resumed run needs
split.csv              which image is in which split
results.csv, .png      a row for each epoch
best/                  a bundle: the latest weights whose val accuracy is within a standard error of the highest
last.ckpt, previous.ckpt
confusion_matrix.png, per_class.csv, reliability.png, mistakes.jpg, metrics.json     after the last epoch
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from cyclopts import Parameter

from effnet.arch.recompute import RecomputePlan
from effnet.arch.spec import FitMode, InputSpec, NetworkSpec, NumericPolicy
from effnet.console import Flag
from effnet.data.dataset import SIZE
from effnet.errors import ArgumentError, TrainingError
from effnet.fields import (
    check_fields,
    non_negative,
    one_of,
    parse_bytes,
    positive_float,
    positive_int,
    read_fields,
    set_field,
    whole_number,
)
from effnet.files import write_text
from effnet.machine import Precision, this_machine
from effnet.training.recipe import Recipe
from effnet.version import __version__

PrecisionOption = Literal["auto", "fp32", "bf16"]
ARGS, SPLIT, RESULTS, BEST, METRICS = "args.yaml", "split.csv", "results.csv", "best", "metrics.json"
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
RUNS = Path("runs") / "train"
STAGES = 9  # of the paper's Table 1
CHECKS: dict[str, Callable[[str, Any], object]] = {
    "minutes": positive_float,
    "resolution": positive_int,
    "threads": positive_int,
    "train_memory": parse_bytes,
    "workers": whole_number,
    "seed": whole_number,
    "save_seconds": non_negative,
}


@Parameter(name="*")
@dataclass(frozen=True)
class Settings:
    """What is trained and within which limits; the recipe holds what the network learns by.

    These are options of `effnet train` and keyword arguments of `effnet.train`. `given` holds the names of the fields
    that were given explicitly; only these override the settings of a `like` run.
    """

    model: str = "lite0"
    """A variant (lite0, b0), a bundle, a file of weights, or a spec.yaml."""

    minutes: float | None = None
    """Time for the whole run, instead of epochs. The schedule follows the clock, so the weights differ from run to
    run."""

    resolution: int | None = None
    """Height and width of the images in pixels. Default: the model's."""

    fit: FitMode | None = None
    """How photos become square. Default: as the weights expect, mostly crop. For objects that fill the frame, pad or
    squash cut nothing off."""

    stem_stride: int | None = None
    """1 suits images of 28 to 64 px: with 2, their last feature map has one pixel. Default: the model's."""

    init: str | None = None
    """Start from another network's weights, as far as its blocks match or can be sliced or grown."""

    freeze: int = 0
    """Keep the weights of stages 1 to N; with 9, only the classifier learns."""

    train_memory: str | int | None = None
    """Memory limit of a training step, such as 4GB; torch itself is not counted. Feature maps are then recomputed
    instead of kept, and a batch goes through in parts."""

    seed: int = 0
    """Seed of the split, the initial weights, the order of the images and the augmentation."""

    device: str = "cpu"
    """cpu, cuda, cuda:1 or mps."""

    precision: PrecisionOption = "auto"
    """Number format of the feature maps; auto takes bf16 where the processor runs it faster."""

    workers: int | None = None
    """Processes that load images. Default: by a rule of image size, network and cores."""

    threads: int | None = None
    """Threads that torch uses. Default: one per core without a worker."""

    val: float = 0.15
    """Share of the images for validation, where the data has no val split."""

    test: float = 0.15
    """Share of the images for the final evaluation, where the data is not split."""

    sync_bn: Flag = False
    """Synchronise batch normalisation over all processes of torchrun; CUDA only."""

    tensorboard: Flag = False
    """Also write curves for TensorBoard."""

    save_seconds: float = 60.0
    """Longest time between two checkpoints."""

    def __new__(cls, *_: Any, **named: Any) -> Self:
        """Note the names of the fields that are given."""
        self = super().__new__(cls)
        set_field(self, "given", frozenset(named))
        return self

    given = frozenset[str]()  # without an annotation, so that it is not a field

    def __post_init__(self) -> None:
        """Check every value; an ArgumentError names the first that is outside its range."""
        one_of("precision", self.precision, PrecisionOption)
        if self.fit is not None:
            one_of("fit", self.fit, FitMode)
        for field, check in CHECKS.items():
            if getattr(self, field) is not None:
                check_fields(self, check, field)
        if self.freeze not in range(STAGES + 1):
            raise ArgumentError("freeze", self.freeze, f"must be a number of stages, 0 to {STAGES}.")
        if self.sync_bn and not self.device.startswith("cuda"):
            raise ArgumentError("sync_bn", True, "needs --device cuda: torch synchronises batch statistics only there.")


@dataclass(frozen=True)
class Execution:
    """How the steps of a run are computed."""

    precision: Precision
    part: int  # images that a process puts through the network at once
    parts: int  # of them one after another in a step
    recompute: dict[str, str] | None  # what each part of the network keeps; None: everything
    threads: int
    workers: int
    forecast_bytes: int  # memory of a step, with weights and optimizer states

    @property
    def plan(self) -> RecomputePlan | None:
        """What each part of the network keeps for the backward pass; None: everything."""
        return None if self.recompute is None else RecomputePlan.from_dict(self.recompute)


@dataclass(frozen=True)
class RunPlan:
    """All that decides what a run does, as args.yaml has it."""

    data: str  # a folder or a manifest, as an absolute path
    settings: Settings
    recipe: Recipe
    spec: NetworkSpec
    policy: NumericPolicy
    input: InputSpec
    classes: tuple[str, ...]
    source: str  # where the weights came from
    data_sha256: str
    processes: int
    execution: Execution
    steps: int  # of the whole run; with --minutes a guess

    def write(self, folder: Path) -> None:
        """Write args.yaml."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values |= {name: dataclasses.asdict(values[name]) for name in PLAIN}
        values |= {"spec": self.spec.to_dict(), "versions": versions()}
        plain = json.loads(json.dumps(values, default=str))  # tuples as lists, paths as text
        write_text(folder / ARGS, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True))

    @classmethod
    def read(cls, folder: str | Path) -> tuple[RunPlan, dict[str, str]]:
        """The plan of a run, and the versions that it was begun with.

        Raises:
            TrainingError: there is no run in that folder, or another version wrote it.
        """
        path = Path(folder) / ARGS
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
            began = values.pop("versions")
            values |= {name: read_fields(cls_, values[name]) for name, cls_ in PLAIN.items()}
            values |= {"spec": NetworkSpec.from_dict(values["spec"]), "classes": tuple(values["classes"])}
            return read_fields(cls, values), began
        except FileNotFoundError as error:
            raise TrainingError(f"{folder} is not a run: it has no {ARGS}") from error
        except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
            raise TrainingError(f"{path} is not what this version of effnet train writes: {error}") from error


PLAIN = {  # parts of a plan that are mappings of plain values
    "settings": Settings,
    "recipe": Recipe,
    "policy": NumericPolicy,
    "input": InputSpec,
    "execution": Execution,
}


def versions() -> dict[str, str]:
    """What a result depends on besides its arguments; `code` is a hash of effnet's own source."""
    code = hashlib.sha256()
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(file.read_bytes())
    names = {"effnet": __version__, "code": code.hexdigest()[:12], "torch": importlib.metadata.version("torch")}
    return names | {"machine": str(this_machine())}


def is_unborn(folder: Path) -> bool:
    """Whether a folder holds a run that was killed before its first checkpoint."""
    names = {each.name for each in folder.iterdir()}
    return {SPLIT} <= names <= {SPLIT, ARGS} and SIZE in (folder / SPLIT).read_text(encoding="utf-8").split("\n")[0]

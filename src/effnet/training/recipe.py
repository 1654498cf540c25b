"""The hyper-parameters of a training, each with its reason and source; and recipes that are known to work.

The paper gives some of its own in section 5.2; the rest of `paper` comes from the official code (tensorflow/tpu,
models/official/efficientnet/main.py). A shorter run uses the same schedule, compressed: rates and shares refer to the
whole run, so that twenty epochs of `paper` end with the same learning rate as 350.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from effnet.arch.specfile import load_yaml, read_mapping
from effnet.errors import ArgumentError, UnknownNameError
from effnet.fields import (
    check_fields,
    non_negative_float,
    one_of,
    positive_float,
    positive_int,
    rate,
    ratio,
    read_fields,
)

OptimizerName = Literal["adamw", "sgd", "rmsprop"]
Schedule = Literal["cosine", "exponential"]
Augmentation = Literal["none", "autoaugment", "randaugment", "trivialaugment"]


@dataclass(frozen=True)
class Recipe:
    """How a network is trained; the defaults are the recipe `finetune`."""

    name: str = "finetune"
    fresh: bool = False  # train from scratch: a variant's weights are not loaded
    epochs: float = 10.0  # passes over the training split, if no time is given
    least_steps: int = 150  # more epochs are made to reach this many, unless the user gives their number

    # optimizer
    optimizer: OptimizerName = "adamw"  # "rmsprop" is TensorFlow's, see optimizer.py
    batch: int = 64  # images per step, over all processes and accumulated parts
    epoch_steps: int = 8  # the batch is halved until an epoch has this many steps, unless the user sets it
    lr: float = 1e-3  # the schedule's peak rate, for `lr_batch` images per step
    lr_batch: int = 64  # the rate is scaled with the batch: see scaled_lr
    momentum: float = 0.9  # of sgd and rmsprop; Adam's first beta
    weight_decay: float = 0.02  # adamw: decoupled; the others: L2, added to the gradient
    decay_biases: bool = False  # the official code decays all weights but batch normalisation's, including biases
    clip: float = 5.0  # largest gradient norm, 0 for none, so that one bad batch cannot ruin the weights

    # schedule, in shares of the run
    # First only the classifier is trained: a random one sends noise through the network, and with a good one the
    # features change less (Kumar et al. 2022)
    head_first: float = 0.1
    head_steps: int = 100  # at most this many steps
    head_lr: float = 10.0  # its rate in these steps, relative to `lr`
    # L2 penalty, summed over all images, for fitting the classifier before the first step (initial_network.py); 0 for a
    # random classifier
    linear_probe: float = 0.0
    schedule: Schedule = "cosine"
    warmup: float = 0.05  # the rate rises from 0, until statistics and moments have adapted to this data
    final_lr: float = 0.01  # rate at the end of the schedule, relative to `lr`
    body_lr: float = 1.0  # rate of all layers but the classifier, relative to `lr`: they are pretrained

    # regularisation
    label_smoothing: float = 0.1  # official code
    dropout: float | None = None  # None: the network's own
    drop_connect: float | None = 0.05  # stochastic depth; None: the network's own, meant for hundreds of epochs
    class_weights: bool = False  # whether rare classes count as much as frequent ones
    mixup: float = 0.0  # alpha of the Beta distribution (Zhang et al. 2018); 0 for none
    cutmix: float = 0.0  # alpha (Yun et al. 2019); with both, each batch draws one of them

    # images
    crop_area: float = 0.75  # least share of the image's area in a random crop
    crop_ratio: float = 1.15  # highest aspect ratio of the crop
    flip: float = 0.5  # probability of mirroring; 0 for digits, letters and traffic signs
    augmentation: Augmentation = "none"

    # averages
    ema: float = 0.998  # decay of the moving average of the weights, which is evaluated and kept; 0 for none
    # Of the running statistics. TensorFlow's .99 is .01 here and needs hundreds of steps to forget the initial values.
    # With 0, batch normalisation stays in evaluation mode with the pretrained statistics, for which few images are no
    # replacement
    bn_momentum: float = 0.1

    # stopping
    patience: int = 0  # epochs without a better val result before the run stops; 0 for never

    def __post_init__(self) -> None:
        """Check every value; an ArgumentError names the first one outside its range."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "bool" and not isinstance(value, bool):
                raise ArgumentError(field.name, value, "must be true or false.")
            if field.type in ("int", "float", "float | None") and value is not None:
                non_negative_float(field.name, value)
        check_fields(self, positive_float, "epochs", "lr", "head_lr", "crop_area", "crop_ratio")
        check_fields(self, positive_int, "batch", "lr_batch")
        check_fields(self, ratio, "final_lr", "body_lr", "flip", "crop_area", "bn_momentum")
        check_fields(self, rate, "momentum", "label_smoothing", "ema", "warmup", "head_first")
        check_fields(self, rate, *(name for name in ("dropout", "drop_connect") if getattr(self, name) is not None))
        one_of("optimizer", self.optimizer, OptimizerName)
        one_of("schedule", self.schedule, Schedule)
        one_of("augmentation", self.augmentation, Augmentation)

    @property
    def scaled_lr(self) -> float:
        """The peak learning rate for this batch.

        It scales linearly (Goyal et al. 2017), and with the square root for Adam, which divides by the gradient's size
        (Malladi et al. 2022).
        """
        return float(self.lr * (self.batch / self.lr_batch) ** (0.5 if self.optimizer == "adamw" else 1.0))

    def lr_at(self, progress: float) -> float:
        """The learning rate relative to `lr`, at `progress` (0 to 1) of the run."""
        if progress < self.head_first:
            return self.head_lr
        progress = (progress - self.head_first) / (1 - self.head_first)
        if progress < self.warmup:
            return progress / self.warmup
        if self.schedule == "exponential":
            # x 0.97 every 2.4 of 350 epochs, in steps, counted from the start as in the official code
            return float(0.97 ** math.floor(progress * 350 / 2.4))
        falling = (progress - self.warmup) / (1 - self.warmup)
        return self.final_lr + (1 - self.final_lr) * (1 + math.cos(math.pi * min(1.0, falling))) / 2

    def ema_at(self, step: int) -> float:
        """The average's decay after `step` steps; it rises to `ema` to forget the initial weights (TensorFlow)."""
        return min(self.ema, (1 + step) / (10 + step))


RECIPES = {
    recipe.name: recipe
    for recipe in (
        # Fine-tunes ImageNet weights on new classes.
        #   effnet train fashion --model lite0 --resolution 64 --minutes 15
        #   94.6 % of Fashion-MNIST's test images in 6.2 epochs, two cores of an Intel Xeon
        Recipe(),
        # The same for a few hundred images, which do not improve batch normalisation's statistics. Most of what can be
        # learned is a classifier fitted to the features; the network follows in small steps
        #   effnet train tuxpaint --model lite0 --recipe few --fit squash
        #   95.8 % of 191 photo cut-outs, mean of five folds; 3 minutes of one core of an Intel Xeon each
        Recipe(name="few", batch=16, head_first=0.0, linear_probe=3.0, lr=5e-4, body_lr=0.05, bn_momentum=0.0),
        # A network without weights, on tens of thousands of small images.
        #   effnet train fashion --model b0 --recipe scratch --resolution 32 --stem-stride 1 --minutes 30
        #   92.9 % of Fashion-MNIST's test images in 8.9 epochs, two cores of an Intel Xeon
        Recipe(
            name="scratch",
            fresh=True,
            epochs=30,
            head_first=0.0,
            lr=3e-3,
            weight_decay=0.05,
            drop_connect=0.0,  # a training of hours, not weeks, underfits rather than overfits
            crop_area=0.6,
            ema=0.999,
        ),
        # Section 5.2 and the official code, for a network of the family on ImageNet.
        #   effnet train imagenet --model b0 --recipe paper
        #   77.1 % after 350 epochs, as published, not measured here; 67.7 % in 2 epochs where `scratch` reached 90.1 %
        Recipe(
            name="paper",
            fresh=True,
            epochs=350,
            optimizer="rmsprop",
            batch=256,
            lr=0.016,  # .256 for 4096 images
            lr_batch=256,
            momentum=0.9,
            weight_decay=1e-5,
            decay_biases=True,
            clip=0.0,
            head_first=0.0,
            schedule="exponential",
            warmup=5 / 350,
            crop_area=0.08,
            crop_ratio=4 / 3,
            augmentation="autoaugment",
            ema=0.9999,
            drop_connect=None,
            bn_momentum=0.01,
        ),
    )
}


def read_recipe(recipe: str | Path | Recipe, **changes: Any) -> Recipe:
    """A recipe by name or from a YAML file; `changes` override both.

    The file holds the fields that differ from the recipe that it names as `base`, by default finetune.

    Raises:
        UnknownNameError: there is no such recipe.
        ArgumentError: a field is unknown or outside its range.
    """
    values: dict[str, Any] = {}
    if not isinstance(recipe, Recipe) and Path(recipe).suffix.lower() in (".yaml", ".yml"):
        values = {name: _number(value) for name, value in read_mapping(recipe).items()}
        values["name"] = Path(recipe).stem
        recipe = str(values.pop("base", "finetune"))
    if not isinstance(recipe, Recipe):
        if recipe not in RECIPES:
            raise UnknownNameError("recipe", str(recipe), RECIPES)
        recipe = RECIPES[str(recipe)]
    given = {name: value for name, value in changes.items() if value is not None}
    return read_fields(Recipe, dataclasses.asdict(recipe) | values | given)


def recipe_value(text: str) -> Any:
    """A field's value as YAML; 1e-5, which YAML reads as text, becomes a number."""
    return _number(load_yaml(text))


def _number(value: Any) -> Any:
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value

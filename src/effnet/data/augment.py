"""A photo -> the array that a network sees in training: cropped, mirrored and changed at random by a policy.

The transforms are torchvision's. Their random numbers depend only on the run's seed, the epoch and the image: not on
the number of workers, the batch or an interruption.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from effnet.arch.spec import InputSpec
from effnet.data.image import colour_mode, fit_photo, open_photo
from effnet.errors import UnknownNameError

POLICIES = {
    "none": None,
    "autoaugment": "AutoAugment",  # Cubuk et al. 2019: the paper's, learned on ImageNet
    "randaugment": "RandAugment",  # Cubuk et al. 2020: the official code's for larger variants
    "trivialaugment": "TrivialAugmentWide",  # Mueller & Hutter 2021: nothing to tune
}
MARGIN = 8 / 7  # the side that a random crop is taken from, as a multiple of the network's: evaluation's 256 / 224
SEED_STEP = 1_000_003  # a prime: seeds of neighbouring epochs and images share no sequence


@dataclass(frozen=True)
class Augment:
    """How images are changed in training; see Recipe for the numbers."""

    input: InputSpec
    crop_area: float = 0.08
    crop_ratio: float = 4 / 3
    flip: float = 0.5
    policy: str = "none"

    def __call__(self, photo: str | PathLike[str], seed: int) -> npt.NDArray[np.uint8]:
        """A file as pixels (size, size, C) uint8.

        Raises:
            ImageError: the file cannot be read.
        """
        image: Any = open_photo(photo, colour_mode(self.input))
        torch.default_generator.manual_seed(seed)  # torchvision's; torch.manual_seed is slower than a crop
        if self.input.fit != "crop" and self.crop_area < 1:
            image = self._square(image)
        for transform in self._transforms:
            image = transform(image)
        if image.size != (self.input.size, self.input.size):
            return fit_photo(image, self.input)
        return np.array(image).reshape(self.input.size, self.input.size, self.input.channels)

    def _square(self, image: Image.Image) -> Image.Image:
        """The whole image, padded or squashed to a square as in evaluation, larger by MARGIN."""
        pixels = fit_photo(image, dataclasses.replace(self.input, size=round(self.input.size * MARGIN)))
        return Image.fromarray(pixels[:, :, 0] if self.input.channels == 1 else pixels)

    @cached_property
    def _transforms(self) -> tuple[Any, ...]:
        from torchvision.transforms import InterpolationMode, v2

        if self.policy not in POLICIES:
            raise UnknownNameError("augmentation", self.policy, POLICIES)
        transforms: list[Any] = []
        if self.crop_area < 1:
            ratio, interpolation = (1 / self.crop_ratio, self.crop_ratio), InterpolationMode(self.input.interpolation)
            transforms.append(v2.RandomResizedCrop(self.input.size, (self.crop_area, 1.0), ratio, interpolation))
        if self.flip:
            transforms.append(v2.RandomHorizontalFlip(self.flip))
        if name := POLICIES[self.policy]:
            mean = [round(255 * value) for value in self.input.mean]
            transforms.append(getattr(v2, name)(interpolation=InterpolationMode.BILINEAR, fill=mean))
        return tuple(transforms)


def image_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of one image in one epoch."""
    return ((seed * SEED_STEP + epoch) * SEED_STEP + index) % 2**63

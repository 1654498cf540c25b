"""A photo -> a network's input in training: randomly cropped, mirrored and changed by a policy.

Crops and policies come from torchvision. The random numbers depend only on the run's seed, the epoch and the image, not
on the number of workers or threads, the batch or an interruption. Pixels stay uint8: `Learner` normalises batches.

torch resizes a crop in a quarter of Pillow's time. The results differ by at most one level of 255 where it shrinks and
by a few where it enlarges, since both round between the two directions, which they take in different order.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn import functional

from effnet.arch.spec import InputSpec
from effnet.data.image import colour_mode, fit_photo
from effnet.data.jpeg import read_pixels
from effnet.errors import UnknownNameError

POLICIES = {
    "none": None,
    "autoaugment": "AutoAugment",  # Cubuk et al. 2019: the paper's, learned on ImageNet
    "randaugment": "RandAugment",  # Cubuk et al. 2020: the official code's for larger variants
    "trivialaugment": "TrivialAugmentWide",  # Mueller & Hutter 2021: nothing to tune
}
MARGIN = 8 / 7  # side of the image that is cropped, relative to the network's input; as 256 / 224 in evaluation
SPARE = 4.0  # least size of the smallest crop when a JPEG is halved, relative to its final size; see runtime.classifier
RESIZED_BY_TORCH = ("bilinear", "bicubic")
DRAWING = threading.Lock()  # held by the thread that uses torch's global generator
SEED_STEP = 1_000_003  # a prime, so that neighbouring epochs and images share no sequence


@dataclass(frozen=True)
class Augment:
    """Augmentation in training; see Recipe for the numbers."""

    input: InputSpec
    crop_area: float = 0.08
    crop_ratio: float = 4 / 3
    flip: float = 0.5
    policy: str = "none"

    def read(self, photo: str | PathLike[str]) -> npt.NDArray[np.uint8]:
        """Read a file into the pixels (H, W, C) uint8 that `__call__` takes, which are the same in every epoch.

        Raises:
            ImageError: the file cannot be read.
        """
        crops = self.crop_area < 1
        whole = not crops or self.input.fit != "crop"
        least = None if whole else SPARE * self.input.size * math.sqrt(self.crop_ratio / self.crop_area)
        pixels = read_pixels(photo, colour_mode(self.input), least=least)
        return self._square(pixels) if crops and whole else pixels

    def __call__(self, pixels: npt.NDArray[np.uint8], seed: int) -> npt.NDArray[np.uint8]:
        """The augmented photo, (size, size, C) uint8."""
        size, crops = self.input.size, self.crop_area < 1
        with DRAWING:
            torch.default_generator.manual_seed(seed)  # torch.manual_seed takes longer than a crop
            box = self._crop.make_params([torch.empty(pixels.shape[:2], device="meta")]) if crops else {}
            mirrored = bool(self.flip and torch.rand(1) < self.flip)
            state = torch.default_generator.get_state() if self._policy else None
        if crops:
            pixels = self.cut(pixels, **box)
        if mirrored:
            whole_pixels = pixels.view(f"V{pixels.shape[2]}")  # twice as fast as channel by channel
            pixels = np.ascontiguousarray(whole_pixels[:, ::-1]).view(np.uint8)
        if state is not None:
            image = self._image(pixels)
            with DRAWING:
                torch.default_generator.set_state(state)
                pixels = np.array(self._policy(image)).reshape(pixels.shape)
        if pixels.shape[:2] != (size, size):
            return fit_photo(self._image(pixels), self.input)
        return np.ascontiguousarray(pixels)

    def _square(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The whole photo, padded or squashed to a square as in evaluation, larger by MARGIN."""
        larger = dataclasses.replace(self.input, size=round(self.input.size * MARGIN))
        return fit_photo(self._image(pixels), larger)

    def cut(self, pixels: npt.NDArray[np.uint8], top: int, left: int, height: int, width: int) -> npt.NDArray[np.uint8]:
        """A rectangle of the photo, resized to (size, size, C)."""
        size, interpolation = self.input.size, self.input.interpolation
        part = pixels[top : top + height, left : left + width]
        if interpolation not in RESIZED_BY_TORCH:
            image = self._image(part).resize((size, size), Image.Resampling[interpolation.upper()])
            return np.array(image).reshape(size, size, -1)
        images = torch.empty((1, *part.shape), dtype=torch.uint8)  # torch sees no channels_last in one array
        images.numpy()[0] = part
        resized = functional.interpolate(images.permute(0, 3, 1, 2), (size, size), mode=interpolation, antialias=True)
        return resized.permute(0, 2, 3, 1)[0].numpy()

    def _image(self, pixels: npt.NDArray[np.uint8]) -> Image.Image:
        return Image.fromarray(pixels[:, :, 0] if self.input.channels == 1 else pixels)

    @cached_property
    def _crop(self) -> Any:
        from torchvision.transforms import v2

        return v2.RandomResizedCrop(self.input.size, (self.crop_area, 1.0), (1 / self.crop_ratio, self.crop_ratio))

    @cached_property
    def _policy(self) -> Any:
        from torchvision.transforms import InterpolationMode, v2

        if self.policy not in POLICIES:
            raise UnknownNameError("augmentation", self.policy, POLICIES)
        if not (name := POLICIES[self.policy]):
            return None
        mean = [round(255 * value) for value in self.input.mean]
        return getattr(v2, name)(interpolation=InterpolationMode.BILINEAR, fill=mean)


def image_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of one image in one epoch."""
    return ((seed * SEED_STEP + epoch) * SEED_STEP + index) % 2**63

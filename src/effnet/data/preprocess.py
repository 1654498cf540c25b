"""A photo -> the array that a network sees, from an InputSpec. Pillow and numpy only.

Equal, bit for bit, to what torchvision and timm feed their networks in evaluation:
- fit="crop": torchvision's `ImageClassification` (Resize, CenterCrop, ToTensor, Normalize), and timm's transform with
  crop_mode="center", whose `resize` is floor(size / crop_pct);
- fit="squash": timm's crop_mode="squash" at crop_pct=1;
- fit="pad": timm's crop_mode="border" at crop_pct=1, except that a photo so narrow that it would vanish keeps 1 pixel
  where timm fails.

The paper does not say how ImageNet's photos were prepared. The official code crops the middle size / (size + 32) of the
photo first and resizes it afterwards, bicubic without antialiasing; torchvision's and timm's weights belong to theirs.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from effnet.arch.spec import InputSpec
from effnet.data.photo import ColourMode, PhotoSource, open_photo
from effnet.errors import ArgumentError

PLAIN_LIMIT = 2**25  # pixels of a resized photo before its crop, 134 MB: 512 : 1 at resize=256
REACH = 4  # source pixels to either side that the widest filter, Lanczos, weighs when it enlarges, and one to spare


def preprocess(source: PhotoSource, spec: InputSpec) -> npt.NDArray[np.float32]:
    """`source` as the network sees it: (C, size, size) float32, normalised by `spec`.

    Raises:
        ImageError: the photo cannot be read.
        ArgumentError: `source` is no photo; see `open_photo`.
    """
    return normalise(load_pixels(source, spec), spec)


def load_pixels(source: PhotoSource, spec: InputSpec, *, spare: float | None = None) -> npt.NDArray[np.uint8]:
    """`source` before normalisation: (size, size, C) uint8, a quarter of the bytes of `preprocess`.

    Args:
        source: a photo; see `open_photo`.
        spec: how it is prepared.
        spare: a JPEG may be halved while it is decoded as long as it stays that many times as large as it will be
            resized to. None: it is decoded in full, and only then equal to torchvision's bit for bit.

    Raises:
        ImageError: the photo cannot be read.
        ArgumentError: `source` is no photo; see `open_photo`.
    """

    def halvings(width: int, height: int) -> int:
        """A JPEG's, by the side that decides how large it will be."""
        side = max(width, height) if spec.fit == "pad" else min(width, height)
        resized = spec.resize if spec.fit == "crop" else spec.size
        return math.floor(math.log2(max(1.0, side / (resized * cast(float, spare)))))

    shrink = None if spare is None else halvings
    return fit_photo(open_photo(source, colour_mode(spec), shrink=shrink), spec)


def colour_mode(spec: InputSpec) -> ColourMode:
    """The mode of the photos that `spec` prepares: "L" for one channel, "RGB" for three.

    Raises:
        ArgumentError: it prepares arrays of another number of channels, and no photo has so many.
    """
    if spec.channels not in (1, 3):
        raise ArgumentError("input", f"{spec.channels} channels", "cannot be a photo's, which has 1 or 3: give arrays.")
    return "L" if spec.channels == 1 else "RGB"


def fit_photo(photo: Image.Image, spec: InputSpec) -> npt.NDArray[np.uint8]:
    """`photo` resized and cropped, padded or squashed to (size, size, C) uint8.

    Args:
        photo: an image of `colour_mode(spec)`, upright, such as `open_photo` returns.
        spec: its `size`, `resize`, `interpolation`, `fit` and, for the border, `mean` are used.

    Raises:
        ArgumentError: the photo has another mode.
    """
    if photo.mode != colour_mode(spec):
        raise ArgumentError("photo.mode", photo.mode, f"must be {colour_mode(spec)!r} for {spec.channels} channels.")
    fits = {"crop": _crop, "pad": _pad, "squash": _squash}
    pixels = np.array(fits[spec.fit](photo, spec))  # a copy: torch warns of arrays that may not be written
    return pixels.reshape(spec.size, spec.size, spec.channels)


def normalise(pixels: npt.NDArray[np.uint8], spec: InputSpec) -> npt.NDArray[np.float32]:
    """(pixels / 255 - mean) / std: (..., H, W, C) uint8 -> (..., C, H, W) float32.

    Each step rounds to float32 in torch's order, so the values are torch's, bit for bit.

    Raises:
        ArgumentError: the array has another type or number of channels.
    """
    if pixels.dtype != np.uint8 or pixels.ndim < 3 or pixels.shape[-1] != spec.channels:
        found = f"array of {pixels.dtype}, shape {pixels.shape}"
        raise ArgumentError("pixels", found, f"must be uint8 of shape (..., H, W, {spec.channels}).")
    planes = np.moveaxis(pixels, -1, -3)
    values = np.empty(planes.shape, np.float32)  # contiguous; three passes, in place
    np.divide(planes, np.float32(255), out=values)
    values -= np.array(spec.mean, np.float32)[:, None, None]
    values /= np.array(spec.std, np.float32)[:, None, None]
    return values


def _crop(photo: Image.Image, spec: InputSpec) -> Image.Image:
    """The shorter side to `resize`, the longer rounded down; then the middle."""
    shorter = min(photo.size)
    width, height = (int(spec.resize * side / shorter) for side in photo.size)
    left, top = round((width - spec.size) / 2), round((height - spec.size) / 2)  # halves to even, as torchvision does
    if width * height > PLAIN_LIMIT:
        return _crop_first(photo, (width, height), (left, top), spec)
    resized = photo.resize((width, height), _filter(spec))
    return resized.crop((left, top, left + spec.size, top + spec.size))


def _crop_first(photo: Image.Image, resized: tuple[int, int], corner: tuple[int, int], spec: InputSpec) -> Image.Image:
    """The same from only those pixels that the crop looks at: bounded memory, within 2 levels where it enlarges.

    Pillow keeps the box in float32, so its weights differ in the seventh digit: "nearest" may take the pixel next to
    the right one. Where it shrinks, Pillow sometimes resizes the height first, which overshoots differently.
    """
    cuts, boxes = [], []
    for side, resized_side, start in zip(photo.size, resized, corner, strict=True):
        scale = side / resized_side
        first, last = start * scale, min(side, (start + spec.size) * scale)
        reach = math.ceil(REACH * max(1, scale))
        cuts.append((max(0, math.floor(first) - reach), min(side, math.ceil(last) + reach)))
        boxes.append((first - cuts[-1][0], last - cuts[-1][0]))
    part = photo.crop((cuts[0][0], cuts[1][0], cuts[0][1], cuts[1][1]))
    (left, right), (top, bottom) = boxes
    part = part.resize((spec.size, part.height), _filter(spec), (left, 0, right, part.height))
    return part.resize((spec.size, spec.size), _filter(spec), (0, top, spec.size, bottom))


def _pad(photo: Image.Image, spec: InputSpec) -> Image.Image:
    """The longer side to `size`, centred on the mean colour; an odd pixel of border goes right or below."""
    ratio = max(photo.size) / spec.size
    width, height = (max(1, round(side / ratio)) for side in photo.size)
    colour = tuple(round(255 * value) for value in spec.mean)
    canvas = Image.new(photo.mode, (spec.size, spec.size), colour if spec.channels > 1 else colour[0])
    resized = photo.resize((width, height), _filter(spec))
    canvas.paste(resized, ((spec.size - width) // 2, (spec.size - height) // 2))
    return canvas


def _squash(photo: Image.Image, spec: InputSpec) -> Image.Image:
    return photo.resize((spec.size, spec.size), _filter(spec))


def _filter(spec: InputSpec) -> Image.Resampling:
    return Image.Resampling[spec.interpolation.upper()]

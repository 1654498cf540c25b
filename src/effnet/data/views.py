"""Views of the two photos that come with effnet: what engines and precisions are compared on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from effnet.arch.spec import InputSpec
from effnet.data.image import colour_mode, fit_photo, open_photo

PHOTOS = Path(__file__).with_name("photos")


def views(input_spec: InputSpec, count: int) -> NDArray[np.uint8]:
    """(count, size, size, C): random crops of the packaged photos; noise where the network's images are not photos."""
    random = np.random.default_rng(0)
    if input_spec.channels not in (1, 3):
        shape = count, input_spec.size, input_spec.size, input_spec.channels
        return random.integers(0, 256, shape, dtype=np.uint8)
    photos = [open_photo(file, colour_mode(input_spec)) for file in sorted(PHOTOS.glob("*.png"))]
    found = []
    for number in range(count):
        photo = photos[number % len(photos)]
        share = random.uniform(0.6, 1)  # of the sides
        left, top = (random.uniform(0, side * (1 - share)) for side in photo.size)
        box = round(left), round(top), round(left + share * photo.width), round(top + share * photo.height)
        crop = fit_photo(photo.crop(box), input_spec)
        found.append(crop[:, ::-1] if random.random() < 0.5 else crop)
    return np.stack(found)

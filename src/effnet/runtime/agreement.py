"""Whether two sessions give the same classes, on views of the two photos that come with effnet."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from effnet.arch.spec import InputSpec
from effnet.data.image import colour_mode, fit_photo, open_photo
from effnet.runtime.session import Pixels, Session

PHOTOS = Path(__file__).parents[1] / "data" / "photos"
VIEWS = 64
AGREE = 0.95  # share of the views to which a lower precision has to give fp32's class


def agreement(session: Session, reference: Session, input_spec: InputSpec, count: int = VIEWS) -> int:
    """Of `count` views of the packaged photos, how many two sessions give the same class: AGREE of them are enough."""
    pixels = views(input_spec, count)
    return int((session(pixels).argmax(1) == reference(pixels).argmax(1)).sum())


def views(input_spec: InputSpec, count: int) -> Pixels:
    """(count, size, size, C) uint8: parts of the packaged photos, or noise where the network does not see photos."""
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
        part = fit_photo(photo.crop(box), input_spec)
        found.append(part[:, ::-1] if random.random() < 0.5 else part)
    return np.stack(found)

"""Tests of a map: the probability of the class while cells of the image are blurred and restored in the map's order.

    deletion    mean probability while cells are blurred, starting with those that speak most for the class; low is good
    insertion   the same while the cells of a blurred image are restored in this order; high is good
    gain        insertion - deletion, beyond that of a random order

(Petsiuk et al. 2018, here on cells and with a blurred baseline.) Reversing an order swaps the two curves. So a random
order's insertion - deletion is 0 on average, and ORDERS random orders show how far it deviates by chance. With the
order of a meaningless map added to them, each is as likely as any other to deviate most: the interval of a gain, which
reaches as far as the farthest of ORDERS, covers 0 for 95 % of meaningless maps.

The order from the middle outwards is measured too: subjects of photos are usually in the middle, so a map that does not
beat it says little. Blur leaves traces of what was there, and networks were not trained on images with blurred cells:
gains compare maps, they are not probabilities of being right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from effnet.metrics.intervals import Interval, mean_interval
from effnet.runtime.cam import Explanation
from effnet.runtime.session import Logits, Pixels

LEVELS = 10  # steps of a curve, at most: cells are blurred in as many groups
ORDERS = 19  # random orders: a 20th would deviate more than all of them with a probability of 5 %
BLUR = 1 / 7  # of the image's side: a cell of the paper's networks, 32 of 224 pixels
CHUNK = 64  # images built at once

Places = NDArray[np.intp]  # indices of cells, first to last


@dataclass(frozen=True)
class Faithfulness:
    """How faithful a map is."""

    deletion: float
    insertion: float
    gain: Interval  # over random orders
    centre: float  # insertion - deletion of the order from the middle outwards

    @property
    def beats_chance(self) -> bool:
        """Whether the gain exceeds that of every random order; for 95 % of meaningless maps it does not."""
        return self.gain.low > 0


@dataclass(frozen=True)
class Summary:
    """How faithful the maps of several images are; intervals are of the mean, by Student's t."""

    images: int
    gain: Interval | None  # over random orders; None for fewer than two images
    over_centre: Interval | None
    beating: int  # images whose own map beats chance

    @property
    def beats_chance(self) -> bool:
        """Whether the mean gain is above 0, or for one image, whether its map beats chance."""
        return self.gain.low > 0 if self.gain else self.beating > 0


def measure(ask: Callable[[Pixels], Logits], found: Explanation, seed: int = 0) -> Faithfulness:
    """Deletion, insertion and gain of a map.

    Args:
        ask: the classifier's `logits`.
        found: the map.
        seed: for the random orders.
    """
    cells = found.map.size
    random = np.random.default_rng(seed)
    own = np.argsort(-found.map.ravel(), kind="stable")
    orders = [own, from_centre(found.map.shape), *(random.permutation(cells) for _ in range(ORDERS))]
    steps = np.unique(np.linspace(0, cells, min(LEVELS, cells) + 1).round().astype(int))
    states = [order[:count] for order in orders for count in steps]  # blurred cells
    states += [order[count:] for order in orders for count in steps]
    curves = _probabilities(ask, found, states).reshape(2, len(orders), len(steps))
    widths = np.diff(steps) / cells
    deletion, insertion = ((curves[..., 1:] + curves[..., :-1]) / 2) @ widths
    own_gain, centre, *chance = (insertion - deletion).tolist()
    reach = max(map(abs, chance))
    return Faithfulness(
        float(deletion[0]), float(insertion[0]), Interval(own_gain, own_gain - reach, own_gain + reach), centre
    )


def summarise(found: Sequence[Faithfulness]) -> Summary:
    """The mean gain over images."""
    gains = [each.gain.value for each in found]
    over_centre = [each.gain.value - each.centre for each in found]
    several = len(found) > 1
    return Summary(
        len(found),
        mean_interval(gains) if several else None,
        mean_interval(over_centre) if several else None,
        sum(each.beats_chance for each in found),
    )


def from_centre(shape: tuple[int, ...]) -> Places:
    """Cells from the middle of a map outwards."""
    rows, columns = (np.arange(count) - (count - 1) / 2 for count in shape)
    return np.argsort((rows[:, None] ** 2 + columns**2).ravel(), kind="stable")


def _probabilities(
    ask: Callable[[Pixels], Logits], found: Explanation, states: Sequence[Places]
) -> NDArray[np.float64]:
    """The probability of the class for each set of blurred cells, among two classes if there is a `versus`."""
    keys = [bytes(np.isin(np.arange(found.map.size), state)) for state in states]
    distinct = list(dict.fromkeys(keys))  # many curves begin or end with the same image
    answers = np.concatenate([ask(images) for images in _blurred(found, distinct)]).astype(np.float64)
    answers = answers if found.versus is None else answers[:, [found.index, found.versus]]
    column = found.index if found.versus is None else 0
    answers = np.exp(answers - answers.max(1, keepdims=True))
    probability = dict(zip(distinct, answers[:, column] / answers.sum(1), strict=True))
    return np.array([probability[key] for key in keys])


def _blurred(found: Explanation, states: Sequence[bytes]) -> Iterator[Pixels]:
    """The image with blurred cells, in chunks; each state has one byte per cell, 1 if it is blurred."""
    pixels, shape = found.pixels, found.map.shape
    size = len(pixels)
    radius = BLUR * size
    channels = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(pixels, 2, 0)]
    blurred = np.stack([np.asarray(plane.filter(ImageFilter.GaussianBlur(radius))) for plane in channels], axis=2)
    rows, columns = (np.arange(size) * count // size for count in shape)
    for begin in range(0, len(states), CHUNK):
        masks = [np.frombuffer(state, np.bool_).reshape(shape)[rows][:, columns] for state in states[begin:][:CHUNK]]
        yield np.stack([np.where(mask[..., None], blurred, pixels) for mask in masks])

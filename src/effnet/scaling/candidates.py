"""The networks among which a budget chooses: the curve of a rule and what lies near it, each priced exactly.

The largest network on the curve that meets every limit is found first. Rounding wastes a part of the budget there, so
its neighbourhood is searched: of all networks whose depth, width and resolution each lie within 5 % of a point of the
curve, with no fewer multiply-adds than that one, the one is taken that uses most of the limit that binds.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from effnet.arch.blocks import DepthRounding
from effnet.arch.cost import cost
from effnet.arch.memory import kept_per_image
from effnet.arch.spec import LARGEST_FACTOR, NetworkSpec
from effnet.errors import ArgumentError
from effnet.fields import one_of, positive_int
from effnet.scaling import compound
from effnet.scaling.budget import SMALLEST_RESOLUTION, Budget, tell
from effnet.scaling.compound import Rule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

NEAR = 0.05  # how far depth, width and resolution may each be from the curve
SMALLEST_FACTOR = 0.05  # of depth and width
CURVE_STEP = 0.02  # between points of the curve, in doublings of what is promised
AROUND = 0.8  # doublings on either side of the best point whose neighbourhood is searched
PLACES = 17  # points in there
OFFSETS = 7  # of depth and of width in each neighbourhood
RESOLUTIONS = 5  # in each neighbourhood
LEVEL = 0.005  # shares of the binding limit that are as good as equal; then more multiply-adds win
COUNTABLE = 1e17  # the curve ends before its prices outgrow whole numbers of 64 bits


@dataclass(frozen=True)
class Candidates:
    """Realised networks, an entry each, and what they cost."""

    width: Floats
    depth: Floats
    resolution: Ints
    roundings: tuple[DepthRounding, ...]
    rounding: Ints  # index into roundings
    prices: dict[str, Ints]

    def __len__(self) -> int:
        return len(self.width)


class Search:
    """The candidates of one budget, baseline and rule."""

    def __init__(
        self, budget: Budget, baseline: NetworkSpec, rule: Rule, step: int, rounding: DepthRounding | None
    ) -> None:
        self.budget, self.baseline, self.rule = budget, baseline, rule
        self.step = positive_int("resolution_step", step)
        self.given = rounding
        if rounding is not None:
            one_of("depth_rounding", rounding, DepthRounding)
        self.roundings: tuple[DepthRounding, ...] = (rounding,) if rounding else ("ceil", "nearest")
        if budget.max_resolution is not None and budget.resolution is None and budget.max_resolution < self.step:
            raise ArgumentError("max_resolution", budget.max_resolution, f"is less than one step (={self.step}).")

    def best(self) -> tuple[NetworkSpec, Candidates]:
        """The network that makes most of the budget, and everything that was looked at."""
        import numpy as np

        phis = self._phis()
        curve = self._price(*self._curve(phis))
        fits = self._fits(curve)
        if not fits.any():
            raise self._impossible()
        # Along the curve of the first rounding and then the second: the point of largest macs.
        top = int(np.where(fits, curve.prices["macs"], -1).argmax())
        binding = self._binding(curve, top)
        near = self._price(*self._neighbours(phis, float(np.tile(phis, len(self.roundings))[top])))
        everything = _joined(curve, near)
        allowed = self._fits(everything) & (everything.prices["macs"] >= curve.prices["macs"][top])
        share = np.where(allowed, everything.prices[binding] / self.budget.limits[binding], 0)
        best = allowed & (share >= share.max() - LEVEL)
        chosen = int(np.where(best, everything.prices["macs"], -1).argmax())
        return self.spec_at(everything, chosen), everything

    def curve_spec(self, phi: float) -> NetworkSpec | None:
        """The larger of the curve's networks at this phi that meet the limits."""
        import numpy as np

        at = self._price(*self._curve(np.array([phi])))
        fits = self._fits(at) if self.budget.limits else np.ones(len(at), bool)
        return self.spec_at(at, int(np.where(fits, at.prices["macs"], -1).argmax())) if fits.any() else None

    def near(self, phi: float) -> Candidates:
        """Every network near the curve around `phi` that meets the limits."""
        networks = self._price(*self._neighbours(self._phis(), phi))
        fits = self._fits(networks)
        arrays = {name: getattr(networks, name)[fits] for name in ("width", "depth", "resolution", "rounding")}
        prices = {name: values[fits] for name, values in networks.prices.items()}
        return Candidates(roundings=networks.roundings, prices=prices, **arrays)

    @property
    def ends(self) -> tuple[float, float]:
        """The phis where the curve begins and ends."""
        phis = self._phis()
        return float(phis[0]), float(phis[-1])

    @property
    def doubling(self) -> float:
        """The phi that is promised to double the multiply-adds: 1.06 by the paper's rule."""
        return math.log(2) / math.log(self.rule.product)

    def spec_at(self, candidates: Candidates, index: int) -> NetworkSpec:
        """One of the candidates as a spec."""
        return self._spec(
            float(candidates.depth[index]),
            float(candidates.width[index]),
            int(candidates.resolution[index]),
            candidates.roundings[int(candidates.rounding[index])],
        )

    def _spec(self, depth: float, width: float, resolution: int, rounding: DepthRounding) -> NetworkSpec:
        network = dataclasses.replace(
            self.baseline, depth=depth, width=width, resolution=resolution, depth_rounding=rounding
        )
        name = f"{self.baseline.name}-{cost(network).macs / 1e6:.0f}m"
        return dataclasses.replace(network, name=name, dropout=compound.dropout(self.baseline, network)[0])

    def _phis(self) -> Floats:
        """The curve, as far as factors, resolution and whole numbers go, in steps of equal growth under any rule.

        Raises:
            ArgumentError: with what is settled, not even the smallest network can be counted in 64 bits.
        """
        import numpy as np

        phis = np.arange(self._first(), compound.largest_phi(self.baseline, self.rule), CURVE_STEP * self.doubling)
        depth, width, pixels = self._curve(phis)
        growth = (depth / self.baseline.depth) * (width / self.baseline.width) ** 2
        growth = growth * (pixels / self.baseline.resolution) ** 2
        most = max(cost(self.baseline).macs, kept_per_image(self.baseline) * (self.budget.batch or 1))
        phis = phis[growth * most < COUNTABLE]
        if not len(phis):
            raise self._impossible()
        return phis

    def _first(self) -> float:
        """The phi at which depth, width or resolution is as small as it may be; 0 if the baseline's already is."""
        base = self.baseline
        floors = SMALLEST_FACTOR / base.depth, SMALLEST_FACTOR / base.width, SMALLEST_RESOLUTION / base.resolution
        ends = zip(floors, self.rule.growths, strict=True)
        return max(min(0.0, math.log(floor) / math.log(growth)) for floor, growth in ends if growth > 1)

    def _curve(self, phis: Floats) -> tuple[Floats, Floats, Floats]:
        """Depth, width and resolution in pixels on the curve, not yet rounded; what is settled is settled."""
        import numpy as np

        alpha, beta, gamma = self.rule.growths
        budget = self.budget
        depth = self.baseline.depth * alpha**phis if budget.depth is None else np.full_like(phis, budget.depth)
        width = self.baseline.width * beta**phis if budget.width is None else np.full_like(phis, budget.width)
        pixels = self.baseline.resolution * gamma**phis
        if budget.resolution is not None:
            pixels = np.full_like(phis, budget.resolution)
        elif budget.max_resolution is not None:
            pixels = np.minimum(pixels, budget.max_resolution)
        return depth, width, pixels

    def _neighbours(self, phis: Floats, phi: float) -> tuple[Floats, Floats, Floats]:
        """Everything near the curve around `phi`: depth, width and resolution each within NEAR of a point of it."""
        import numpy as np

        reach = AROUND * self.doubling
        depth, width, pixels = self._curve(np.linspace(max(phis[0], phi - reach), min(phis[-1], phi + reach), PLACES))
        offsets = np.linspace(1 - NEAR, 1 + NEAR, OFFSETS)
        deep = offsets if self.budget.depth is None else np.ones(1)
        wide = offsets if self.budget.width is None else np.ones(1)
        grid = [(d, w, r) for d, w, r in zip(depth, width, pixels, strict=True) for r in self._resolutions(float(r))]
        points = np.array(grid)
        shape = (len(points), len(deep), len(wide))
        return (
            np.broadcast_to(np.minimum(points[:, 0, None, None] * deep[:, None], LARGEST_FACTOR), shape).ravel(),
            np.broadcast_to(np.minimum(points[:, 1, None, None] * wide, LARGEST_FACTOR), shape).ravel(),
            np.broadcast_to(points[:, 2, None, None], shape).ravel(),
        )

    def _resolutions(self, pixels: float) -> list[int]:
        """A few multiples of the step within NEAR of `pixels`, or the nearest one."""
        if self.budget.resolution is not None:
            return [self.budget.resolution]
        low, high = (1 - NEAR) * pixels / self.step, (1 + NEAR) * pixels / self.step
        if self.budget.max_resolution is not None:
            high = min(high, self.budget.max_resolution / self.step)
        inside = range(max(1, math.ceil(low)), math.floor(high) + 1)
        numbers = inside[:: max(1, math.ceil(len(inside) / RESOLUTIONS))] or [max(1, round(pixels / self.step))]
        return [number * self.step for number in numbers]

    def _price(self, depth: Floats, width: Floats, pixels: Floats) -> Candidates:
        """Realised networks, for each way to round the depth, with all that the budget can tell of them."""
        import numpy as np

        if self.budget.resolution is not None:
            resolution = np.full(len(pixels), self.budget.resolution, np.int64)
        else:
            steps = np.maximum(1, np.floor(pixels / self.step + 0.5))
            if self.budget.max_resolution is not None:
                steps = np.minimum(steps, self.budget.max_resolution // self.step)
            resolution = (steps * self.step).astype(np.int64)
        priced = [self._prices(depth, width, resolution, rounding) for rounding in self.roundings]
        times = len(self.roundings)
        return Candidates(
            np.tile(width, times),
            np.tile(depth, times),
            np.tile(resolution, times),
            self.roundings,
            np.repeat(np.arange(times), len(width)),
            {name: np.concatenate([prices[name] for prices in priced]) for name in priced[0]},
        )

    def _prices(self, depth: Floats, width: Floats, resolution: Ints, rounding: DepthRounding) -> dict[str, Ints]:
        base = dataclasses.replace(self.baseline, depth_rounding=rounding)
        shape = base.shape_at(cast(float, width), cast(float, depth), cast(int, resolution))
        names = tuple(dict.fromkeys(("macs", "params", *self.budget.limits)))
        return cast("dict[str, Ints]", tell(shape, self.budget, names))

    def _fits(self, candidates: Candidates) -> NDArray[np.bool_]:
        import numpy as np

        fits = np.ones(len(candidates), bool)
        for name, limit in self.budget.limits.items():
            fits &= candidates.prices[name] <= limit
        return fits

    def _binding(self, candidates: Candidates, index: int) -> str:
        """The limit of which a candidate uses most."""
        shares = {name: candidates.prices[name][index] / limit for name, limit in self.budget.limits.items()}
        return max(shares, key=lambda name: float(shares[name]))

    def _impossible(self) -> ArgumentError:
        """Which limit the smallest network exceeds most, and what it needs; in numbers that cannot overflow."""
        import numpy as np

        depth, width, pixels = (float(axis[0]) for axis in self._curve(np.array([self._first()])))
        resolution = self.budget.resolution or max(1, math.floor(pixels / self.step + 0.5)) * self.step
        network = self._spec(depth, width, resolution, self.roundings[-1])
        prices, limits = tell(network, self.budget), self.budget.limits or {"macs": int(COUNTABLE)}
        worst = max(limits, key=lambda name: prices[name] / limits[name])
        needs = f"{prices[worst]:,} {worst if worst in ('macs', 'params') else 'bytes'}"
        settled = [name for name in ("width", "depth", "resolution") if getattr(self.budget, name) is not None]
        pins = f", with {' and '.join(settled)} settled" if settled else ""
        sizes = f"width {network.width:.3g}, depth {network.depth:.3g}, {network.resolution} px"
        smallest_network = f"the smallest network of the rule {self.rule.name or 'given'} from {self.baseline.name}"
        words = f"cannot be met{pins}: {smallest_network} needs {needs} ({sizes})."
        return ArgumentError(worst, limits[worst], words)


def _joined(first: Candidates, second: Candidates) -> Candidates:
    import numpy as np

    names = ("width", "depth", "resolution", "rounding")
    arrays = {name: np.concatenate([getattr(first, name), getattr(second, name)]) for name in names}
    prices = {name: np.concatenate([first.prices[name], second.prices[name]]) for name in first.prices}
    return Candidates(roundings=first.roundings, prices=prices, **arrays)

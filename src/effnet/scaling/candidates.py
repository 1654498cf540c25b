"""The networks among which a budget chooses: the curve of a rule and what lies near it, each priced exactly.

The largest network on the curve that meets every limit is found first. Rounding wastes a part of the budget there, so
its neighbourhood is searched: of all networks whose depth, width and resolution each lie within 5 % of a point of the
curve, the one is taken that uses most of the limit that binds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from effnet.arch.cost import cost
from effnet.arch.shape import DepthRounding, shape_of
from effnet.arch.spec import NetworkSpec, positive_int
from effnet.errors import ArgumentError
from effnet.scaling import compound
from effnet.scaling.budget import Budget, tell
from effnet.scaling.compound import Rule

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Ints = NDArray[np.int64]

NEAR = 0.05  # how far depth, width and resolution may each be from the curve
SMALLEST_RESOLUTION = 32  # the last map is then one pixel
SMALLEST_FACTOR = 0.05  # of depth and width
CURVE_STEP = 0.02  # of phi
AROUND = 40  # points of the curve on either side whose neighbourhood is searched: 0.8 of phi
OFFSETS = 7  # of depth and of width in each neighbourhood
LEVEL = 0.005  # shares of the binding limit that are as good as equal; then more multiply-adds win


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
        self.roundings: tuple[DepthRounding, ...] = (rounding,) if rounding else ("ceil", "nearest")

    def best(self) -> tuple[NetworkSpec, Candidates]:
        """The network that makes most of the budget, and everything that was looked at."""
        import numpy as np

        phis = self._phis()
        curve = self._price(*self._curve(phis))
        fits = self._fits(curve)
        if not fits.any():
            raise self._impossible(curve)
        # Along the curve of the first rounding and then the second: the point of largest macs.
        top = int(np.where(fits, curve.prices["macs"], -1).argmax())
        binding = self._binding(curve, top)
        near = self._price(*self._neighbours(phis, float(np.tile(phis, len(self.roundings))[top])))
        everything = _joined(curve, near)
        allowed = self._fits(everything)
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
    def smallest_phi(self) -> float:
        """Where the curve begins."""
        return float(self._phis()[0])

    @property
    def largest_phi(self) -> float:
        """Where it ends."""
        return float(self._phis()[-1])

    def spec_at(self, candidates: Candidates, index: int) -> NetworkSpec:
        """One of the candidates as a spec."""
        network = dataclasses.replace(
            self.baseline,
            width=float(candidates.width[index]),
            depth=float(candidates.depth[index]),
            resolution=int(candidates.resolution[index]),
            depth_rounding=candidates.roundings[int(candidates.rounding[index])],
        )
        name = f"{self.baseline.name}-{cost(network).macs / 1e6:.0f}m"
        return dataclasses.replace(network, name=name, dropout=compound.dropout(self.baseline, network)[0])

    def _phis(self) -> Floats:
        """The curve, as far as factors and resolution are allowed to go."""
        import numpy as np

        largest = compound.largest_phi(self.baseline, self.rule)
        ends = [largest]
        floors = (
            SMALLEST_FACTOR / self.baseline.depth,
            SMALLEST_FACTOR / self.baseline.width,
            SMALLEST_RESOLUTION / self.baseline.resolution,
        )
        for floor, growth in zip(floors, self.rule.growths, strict=True):
            if growth > 1:
                ends.append(-math.log(floor) / math.log(growth))
        return np.arange(-min(ends), largest, CURVE_STEP)

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

        around = phis[np.abs(phis - phi) <= AROUND * CURVE_STEP][:: max(1, AROUND // 8)]
        depth, width, pixels = self._curve(around)
        offsets = np.linspace(1 - NEAR, 1 + NEAR, OFFSETS)
        deep = offsets if self.budget.depth is None else np.ones(1)
        wide = offsets if self.budget.width is None else np.ones(1)
        grid = [(d, w, r) for d, w, r in zip(depth, width, pixels, strict=True) for r in self._resolutions(float(r))]
        points = np.array(grid)
        shape = (len(points), len(deep), len(wide))
        return (
            np.broadcast_to(points[:, 0, None, None] * deep[None, :, None], shape).ravel(),
            np.broadcast_to(points[:, 1, None, None] * wide[None, None, :], shape).ravel(),
            np.broadcast_to(points[:, 2, None, None], shape).ravel(),
        )

    def _resolutions(self, pixels: float) -> Iterator[int]:
        """The multiples of the step within NEAR of `pixels`, or the nearest one."""
        if self.budget.resolution is not None:
            yield self.budget.resolution
            return
        low, high = (1 - NEAR) * pixels / self.step, (1 + NEAR) * pixels / self.step
        if self.budget.max_resolution is not None:
            high = min(high, self.budget.max_resolution / self.step)
        inside = range(max(1, math.ceil(low)), math.floor(high) + 1)
        for number in inside or (max(1, round(pixels / self.step)),):
            yield number * self.step

    def _price(self, depth: Floats, width: Floats, pixels: Floats) -> Candidates:
        """Realised networks, for each way to round the depth, with all that the budget can tell of them."""
        import numpy as np

        if self.budget.resolution is not None:
            resolution = np.full(len(pixels), self.budget.resolution, np.int64)
        else:
            steps = np.maximum(1, np.floor(pixels / self.step + 0.5))
            if self.budget.max_resolution is not None:
                steps = np.minimum(steps, max(1, self.budget.max_resolution // self.step))
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
        shape = shape_of(base, cast(float, width), cast(float, depth), cast(int, resolution))
        names = tuple(dict.fromkeys(("macs", "params", *self.budget.limits)))
        return cast("dict[str, Ints]", tell(shape, self.budget, names))

    def _fits(self, candidates: Candidates) -> NDArray[np.bool_]:
        import numpy as np

        fits = np.ones(len(candidates), bool)
        for name, limit in self.budget.limits.items():
            fits &= candidates.prices[name] <= limit
        return fits

    def _binding(self, candidates: Candidates, index: int) -> str:
        """The limit of which a candidate uses most; without one, multiply-adds stand for all."""
        shares = {name: candidates.prices[name][index] / limit for name, limit in self.budget.limits.items()}
        return max(shares, key=lambda name: float(shares[name]))

    def _impossible(self, curve: Candidates) -> ArgumentError:
        """Which limit the smallest network breaks most, and what it needs."""
        smallest = int(curve.prices["macs"].argmin())
        over = {name: curve.prices[name].min() / limit for name, limit in self.budget.limits.items()}
        worst = max(over, key=lambda name: float(over[name]))
        if over[worst] <= 1:  # each can be met, but not all by one network
            over = {name: curve.prices[name][smallest] / limit for name, limit in self.budget.limits.items()}
            worst = max(over, key=lambda name: float(over[name]))
        network = self.spec_at(curve, int(curve.prices[worst].argmin()))
        needs = f"{int(curve.prices[worst].min()):,} {'bytes' if worst not in ('macs', 'params') else worst}"
        settled = [name for name in ("width", "depth", "resolution") if getattr(self.budget, name) is not None]
        pins = f", with {' and '.join(settled)} settled" if settled else ""
        sizes = f"width {network.width:.3g}, depth {network.depth:.3g}, {network.resolution} px"
        smallest_network = f"the smallest network of the rule {self.rule.name or 'given'} from {self.baseline.name}"
        words = f"cannot be met{pins}: {smallest_network} needs {needs} ({sizes})."
        return ArgumentError(worst, self.budget.limits[worst], words)


def _joined(first: Candidates, second: Candidates) -> Candidates:
    import numpy as np

    names = ("width", "depth", "resolution", "rounding")
    arrays = {name: np.concatenate([getattr(first, name), getattr(second, name)]) for name in names}
    prices = {name: np.concatenate([first.prices[name], second.prices[name]]) for name in first.prices}
    return Candidates(roundings=first.roundings, prices=prices, **arrays)

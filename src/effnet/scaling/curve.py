"""The networks that a budget chooses from: a rule's curve and what lies near it, with exact costs.

First the largest network on the curve that meets every limit is found. Since rounding wastes part of the budget, its
neighbourhood is searched: of all networks whose depth, width and resolution each lie within 5 % of a point on the
curve, with no fewer multiply-adds than that one, the result is the one that uses most of the binding limit.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from effnet.arch.blocks import DepthRounding
from effnet.arch.cost import cost
from effnet.arch.memory import kept_per_image
from effnet.arch.spec import LARGEST_FACTOR, NetworkSpec
from effnet.errors import ArgumentError
from effnet.fields import one_of, positive_int
from effnet.scaling.budget import SMALLEST_RESOLUTION, Budget, count_resources
from effnet.scaling.compound import Rule, interpolate_dropout, largest_phi

FloatArray: TypeAlias = NDArray[np.float64]
# Networks as built, one per entry: width, depth, resolution, rounding (index into ROUNDINGS) and, by name, each
# resource that was computed.
CountedNetworks: TypeAlias = dict[str, NDArray[Any]]

ROUNDINGS: tuple[DepthRounding, ...] = ("ceil", "nearest")
BUILT = ("width", "depth", "resolution", "rounding")
NEAR = 0.05  # how far depth, width and resolution may each be from the curve, relatively
SMALLEST_FACTOR = 0.05  # of depth and width
CURVE_STEP = 0.02  # between points of the curve, in doublings of the nominal multiply-adds
AROUND = 0.8  # doublings on either side of the best point whose neighbourhood is searched
PLACES = 17  # points in that range
OFFSETS = 7  # of depth and of width in each neighbourhood
RESOLUTIONS = 5  # in each neighbourhood
TIE = 0.005  # difference in the used share of the binding limit that counts as a tie; then more multiply-adds win
COUNTABLE = 1e17  # the curve ends before its counts overflow 64-bit integers


class CurveSearch:
    """The networks for a budget, a baseline and a rule."""

    def __init__(
        self, budget: Budget, baseline: NetworkSpec, rule: Rule, step: int, rounding: DepthRounding | None
    ) -> None:
        self.budget, self.baseline, self.rule, self.rounding = budget, baseline, rule, rounding
        self.step = positive_int("resolution_step", step)
        if rounding is not None:
            one_of("depth_rounding", rounding, DepthRounding)
        if budget.max_resolution is not None and budget.resolution is None and budget.max_resolution < self.step:
            raise ArgumentError("max_resolution", budget.max_resolution, f"is less than one step (={self.step}).")
        self.doubling = math.log(2) / math.log(rule.product)  # the phi that doubles the nominal multiply-adds

    def with_changes(self, budget: Budget | None = None, rule: Rule | None = None) -> CurveSearch:
        """The same search with another budget or rule."""
        return CurveSearch(budget or self.budget, self.baseline, rule or self.rule, self.step, self.rounding)

    def best(self) -> tuple[NetworkSpec, CountedNetworks]:
        """The network that makes most of the budget, and all that were considered; an error if none meets it."""
        phis, limits = self._phis(), self.budget.limits
        curve = self._count(*self._curve(phis))
        fits = self._fits(curve)
        if not fits.any():
            raise self._impossible()
        # The point with most multiply-adds on the curve, which exists once for each rounding.
        top = int(np.where(fits, curve["macs"], -1).argmax())
        binding = max(limits, key=lambda name: float(curve[name][top] / limits[name]))
        near = self._count(*self._neighbours(phis, float(phis[top % len(phis)])))
        everything = {name: np.concatenate([curve[name], near[name]]) for name in curve}
        allowed = self._fits(everything) & (everything["macs"] >= curve["macs"][top])
        share = np.where(allowed, everything[binding] / limits[binding], 0)
        return self._largest(everything, allowed & (share >= share.max() - TIE)), everything

    def curve_spec(self, phi: float) -> NetworkSpec | None:
        """The largest of the curve's networks at this phi that meet the limits."""
        at = self._count(*self._curve(np.array([phi])))
        fits = self._fits(at)
        return self._largest(at, fits) if fits.any() else None

    def near(self, phi: float) -> CountedNetworks:
        """Every network near the curve around `phi` that meets the limits."""
        networks = self._count(*self._neighbours(self._phis(), phi))
        fits = self._fits(networks)
        return {name: values[fits] for name, values in networks.items()}

    @property
    def ends(self) -> tuple[float, float]:
        """The phis at which the curve begins and ends."""
        phis = self._phis()
        return float(phis[0]), float(phis[-1])

    def spec_at(self, networks: CountedNetworks, index: int) -> NetworkSpec:
        """One of the networks as a spec."""
        width, depth, resolution, rounding = (networks[name][index] for name in BUILT)
        return self._spec(float(width), float(depth), int(resolution), ROUNDINGS[rounding])

    def _largest(self, networks: CountedNetworks, allowed: NDArray[np.bool_]) -> NetworkSpec:
        return self.spec_at(networks, int(np.where(allowed, networks["macs"], -1).argmax()))

    def _spec(self, width: float, depth: float, resolution: int, rounding: DepthRounding) -> NetworkSpec:
        network = dataclasses.replace(
            self.baseline, depth=depth, width=width, resolution=resolution, depth_rounding=rounding
        )
        name = f"{self.baseline.name}-{cost(network).macs / 1e6:.0f}m"
        return dataclasses.replace(network, name=name, dropout=interpolate_dropout(self.baseline, network)[0])

    def _phis(self) -> FloatArray:
        """The curve in steps of equal growth, as far as factors, resolution and 64-bit integers allow."""
        phis = np.arange(self._first(), largest_phi(self.baseline, self.rule), CURVE_STEP * self.doubling)
        depth, width, pixels = self._curve(phis)
        growth = (depth / self.baseline.depth) * (width / self.baseline.width) ** 2
        growth = growth * (pixels / self.baseline.resolution) ** 2
        most = max(cost(self.baseline).macs, kept_per_image(self.baseline) * (self.budget.batch or 1))
        phis = phis[growth * most < COUNTABLE]
        if not len(phis):
            raise self._impossible()
        return phis

    def _first(self) -> float:
        """The phi at which depth, width or resolution becomes as small as allowed; 0 if the baseline's already is."""
        base = self.baseline
        floors = SMALLEST_FACTOR / base.depth, SMALLEST_FACTOR / base.width, SMALLEST_RESOLUTION / base.resolution
        ends = zip(floors, self.rule.growths, strict=True)
        return max(min(0.0, math.log(floor) / math.log(growth)) for floor, growth in ends if growth > 1)

    def _curve(self, phis: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Depth, width and resolution in pixels on the curve, not yet rounded, except for fixed ones."""
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

    def _neighbours(self, phis: FloatArray, phi: float) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Everything near the curve around `phi`: depth, width and resolution each within NEAR of a point on it."""
        reach = AROUND * self.doubling
        depth, width, pixels = self._curve(np.linspace(max(phis[0], phi - reach), min(phis[-1], phi + reach), PLACES))
        offsets = np.linspace(1 - NEAR, 1 + NEAR, OFFSETS)
        deep = offsets if self.budget.depth is None else np.ones(1)
        wide = offsets if self.budget.width is None else np.ones(1)
        points = np.array(
            [(d, w, r) for d, w, r in zip(depth, width, pixels, strict=True) for r in self._resolutions(float(r))]
        )
        shape = (len(points), len(deep), len(wide))
        return (
            np.broadcast_to(np.minimum(points[:, 0, None, None] * deep[:, None], LARGEST_FACTOR), shape).ravel(),
            np.broadcast_to(np.minimum(points[:, 1, None, None] * wide, LARGEST_FACTOR), shape).ravel(),
            np.broadcast_to(points[:, 2, None, None], shape).ravel(),
        )

    def _resolutions(self, pixels: float) -> list[int]:
        """Some multiples of the step within NEAR of `pixels`, or the nearest one."""
        if self.budget.resolution is not None:
            return [self.budget.resolution]
        low, high = (1 - NEAR) * pixels / self.step, (1 + NEAR) * pixels / self.step
        if self.budget.max_resolution is not None:
            high = min(high, self.budget.max_resolution / self.step)
        inside = range(max(1, math.ceil(low)), math.floor(high) + 1)
        numbers = inside[:: max(1, math.ceil(len(inside) / RESOLUTIONS))] or [max(1, round(pixels / self.step))]
        return [number * self.step for number in numbers]

    def _round_pixels(self, pixels: FloatArray) -> NDArray[np.int64]:
        """The resolutions as built."""
        if self.budget.resolution is not None:
            return np.full(len(pixels), self.budget.resolution, np.int64)
        steps = np.maximum(1, np.floor(pixels / self.step + 0.5))
        if self.budget.max_resolution is not None:
            steps = np.minimum(steps, self.budget.max_resolution // self.step)
        return (steps * self.step).astype(np.int64)

    def _count(self, depth: FloatArray, width: FloatArray, pixels: FloatArray) -> CountedNetworks:
        """The networks as built, for each rounding of the depth, with the resources that the budget limits."""
        resolution = self._round_pixels(pixels)
        names = tuple(dict.fromkeys(("macs", "params", *self.budget.limits)))
        parts = []
        for index, rounding in enumerate(ROUNDINGS):
            if self.rounding in (None, rounding):
                base = dataclasses.replace(self.baseline, depth_rounding=rounding)
                shape = base.shape_at(cast(float, width), cast(float, depth), cast(int, resolution))
                built = zip(BUILT, (width, depth, resolution, np.full(len(width), index)), strict=True)
                parts.append(dict(built) | cast(CountedNetworks, count_resources(shape, self.budget, names)))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _fits(self, networks: CountedNetworks) -> NDArray[np.bool_]:
        fits = np.ones(len(networks["macs"]), bool)
        for name, limit in self.budget.limits.items():
            fits &= networks[name] <= limit
        return fits

    def _impossible(self) -> ArgumentError:
        """The error: which limit the smallest network exceeds most, and what it needs, without overflow."""
        depth, width, pixels = self._curve(np.array([self._first()]))
        resolution = int(self._round_pixels(pixels)[0])
        network = self._spec(float(width[0]), float(depth[0]), resolution, self.rounding or "nearest")
        counts, limits = count_resources(network, self.budget), self.budget.limits or {"macs": int(COUNTABLE)}
        worst = max(limits, key=lambda name: counts[name] / limits[name])
        needs = f"{counts[worst]:,} {worst if worst in ('macs', 'params') else 'bytes'}"
        settled = [name for name in ("width", "depth", "resolution") if getattr(self.budget, name) is not None]
        pins = f", with {' and '.join(settled)} fixed" if settled else ""
        sizes = f"width {network.width:.3g}, depth {network.depth:.3g}, {network.resolution} px"
        smallest = f"the smallest network by the rule {self.rule.name or 'given'} from {self.baseline.name}"
        return ArgumentError(worst, limits[worst], f"cannot be met{pins}: {smallest} needs {needs} ({sizes}).")

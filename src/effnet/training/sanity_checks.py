"""Sanity checks of every step: a hopeless run stops within its first hundred steps and names the likely cause."""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean

from effnet.errors import TrainingError

CHECKED = 100  # first steps; in later ones, loss and gradients only have to be finite
CONSTANT = 1e-6  # spread of the outputs over a batch, as a share of their size
PATIENCE = 5  # steps in a row with constant outputs, or with gradients of zero
RECENT = 20  # steps over which the loss is averaged
DIVERGED = "the learning rate is probably too high: try a tenth of it with --lr"


class SanityChecks:
    """Stops a run that cannot succeed."""

    def __init__(self, num_classes: int) -> None:
        self.guessing = math.log(max(2, num_classes))  # the loss of a network that guesses
        self.recent: deque[float] = deque(maxlen=RECENT)
        self.constant = self.still = 0

    def state(self) -> tuple[list[float], int, int]:
        """What it remembers, for a checkpoint."""
        return list(self.recent), self.constant, self.still

    def restore(self, state: tuple[list[float], int, int]) -> None:
        """Go on from what `state` returned."""
        recent, self.constant, self.still = state
        self.recent.extend(recent)

    def check(self, step: int, loss: float, spread: float, gradient: float) -> None:
        """Check a step, counted from 0.

        Args:
            step: its number.
            loss: its mean loss.
            spread: standard deviation of the outputs over the images, as a share of their mean size.
            gradient: norm of all gradients before clipping.

        Raises:
            TrainingError: the run cannot succeed; the message gives the likely cause.
        """
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {step}: {DIVERGED}")
        if not math.isfinite(gradient):
            raise TrainingError(f"the gradients are not finite at step {step}, the loss is {loss:.3g}: {DIVERGED}")
        if step >= CHECKED:
            return
        self.recent.append(loss)
        self.constant = self.constant + 1 if spread < CONSTANT else 0
        self.still = self.still + 1 if gradient == 0 else 0
        if self.constant >= PATIENCE:
            raise TrainingError(
                f"the network gives the same answer to every image at step {step}: are the images all alike or empty? "
                "Look at them with effnet check; weights that were damaged do the same"
            )
        if self.still >= PATIENCE:
            raise TrainingError(f"the gradients are zero at step {step}, as all activations are: damaged weights?")
        if step == CHECKED - 1 and (mean := fmean(self.recent)) > self.guessing + 1:
            guessing = f"guessing has ln(K) = {self.guessing:.2f}"
            raise TrainingError(f"after {CHECKED} steps the loss is {mean:.2f}, and {guessing}: {DIVERGED}")

"""How good a network is on the val part while it learns, over all processes."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.distributed as dist

from effnet.data.dataset import Dataset
from effnet.errors import CheckpointError, TrainingError
from effnet.metrics.evaluate import Predicted, Progress, predict_logits
from effnet.training.module import Answering
from effnet.training.watch import DIVERGED


def answers(answering: Answering, part: Dataset, *, batch: int, progress: Progress | None = None) -> Predicted:
    """What a network answers to every image of a part.

    Raises:
        TrainingError: an image cannot be read.
    """
    found = predict_logits(answering, part, batch=batch, progress=progress)
    if found.unreadable:
        path, reason = next(iter(found.unreadable.items()))
        raise TrainingError(f"{path} cannot be read: {reason} Find all such files with: effnet check DATA")
    return found


def score(
    answering: Answering, part: Dataset, *, batch: int, rank: int = 0, world: int = 1, progress: Progress | None = None
) -> tuple[float, float]:
    """Accuracy and mean cross entropy over a part, of which each process looks at its share.

    Raises:
        TrainingError: an image cannot be read, or an answer is no finite number.
    """
    if world > 1:  # each process has its own running statistics; rank 0's are kept
        for buffer in answering.network.buffers():
            dist.broadcast(buffer, 0)
    mine = dataclasses.replace(part, samples=part.samples[rank::world])
    try:
        found = answers(answering, mine, batch=batch, progress=progress)
    except CheckpointError as error:
        raise TrainingError(f"the network's answers are not finite numbers: {DIVERGED}") from error
    shifted = found.logits.astype(np.float64) - found.logits.max(1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(1)) - shifted[np.arange(len(shifted)), found.labels]
    sums = torch.tensor(
        [float((found.logits.argmax(1) == found.labels).sum()), float(losses.sum()), float(len(losses))],
        dtype=torch.float64,
    )
    if world > 1:
        dist.all_reduce(sums)
    correct, loss, count = sums.tolist()
    return correct / count, loss / count

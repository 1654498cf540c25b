"""States of small networks under the names of a library, and the files and folders that hold them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import torch
from random_weights import shaken
from safetensors.torch import save_file

from effnet.arch.variants import spec
from effnet.models.efficientnet import EfficientNet
from effnet.weights.convert import foreign_state
from effnet.weights.layouts import LAYOUTS

ALLOWED = 1e-4  # largest difference by largest logit; 1e-6 is usual
IMAGENET_STD = (0.229, 0.224, 0.225)


@cache
def small() -> EfficientNet:
    """A network of 8 blocks for 5 classes, built once."""
    return shaken(EfficientNet(spec("b0", width=0.5, depth=0.4, num_classes=5)), 64)


def tiny(layout="native", network=None):
    """The state of a small network under the names of a library."""
    network = shaken(network, 64) if network else small()
    return foreign_state(network.state_dict(), network.spec, LAYOUTS[layout])


def written(folder: Path, state, **configs) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / "model.safetensors")
    for name, values in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def saved(path: Path, state) -> Path:
    torch.save(state, path)
    return path

"""Opens a file or folder of weights, whichever library wrote it, as flat tensors and what stands beside them.

Pickles are opened with weights_only=True and in no other way. What training wrappers put around a state dict (DDP,
torch.compile, Lightning, EMA) is taken off, and said. Keras kernels are turned into torch's order of dimensions.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from effnet.errors import CheckpointError, MissingExtraError

if TYPE_CHECKING:
    import h5py

# In this order: an average of the weights is what was evaluated, so it goes first.
INNER = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "state_dict", "model_state_dict", "model", "net")
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.", "ema.")
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
KERAS_SUFFIXES = (".h5", ".hdf5", ".keras")


@dataclass(frozen=True)
class WeightFile:
    """Flat tensors under the names of the library that wrote them."""

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)  # a hub folder's config.json
    preprocessor: dict[str, Any] = field(default_factory=dict)  # a transformers folder's preprocessor_config.json
    notes: tuple[str, ...] = ()  # what was taken off


def open_weights(path: Path) -> WeightFile:
    """Read a .pth, .pt, .bin, .safetensors, .h5 or .keras file, or a folder of timm's or transformers' hub layout.

    Raises:
        CheckpointError: it is missing, damaged, or holds no tensors.
        MissingExtraError: a Keras file, and h5py is not installed.
    """
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    config: dict[str, Any] = {}
    preprocessor: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    file = path
    if path.is_dir():
        file = next((path / name for name in FOLDER_FILES if (path / name).is_file()), path)
        if file is path:
            raise CheckpointError(f"the folder {path} holds none of {', '.join(FOLDER_FILES)}")
        config, preprocessor = _json(path / "config.json"), _json(path / "preprocessor_config.json")
    try:
        if file.suffix in KERAS_SUFFIXES:
            tensors = _open_keras(file)
        elif file.suffix == ".safetensors":
            tensors, notes = unwrap(load_file(file))
        else:
            tensors, notes = unwrap(torch.load(file, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error) and "Weights only" not in str(error):
            raise CheckpointError(f"{file} is damaged or no file of weights: {error}") from error
        kind = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(
            f"{file} holds Python objects beside its tensors{f' ({kind[1]})' if kind else ''}, and opening those can "
            "run anybody's code. Where you trust it, save its state dict alone: torch.save(model.state_dict(), path)"
        ) from error
    except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{file} is damaged or no file of weights: {str(error).splitlines()[0]}") from error
    return WeightFile(path, tensors, config, preprocessor, notes)


def unwrap(loaded: object) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The state dict inside what a training wrapper saved, and a note on each layer that was taken off.

    Raises:
        CheckpointError: there are no tensors in it.
    """
    notes = []
    while isinstance(loaded, Mapping) and not any(isinstance(value, Tensor) for value in loaded.values()):
        inner = next((name for name in INNER if isinstance(loaded.get(name), Mapping)), None)
        if inner is None:
            break
        beside = [name for name in INNER if name != inner and isinstance(loaded.get(name), Mapping)]
        notes.append(f"took {inner!r} out of the checkpoint" + (f", not {', '.join(beside)}" if beside else ""))
        loaded = loaded[inner]
    tensors = (
        {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
        if isinstance(loaded, Mapping)
        else {}
    )
    if not tensors:
        raise CheckpointError("it holds no tensors under names, so it is no state dict")
    while True:
        prefix = next((p for p in PREFIXES if sum(key.startswith(p) for key in tensors) > len(tensors) / 2), None)
        if prefix is None:
            return tensors, tuple(notes)
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
        notes.append(f"took the prefix {prefix!r} off the keys")


def _json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    return loaded if isinstance(loaded, dict) else {}


def _open_keras(path: Path) -> dict[str, Tensor]:
    """Keras: layers by name in older files, by class and running number in newer ones."""
    try:
        import h5py
    except ImportError as error:
        raise MissingExtraError(f"reading {path.name}", "keras") from error

    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as inner, h5py.File(inner, "r") as file:
            return _keras_tensors(file)
    with h5py.File(path, "r") as file:
        return _keras_tensors(file)


def _keras_tensors(file: h5py.File) -> dict[str, Tensor]:
    import h5py

    tensors = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset):
            pieces = [
                piece for piece in name.split(":")[0].split("/") if piece not in ("model_weights", "layers", "vars")
            ]
            leaf = pieces[-1].replace("depthwise_kernel", "kernel")
            tensors[f"{pieces[0]}/{leaf}"] = torch.from_numpy(_torch_order(pieces[0], np.asarray(item)))

    file.visititems(visit)
    for layer in ("rescaling_1",):  # holds no tensors, but its presence changes what the network expects
        if f"layers/{layer}" in file or layer in file.get("model_weights", file):
            tensors[f"{layer}/present"] = torch.ones(())
    return tensors


def _torch_order(layer: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if values.ndim == 4:  # (h, w, in, out), depthwise (h, w, channels, 1)
        return np.ascontiguousarray(
            values.transpose((2, 3, 0, 1) if "dw" in layer or "depthwise" in layer else (3, 2, 0, 1))
        )
    return np.ascontiguousarray(values.T) if values.ndim == 2 else values

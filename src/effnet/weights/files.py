"""Opens a file or folder of weights, whichever library wrote it, as flat tensors and what stands beside them.

Pickles are opened with weights_only=True and in no other way. What training wrappers put around a state dict (DDP,
torch.compile, Lightning, EMA) is taken off, and said. Keras kernels are turned into torch's order of dimensions.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from effnet.errors import CheckpointError, MissingExtraError
from effnet.weights.layouts import BASELINE_LAYOUTS, LAYOUTS

if TYPE_CHECKING:
    import h5py

# In this order: an average of the weights is what was evaluated, so it goes first.
INNER = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema", "shadow"),
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "module"),
)
STEMS = tuple(layout.told_by for layout in (*LAYOUTS.values(), *BASELINE_LAYOUTS.values()))
NESTED = 6  # dictionaries inside one another that are looked into
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
KERAS_SUFFIXES = (".h5", ".hdf5", ".keras")
HEADLESS_HF = "embeddings.convolution.weight"  # the stem of transformers' EfficientNetModel, which has no classifier
DAMAGED = (  # what torch, safetensors, zipfile and h5py raise over files that are none of theirs
    *(SafetensorError, zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError),
    *(AttributeError, OverflowError, AssertionError, struct.error),
)


@dataclass(frozen=True)
class WeightFile:
    """Flat tensors under the names of the library that wrote them."""

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)  # a hub folder's config.json
    preprocessor: dict[str, Any] = field(default_factory=dict)  # a transformers folder's preprocessor_config.json
    notes: tuple[str, ...] = ()  # what was taken off
    beside: tuple[str, ...] = ()  # names of tensors that stand beside the network's


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
    file = path
    if path.is_dir():
        file = next((path / name for name in FOLDER_FILES if (path / name).is_file()), path)
        if file is path:
            hint = f"; the model of this run is {path / 'best'}" if (path / "best").is_dir() else ""
            raise CheckpointError(f"the folder {path} holds none of {', '.join(FOLDER_FILES)}{hint}")
        config, preprocessor = _json(path / "config.json"), _json(path / "preprocessor_config.json")
    if not file.stat().st_size:
        raise CheckpointError(f"{file} is empty")
    try:
        if file.suffix.lower() in KERAS_SUFFIXES:
            return WeightFile(path, _open_keras(file), config, preprocessor)
        loaded = load_file(file) if file.suffix == ".safetensors" else _load_pickle(file)
    except DAMAGED as error:
        reason = re.split(r"\n|\. ", str(error))[0]
        raise CheckpointError(f"{file} is damaged or no file of weights ({type(error).__name__}: {reason})") from error
    try:
        tensors, beside, notes = unwrap(loaded)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return WeightFile(path, tensors, config, preprocessor, notes, beside)


def unwrap(loaded: object) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """The network's tensors in what a training script saved, the names beside them, and a note on what was taken off.

    Raises:
        CheckpointError: there are no tensors in it, or those of several networks.
    """
    path = _path_to_tensors(loaded)
    if path is None:
        raise CheckpointError("it holds no tensors under names, so it is no state dict")
    notes = []
    for name in path:
        assert isinstance(loaded, Mapping)
        others = [str(other) for other in loaded if other != name and _path_to_tensors(loaded[other]) is not None]
        notes.append(f"took {name!r} out of the checkpoint" + (f", not {', '.join(others)}" if others else ""))
        loaded = loaded[name]
    assert isinstance(loaded, Mapping)
    tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}

    prefix = _prefix(tensors)
    if prefix is None and (prefix := _prefix(tensors, (HEADLESS_HF,))) is not None:
        tensors = {key.replace(prefix, f"{prefix}efficientnet.", 1): value for key, value in tensors.items()}
    if not prefix:
        return tensors, (), tuple(notes)
    inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    notes.append(f"took the prefix {prefix!r} off the keys")
    return inside, tuple(key for key in tensors if not key.startswith(prefix)), tuple(notes)


def _path_to_tensors(loaded: object, depth: int = 0) -> tuple[str, ...] | None:
    """The names that lead to the first dictionary that holds tensors itself."""
    if not isinstance(loaded, Mapping) or depth > NESTED:
        return None
    for name in INNER:
        if (path := _path_to_tensors(loaded.get(name), depth + 1)) is not None:
            return name, *path
    return () if any(isinstance(value, Tensor) for value in loaded.values()) else None


def _prefix(keys: Collection[str], marks: tuple[str, ...] = STEMS) -> str | None:
    """What stands before the network's own names (DDP: module., torch.compile: _orig_mod.), told from one of them."""
    prefixes = {key.removesuffix(mark) for key in keys for mark in marks if f".{key}".endswith(f".{mark}")}
    averaged = {prefix for prefix in prefixes if re.search(r"(^|[._])(ema|averag)", prefix.lower())}
    chosen = averaged if len(averaged) == 1 else prefixes
    if len(chosen) > 1:
        names = ", ".join(repr(prefix) for prefix in sorted(prefixes))
        raise CheckpointError(f"it holds several networks, under {names}: save the state dict of one of them")
    return next(iter(chosen), None)


def _load_pickle(file: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's hints on odd files, which all end in an error that says more
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        alone = "Where you trust it, save its state dict alone: torch.save(model.state_dict(), path)"
        if isinstance(error, RuntimeError):
            if "weights_only" not in str(error):
                raise
            raise CheckpointError(
                f"{file} is a TorchScript archive or of torch's oldest format: opening it would run what is inside. "
                + alone
            ) from error
        if "Unsupported operand" in str(error):
            raise CheckpointError(f"{file} is damaged, or neither torch.save nor safetensors wrote it") from error
        kind = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(
            f"{file} holds Python objects beside its tensors{f' ({kind[1]})' if kind else ''}, and opening those can "
            f"run anybody's code. {alone}"
        ) from error


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

    content: Path | io.BytesIO = path
    if path.suffix.lower() == ".keras":
        with zipfile.ZipFile(path) as archive:
            content = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(content, "r") as file:
        return _keras_tensors(file)


def _keras_tensors(file: h5py.File) -> dict[str, Tensor]:
    """The datasets as LAYER/LEAF, whatever models the layer is nested in; those of the optimizer are left out."""
    import h5py

    datasets: dict[str, h5py.Dataset] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and not name.startswith("optimizer"):
            datasets[name] = item

    file.visititems(visit)
    short = {name: "/".join(_keras_pieces(name)[-2:]) for name in datasets}
    repeated = {key for key, times in Counter(short.values()).items() if times > 1}
    return {
        (name if key in repeated else key): torch.from_numpy(_torch_order(key, np.asarray(datasets[name])))
        for name, key in short.items()
    }


def _keras_pieces(name: str) -> list[str]:
    """`layers/conv2d_3/vars/0`, or in older files `stem_conv/stem_conv/kernel:0`, without what says nothing.

    Older files number the normalisation of the input through all networks that one program made.
    """
    pieces = name.partition(":")[0].replace("depthwise_kernel", "kernel").split("/")
    return [
        re.sub(r"^normalization_\d+$", "normalization", piece) for piece in pieces if piece not in ("layers", "vars")
    ]


def _torch_order(layer: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if values.ndim == 4:  # (h, w, in, out), depthwise (h, w, channels, 1)
        return np.ascontiguousarray(
            values.transpose((2, 3, 0, 1) if "dw" in layer or "depthwise" in layer else (3, 2, 0, 1))
        )
    return np.ascontiguousarray(values.T) if values.ndim == 2 else values

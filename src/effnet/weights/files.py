"""Opens a file or folder of weights, whichever library wrote it, and returns its tensors by name.

Pickles are only opened with weights_only=True. What training wrappers put around a state dict (DDP, torch.compile,
Lightning, EMA) is removed and noted. Keras kernels are brought into torch's order of dimensions.
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
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from effnet.arch.spec import InputSpec
from effnet.errors import CheckpointError, optional_import
from effnet.weights.bundle import BundleConfig, is_bundle, read_bundle
from effnet.weights.layouts import BASELINE_LAYOUTS, LAYOUTS

# Where a state dict is inside a checkpoint. Averages come first: they are what was evaluated.
INNER = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema", "shadow"),
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "module"),
)
STEMS = tuple(layout.mark for layout in (*LAYOUTS.values(), *BASELINE_LAYOUTS))
MAX_DEPTH = 6  # of nested dictionaries
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
KERAS_SUFFIXES = (".h5", ".hdf5", ".keras")
HEADLESS_HF = "embeddings.convolution.weight"  # the stem of transformers' EfficientNetModel, which has no classifier
# The layer of a Keras network that normalises images: mean, variance and their count, by name and by number.
KERAS_INPUT = tuple(f"normalization/{leaf}" for leaf in ("mean", "variance", "count", "0", "1", "2"))
DAMAGED = (  # what torch, safetensors, zipfile and h5py raise for files that they cannot read
    *(SafetensorError, zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError),
    *(AttributeError, OverflowError, AssertionError, struct.error),
)


@dataclass(frozen=True)
class WeightFile:
    """Flat tensors under the names of the library that wrote them."""

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)  # config.json of a hub folder
    preprocessor: dict[str, Any] = field(default_factory=dict)  # preprocessor_config.json of a transformers folder
    bundle: BundleConfig | None = None
    notes: tuple[str, ...] = ()  # what was removed around the tensors
    beside: tuple[str, ...] = ()  # names of tensors that do not belong to the network

    @property
    def timm_config(self) -> dict[str, Any]:
        """timm's pretrained_cfg; empty where there is none."""
        config = self.config.get("pretrained_cfg", self.config)  # older folders have one flat config
        return config if isinstance(config, dict) and "input_size" in config else {}


def open_weights(path: Path) -> WeightFile:
    """Read a weight file, a bundle, or a hub folder of timm or transformers; raises as `read_checkpoint`."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if is_bundle(path):
        tensors, bundle = read_bundle(path)
        return WeightFile(path, tensors, bundle=bundle)
    config, preprocessor, file = {}, {}, path
    if path.is_dir():
        file = next((path / name for name in FOLDER_FILES if (path / name).is_file()), path)
        if file is path:
            hint = f"; the model of this run is {path / 'best'}" if (path / "best").is_dir() else ""
            raise CheckpointError(f"the folder {path} holds none of {', '.join(FOLDER_FILES)}{hint}")
        config, preprocessor = _read_json(path / "config.json"), _read_json(path / "preprocessor_config.json")
    if not file.stat().st_size:
        raise CheckpointError(f"{file} is empty")
    try:
        if file.suffix.lower() in KERAS_SUFFIXES:
            return WeightFile(path, _load_keras(file), config, preprocessor)
        loaded = load_file(file) if file.suffix == ".safetensors" else _load_pickle(file)
    except DAMAGED as error:
        reason = re.split(r"\n|\. ", str(error))[0]
        raise CheckpointError(f"{file} is damaged or not a weight file ({type(error).__name__}: {reason})") from error
    try:
        tensors, beside, notes = unwrap(loaded)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    return WeightFile(path, tensors, config, preprocessor, notes=notes, beside=beside)


def unwrap(loaded: object) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """The network's tensors in what a training script saved, names of other tensors, and notes on what was removed."""
    path = _path_to_tensors(loaded)
    if path is None:
        raise CheckpointError("it holds no named tensors, so it is not a state dict")
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
    notes.append(f"removed the prefix {prefix!r} from the keys")
    return inside, tuple(key for key in tensors if not key.startswith(prefix)), tuple(notes)


def keras_input(file: WeightFile, resolution: int) -> tuple[InputSpec | None, tuple[str, ...]]:
    """How images are prepared by the normalisation in a Keras network, and notes; None where it has none.

    Keras divides by the root of the variance. Where that variance is ImageNet's std, a known slip in Keras' published
    weights, it divides by the root once more.
    """
    stated = [file.tensors[key] for key in KERAS_INPUT if key in file.tensors]
    if len(stated) < 2:
        return None, ()
    mean, variance = (tensor.flatten().float() for tensor in stated[:2])
    std, notes = variance.sqrt(), tuple[str, ...]()
    if variance.shape == (3,) and torch.allclose(variance, torch.tensor(InputSpec.std)):
        std = variance
        notes = ("its variance is ImageNet's std, as in Keras' published weights: it was read as the std",)
    return InputSpec(resolution, resolution, tuple(mean.tolist()), tuple(std.tolist()), "bilinear", "squash"), notes


def _path_to_tensors(loaded: object, depth: int = 0) -> tuple[str, ...] | None:
    """The names that lead to the first dictionary with tensors as values."""
    if not isinstance(loaded, Mapping) or depth > MAX_DEPTH:
        return None
    for name in INNER:
        if (path := _path_to_tensors(loaded.get(name), depth + 1)) is not None:
            return name, *path
    return () if any(isinstance(value, Tensor) for value in loaded.values()) else None


def _prefix(keys: Collection[str], marks: tuple[str, ...] = STEMS) -> str | None:
    """The prefix of the network's own names (DDP: module., torch.compile: _orig_mod.), found by one of `marks`."""
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
            warnings.simplefilter("ignore")  # torch warns of odd files before it raises an error that says more
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        advice = "If you trust it, save only its state dict: torch.save(model.state_dict(), path)"
        if isinstance(error, RuntimeError):
            if "weights_only" not in str(error):
                raise
            reason = "is a TorchScript archive or of torch's oldest format: opening it would run code in it"
            raise CheckpointError(f"{file} {reason}. {advice}") from error
        if "Unsupported operand" in str(error):
            raise CheckpointError(f"{file} is damaged, or neither torch.save nor safetensors wrote it") from error
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        objects = f"Python objects{f' ({found[1]})' if found else ''}"
        raise CheckpointError(f"{file} holds {objects}, and opening it would run their code. {advice}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    return loaded if isinstance(loaded, dict) else {}


def _load_keras(path: Path) -> dict[str, Tensor]:
    """Arrays as LAYER/LEAF, however deep the layer is nested: by name in older files, by class and number in newer."""
    with optional_import(f"reading {path.name}"):
        import h5py

    datasets: dict[str, np.ndarray[Any, Any]] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and not name.startswith("optimizer"):
            datasets[name] = np.asarray(item)

    content: Path | io.BytesIO = path
    if path.suffix.lower() == ".keras":
        with zipfile.ZipFile(path) as archive:
            content = io.BytesIO(archive.read("model.weights.h5"))
    with h5py.File(content, "r") as file:
        file.visititems(visit)
    short = {name: "/".join(_keras_pieces(name)[-2:]) for name in datasets}
    times = Counter(short.values())
    return {
        (key if times[key] == 1 else name): torch.from_numpy(_torch_order(key, datasets[name]))
        for name, key in short.items()
    }


def _keras_pieces(name: str) -> list[str]:
    """The parts of `layers/conv2d_3/vars/0`, or in older files of `stem_conv/stem_conv/kernel:0`."""
    pieces = name.partition(":")[0].replace("depthwise_kernel", "kernel").split("/")
    # older files number the normalisation of the input through all networks of one program
    pieces = [re.sub(r"^normalization_\d+$", "normalization", piece) for piece in pieces]
    return [piece for piece in pieces if piece not in ("layers", "vars")]


def _torch_order(layer: str, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if values.ndim == 4:  # (h, w, in, out), depthwise (h, w, channels, 1)
        values = values.transpose((2, 3, 0, 1) if "dw" in layer or "depthwise" in layer else (3, 2, 0, 1))
    return (values.T if values.ndim == 2 else values).copy()

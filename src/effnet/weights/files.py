"""Opens a file or folder of weights, whichever library wrote it: flat tensors, and how images are prepared for them.

Pickles are opened with weights_only=True and in no other way. What training wrappers put around a state dict (DDP,
torch.compile, Lightning, EMA) is taken off and noted. Keras kernels are turned into torch's order of dimensions.
A hub folder states how images are prepared (timm: config.json; transformers: preprocessor_config.json), a Keras file
holds it as a layer, and a bundle knows all about its network.
"""

from __future__ import annotations

import dataclasses
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

from effnet.arch.spec import FitMode, InputSpec, Interpolation
from effnet.errors import CheckpointError, optional_import
from effnet.weights.bundle import BundleConfig, is_bundle, read_bundle
from effnet.weights.layouts import BASELINE_LAYOUTS, LAYOUTS
from effnet.weights.registry import crop_input

if TYPE_CHECKING:
    import h5py

# In this order: an average of the weights is what was evaluated, so it goes first.
INNER = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema", "shadow"),
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "module"),
)
STEMS = tuple(layout.mark for layout in (*LAYOUTS.values(), *BASELINE_LAYOUTS.values()))
MAX_DEPTH = 6  # of dictionaries inside one another
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
KERAS_SUFFIXES = (".h5", ".hdf5", ".keras")
HEADLESS_HF = "embeddings.convolution.weight"  # the stem of transformers' EfficientNetModel, which has no classifier
CROP_FRACTION = 0.875  # timm's where its config names none: what is kept of the resized image
RESAMPLE: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # Pillow's numbers
TIMM_FITS: dict[str, FitMode] = {"center": "crop", "squash": "squash", "border": "pad"}
HF_DEFAULTS: dict[str, Any] = {  # of EfficientNetImageProcessor
    "size": {"height": 346, "width": 346},
    "resample": 3,
    "do_center_crop": False,
    "crop_size": {"height": 289, "width": 289},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "rescale_offset": False,
    "do_normalize": True,
    "image_mean": [0.5] * 3,
    "image_std": [0.5] * 3,
    "include_top": True,
}
# How a Keras network prepares its images: mean, variance and their count, by name and by number.
KERAS_INPUT = tuple(f"normalization/{leaf}" for leaf in ("mean", "variance", "count", "0", "1", "2"))
DAMAGED = (  # what torch, safetensors, zipfile and h5py raise over files that are not theirs
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
    notes: tuple[str, ...] = ()  # what was taken off
    beside: tuple[str, ...] = ()  # names of tensors that do not belong to the network

    @property
    def timm_config(self) -> dict[str, Any]:
        """timm's pretrained_cfg; empty where there is none."""
        config = self.config.get("pretrained_cfg", self.config)  # older folders have all in one
        return config if isinstance(config, dict) and "input_size" in config else {}


def open_weights(path: Path) -> WeightFile:
    """Read a .pth, .pt, .bin, .safetensors, .h5 or .keras file, a bundle, or a hub folder of timm or transformers.

    Raises:
        CheckpointError: it is missing, damaged, or holds no tensors.
        BundleError: a bundle that was changed or cut short.
        MissingExtraError: a Keras file, and h5py is not installed.
    """
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


def stated_input(file: WeightFile, resolution: int) -> tuple[InputSpec | None, tuple[str, ...]]:
    """How images are prepared, by what the file says, and notes on it; None where it says nothing.

    Args:
        file: the file and what stands beside it.
        resolution: of the network; Keras does not state one.

    Raises:
        CheckpointError: what it says is not understood.
    """
    try:
        if file.bundle:
            return file.bundle.input, ()
        if file.timm_config:
            return _timm_input(file.timm_config), ()
        if file.preprocessor:
            return _hf_input(HF_DEFAULTS | file.preprocessor)
        return _keras_input(file, resolution)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file.path}: how it prepares images is not understood ({error})") from error


def unwrap(loaded: object) -> tuple[dict[str, Tensor], tuple[str, ...], tuple[str, ...]]:
    """The network's tensors in what a training script saved, the names beside them, and a note on what was taken off.

    Raises:
        CheckpointError: there are no tensors in it, or those of several networks.
    """
    path = _path_to_tensors(loaded)
    if path is None:
        raise CheckpointError("it holds no tensors under names, so it is not a state dict")
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
            warnings.simplefilter("ignore")  # torch's hints on odd files, which all end in an error that says more
            return torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        advice = "If you trust it, save only its state dict: torch.save(model.state_dict(), path)"
        if isinstance(error, RuntimeError):
            if "weights_only" not in str(error):
                raise
            raise CheckpointError(
                f"{file} is a TorchScript archive or of torch's oldest format: opening it would run what is inside. "
                + advice
            ) from error
        if "Unsupported operand" in str(error):
            raise CheckpointError(f"{file} is damaged, or neither torch.save nor safetensors wrote it") from error
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(
            f"{file} holds Python objects beside its tensors{f' ({found[1]})' if found else ''}, and opening those can "
            f"run anybody's code. {advice}"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    return loaded if isinstance(loaded, dict) else {}


def _load_keras(path: Path) -> dict[str, Tensor]:
    """Layers by name in older files, by class and running number in newer ones."""
    with optional_import(f"reading {path.name}"):
        import h5py

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


def _timm_input(config: Mapping[str, Any]) -> InputSpec:
    result = crop_input(
        int(config["input_size"][-1]),
        config.get("crop_pct", CROP_FRACTION),
        tuple(config.get("mean", InputSpec.mean)),
        tuple(config.get("std", InputSpec.std)),
        config.get("interpolation", "bicubic"),
    )
    return dataclasses.replace(result, fit=TIMM_FITS.get(config.get("crop_mode", "center"), "crop"))


def _hf_input(config: Mapping[str, Any]) -> tuple[InputSpec, tuple[str, ...]]:
    """transformers: pixels * factor - offset, minus mean, by std, and by std once more where `include_top` is set.

    The published ones set it, because they hold the square root of the std.
    """
    factor = config["rescale_factor"] * 255 if config["do_rescale"] else 255
    offset = float(config["do_rescale"] and config["rescale_offset"])
    mean, std = config["image_mean"], config["image_std"]
    ones = [1.0] * len(std)
    first, second = (std if config["do_normalize"] else ones), (std if config["include_top"] else ones)
    mean = mean if config["do_normalize"] else [0.0] * len(std)
    result = InputSpec(
        _side(config["size"]),
        _side(config["size"]),
        tuple((value + offset) / factor for value in mean),
        tuple(a * b / factor for a, b in zip(first, second, strict=True)),
        RESAMPLE[config["resample"]],
        "squash",
    )
    if not config["do_center_crop"]:
        return result, ()
    result = dataclasses.replace(result, size=_side(config["crop_size"]), fit="crop")
    if "shortest_edge" in config["size"]:
        return result, ()
    return result, ("its processor squashes photos before it crops them: here they keep their aspect ratio",)


def _side(size: Mapping[str, int] | int) -> int:
    return size if isinstance(size, int) else size.get("height") or size["shortest_edge"]


def _keras_input(file: WeightFile, resolution: int) -> tuple[InputSpec | None, tuple[str, ...]]:
    """Keras normalises inside the network, by the square root of the variance.

    Where that variance is ImageNet's std, a known slip in Keras' published weights, it divides by the root once more.
    """
    stated = [file.tensors[key] for key in KERAS_INPUT if key in file.tensors]
    if len(stated) < 2:
        return None, ()
    mean, variance = (tensor.flatten().float() for tensor in stated[:2])
    std, notes = variance.sqrt(), tuple[str, ...]()
    if variance.shape == (3,) and torch.allclose(variance, torch.tensor(InputSpec.std)):
        std = variance
        notes = ("its variance is ImageNet's std, as in Keras' published weights, and was read as the std",)
    return InputSpec(resolution, resolution, tuple(mean.tolist()), tuple(std.tolist()), "bilinear", "squash"), notes

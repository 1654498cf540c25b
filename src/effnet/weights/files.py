"""Opens a weight file or folder of any library, and returns its tensors by name.

Wrappers around a state dict (DDP, torch.compile, Lightning, EMA) are removed and noted.
Needs no torch: tensors are numpy arrays.
"""

from __future__ import annotations

import dataclasses
import re
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from effnet.arch.spec import NetworkSpec
from effnet.errors import CheckpointError, MismatchError, reason
from effnet.files import parse_json, read_bytes
from effnet.weights.arrays import AnyArray, read_safetensors
from effnet.weights.bundle import BundleConfig, is_bundle, name_model_inside, open_bundle
from effnet.weights.keras import SUFFIXES as KERAS_SUFFIXES
from effnet.weights.keras import KerasLayer, load_keras
from effnet.weights.layouts import BASELINE_LAYOUTS, LAYOUTS, Layout, LayoutStep, list_names
from effnet.weights.pickles import PassedOver, read_torch

# Keys of a state dict inside a checkpoint. Averages come first, since they were evaluated.
INNER = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema", "params_ema", "shadow"),
    *("state_dict", "model_state_dict", "model_state", "model", "net", "network", "params", "module"),
)
STEMS = tuple(layout.mark for layout in (*LAYOUTS.values(), *BASELINE_LAYOUTS))
MAX_DEPTH = 6  # of nested dictionaries
FOLDER_FILES = ("model.safetensors", "pytorch_model.bin")
HEADLESS_HF = "embeddings.convolution.weight"  # the stem of transformers' EfficientNetModel, which has no classifier
# Pieces of the names of tensors that a training leaves beside a network
TRAINING = re.compile(
    r"(^|[./])(criteri\w+|(\w+_)?loss(es)?(_fn|_func\w*)?|optim\w*|sched\w*|momentum\w*|grads?|seed_generator|"
    r"(\w+_)?(metrics?|acc(uracy)?)(?!.*weight$)|queue|confmat|[tf][pn]$)(_?\d+)?([./]|$)",
    re.IGNORECASE,
)
COUNTS = re.compile(
    r"(^|[./])(\w+_)?(ema|shadow|averaged|decay|step|epoch|scaler)([./]|$)", re.IGNORECASE
)  # only scalars
DAMAGED = (  # what reading a file that is not one of weights raises, here and in h5py
    *(OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, OverflowError, MemoryError),
    *(AssertionError, struct.error),
)


@dataclass(frozen=True)
class WeightFile:
    """Flat tensors under the names of the library that wrote them."""

    path: Path
    tensors: dict[str, AnyArray]
    config: dict[str, Any] = field(default_factory=dict)  # config.json of a hub folder
    preprocessor: dict[str, Any] = field(default_factory=dict)  # preprocessor_config.json of a transformers folder
    bundle: BundleConfig | None = None
    notes: tuple[str, ...] = ()  # wrappers that were removed
    beside: dict[str, AnyArray] = field(default_factory=dict)  # tensors outside the network's state dict
    idle: frozenset[str] = frozenset()  # those of them that compute nothing: copies, and remains of a training
    layers: tuple[KerasLayer, ...] | None = None  # of a Keras file that lists them

    @property
    def timm_config(self) -> dict[str, Any]:
        """timm's pretrained_cfg; empty if there is none."""
        config = self.config.get("pretrained_cfg", self.config)  # older folders have one flat config
        return config if isinstance(config, dict) and "input_size" in config else {}


def open_weights(path: Path) -> WeightFile:
    """Read a weight file, a bundle, or a hub folder of timm or transformers; raises as `read_checkpoint`."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if is_bundle(path):
        bundle = open_bundle(path)
        return WeightFile(path, dict(bundle.weights), bundle=bundle.config)
    config, preprocessor, files = {}, {}, [path]
    if path.is_dir():
        files = _folder_files(path)
        config, preprocessor = _read_json(path / "config.json"), _read_json(path / "preprocessor_config.json")
    loaded: Any = {}
    held: Any
    for file in files:
        if not file.stat().st_size:
            raise CheckpointError(f"{file} is empty")
        try:
            if file.suffix.lower() in KERAS_SUFFIXES:
                tensors, layers = load_keras(file)
                return WeightFile(path, tensors, layers=layers)
            held = read_safetensors(read_bytes(file)) if file.suffix == ".safetensors" else read_torch(file)
        except DAMAGED as error:
            raise CheckpointError(f"{file} is damaged or not a weight file ({reason(error)})") from error
        loaded = held if len(files) == 1 else {**loaded, **held}
    try:
        tensors, beside, idle, notes = unwrap(loaded)
    except CheckpointError as error:
        raise CheckpointError(f"{path if path.is_file() else files[0]}: {error}") from error
    return WeightFile(path, tensors, config, preprocessor, notes=notes, beside=beside, idle=idle)


def unwrap(loaded: object) -> tuple[dict[str, AnyArray], dict[str, AnyArray], frozenset[str], tuple[str, ...]]:
    """The network's tensors in a training script's checkpoint, and the tensors beside them.

    Also returns the names of those that compute nothing, and notes on removed wrappers.
    """
    path = _find(loaded, _holds_network)
    if path is None and (path := _find(loaded, _holds_tensors)) is None:
        hidden = _holds_hidden(loaded)
        where = " outside of its arrays of numpy and its objects of settings, which are passed over" if hidden else ""
        raise CheckpointError(f"it holds no named tensors{where}, so it is not a state dict")
    beside, notes = dict[str, AnyArray](), []
    for name in path:
        assert isinstance(loaded, Mapping)
        others = [other for other in loaded if other != name and _is_name(other)]
        known = [str(other) for other in others if _find(loaded[other], _holds_tensors) is not None]
        unread = f", not {', '.join(known)}" if known else ""
        notes.append(f"took {name!r} out of the checkpoint{unread}")
        rivals = [
            repr(other) for other in others if name not in INNER and _find(loaded[other], _holds_network) is not None
        ]
        if rivals:
            raise CheckpointError(f"it holds several networks, under {name!r}, {', '.join(rivals)}: save one of them")
        for other in others:  # a head that was saved by itself; another copy of the network is no such thing
            if _find(loaded[other], _holds_network) is None:
                beside |= {key: value for key, value in _nested(loaded[other], f"{other}.", set()) if value.ndim}
        loaded = loaded[name]
    assert isinstance(loaded, Mapping)
    tensors = _tensors(loaded)

    prefix = _prefix(tensors, STEMS)
    if prefix is None and (prefix := _prefix(tensors, (HEADLESS_HF,))) is not None:
        tensors = {key.replace(prefix, f"{prefix}efficientnet.", 1): value for key, value in tensors.items()}
    if not prefix:
        return tensors, beside, _find_idle(tensors, beside, ""), tuple(notes)
    notes.append(f"removed the prefix {prefix!r} from the keys")
    beside = {key: value for key, value in tensors.items() if not key.startswith(prefix)} | beside
    inside = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return inside, beside, _find_idle(inside, beside, prefix), tuple(notes)


def name_classifier(file: WeightFile, layout: Layout, num_classes: int | None) -> WeightFile:
    """The file with its classifier under the library's name, if another linear layer replaced it."""
    steps = [LayoutStep("classifier", (), dropout=dropout) for dropout in (True, False)]
    own, own_bias = (key for key, _ in layout.keys(steps[0]))
    everything = file.beside | file.tensors
    linear = [key for key in _find_layers(file, file.tensors) if everything[key].ndim == 2]
    named = any(key in file.tensors for step in steps for key, _ in layout.keys(step))
    if not named and len(linear) > 1 and num_classes is None:
        names = list_names(linear)
        raise MismatchError(f"{file.path} has several linear layers where {layout.name} has one classifier: {names}")
    if named or len(linear) != 1:
        return file
    (weight,) = linear
    bias = weight.removesuffix(layout.weight[0]) + layout.weight[1]
    unbiased = [layer for layer in file.layers or () if layer.kind == "Dense" and layer.get("use_bias") is False]
    if bias not in everything and not unbiased:
        return file
    values = everything[weight], everything.get(bias, np.zeros(len(everything[weight]), np.float32))
    taken = weight, bias
    rest, beside = ({key: held[key] for key in held if key not in taken} for held in (file.tensors, file.beside))
    return dataclasses.replace(
        file,
        tensors=rest | dict(zip((own, own_bias), values, strict=True)),
        beside=beside,
        notes=(*file.notes, f"its only linear layer, {weight}, was taken for the classifier"),
    )


def check_unread(file: WeightFile, spec: NetworkSpec, unread: Mapping[str, AnyArray], *, fresh: bool) -> None:
    """Raise MismatchError if unread tensors may take part in computing; with a fresh classifier they do not matter.

    `unread`: of the network's own state dict.
    """
    shapes = {key: tensor.shape for key, tensor in (file.beside | dict(unread)).items()}
    layers = [key for key in _find_layers(file, unread) if len(shapes[key]) == 4 or not fresh]
    if losses := [key for key in layers if shapes[key] == (spec.num_classes,) and re.search("weights?$", key)]:
        layers = [key for key in layers if key not in losses or key.replace("weight", "bias") in shapes]
    if layers:
        raise MismatchError(
            f"{file.path} holds layers that {spec.name} does not have, so it would answer differently: "
            f"{list_names(layers)}; with another num_classes, the body is read and the classifier starts fresh"
        )


def _folder_files(folder: Path) -> list[Path]:
    """The weight file in a hub folder, or its shards."""
    for name in FOLDER_FILES:
        if (folder / name).is_file():
            return [folder / name]
        shards = _read_json(folder / f"{name}.index.json").get("weight_map")
        if isinstance(shards, dict) and shards:
            files = [folder / Path(str(shard)).name for shard in sorted({*shards.values()})]
            if lost := next((file for file in files if not file.is_file()), None):
                raise CheckpointError(f"{lost} is missing: {name}.index.json names it as one of {len(files)} files")
            return files
    raise CheckpointError(f"the folder {folder} holds none of {', '.join(FOLDER_FILES)}{name_model_inside(folder)}")


def _find(
    loaded: object, accept: Callable[[Mapping[Any, Any]], bool], depth: int = 0, seen: set[int] | None = None
) -> tuple[Any, ...] | None:
    """The names that lead to the first dictionary that is accepted: those of INNER first, then itself, then others.

    `seen`: dictionaries that were searched already; a file may hold one under any number of names.
    """
    seen = set() if seen is None else seen
    if not isinstance(loaded, Mapping) or depth > MAX_DEPTH or id(loaded) in seen:
        return None
    seen.add(id(loaded))
    others = (name for name in loaded if _is_name(name) and name not in INNER and accept is _holds_network)
    for name in (*INNER, None, *others):
        if name is None and accept(loaded):
            return ()
        if name is not None and (path := _find(loaded.get(name), accept, depth + 1, seen)) is not None:
            return name, *path
    return None


def _tensors(values: Mapping[Any, Any]) -> dict[str, AnyArray]:
    return {key: value for key, value in values.items() if isinstance(value, np.ndarray) and isinstance(key, str)}


def _nested(values: object, name: str, seen: set[int], depth: int = 0) -> Iterator[tuple[str, AnyArray]]:
    """Every named tensor below `values`, but those of an optimizer's state dict and of what was `seen` already."""
    if id(values) in seen or depth > MAX_DEPTH:
        return
    seen.add(id(values))
    if isinstance(values, (list, tuple)):
        values = {number: value for number, value in enumerate(values) if not isinstance(value, np.ndarray)}
    if isinstance(values, Mapping) and "param_groups" not in values:
        for key, value in values.items():
            if isinstance(value, np.ndarray) and _is_name(key):
                yield f"{name}{key}", value
            elif _is_name(key):
                yield from _nested(value, f"{name}{key}.", seen, depth + 1)


def _is_name(key: object) -> bool:
    return isinstance(key, (str, int))


def _holds_tensors(values: Mapping[Any, Any]) -> bool:
    return bool(_tensors(values))


def _holds_network(values: Mapping[Any, Any]) -> bool:
    return bool(_find_prefixes(_tensors(values), (*STEMS, HEADLESS_HF)))


def _find_layers(file: WeightFile, own: Mapping[str, AnyArray]) -> list[str]:
    """The keys that may compute, of `own`, which are in the network's state dict, and of the tensors beside it."""
    return [
        *(key for key, tensor in own.items() if tensor.dtype.kind == "f" and not _is_left(key, tensor)),
        *(key for key, tensor in file.beside.items() if tensor.dtype.kind == "f" and key not in file.idle),
    ]


def _is_left(key: str, tensor: AnyArray) -> bool:
    """Whether it is a remain of a training; `key` is without a wrapper's name."""
    return bool(TRAINING.search(key) or (tensor.size == 1 and COUNTS.search(key)))


def _find_idle(tensors: Mapping[str, AnyArray], beside: Mapping[str, AnyArray], prefix: str) -> frozenset[str]:
    """The keys of `beside` that compute nothing: copies of `tensors`, and remains of a training."""
    copies = _find_prefixes(beside, (*STEMS, *(_join(stem) for stem in STEMS)))
    names = {*tensors, *map(_join, tensors)}
    wrapper = prefix.split(".")[:-1]

    def is_idle(key: str) -> bool:
        if any(key.startswith(copy) and key.removeprefix(copy) in names for copy in copies):
            return True
        pieces = key.split(".")
        own = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(pieces[:-1], wrapper, strict=False)))
        return _is_left(".".join(pieces[own:]), beside[key])

    return frozenset(filter(is_idle, beside))


def _join(key: str) -> str:
    """As averages are named whose wrapper allows no dots (LitEma)."""
    return key.replace(".", "")


def _find_prefixes(keys: Collection[str], marks: tuple[str, ...] = STEMS) -> set[str]:
    """The prefix of the network's own names (DDP: module., torch.compile: _orig_mod.), found by one of `marks`."""
    return {key.removesuffix(mark) for key in keys for mark in marks if f".{key}".endswith(f".{mark}")}


def _prefix(keys: Collection[str], marks: tuple[str, ...]) -> str | None:
    """The prefix of the network to read, preferring averaged weights; None if there is no network."""
    prefixes = _find_prefixes(keys, marks)
    averaged = {prefix for prefix in prefixes if re.search(r"(^|[._])(ema|averag)", prefix.lower())}
    chosen = averaged if len(averaged) == 1 else prefixes
    if len(chosen) > 1:
        names = ", ".join(repr(prefix) for prefix in sorted(prefixes))
        raise CheckpointError(f"it holds several networks, under {names}: save the state dict of one of them")
    return next(iter(chosen), None)


def _holds_hidden(loaded: object) -> bool:
    """Whether anything in it was skipped."""
    seen, rest = set[int](), [loaded]
    while rest:
        each = rest.pop()
        if isinstance(each, PassedOver):
            return True
        if isinstance(each, (Mapping, list, tuple)) and id(each) not in seen:
            seen.add(id(each))
            rest += each.values() if isinstance(each, Mapping) else each
    return False


def _read_json(path: Path) -> dict[str, Any]:
    try:
        loaded = parse_json(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    return loaded if isinstance(loaded, dict) else {}

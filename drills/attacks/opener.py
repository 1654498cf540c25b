"""A process that writes valid files of every kind that effnet opens, then opens the requested files one by one.

    python -m attacks.opener FOLDER < REQUESTS      (in drills/)

A request is a line of JSON: [kind, path]. The answer, also a line, gives the result (two digests: of the network and
its context, and of all numbers), why the file was refused, or an exception that should not have been raised.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from attacks.reader import attempt, peak_mb
from PIL import Image
from safetensors.torch import save_file

import effnet
from effnet.arch.cost import cost
from effnet.arch.spec import NetworkSpec, StageSpec
from effnet.arch.specfile import read_spec, spec_text
from effnet.arch.variants import spec as make_spec
from effnet.data.dataset import place, read_data
from effnet.data.shards import member_names, open_file
from effnet.errors import EffnetError
from effnet.exporting.export import export
from effnet.models.efficientnet import EfficientNet
from effnet.packing.pack import pack
from effnet.runtime.load import read_model
from effnet.scaling.compound import read_rule, scale
from effnet.training.recipe import read_recipe
from effnet.training.run_folder import RunPlan, check_inputs, load_checkpoint, read_split
from effnet.weights.convert import foreign_state
from effnet.weights.layouts import LAYOUTS, policy_of
from effnet.weights.writers import write_checkpoint

MEMORY = 16 * 10**9  # bytes of address space for the process
IMAGES = 8  # per class of the data set
Found = tuple[Any, Any]  # the context; the numbers


def make(folder: Path) -> None:
    """Write valid files of every kind, with the names that `models.py` uses."""
    torch.manual_seed(0)
    stages = (StageSpec(1, 3, 1, 8, 1), StageSpec(4, 5, 2, 16, 2))
    own = EfficientNet(NetworkSpec("tiny", stages, resolution=32, stem=8, head=32, num_classes=4)).eval()
    named = make_spec("b0", width=0.5, depth=0.4, resolution=32, num_classes=5)
    family = EfficientNet(named, policy=policy_of("hf", named)).eval()
    effnet.save(own, folder / "bundle", classes=list("abcd"), source="drill")
    bundle = read_model(str(folder / "bundle"))
    for format, name in (("openvino", "openvino"), ("onnx", "model.onnx"), ("torch", "model.pt2")):
        export(bundle, folder / name, format=format)
    state = family.state_dict()
    for layout in LAYOUTS:
        if not layout.startswith("keras"):
            renamed = {
                name: tensor.contiguous() for name, tensor in foreign_state(state, named, LAYOUTS[layout]).items()
            }
            torch.save({"state_dict": renamed, "epoch": 3}, folder / f"{layout}.pth")
            save_file(renamed, folder / f"{layout}.safetensors")
    torch.save(state, folder / "older.pth", _use_new_zipfile_serialization=False)
    write_checkpoint(family, "hf", folder / "hub", input_spec=bundle.config.input)
    _write_keras(family, folder / "keras.h5")
    (folder / "spec.yaml").write_text(spec_text(make_spec("b0")))
    (folder / "rule.yaml").write_text("name: mine\nalpha: 1.2\nbeta: 1.1\ngamma: 1.15\n")
    (folder / "recipe.yaml").write_text("base: finetune\nlr: 0.01\nepochs: 3\nmixup: 0.1\n")
    random = np.random.default_rng(0)
    for number in range(2 * IMAGES):
        image = folder / "data" / "ab"[number % 2] / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(image)
    rows = "".join(
        f"data/{'ab'[n % 2]}/{n}.png,{'ab'[n % 2]},{'val' if n > 11 else 'train'}\n" for n in range(2 * IMAGES)
    )
    (folder / "manifest.csv").write_text("path,label,split\n" + rows)
    pack(read_data(folder / "data"), folder / "shards", 20_000)
    settings: dict[str, Any] = {"batch": 4, "epochs": 1, "workers": 0, "threads": 1, "save_seconds": 0.0}
    effnet.train(folder / "data", _small_spec(folder), "scratch", out=folder / "run", **settings)


def _small_spec(folder: Path) -> Path:
    path = folder / "small.yaml"
    stages = (StageSpec(1, 3, 2, 8, 1),)
    path.write_text(spec_text(NetworkSpec("small", stages, resolution=32, stem=8, head=16)))
    return path


def _write_keras(network: EfficientNet, path: Path) -> None:
    """Write the network to a Keras weights file."""
    import h5py

    with h5py.File(path, "w") as file:
        for name, tensor in foreign_state(network.state_dict(), network.spec, LAYOUTS["keras"]).items():
            values = tensor.numpy()
            if values.ndim == 4:
                values = values.transpose((2, 3, 0, 1) if "dw" in name else (2, 3, 1, 0))
            file[name] = values.T if values.ndim == 2 else values


def open_model(path: Path) -> Found:
    """Classify with a MODEL, as effnet predict does."""
    timm = {"source": "timm"} if path.name.startswith("timm") else {}
    with effnet.load(path, **timm) as model:
        size, channels = model.input.size, model.input.channels
        if size > 512:
            return "large", "large"
        pixels = np.random.default_rng(0).integers(0, 256, (2, size, size, channels), dtype=np.uint8)
        logits, _ = model.answer(pixels)
        model.describe(logits, None)  # refuses logits that are not finite
        return (model.spec, model.input, model.classes, model.calibration), logits.tobytes()


def open_spec(path: Path) -> Found:
    """Open a network, which must match the YAML, and count its costs."""
    found, values = read_spec(path), yaml.safe_load(path.read_text("utf-8"))
    for name, value in values.items():
        if name != "stages" and getattr(found, name) != value:
            raise ValueError(f"{name} is {getattr(found, name)}, where YAML says {value}")
    cost(found)
    return found, found


def open_rule(path: Path) -> Found:
    """Open a rule, which must match the YAML, and scale by it."""
    found, values = read_rule(path), yaml.safe_load(path.read_text("utf-8"))
    if any(getattr(found, name) != values[name] for name in ("alpha", "beta", "gamma")):
        raise ValueError(f"the rule is {found}, where YAML says {values}")
    scale(make_spec("b0"), 1.0, found)
    return found, found


def open_recipe(path: Path) -> Found:
    """Open a recipe."""
    found = read_recipe(path)
    return found, found


def open_data(path: Path) -> Found:
    """Open a manifest, a folder or shards; every listed image must have its bytes and class."""
    data = read_data(path)
    if path.suffix == ".csv":
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
        cells = {cell.strip() for row in csv.reader(io.StringIO(text, newline="")) for cell in row}
        if unknown := [each for each in data.samples if each.path not in cells and "," in text.partition("\n")[0]]:
            raise ValueError(f"{unknown[0]} is in no cell")
    contents = {}
    for sample in data.samples:
        try:
            with open_file(place(data.root, sample.path)) as opened:
                contents[sample.path] = (data.classes[sample.label], hashlib.sha256(opened.read()).hexdigest())
        except (EffnetError, OSError, ValueError):
            contents[sample.path] = ("", "")
    if path.is_dir():
        for shard in path.glob("*.tar"):
            member_names(str(shard))
    return sorted(contents.items()), sorted(contents.items())


def open_run(path: Path) -> Found:
    """Read what effnet train --resume reads first."""
    plan, _ = RunPlan.read(path)
    state, problem = load_checkpoint(path)
    check_inputs(state["inputs"], plan, path)
    read_split(plan.data, path, plan.classes)
    network = {name: tensor.numpy().tobytes() for name, tensor in state["network"].items()}
    return plan.recipe, ("" if problem else sorted(network.items()))


OPENERS: dict[str, Callable[[Path], Found]] = {
    **{"model": open_model, "spec": open_spec, "rule": open_rule, "recipe": open_recipe},
    **{"data": open_data, "run": open_run},
}


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def main() -> None:
    """Write the files, then open those that standard input names."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    folder = Path(sys.argv[1])
    if not (folder / "run").exists():
        make(folder)
    print(json.dumps({"base_mb": peak_mb()}), flush=True)
    for line in sys.stdin:
        kind, path = json.loads(line)
        base, began = peak_mb(reset=True), time.process_time()
        found, refused, raised = attempt(lambda k=kind, p=path: OPENERS[k](Path(p)))
        digests = [] if found is None else [_digest(each) for each in found]
        items = found[0] if kind == "data" and found else []
        seconds, mb = time.process_time() - began, peak_mb() - base
        told = {
            "digests": digests,
            "nothing": _digest(""),
            "items": items,
            "refused": refused,
            "raised": raised,
            "seconds": seconds,
            "mb": mb,
        }
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()

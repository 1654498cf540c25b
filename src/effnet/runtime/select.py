"""Which engine runs a model, by rule, and the one place where models are opened. Nothing is timed here.

The rules, and why. What they cost against the measured best: `python benchmarks/rules.py`, in benchmarks/results.

- Engine of a network: the first of native (effnet's own), OpenVINO, ONNX Runtime and torch that is there and can run
  it; on x86 processors that have AVX2 but not AVX-512, of native, ONNX Runtime, OpenVINO and torch. native takes about
  two thirds of OpenVINO's time. It gives way to OpenVINO's bf16 where there is AMX, which it does not use, and to both
  on processors without AVX2, ARM among them, where it was not measured. torch takes 2 to 4 times as long as OpenVINO.
  With AVX-512 OpenVINO took 0.8 to 1.12 of ONNX Runtime's time in fp32 (1.12 for batches of B0 on Zen 4); with AVX2
  (Zen 3) ONNX Runtime took 0.9 to 1.04 of OpenVINO's time.
- Engine of an artifact: the first that is installed of those that run its format. For ONNX files that is ONNX Runtime,
  which also starts sooner.
- Precision: bf16 where OpenVINO or native runs a network and Machine.fast_bf16 holds (AMX, AMD's AVX-512 BF16): 0.6 to
  0.7 of fp32's time on Zen 4, Zen 5 and AMX. Else fp32. An artifact runs in the precision that it was exported for.
- Streams: a request for each core, as many as the batch has. A core that works alone waits for no other.
- Part: as many images as have their largest feature maps in CACHE together. On Zen 4 that is the best of 1, 2, 4, 8 and
  16 for B0 at 224 px and B4 at 380 px, in fp32 and bf16, in both engines; on a Xeon with twice the L2 cache the next
  larger part of B0 was 1 % faster, so it does not grow with L2. A part twice as large costs 3 to 14 %.
- Batch: 16 images, fewer of large networks: about a second of work, so that answers come soon and memory stays small.
- On a GPU: torch, in bf16 where the GPU has it, in batches four times as large. Not measured.

`effnet bench MODEL --keep` measures on this machine; what it kept is used in place of the rules.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from effnet.arch.cost import cost
from effnet.arch.spec import NetworkSpec
from effnet.errors import ArgumentError, optional_import
from effnet.fields import positive_int, read_fields
from effnet.files import parse_json, write_file
from effnet.machine import Machine, cache_folder, check_device, choose_precision, this_machine
from effnet.native import CHOSEN, instruction_set
from effnet.runtime import native
from effnet.runtime.artifact import ENGINES, Artifact, Model, metadata
from effnet.runtime.options import EngineName, EnginePrecision
from effnet.runtime.session import BF16_ENGINES, TITLES, Backend, BatchedSession, Compiler, Session
from effnet.version import __version__
from effnet.weights.bundle import Bundle

NEEDED: dict[EngineName, tuple[str, ...]] = {  # packages for a network in memory; for an artifact only the first
    "native": ("native",),
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime", "onnx"),
    "torch": ("torch",),
}
BATCH, BATCH_MACS = 16, 64e9  # images and multiply-adds of a full batch, at most
ON_GPU = 4  # batches on a GPU have 4 times the images, and up to 4^2 times the multiply-adds
KEPT = "selections"  # a folder in the cache
CACHE = 10 * 2**20  # bytes


@dataclass(frozen=True)
class Selection:
    """A backend for a model, and the reasons for it."""

    backend: Backend
    batch: int  # images of a full batch
    reason: str
    kept: bool = False  # whether `effnet bench --keep` measured it on this machine

    def __post_init__(self) -> None:
        positive_int("batch", self.batch)

    def __str__(self) -> str:
        return f"{self.backend}, batches of {self.batch}: {self.reason}"


def installed(name: str) -> bool:
    """Whether a package can be imported; for "native" whether it was compiled."""
    if name == "native":
        return not native.missing()
    try:
        return find_spec(name) is not None
    except ValueError:  # something without a spec stands in for it
        return False


def select(
    spec: NetworkSpec,
    *,
    engine: EngineName | None = None,
    precision: EnginePrecision | None = None,
    batch: int | None = None,
    threads: int | None = None,
    machine: Machine | None = None,
    installed: Collection[EngineName] | None = None,
    artifact: Artifact | None = None,
    device: str = "cpu",
) -> Selection:
    """Select the backend for a network or an artifact by the rules above. The same arguments give the same selection.

    Args:
        spec: the network, at the resolution of its images.
        engine: the only one that may run it; None: by rule.
        precision: the only one that it may compute with; None: by rule.
        batch: images of a full batch; None: by rule.
        threads: how many the engine may use; None: one for each core.
        machine: None: this one.
        installed: the engines that there are; None: those that are installed here.
        artifact: where the network is in an exported file.
        device: where it is run; other than on the CPU by torch, and no artifact.

    Raises:
        ArgumentError: a value is outside its range, or the network or artifact cannot be run so.
        MissingExtraError: no engine that is installed computes in this precision.
    """
    machine = machine or this_machine()
    if threads is not None and positive_int("threads", threads) > machine.cores:
        raise ArgumentError("threads", threads, f"must be at most {machine.cores}, the cores of this machine.")
    engines = installed_engines(artifact) if installed is None else installed
    if device != "cpu":
        engine, precision, reasons = _of_device(device, engine, precision, artifact)
    elif artifact is None:
        engine, precision, reasons = _of_network(spec, engine, precision, engines, machine)
    else:
        engine, precision, reasons = _of_artifact(artifact, engine, precision, engines, machine)
    fixed = _fixed(engine, precision, artifact)
    step = fixed or 1
    if batch is not None and positive_int("batch", batch) % step:
        rule = f"cannot be chosen: the artifact was exported for {step} images; it takes a multiple of that."
        raise ArgumentError("batch", batch, rule)
    if batch is None:
        more = 1 if device == "cpu" else ON_GPU
        batch = min(more * BATCH, int(more**2 * BATCH_MACS / cost(spec).macs))
        batch = max(step, batch - batch % step)
    backend = Backend(engine, precision, threads, device=device)
    part, streams = _parts(spec, backend, batch, fixed, machine)
    if part < batch:
        backend = dataclasses.replace(backend, part=part, streams=streams)
    return Selection(backend, batch, "; ".join(reasons))


def open_session(model: Model, selection: Selection | None = None) -> Session:
    """Open a model; the only place where models are opened.

    Args:
        model: a network with its context, in eval mode, or an artifact.
        selection: how it is run; None: see `select_for`.

    Raises:
        ArgumentError, ArtifactError, MissingExtraError: as `check_memory`; damaged artifact; no engine can run it.
    """
    check_memory(model.config.spec)
    selection = selection or select_for(model)
    backend = selection.backend
    fixed = _fixed(backend.engine, backend.precision, model if isinstance(model, Artifact) else None)
    session = BatchedSession(compiler(model, backend), backend, selection.batch, least=1 if fixed is None else fixed)
    session.prepare()
    return session


def select_for(
    model: Model,
    *,
    engine: EngineName | None = None,
    precision: EnginePrecision | None = None,
    batch: int | None = None,
    threads: int | None = None,
    device: str = "cpu",
) -> Selection:
    """What `effnet bench --keep` kept for a model on this machine, where it fits the arguments; else see `select`."""
    artifact = model if isinstance(model, Artifact) else None
    pins: Any = {"engine": engine, "precision": precision, "batch": batch, "threads": threads}
    selection = select(model.config.spec, artifact=artifact, device=device, **pins)
    kept = kept_selection(model, selection.batch, threads=threads) if device == "cpu" else None
    if kept and engine in (None, kept.backend.engine) and precision in (None, kept.backend.precision):
        return kept
    return selection


def compiler(model: Model, backend: Backend, *, recording: bool = False) -> Compiler:
    """What compiles a model's graphs: images and streams -> a graph; images 0: any number.

    Args:
        model: see `open_session`.
        backend: how it is run; its part and streams do not matter here.
        recording: whether a graph records the time of its nodes, in `recorded()`; not torch.

    Raises:
        ArtifactError: the artifact is damaged.
        MissingExtraError: the engine is not installed.
    """
    with optional_import(f"running {model.config.spec.name} in {TITLES[backend.engine]}"):
        if backend.engine == "native":
            return native.compiler(model, backend, recording=recording)
        if backend.engine == "openvino":
            from effnet.runtime import openvino

            return openvino.compiler(model, backend, recording=recording)
        if backend.engine == "onnxruntime":
            from effnet.runtime import onnx

            return onnx.compiler(model, backend, recording=recording)
        from effnet.runtime import torch

        return torch.compiler(model, backend)


def kept_selection(model: Model, batch: int, *, threads: int | None = None) -> Selection | None:
    """What `effnet bench --keep` measured for a model on this machine, for the batch nearest to this one.

    None where nothing was kept, or with another version of an engine or of effnet, or the file is damaged.
    """
    folder = cache_folder() / KEPT
    try:
        if not folder.is_dir():  # else the weights would be read for nothing
            return None
        values = parse_json((folder / _kept_name(model, threads)).read_text("utf-8"))["selections"]
        found = [read_fields(Selection, {**each, "backend": read_fields(Backend, each["backend"])}) for each in values]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    fitting = [each for each in found if (each.backend.part or 1) * each.backend.streams <= batch]
    nearest = min(fitting, key=lambda each: max(each.batch / batch, batch / each.batch), default=None)
    return nearest and dataclasses.replace(nearest, batch=batch, kept=True)


def keep_selection(model: Model, selections: Sequence[Selection], *, threads: int | None = None) -> Path:
    """Write what was measured for a model on this machine, one selection for each batch; `load` follows it.

    Returns:
        The file, in machine.cache_folder(); it replaces what was kept before.
    """
    file = cache_folder() / KEPT / _kept_name(model, threads)
    values = [dataclasses.asdict(selection) for selection in selections]
    with write_file(file) as temporary:
        temporary.write_text(json.dumps({"conditions": _conditions(threads), "selections": values}, indent=1))
    return file


def version_of(engine: str) -> str:
    """The version of the package that an engine is named after; "unknown" where it was installed under another name."""
    from importlib.metadata import PackageNotFoundError, version

    if engine == "native":
        return f"{__version__} ({instruction_set() or 'not compiled'})"
    try:
        return version(engine)
    except PackageNotFoundError:
        return "unknown"


def _of_device(
    device: str, engine: EngineName | None, precision: EnginePrecision | None, artifact: Artifact | None
) -> tuple[EngineName, EnginePrecision, list[str]]:
    """Engine, precision and the reasons on another device than the CPU."""
    if artifact is not None:
        raise ArgumentError("device", device, f"is for weights and bundles; {artifact.path} is run on the CPU.")
    if engine not in (None, "torch"):
        raise ArgumentError("device", device, f"needs engine torch; {engine} computes on the CPU.")
    if precision == "int8":
        raise ArgumentError("precision", precision, f"is for artifacts, which are run on the CPU, not on {device}.")
    check_device(device)
    fast, reason = choose_precision(device)
    return "torch", precision or ("bf16" if fast == "bf16" else "fp32"), [f"torch computes on {device}", reason]


def _of_network(
    spec: NetworkSpec,
    engine: EngineName | None,
    precision: EnginePrecision | None,
    engines: Collection[EngineName],
    machine: Machine,
) -> tuple[EngineName, EnginePrecision, list[str]]:
    """Engine, precision and the reasons for a network in memory."""
    if precision == "int8":
        rule = "takes images to calibrate on: effnet export MODEL DATA --precision int8 makes an artifact of them."
        raise ArgumentError("precision", precision, rule)
    if engine is not None:
        chosen, reasons = engine, ["the engine that was chosen"]
    else:
        order, unable = _order(machine, precision), native.unsupported(spec)
        if unable:
            order.remove("native")
        nothing = "native" if "native" in order else order[-1]  # which fails, and says why
        chosen = next((name for name in order if name in engines), nothing)
        reasons = [f"the first that is installed of {', '.join(TITLES[name] for name in order)}"]
        if reason := unable or native.missing():
            reasons.append(f"native {reason}")
    if precision is None:
        fast = machine.fast_bf16
        if chosen == "native":  # which does not use AMX, and may have been told to use less than the processor has
            limited = os.environ.get(CHOSEN) not in (None, "", "avx512bf16")
            fast = fast and "amx_bf16" not in machine.features and not limited
        precision = "bf16" if chosen in BF16_ENGINES and fast else "fp32"
        if chosen in BF16_ENGINES:
            reasons.append(f"bf16 is {'' if fast else 'not '}faster than fp32 on this processor")
    return chosen, precision, reasons


def _order(machine: Machine, precision: EnginePrecision | None) -> list[EngineName]:
    """The engines of a network, best first."""
    order: list[EngineName] = ["native", "openvino", "onnxruntime", "torch"]
    if "avx2" in machine.features and "avx512f" not in machine.features:
        order = ["native", "onnxruntime", "openvino", "torch"]
    amx = "amx_bf16" in machine.features and precision != "fp32"
    if amx or "avx2" not in machine.features:
        order.remove("native")
        order.insert(1 if amx else 2, "native")
    return [name for name in order if name in BF16_ENGINES] if precision == "bf16" else order


def _of_artifact(
    artifact: Artifact,
    engine: EngineName | None,
    precision: EnginePrecision | None,
    engines: Collection[EngineName],
    machine: Machine,
) -> tuple[EngineName, EnginePrecision, list[str]]:
    """Engine, precision and the reasons for an artifact."""
    form, known = artifact.form, ENGINES[artifact.form.format]
    if engine not in (None, *known):
        rule = f"cannot be chosen: {artifact.path} can be run by {' or '.join(known)}, by its format."
        raise ArgumentError("engine", engine, rule)
    if precision not in (None, form.precision) and "int8" in (precision, form.precision):
        rule = f"cannot be chosen: {artifact.path} was exported in {form.precision}; export it again with --precision."
        raise ArgumentError("precision", precision, rule)
    if engine is not None:
        chosen, reasons = engine, ["the engine that was chosen"]
    else:
        order = sorted(known, key=lambda name: precision == "bf16" and name != "openvino")
        chosen = next((name for name in order if name in engines), order[0])
        reasons = [f"runs files of the format {form.format}"]
    if precision is not None:
        return chosen, precision, reasons
    if form.precision == "bf16" and not machine.bf16:
        return chosen, "fp32", [*reasons, "the processor does not multiply bf16, in which it was exported"]
    return chosen, form.precision, [*reasons, f"exported in {form.precision}"]


def _fixed(engine: EngineName, precision: EnginePrecision, artifact: Artifact | None) -> int | None:
    """Images that every graph takes, 0: any number; None where a graph is compiled for each number.

    OpenVINO changes the batch of an artifact; in int8 other batches are rounded otherwise than the one evaluated.
    """
    own = artifact.form.batch if artifact else None
    if engine in ("torch", "native"):
        return own or 0
    return own if engine == "onnxruntime" or precision == "int8" else None


def _parts(spec: NetworkSpec, backend: Backend, batch: int, fixed: int | None, machine: Machine) -> tuple[int, int]:
    if fixed == 0:
        return batch, 1
    streams = min(backend.threads or machine.cores, batch // (fixed or 1))
    fitting = max(1, CACHE // largest_map(spec, backend.precision))
    return fixed or min(fitting, batch // streams), streams


def largest_map(spec: NetworkSpec, precision: EnginePrecision) -> int:
    """Bytes of the largest feature map of one image."""
    stem = spec.shape.stem_channels * spec.shape.stem_size**2
    largest = max(stem, *(layer.elements for block in spec.blocks for layer in block.layers))
    return largest * {"fp32": 4, "bf16": 2, "int8": 1}[precision]


def check_memory(spec: NetworkSpec) -> None:
    """Raise ArgumentError if one map takes more memory than this machine has, as after a typing error."""
    needed, there = largest_map(spec, "fp32"), this_machine().memory_bytes
    if there is not None and needed > there:
        rule = f"is too large: one map takes {needed / 1e9:,.1f} GB, and there are {there / 1e9:,.1f} GB of memory."
        raise ArgumentError("resolution", spec.resolution, rule)


def installed_engines(artifact: Artifact | None) -> list[EngineName]:
    """The engines that can run a network, or this artifact, here."""
    if artifact is not None:
        return [name for name in ENGINES[artifact.form.format] if installed(name)]
    return [name for name, packages in NEEDED.items() if all(map(installed, packages))]


def _conditions(threads: int | None) -> dict[str, Any]:
    """What a measurement depends on besides the model."""
    versions = {name: version_of(name) for name in NEEDED} | {"effnet": __version__}
    limits = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}  # torch's
    return {"machine": this_machine().to_dict(), "versions": versions, "limits": limits, "threads": threads}


def _kept_name(model: Model, threads: int | None) -> str:
    """The name of the file for a model under these conditions."""
    config = model.config
    form = metadata(config, model.form) if isinstance(model, Artifact) else None
    numbers = [form, *(dataclasses.asdict(each) for each in (config.spec, config.policy, config.input))]
    found = hashlib.sha256(json.dumps([config.sha256, numbers, _conditions(threads)], sort_keys=True).encode())
    if isinstance(model, Bundle) and not config.sha256:
        for array in model.weights.values():
            found.update(np.ascontiguousarray(array).data)
    return f"{found.hexdigest()[:24]}.json"

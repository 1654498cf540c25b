"""Options for opening and running a model: arguments of effnet.load and options of several commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from effnet.arch.spec import FitMode
from effnet.fields import one_of

AnyEngine = Literal["auto", "native", "torch", "openvino", "onnxruntime"]
AnyPrecision = Literal["auto", "fp32", "bf16", "int8"]
Decode = Literal["fast", "exact"]
EngineName = Literal["torch", "native", "openvino", "onnxruntime"]
EnginePrecision = Literal["fp32", "bf16", "int8"]


@dataclass(frozen=True)
class EngineOptions:
    """Options for running a model: part of effnet.load's arguments and of several commands' options."""

    engine: AnyEngine = "auto"
    """What runs the model. Default: what effnet bench --keep found fastest here, else effnet's own engine, native; what
    that cannot run or does more slowly by rule (bf16 with AMX) goes to OpenVINO, ONNX Runtime or torch. An artifact
    runs in the engine of its format."""
    precision: AnyPrecision | None = None
    """What it computes with; native and OpenVINO have bf16. auto: an artifact's own; else bf16 where the processor is
    faster in it, else fp32. Default: auto; effnet val and explain: an artifact's own, else fp32."""
    batch: int | None = None
    """Images of a full batch, which may go through the network in parts. Default: 16, fewer for a large network."""
    threads: int | None = None
    """Threads that the engine and image decoding may use. Default: one per core."""
    source: str | None = None
    """Library that wrote a weight file, if its keys do not tell: timm or timm-tf."""
    device: str = "cpu"
    """Where it computes: cpu, or cuda, cuda:1 or mps, on which torch runs weights and bundles."""

    def __post_init__(self) -> None:
        one_of("engine", self.engine, AnyEngine)
        one_of("precision", self.precision or "auto", AnyPrecision)


@dataclass(frozen=True)
class LoadOptions(EngineOptions):
    """Options for opening a model: the arguments of effnet.load."""

    fit: FitMode | None = None
    """How a photo is made square: crop its sides, pad it, or squash it. Default: as the weights were trained."""
    decode: Decode = "fast"
    """fast: a large JPEG is halved while it is decoded, as long as its sides stay four times what the network sees, and
    a photo is resized within 5 levels of 255. exact: equal to torchvision's bit for bit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("decode", self.decode, Decode)


AUTO = EngineOptions()

"""torch: a network in memory, and a torch.export program, the network's graph in torch's own format."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn

from effnet.arch.spec import InputSpec
from effnet.errors import ArgumentError, ArtifactError
from effnet.fields import positive_int
from effnet.files import MARK
from effnet.models.efficientnet import EfficientNet
from effnet.process import unchanged
from effnet.runtime.artifact import Model
from effnet.runtime.graph import linear_of
from effnet.runtime.program_file import read_checked
from effnet.runtime.session import Backend, Compiler, Linear, Logits, Maps, Pixels, Run, RunMaps, in_live_thread
from effnet.weights.bundle import Bundle

T = TypeVar("T")

WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch.load reads it


def compiler(model: Model, backend: Backend) -> Compiler:
    """See runtime.select.compiler. There is one graph, whatever the number of images.

    A network is in eval mode and in channels_last afterwards.
    """
    if isinstance(model, Bundle):
        low = torch.bfloat16 if backend.precision == "bf16" else None
        layout, device = torch.channels_last, torch.device(backend.device)
        network = in_live_thread(lambda: model.network.eval().to(memory_format=layout).to(device))
        told = network, model.config.input, backend.threads, low
        run, run_maps = compile_network(*told), compile_maps(*told)
        return Compiler(lambda images, streams: run, lambda images, streams: run_maps, lambda: linear_of(model))
    program, threads = read_program(model.path), backend.threads
    run = compile_program(program, threads)
    return Compiler(
        lambda images, streams: run,
        lambda images, streams: compile_program_maps(program, threads),
        lambda: read_linear(program),
    )


def compile_network(
    network: EfficientNet, input_spec: InputSpec, threads: int | None = None, low: torch.dtype | None = None
) -> Run:
    """A network on the device where its parameters are; pixels are normalised there. It takes any number of images.

    Args:
        network: in eval mode.
        input_spec: how images are prepared.
        threads: of torch while it computes; None: torch's own number. The number belongs to the process: another thread
            that begins to use torch meanwhile inherits it.
        low: what autocast computes in, such as torch.bfloat16; None: without autocast.
    """

    def answer(images: Tensor) -> Logits:
        logits: Logits = network(images).float().cpu().numpy()
        return logits

    return _compile(network, input_spec, threads, low, answer)


def compile_maps(
    network: EfficientNet, input_spec: InputSpec, threads: int | None = None, low: torch.dtype | None = None
) -> RunMaps:
    """The same, with the last feature maps; see `compile_network`."""

    def answer(images: Tensor) -> tuple[Logits, Maps]:
        maps = network.forward_features(images)
        logits = network.classifier(network.pool(maps).flatten(1))
        return logits.float().cpu().numpy(), maps.float().cpu().contiguous().numpy()

    return _compile(network, input_spec, threads, low, answer)


def _compile(
    network: EfficientNet,
    input_spec: InputSpec,
    threads: int | None,
    low: torch.dtype | None,
    answer: Callable[[Tensor], T],
) -> Callable[[Pixels], T]:
    """What `answer` makes of pixels, normalised where the network's parameters are."""
    constants: dict[torch.device, list[Tensor]] = {}  # mean and std; a copy to a GPU waits for what it computes

    @torch.inference_mode()
    def run(pixels: Pixels) -> T:
        weight = network.classifier.weight
        device = weight.device
        if device not in constants:
            values = (input_spec.mean, input_spec.std)
            constants[device] = [torch.tensor(each).view(-1, 1, 1).to(device) for each in values]
        mean, std = constants[device]
        images = to_device(_tensor(pixels), device).permute(0, 3, 1, 2)  # a view, which makes it channels_last
        with torch_threads(threads), torch.autocast(device.type, low, enabled=low is not None):
            images = images.to(torch.float32).div_(255).sub_(mean).div_(std)
            return answer(images.to(weight.dtype))

    return run


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device; only readers of the result wait for the copy."""
    return tensor.to(device, non_blocking=device.type != "mps")  # there torch may read the tensor after it is gone


def read_program(file: Path) -> fx.GraphModule:
    """A torch.export program.

    Raises:
        ArtifactError: it is not a torch.export program, or it would run code while it is read.
    """
    try:
        content = read_checked(file)
        with _weights_only():
            program: fx.GraphModule = torch.export.load(content).module()
            return program
    except ArtifactError:
        raise
    except Exception as error:  # zip files, JSON and torch's schema have no common exception
        raise ArtifactError(f"{file} cannot be read by torch.export: {str(error).splitlines()[0]}") from error


def compile_program(program: fx.GraphModule, threads: int | None = None) -> Run:
    """A torch.export program; it takes as many images as it was exported for."""

    @torch.inference_mode()
    def run(pixels: Pixels) -> Logits:
        with torch_threads(threads):
            logits: Logits = program(_tensor(pixels)).numpy()
        return logits

    return run


def compile_program_maps(program: fx.GraphModule, threads: int | None = None) -> RunMaps:
    """The same, with the last feature maps, the input of its last average; the program is not changed."""

    @torch.inference_mode()
    def run(pixels: Pixels) -> tuple[Logits, Maps]:
        keeping = _Keeping(program)
        with torch_threads(threads):
            logits: Tensor = keeping.run(_tensor(pixels))
        return logits.numpy(), keeping.kept.contiguous().numpy()

    return run


def read_linear(program: fx.GraphModule) -> Linear:
    """The classifier of a program that `write` wrote."""
    state = program.state_dict()
    weight, bias = (state[f"network.classifier.{name}"].detach().numpy() for name in ("weight", "bias"))
    return Linear(weight, bias)


class _Keeping(fx.Interpreter):
    """Runs a program node by node, and keeps what its last average reads."""

    kept: Tensor

    def __init__(self, program: fx.GraphModule) -> None:
        super().__init__(program)
        self.average = [node for node in program.graph.nodes if "avg_pool" in str(node.target)][-1]

    def run_node(self, n: fx.Node) -> Any:
        """The result of a node; what the average reads is kept before that, as an interpreter forgets it afterwards."""
        if n is self.average:
            self.kept = self.env[n.args[0]]
        return super().run_node(n)


class FromPixels(nn.Module):
    """A network that takes pixels (N, size, size, C) uint8 and normalises them itself."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: EfficientNet, input_spec: InputSpec) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(input_spec.mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(input_spec.std).view(-1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (N, K) float32."""
        images = pixels.permute(0, 3, 1, 2).to(torch.float32)
        logits: Tensor = self.network((images / 255 - self.mean) / self.std)
        return logits


def write(
    network: EfficientNet, input_spec: InputSpec, batch: int | None, metadata: Mapping[str, Any], file: Path
) -> None:
    """Write the network as a torch.export program for `batch` images (None: any number), with its metadata.

    A program computes where it was exported, so that of a network on a GPU is made of a copy on the CPU.
    """
    if network.classifier.weight.device.type != "cpu":
        network = copy.deepcopy(network).cpu()
    network.to(memory_format=torch.contiguous_format)  # torch.export.save loses weights in channels_last
    module = FromPixels(network, input_spec).eval()
    size = input_spec.size
    example = torch.zeros(batch or 2, size, size, input_spec.channels, dtype=torch.uint8)
    shapes = None if batch else ({0: torch.export.Dim("batch", min=1)},)
    with torch.no_grad():
        program = torch.export.export(module, (example,), dynamic_shapes=shapes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names the folders of this machine
    torch.export.save(program, file, extra_files={MARK: json.dumps(metadata)})


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Use this number of torch threads inside the with statement; None: keep torch's own.

    Raises:
        ArgumentError: `threads` is not a positive whole number, or more than the machine's cores.
    """
    if threads is None:
        yield
        return
    before, cores = torch.get_num_threads(), os.cpu_count() or 1
    if positive_int("threads", threads) > cores:
        raise ArgumentError("threads", threads, f"must be at most {cores}, the cores of this machine.")
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tensor(pixels: Pixels) -> Tensor:
    return torch.from_numpy(np.require(pixels, requirements=["C", "W"]))  # torch warns of arrays that are read-only


@contextmanager
def _weights_only() -> Iterator[None]:
    """Without pickles that run code: torch.export.load follows a file that asks for one, unless this forbids it."""
    from torch.export.pt2_archive import _package

    with unchanged():  # one program at a time, since all threads share the environment
        os.environ[WEIGHTS_ONLY] = "1"
        pickle = vars(_package).pop("pickle", None)  # which it asks for constants that are objects, whatever is set
        try:
            yield
        finally:
            if pickle is not None:
                vars(_package)["pickle"] = pickle

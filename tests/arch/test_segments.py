"""Memory that a step with the compiled kernels keeps and holds, by formula and measured."""

import json
import os
import subprocess
import sys

import pytest
import torch

import effnet
from effnet import native
from effnet.arch.memory import kept_per_image, largest_batch, training_memory
from effnet.arch.recompute import RecomputePlan, extra_work, find_plan, levels
from effnet.arch.segments import Keep, uses_kernels
from effnet.arch.spec import NetworkSpec
from effnet.models.efficientnet import EfficientNet

needs_kernels = pytest.mark.skipif(not native.instruction_sets(), reason="nothing was compiled")
NETWORKS = (
    effnet.spec("b0"),
    effnet.spec("b0", width=0.5, resolution=33, num_classes=7),
    effnet.spec("b2", resolution=96),
    effnet.spec("lite0", resolution=128),
    effnet.spec("mobilenetv1", resolution=96),
    effnet.spec("mobilenetv2", resolution=96),
)
PRECISIONS = ("fp32", "bf16")


def kept_by_autograd(spec: NetworkSpec, batch: int, precision: str, plan: RecomputePlan | None) -> int:
    """Bytes that wait for the backward pass: images too, but neither weights nor buffers."""
    network = EfficientNet(spec).train()
    network.recompute(plan)
    own = {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.randn(batch, spec.in_channels, spec.resolution, spec.resolution)
    images = images.contiguous(memory_format=torch.channels_last)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        logits = network(images)
    assert logits.requires_grad
    return sum(size for address, size in found.items() if address not in own)


@needs_kernels
@pytest.mark.parametrize("spec", NETWORKS, ids=lambda spec: spec.name)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("keep", [None, Keep.CONVOLUTIONS, Keep.DEPTHWISE])
def test_what_the_kernels_keep(spec, precision, keep):
    plan = None if keep is None else RecomputePlan.uniform(spec, keep)
    said = training_memory(spec, 2, precision=precision, plan=plan, kernels=True)
    # in bf16 the images themselves are not kept, and the classifier's weights are copied
    expected = said.images if precision == "fp32" else said.weights - 4 * effnet.cost(spec).params
    assert said.activations + expected == pytest.approx(kept_by_autograd(spec, 2, precision, plan), rel=2e-3)


# Each training is measured in a process of its own, forked from one that has imported torch and trained nothing
PROGRAM = """
import json, os, sys
from pathlib import Path
import torch
import effnet
from effnet.arch.recompute import RecomputePlan
from effnet.models.efficientnet import EfficientNet

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024

def train(spec, keep, batch, low):
    network = EfficientNet(spec).train()
    network.recompute(keep and RecomputePlan.uniform(spec, keep))
    images = torch.randn(batch, 3, spec.resolution, spec.resolution).contiguous(memory_format=torch.channels_last)
    for _ in range(2):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            logits = network(images)
        logits.float().sum().backward()

torch.set_num_threads(1)
for name, options, *rest in json.loads(sys.argv[1]):
    if not (child := os.fork()):
        train(effnet.spec("b0", width=0.25, depth=0.4, resolution=32), None, 2, rest[-1])
        before = resident("VmRSS")
        train(effnet.spec(name, **options), *rest)
        print(resident("VmHWM") - before, flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
TRAININGS = [
    (name, options, keep, 16, precision)
    for name, options in (("b0", {"resolution": 128}), ("mobilenetv1", {"resolution": 128}))
    for keep in (None, "bottlenecks")
    for precision in PRECISIONS
]


@pytest.fixture(scope="module")
def grown() -> dict[str, int]:
    """By how many bytes a process grows that makes one of the trainings."""
    tasks = json.dumps([[*training, precision == "bf16"] for *training, precision in TRAININGS])
    # freed memory goes back to the system at once, so resident memory is what is in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run([sys.executable, "-c", PROGRAM, tasks], env=environment, capture_output=True, check=True)
    return dict(zip(map(str, TRAININGS), map(int, done.stdout.split()), strict=True))


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("training", TRAININGS, ids=lambda training: "-".join(map(str, training)))
def test_the_peak_is_what_a_process_grows_by(training, grown):
    name, options, keep, batch, precision = training
    spec = effnet.spec(name, **options)
    plan = None if keep is None else RecomputePlan.uniform(spec, keep)
    settings = {"optimizer": "sgd", "ema": False, "precision": precision, "plan": plan}
    said = training_memory(spec, batch, **settings, kernels=True)
    assert said.peak == pytest.approx(grown[str(training)], rel=0.1)


@needs_kernels
def test_what_computes_is_asked_here(monkeypatch):
    spec, other = effnet.spec("b0"), effnet.spec("resnet50")
    assert training_memory(spec, 8) == training_memory(spec, 8, kernels=True)
    assert training_memory(spec, 8).peak < training_memory(spec, 8, kernels=False).peak / 2
    assert not uses_kernels(other, kernels=True)  # whose blocks they do not know
    assert training_memory(other, 8, kernels=True) == training_memory(other, 8, kernels=False)
    monkeypatch.setenv("EFFNET_NATIVE", "0")
    assert training_memory(spec, 8) == training_memory(spec, 8, kernels=False)
    assert kept_per_image(spec) == kept_per_image(spec, kernels=False)
    monkeypatch.delenv("EFFNET_NATIVE")
    monkeypatch.setattr(native, "library", lambda: None)
    assert not uses_kernels(spec)


@pytest.mark.parametrize("keep", Keep)
def test_two_levels_differ(keep):
    spec = effnet.spec("b0")
    held = training_memory(spec, 8, plan=keep, kernels=True)
    like = Keep.CONVOLUTIONS if keep >= Keep.CONVOLUTIONS else Keep.BOTTLENECKS
    assert held == training_memory(spec, 8, plan=like, kernels=True)
    assert (held == training_memory(spec, 8, kernels=True)) == (keep >= Keep.CONVOLUTIONS)
    assert levels(spec, kernels=True) == [Keep.CONVOLUTIONS, Keep.BOTTLENECKS]
    assert levels(spec, kernels=False) == sorted(Keep, reverse=True)


@pytest.mark.parametrize("share", [0.95, 0.8, 0.65])
def test_plans_for_the_kernels(share):
    spec, settings = effnet.spec("b0"), {"optimizer": "sgd", "ema": False, "kernels": True}
    limit = int(share * training_memory(spec, 32, **settings).peak)
    plan = find_plan(spec, limit, 32, **settings)
    assert training_memory(spec, 32, plan=plan, **settings).peak <= limit
    assert set(plan.values()) == {Keep.CONVOLUTIONS, Keep.BOTTLENECKS}
    for name, keep in plan.items():  # one that keeps its maps after all would not fit, or saves no work
        if keep is Keep.BOTTLENECKS:
            richer = RecomputePlan({**plan, name: Keep.CONVOLUTIONS})
            assert training_memory(spec, 32, plan=richer, **settings).peak > limit
    assert largest_batch(spec, limit, plan=plan, **settings) >= 32


def test_work_of_a_plan_by_hand():
    """A block that keeps its input only is computed twice; of the stem that is so at every level."""
    spec = effnet.spec("b0")
    least, most = (RecomputePlan.uniform(spec, keep) for keep in (Keep.BOTTLENECKS, Keep.CONVOLUTIONS))
    stem, *_, classifier = effnet.cost(spec).blocks
    assert extra_work(spec, most, kernels=True).macs == stem.macs
    assert extra_work(spec, least, kernels=True).macs == effnet.cost(spec).macs - classifier.macs

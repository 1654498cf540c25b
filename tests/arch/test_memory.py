"""Memory by formula against what torch's modules keep and hold; for the kernels see test_segments.py."""

from functools import cache, partial

import pytest
import torch
from alive import Alive

import effnet
from effnet.arch import memory
from effnet.arch.memory import file_bytes, inference_memory, largest_batch
from effnet.arch.recompute import RecomputePlan
from effnet.arch.segments import Keep
from effnet.arch.spec import NetworkSpec, StageSpec
from effnet.errors import ArgumentError, UnknownNameError
from effnet.models.efficientnet import EfficientNet

MIB = 2**20
training_memory = partial(memory.training_memory, kernels=False)
kept_per_image = partial(memory.kept_per_image, kernels=False)
ODD = (
    effnet.spec("b0", width=0.5, depth=0.7, resolution=97, num_classes=7),
    NetworkSpec(
        "no-se",
        (StageSpec(3, 7, 1, 24, 2), StageSpec(1, 3, 2, 40, 1), StageSpec(4, 5, 2, 48, 3)),
        resolution=70,
        squeeze_ratio=0,
        head=64,
        num_classes=5,
        dropout=0,
    ),
    NetworkSpec(
        "relu6-se",
        (StageSpec(6, 3, 2, 16, 3), StageSpec(6, 3, 1, 16, 2)),
        resolution=64,
        activation="relu6",
        squeeze_ratio=0.5,
        head=2048,
        in_channels=1,
        fixed_ends=True,
        depth=2.0,
    ),
)
NETWORKS = (
    effnet.spec("b0"),
    effnet.spec("lite0"),
    effnet.spec("b0", resolution=64, stem_stride=1),
    *(effnet.spec(name, width=0.25, resolution=96) for name in ("mobilenetv1", "resnet50")),
    *ODD,
)
LEVELS = (None, *Keep)
by_name = pytest.mark.parametrize("spec", NETWORKS, ids=lambda spec: spec.name)


@cache
def without_memory(spec: NetworkSpec) -> EfficientNet:
    """A network of shapes; it takes as long to make as to ask."""
    with torch.device("meta"):
        return EfficientNet(spec)


def built(spec: NetworkSpec, batch: int) -> tuple[EfficientNet, torch.Tensor]:
    """Shapes without memory."""
    images = torch.empty(batch, spec.in_channels, spec.resolution, spec.resolution, device="meta")
    return without_memory(spec), images


def alive_after_forward(spec: NetworkSpec, plan: RecomputePlan | None, batch: int) -> int:
    """Bytes that wait for the backward pass, the images among them and the logits not."""
    network, images = built(spec, batch)
    network.train().recompute(plan)
    with Alive() as alive:
        alive.add(images)
        logits = network(images)
        return alive.bytes - logits.untyped_storage().nbytes()


@by_name
@pytest.mark.parametrize("keep", LEVELS)
def test_kept_activations_are_what_torch_keeps(spec, keep):
    plan = None if keep is None else RecomputePlan.uniform(spec, keep)
    per_image = alive_after_forward(spec, plan, 2) - alive_after_forward(spec, plan, 1)
    said = training_memory(spec, 1, plan=plan)
    assert said.activations + said.images == pytest.approx(per_image, rel=1e-3)


@by_name
def test_inference_memory_is_the_worst_moment(spec):
    network, images = built(spec, 1)
    with Alive() as alive, torch.no_grad():
        alive.add(images)
        network.eval()(images)
    weights = 4 * effnet.cost(spec).params
    assert inference_memory(spec) - weights == pytest.approx(alive.peak, rel=5e-3)


@pytest.mark.parametrize("spec", [network for network in NETWORKS if network.stem_stride == 2], ids=lambda s: s.name)
@pytest.mark.parametrize("keep", LEVELS)
def test_the_peak_covers_the_backward_pass(spec, keep):
    """On the processor, where nothing is decomposed; small images, as the formula does not care."""
    spec, batch = effnet.spec(spec, resolution=64), 4
    network = EfficientNet(spec).train()
    network.recompute(None if keep is None else RecomputePlan.uniform(spec, keep))
    images = torch.randn(batch, spec.in_channels, 64, 64)
    network(images).sum().backward()  # gradients and caches are there
    network.zero_grad()
    with Alive() as alive:
        alive.add(images)
        network(images).sum().backward()
    said = training_memory(spec, batch, plan=keep, optimizer="sgd", ema=False)
    assert said.peak - said.weights == pytest.approx(alive.peak, rel=0.1)


# Counted with saved-tensor hooks on torchvision's networks, MiB per image; ours keep no copy of the head's last map
PUBLISHED = {"b0": 84.2, "b1": 136.4, "b2": 173.5, "b3": 298.2, "b4": 623.5, "b5": 1248.3, "b6": 2114.1, "b7": 3671.5}
# The feature maps alone, in elements, on torchvision's networks
PEAKS = {"b0": 2_609_152, "b1": 2_995_200, "b2": 3_515_200, "b3": 7_020_000} | {
    "b4": 11_263_200,
    "b5": 16_219_008,
    "b6": 28_993_536,
    "b7": 37_440_000,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_family(name):
    spec = effnet.spec(name)
    assert kept_per_image(spec) / MIB == pytest.approx(PUBLISHED[name], rel=5e-3)
    image = 3 * spec.resolution**2
    assert inference_memory(spec) == 4 * (effnet.cost(spec).params + image + PEAKS[name])


def test_training_memory_has_its_parts():
    spec = effnet.spec("b0")
    params = effnet.cost(spec).params
    held = training_memory(spec, 16)
    assert (held.weights, held.gradients, held.optimizer, held.ema) == (4 * params, 4 * params, 8 * params, 4 * params)
    assert held.images == 16 * 3 * 224**2 * 4
    assert held.activations + held.images == 16 * kept_per_image(spec)
    assert held.weights + held.optimizer + held.ema + held.images + held.activations <= held.peak
    assert training_memory(spec, 16, optimizer="sgd", ema=False).optimizer == 0


def test_bf16_halves_the_activations_and_copies_the_weights():
    spec = effnet.spec("b0")
    full, half = training_memory(spec, 8), training_memory(spec, 8, precision="bf16")
    assert half.activations == pytest.approx(full.activations / 2, rel=0.01)
    assert half.weights == full.weights * 3 // 2
    assert half.optimizer == full.optimizer


@pytest.mark.parametrize("keep", [None, Keep.CONVOLUTIONS])
def test_bf16_as_autocast_keeps_it(keep):
    spec = effnet.spec("b0", resolution=64)

    def alive(batch):
        network, images = EfficientNet(spec).train(), torch.randn(batch, 3, 64, 64)
        network.recompute(keep if keep is None else RecomputePlan.uniform(spec, keep))
        with Alive() as counter, torch.autocast("cpu", torch.bfloat16):
            logits = network(images)
            return counter.bytes - logits.untyped_storage().nbytes()

    said = training_memory(spec, 1, precision="bf16", plan=keep)
    assert said.activations == pytest.approx(alive(3) - alive(2), rel=0.03)


@pytest.mark.parametrize("name", ["b0", "lite0"])
def test_file_bytes(name, tmp_path):
    spec = effnet.spec(name)
    folder = effnet.save(EfficientNet(spec), tmp_path / "bundle")
    size = (folder / "model.safetensors").stat().st_size
    assert size <= file_bytes(spec) <= size * 1.005


def test_largest_batch():
    spec = effnet.spec("b4")
    for plan in (None, Keep.BOTTLENECKS):
        batch = largest_batch(spec, 8 * 10**9, plan=plan, kernels=False)
        assert training_memory(spec, batch, plan=plan).peak <= 8 * 10**9
        assert training_memory(spec, batch + 1, plan=plan).peak > 8 * 10**9
    assert largest_batch(spec, 10**6, kernels=False) == 0


def test_plans_of_levels():
    spec = effnet.spec("b0")
    plan = RecomputePlan.uniform(spec, "convolutions")
    assert plan == RecomputePlan.uniform(spec, Keep.CONVOLUTIONS)
    assert str(plan) == "convolutions"
    mixed = RecomputePlan({**plan, "stem": Keep.BOTTLENECKS})
    assert str(mixed) == "convolutions 17, bottlenecks 1"
    assert mixed.to_dict()["stem"] == "bottlenecks"
    assert training_memory(spec, 2, plan=plan) == training_memory(spec, 2, plan=Keep.CONVOLUTIONS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"batch": 0}, "`batch`"),
        ({"optimizer": "adm"}, "Did you mean 'adam'"),
        ({"precision": "fp8"}, "`precision`"),
        ({"plan": RecomputePlan({"stem": Keep.BOTTLENECKS})}, "`plan`"),
    ],
)
def test_wrong_arguments(arguments, words):
    with pytest.raises(ArgumentError, match=words):
        training_memory(effnet.spec("b0"), **({"batch": 1} | arguments))


def test_unknown_level():
    with pytest.raises(UnknownNameError, match="Did you mean 'bottlenecks'"):
        RecomputePlan.uniform(effnet.spec("b0"), "bottleneck")


def test_a_gpu_rounds_tensors() -> None:
    """By torch's CUDACachingAllocator: kMinBlockSize is 512, of which a tensor wastes half in the mean."""
    network = effnet.spec("b0")
    step = training_memory(network, 8, optimizer="adamw", ema=True, precision="bf16")
    found = memory.gpu_memory(network, 8, step)
    module = EfficientNet(network)
    copies = 5  # weights, gradients, Adam's two, the average
    tensors = copies * len([*module.parameters()]) + 2 * len([*module.buffers()])
    pixels = 2 * 8 * 3 * 224 * 224  # two parts of the batch
    assert found == step.peak + pixels + tensors * 256 + memory.WORKSPACE
    fp16, bf16 = (training_memory(network, 8, precision=name) for name in ("fp16", "bf16"))
    assert fp16 == bf16
    assert training_memory(network, 8, precision="tf32") == training_memory(network, 8)

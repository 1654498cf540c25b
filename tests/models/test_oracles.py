"""The same logits as independent implementations, from random weights and shaken statistics.

Weights travel by position: the tutorial's, torchvision's, timm's, lukemelas' and Hugging Face's networks hold tensors
of the same shapes in the same order as ours, and Keras in the same order in layers of its own shapes. No name is mapped
here, so this is independent of the naming rules of the checkpoints.
"""

import json
import math
from pathlib import Path

import keras
import numpy as np
import pytest
import timm
import torch
import torchvision
from efficientnet_pytorch import EfficientNet as LukemelasEfficientNet
from random_weights import golden
from torch import nn
from transformers import EfficientNetConfig, EfficientNetForImageClassification

import effnet
from effnet.arch.spec import NumericPolicy
from effnet.models.blocks import MBConv
from effnet.models.efficientnet import EfficientNet

ALLOWED = 1e-4  # largest difference by largest logit; 1e-6 is usual

B_NETS = tuple(f"b{number}" for number in range(8))
LITE = tuple(f"lite{number}" for number in range(5))
EVEN, ODD, OBLONG = (64, 64), (65, 65), (38, 49)  # OBLONG meets even and odd maps in both directions


def golden_images(*size: int, count: int = 1) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(1).normal(0, 1, (count, 3, *size)).astype(np.float32))


def give(module: nn.Module, tensors) -> nn.Module:
    """`module` with these tensors in the order of its state dict, ready to answer; shapes must agree."""
    module.load_state_dict(dict(zip(module.state_dict(), tensors, strict=True)), assign=True)
    return module.eval()


def shaken(name: str, padding: str, eps: float = 1e-3) -> EfficientNet:
    """A network without a trivial tensor, as sensitive to its input as a trained one and no more.

    Its statistics are those of real maps, then disturbed, and its residual branches are small. With random statistics
    alone, B0 hardly sees its input, and B7's maps grow until rounding makes half of the answer.
    """
    policy = NumericPolicy(bn_eps=eps, bn_momentum=1, padding=padding)
    network = EfficientNet(effnet.spec(name, dropout=0, drop_connect=0), policy=policy)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    for module in network.modules():
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, 0, 0.2)
        if isinstance(module, MBConv) and module.has_shortcut:
            nn.init.uniform_(module.project.norm.weight, 0.1, 0.3)
    network.train()(golden_images(64, 64, count=4))
    for norm in norms:
        norm.running_mean += 0.2 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
        norm.running_var *= torch.empty_like(norm.running_var).uniform_(0.5, 2)
    return network.eval()


def pair(name: str, judge: nn.Module, padding: str) -> tuple[EfficientNet, nn.Module]:
    """Our network and the judge's, which was built without memory, with the same weights."""
    (eps,) = {module.eps for module in judge.modules() if isinstance(module, nn.BatchNorm2d)}
    network = shaken(name, padding, eps)
    return network, give(judge, network.state_dict().values())


@pytest.fixture
def compare(request):
    """Compares two answers, and prints the largest relative difference: `pytest -rP` shows it."""
    differences = []

    def compare(ours, reference):
        assert ours.shape == reference.shape
        differences.append(((ours - reference).abs().max() / reference.abs().max()).item())
        assert differences[-1] < ALLOWED  # and no NaN

    yield compare
    print(f"relative difference {max(differences, default=math.nan):.1e} in {request.node.name}")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_the_tutorials_network(compare):
    """Its keys, shapes and logits were written down once; its weights follow from the keys."""
    file = json.loads((Path(__file__).parent / "tutorial_tiny.json").read_text())
    spec = effnet.spec("b0", width=file["width"], depth=file["depth"], num_classes=file["num_classes"])
    network = give(EfficientNet(spec), [golden(key, shape) for key, shape in file["keys"]])
    compare(network(golden_images(file["resolution"], file["resolution"], count=2)), torch.tensor(file["logits"]))


@pytest.mark.parametrize("name", B_NETS)
def test_torchvision(name, compare):
    with torch.device("meta"):
        judge = getattr(torchvision.models, f"efficientnet_{name}")(weights=None)
    network, judge = pair(name, judge, "symmetric")
    for size in (OBLONG, ODD) if name in ("b0", "b3", "lite0") else (OBLONG,):
        compare(network(golden_images(*size)), judge(golden_images(*size)))


@pytest.mark.parametrize("name", ["b0", "b3", *LITE])
def test_timm(name, compare):
    with torch.device("meta"):
        judge = timm.create_model(f"efficientnet_{name}")
    network, judge = pair(name, judge, "symmetric")
    for size in (OBLONG, ODD) if name in ("b0", "b3", "lite0") else (OBLONG,):
        compare(network(golden_images(*size)), judge(golden_images(*size)))


@pytest.mark.parametrize("name", [*B_NETS, "b8", *LITE])
def test_tensorflows_padding(name, compare):
    """timm, lukemelas and Hugging Face, as far as they have the network.

    lukemelas' convolutions pad for the size that arrives where no image size is given. Hugging Face's padding is fixed:
    a list of the blocks that meet an odd map. At a multiple of 32 no map is odd, so the empty list holds there.
    """
    with torch.device("meta"):
        judges = [timm.create_model(f"tf_efficientnet_{name}")]
        if name in B_NETS:
            judges.append(LukemelasEfficientNet.from_name(f"efficientnet-{name}", image_size=None))
            judges.append(hugging_face(name, EVEN[0], []))
    network, images = shaken(name, "same"), {size: golden_images(*size) for size in (OBLONG, EVEN)}
    expected = {size: network(images[size]) for size in images}
    for judge, size in zip(judges, (OBLONG, OBLONG, EVEN), strict=False):
        answer = give(judge, network.state_dict().values())(images[size])
        compare(expected[size], getattr(answer, "logits", answer))


def test_timm_l2_has_the_same_tensors():
    """Too large to run here: 480 million parameters, compared by shape."""
    with torch.device("meta"):
        judge, network = timm.create_model("tf_efficientnet_l2"), EfficientNet(effnet.spec("l2"))
    ours, theirs = ([tuple(tensor.shape) for tensor in net.state_dict().values()] for net in (network, judge))
    assert ours == theirs


def hugging_face(name: str, resolution: int, odd: list[int]) -> nn.Module:
    spec = effnet.spec(name)
    config = EfficientNetConfig(
        image_size=resolution,
        width_coefficient=spec.width,
        depth_coefficient=spec.depth,
        hidden_dim=spec.head_channels,
        depthwise_padding=odd,
        num_labels=1000,
    )
    return EfficientNetForImageClassification(config)


# Resolution, and the blocks whose strided convolution meets an odd map there, as in the published checkpoints
@pytest.mark.parametrize(
    ("name", "resolution", "odd"),
    [
        ("b0", 224, []),
        ("b1", 240, [16]),
        ("b2", 260, [5, 8, 16]),
        ("b3", 300, [5, 18]),
        ("b4", 284, [6]),  # from here on at a smaller size whose maps are odd in the same blocks
        ("b5", 296, [13, 27]),
        ("b6", 272, [31]),
        ("b7", 280, [18]),
    ],
)
def test_hugging_face(name, resolution, odd, compare):
    with torch.device("meta"):
        judge = hugging_face(name, resolution, odd)
    network, judge = pair(name, judge, "same")
    images = golden_images(resolution, resolution)
    compare(network(images), judge(images).logits)


@pytest.mark.parametrize(
    ("name", "size"), [("b0", OBLONG), ("b0", ODD), ("b3", EVEN), pytest.param("b7", EVEN, marks=pytest.mark.slow)]
)
def test_keras(name, size, compare):
    """Its padding is fixed for the size that it is built for; images are (N, H, W, 3) and in 0 ... 255."""
    assert keras.backend.backend() == "torch"
    judge = getattr(keras.applications, f"EfficientNet{name.upper()}")(
        weights=None, input_shape=(*size, 3), classifier_activation=None
    )
    network = shaken(name, "same")
    remaining = iter(network.state_dict().values())
    for layer in judge.layers:
        if not layer.weights or isinstance(layer, keras.layers.Normalization):
            continue
        values = [next(remaining) for _ in layer.weights]
        if isinstance(layer, keras.layers.BatchNormalization):
            next(remaining)  # num_batches_tracked, which Keras has not
        elif isinstance(layer, keras.layers.DepthwiseConv2D):
            values[0] = values[0].permute(2, 3, 0, 1)  # (C, 1, H, W) -> (H, W, C, 1)
        elif isinstance(layer, keras.layers.Conv2D):
            values[0] = values[0].permute(2, 3, 1, 0)  # (O, I, H, W) -> (H, W, I, O)
        else:
            values[0] = values[0].T
        layer.set_weights([value.numpy() for value in values])
    assert next(remaining, None) is None

    images = golden_images(*size)
    compare(network(images), judge(255 * images.permute(0, 2, 3, 1), training=False).cpu())


def test_training_is_torchvisions(compare):
    """One step in training mode without randomness: the same logits, gradients and running statistics."""
    judge = torchvision.models.efficientnet_b0(weights=None, dropout=0, stochastic_depth_prob=0)
    network = EfficientNet(effnet.spec("b0", dropout=0, drop_connect=0), policy=NumericPolicy(1e-5, 0.1))
    tensors = shaken("b0", "symmetric").state_dict().values()
    images, labels = golden_images(*OBLONG, count=4).double(), torch.tensor([0, 3, 5, 9])
    answers = []
    with torch.enable_grad():
        for net in (network, judge):
            give(net, [tensor.clone() for tensor in tensors]).double().train()
            logits = net(images)
            nn.functional.cross_entropy(logits, labels).backward()
            answers.append([logits, *(weight.grad for weight in net.parameters()), *net.buffers()])
    for ours, reference in zip(*answers, strict=True):
        compare(ours.double(), reference.double())

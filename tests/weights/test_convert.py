"""Reading checkpoints of every library: the same logits as the library itself, and a report that leaves nothing out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
import transformers
from efficientnet_pytorch import EfficientNet as Lukemelas
from foreign import ALLOWED, saved, small, tiny, written
from random_weights import golden, shaken
from torch import nn
from torchvision.models.efficientnet import MBConvConfig

from effnet.arch.spec import NumericPolicy
from effnet.arch.variants import B0, VARIANTS, spec
from effnet.errors import AmbiguousSourceError, CheckpointError, MismatchError, UnknownNameError
from effnet.models.efficientnet import EfficientNet
from effnet.weights.bundle import save, to_tensors
from effnet.weights.convert import adapt_stem, read_checkpoint
from effnet.weights.load import build
from effnet.weights.verify import logit_difference


@torch.no_grad()
def relative_difference(ours: nn.Module, theirs: nn.Module, size: int, channels: int = 3) -> float:
    images = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))
    a, b = theirs(images), ours(images)
    a = getattr(a, "logits", a)
    return ((a - b).abs().max() / a.abs().max()).item()


def torchvision_scaled(width: float, depth: float, **options) -> nn.Module:
    rows = [
        MBConvConfig(row.expand_ratio, row.kernel_size, row.stride, channels, row.channels, row.layers, width, depth)
        for row, channels in zip(B0.stages, (32, *(row.channels for row in B0.stages)), strict=False)
    ]
    return torchvision.models.EfficientNet(rows, dropout=0.2, **options)


def transformers_network(size: int, **options) -> nn.Module:
    config = transformers.EfficientNetConfig(image_size=size, num_labels=1000, **options)
    return transformers.EfficientNetForImageClassification(config)


# library, network, size of the images; 224 is the native one
NETWORKS = [
    ("torchvision", "b0", 224),
    ("torchvision", "b5", 64),
    pytest.param("torchvision", "b6", 65, marks=pytest.mark.slow),
    pytest.param("torchvision", "b7", 49, marks=pytest.mark.slow),
    ("timm", "b2", 75),
    ("timm", "lite0", 224),
    ("timm-tf", "b0", 224),
    ("timm-tf", "b1", 95),
    ("timm-tf", "lite2", 70),
    ("lukemelas", "b0", 224),
    ("lukemelas", "b1", 75),
    ("hf", "b1", 240),
]


def library_network(source: str, name: str, size: int) -> nn.Module:
    match source:
        case "torchvision":
            return getattr(torchvision.models, f"efficientnet_{name}")()
        case "timm" | "timm-tf":
            return timm.create_model(f"{'tf_' if source == 'timm-tf' else ''}efficientnet_{name}")
        case "lukemelas":
            return Lukemelas.from_name(f"efficientnet-{name}", image_size=size)
        case _:
            b1 = {"width_coefficient": 1.0, "depth_coefficient": 1.1, "hidden_dim": 1280, "depthwise_padding": [16]}
            return transformers_network(size, **b1)


def test_whole_numbers_are_no_weights(tmp_path):
    """A changed format in a file's header, of the same size, would turn every number into another."""
    state = {key: tensor.contiguous() for key, tensor in tiny("native").items()}
    state["stem.conv.weight"] = state["stem.conv.weight"].view(torch.int32)
    with pytest.raises(MismatchError, match=r"lacks 1 of .*stem\.conv\.weight \(int32, not float32\)"):
        read_checkpoint(saved(tmp_path / "a.pth", state))


@pytest.mark.parametrize(("source", "name", "size"), NETWORKS)
def test_the_librarys_logits(tmp_path, source, name, size):
    theirs = shaken(library_network(source, name, size), size, images=2 if size > 200 else 8)
    path = saved(tmp_path / "a.pth", theirs.state_dict())
    read = read_checkpoint(path, source=source if "timm" in source else None)
    report = read
    assert (report.spec, report.source) == (VARIANTS[name].spec, source)
    assert (report.matched, report.fresh, report.adapted, report.left_over) == (len(theirs.state_dict()), (), (), ())
    difference = relative_difference(build(read), theirs, size)
    print(f"relative difference {difference:.1e}")  # shown by pytest -rP
    assert difference < ALLOWED
    if size == 224:
        found = logit_difference(read, build(read))
        package = {"timm-tf": "timm", "lukemelas": "efficientnet-pytorch"}.get(source, source)
        assert found.against.startswith(f"{package} ")
        assert (found.size, found.note) == (224, "")
        assert 0 <= found.relative < ALLOWED
        for fact in (found.against, "224 px", f"{found.absolute:.2g}", f"{found.relative:.1e}"):
            assert fact in str(found)


def test_the_tutorials_logits(tmp_path):
    file = json.loads((Path(__file__).parents[1] / "models" / "tutorial_tiny.json").read_text())
    torch.save({key: golden(key, shape) for key, shape in file["keys"]}, tmp_path / "a.pth")
    read = read_checkpoint(tmp_path / "a.pth")
    assert (read.source, read.matched) == ("tutorial", 530)
    assert read.spec.name == "b0-w0.25-d1.3"
    size = file["resolution"]
    images = torch.from_numpy(np.random.RandomState(1).normal(0, 1, (2, 3, size, size)).astype(np.float32))
    logits = torch.tensor(file["logits"])
    with torch.no_grad():
        assert (build(read)(images) - logits).abs().max() < ALLOWED * logits.abs().max()


@pytest.mark.parametrize(
    ("width", "depth", "name"), [(0.51, 1.0, "b0-w0.5"), (0.3, 1.2, "b0-w0.3-d1.2"), (1.1, 0.9, "b0-w1.1-d0.9")]
)
def test_custom_widths_of_torchvision(tmp_path, width, depth, name):
    theirs = shaken(torchvision_scaled(width, depth, num_classes=7))
    read = read_checkpoint(saved(tmp_path / "a.pth", theirs.state_dict()))
    assert relative_difference(build(read), theirs, 70) < ALLOWED
    assert read.classes is None


# small networks from here on: what the reader says and refuses


def test_another_network_than_expected(tmp_path):
    with torch.device("meta"):
        shapes = torchvision.models.efficientnet_b3().state_dict()
    state = {key: torch.zeros(tensor.shape, dtype=tensor.dtype) for key, tensor in shapes.items()}
    path = saved(tmp_path / "a.pth", state)
    with pytest.raises(MismatchError, match="holds a b3, not a b0"):
        read_checkpoint(path, "b0")
    assert read_checkpoint(path, "b3").spec.name == "b3"
    with pytest.raises(MismatchError, match="holds a b3"):
        read_checkpoint(path, spec("b3", width=1.3))


def test_timms_keys_alone_are_ambiguous(tmp_path):
    path = saved(tmp_path / "a.pth", tiny("timm"))
    with pytest.raises(AmbiguousSourceError, match=r"source timm\).*source timm-tf"):
        read_checkpoint(path)
    policies = [read_checkpoint(path, source=source).policy for source in ("timm", "timm-tf")]
    assert policies == [NumericPolicy(1e-5, 0.1, "symmetric"), NumericPolicy(1e-3, 0.1, "same")]


def test_sources_that_do_not_fit(tmp_path):
    path = saved(tmp_path / "a.pth", tiny("torchvision"))
    with pytest.raises(UnknownNameError, match="Did you mean 'timm'"):
        read_checkpoint(path, source="tim")
    with pytest.raises(CheckpointError, match="was written by torchvision, not by lukemelas"):
        read_checkpoint(path, source="lukemelas")
    assert read_checkpoint(path, source="torchvision").source == "torchvision"


def test_another_number_of_classes(tmp_path):
    path = saved(tmp_path / "a.pth", tiny())
    wanted = spec("b0", width=0.5, depth=0.4)
    with pytest.raises(MismatchError, match=r"5 classes, but b0-w0\.5-d0\.4 .*1000; num_classes=1000"):
        read_checkpoint(path, wanted)
    read = read_checkpoint(path, wanted, num_classes=7)
    assert read.fresh == ("classifier.weight", "classifier.bias")
    assert not read.state.keys() & {"classifier.weight", "classifier.bias"}
    assert "start fresh: classifier.weight, classifier.bias" in str(read)
    assert read_checkpoint(path, num_classes=5).fresh == ()
    assert build(read)(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


def test_without_a_classifier(tmp_path):
    state = tiny("lukemelas")
    path = saved(tmp_path / "a.pth", {key: tensor for key, tensor in state.items() if "_fc" not in key})
    with pytest.raises(MismatchError, match="has no classifier"):
        read_checkpoint(path)
    assert read_checkpoint(path, num_classes=3).fresh == ("classifier.weight", "classifier.bias")
    half = saved(tmp_path / "b.pth", {key: tensor for key, tensor in state.items() if key != "_fc.bias"})
    with pytest.raises(MismatchError, match=r"lacks 1 of .*tensors: _fc\.bias"):
        read_checkpoint(half)


def test_transformers_without_a_classifier(tmp_path):
    b0 = {"width_coefficient": 1.0, "depth_coefficient": 1.0, "hidden_dim": 1280}
    theirs = transformers_network(64, **b0).efficientnet
    theirs.save_pretrained(tmp_path / "a")
    with pytest.raises(MismatchError, match="has no classifier"):
        read_checkpoint(tmp_path / "a")
    read = read_checkpoint(tmp_path / "a", num_classes=2)
    assert (read.source, read.spec.resolution) == ("hf", 64)


def test_missing_and_left_over_tensors(tmp_path):
    state = tiny("tutorial")
    lost = "features.3a.block.dwconv.1.running_mean"
    path = saved(tmp_path / "a.pth", {key: tensor for key, tensor in state.items() if key != lost})
    with pytest.raises(MismatchError, match=f"lacks 1 of b0-w0.5-d0.4's tensors: {lost}"):
        read_checkpoint(path)
    wrapped = {f"module.{key}": tensor for key, tensor in state.items()} | {"n_averaged": torch.ones(())}
    report = read_checkpoint(saved(tmp_path / "b.pth", wrapped))
    assert report.left_over == ("n_averaged",)
    input_facts = ("224 px, crop from 256, bicubic", "mean 0.485 0.456 0.406, std 0.229 0.224 0.225")
    facts = ("b0-w0.5-d0.4 from tutorial", "BN eps 0.001, momentum 0.1, symmetric padding", "not used: n_averaged")
    assert all(fact in str(report) for fact in (*facts, *input_facts, "'module.'"))
    wrong = saved(tmp_path / "c.pth", state | {lost: torch.zeros(3)})
    with pytest.raises(MismatchError, match=rf"{lost} \(shape \(3,\), not \(96,\)\)"):
        read_checkpoint(wrong)


def linear(name, outputs, inputs):
    return {f"{name}.weight": torch.ones(outputs, inputs), f"{name}.bias": torch.ones(outputs)}


def under(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    ("prefix", "extra", "named"),
    [
        ("", linear("classifier.3", 7, 5), "classifier.3.weight, classifier.3.bias"),
        ("net.", linear("fc", 7, 5), "fc.weight, fc.bias"),
        ("net.", {"norm.running_mean": torch.ones(5)}, "norm.running_mean"),
        ("net.", {"logit_scale": torch.ones(())}, "logit_scale"),
        ("net.", {"adapter.weight": torch.ones(3, 4, 1, 1)}, "adapter.weight"),
        ("net.", linear("classifier", 5, 5), "classifier.weight, classifier.bias"),
        ("ema.backbone.", linear("ema.fc", 3, 5), "ema.fc.weight, ema.fc.bias"),
        ("ema_model.net.", linear("ema_model.fc", 3, 5), "ema_model.fc.weight, ema_model.fc.bias"),
        ("loss.net.", linear("loss.fc", 3, 5), "loss.fc.weight, loss.fc.bias"),
        ("", linear("step_head", 3, 5), "step_head.weight, step_head.bias"),
        ("", linear("accuracy_head", 3, 5), "accuracy_head.weight, accuracy_head.bias"),
        ("", linear("scaler", 5, 5), "scaler.weight, scaler.bias"),
        ("", linear("ema", 5, 5), "ema.weight, ema.bias"),
        ("", linear("gloss", 3, 5), "gloss.weight, gloss.bias"),
        ("", linear("metric", 3, 5), "metric.weight"),
        ("ema.", tiny("torchvision") | linear("fc2", 3, 5), "fc2.weight, fc2.bias"),
        ("ema.", tiny("torchvision") | under("ema.", linear("fc2", 3, 5)), "fc2.weight, fc2.bias"),
    ],
)
def test_layers_that_would_be_left_out_are_named(tmp_path, prefix, extra, named):
    path = saved(tmp_path / "a.pth", under(prefix, tiny("torchvision")) | extra)
    with pytest.raises(MismatchError, match=rf"a\.pth holds layers .*{named};"):
        read_checkpoint(path)
    if "adapter" not in named:  # behind the body, where a fresh classifier goes
        left_over = read_checkpoint(path, num_classes=3).left_over
        assert sorted(left_over) == sorted(key.removeprefix(prefix) for key in extra)


BESIDE = {
    "opt": {"state": {0: {"exp_avg": torch.ones(3, 3)}}, "param_groups": [{"lr": 0.1}]},
    "ema": {"decay": 0.9, "shadow_params": [torch.ones(3, 3)]},
    "callbacks": {"best": {"score": torch.tensor(0.5)}},
    Path("a"): {"weight": torch.ones(3, 3)},
}


def test_what_a_training_leaves_is_no_layer(tmp_path):
    leftovers = {"criterion.weight": torch.ones(5), "ce.pos_weight": torch.ones(5), "n_averaged": torch.tensor(3)}
    leftovers |= {"class_weights": torch.ones(5), "train_acc.total": torch.zeros(1), "val_f1.tp": torch.ones(5)}
    leftovers |= {"confmat.confmat": torch.ones(5, 5), "queue": torch.ones(4, 8), "ema.decay": torch.ones(())}
    leftovers |= {"arc_loss.centers": torch.ones(5, 8), "val_metric.total": torch.ones(1), "seen": torch.tensor([4, 2])}
    raw = under("net.", tiny("torchvision"))
    averaged = under("ema.module.", tiny("torchvision"))
    dotless = {f"model_ema.{key.replace('.', '')}": tensor for key, tensor in tiny("torchvision").items()}
    for state in (raw | leftovers, averaged | raw | leftovers, raw | dotless | leftovers):
        read = read_checkpoint(saved(tmp_path / "a.pth", state))
        assert set(leftovers) <= set(read.left_over)
    assert read_checkpoint(saved(tmp_path / "b.pth", {"net": raw, **BESIDE})).spec.num_classes == 5


@pytest.mark.parametrize("names", [["head"], ["ema_head"], ["head", "state_dict"], ["parts", 0], ["a", "b", "c"]])
def test_a_head_that_is_saved_apart_is_found(tmp_path, names):
    head = {"weight": torch.ones(7, 5)}
    for name in reversed(names):
        head = [head] if name == 0 else {name: head}
    for beside in ({}, {"opt": {"state": {0: {"exp_avg": torch.ones(3, 3)}}, "param_groups": []}}):
        path = saved(tmp_path / "a.pth", {"state_dict": tiny("torchvision")} | head | beside)
        with pytest.raises(MismatchError, match=rf"holds layers .*: {'.'.join(map(str, names))}\.weight;"):
            read_checkpoint(path)


@pytest.mark.parametrize(
    ("prefix", "name"), [("", "classifier"), ("", "classifier.0"), ("", "classifier.1.4"), ("net.", "fc")]
)
def test_a_replaced_classifier(tmp_path, prefix, name):
    state = tiny("torchvision")
    weight, bias = (state.pop(f"classifier.1.{leaf}") for leaf in ("weight", "bias"))
    lone = under(prefix, state) | {f"{name}.weight": weight}
    with pytest.raises(MismatchError, match="has no classifier"):  # a weight alone may be of an attention
        read_checkpoint(saved(tmp_path / "a.pth", lone))
    path = saved(tmp_path / "a.pth", lone | {f"{name}.bias": bias})
    read = read_checkpoint(path)
    assert (read.spec.num_classes, read.fresh, read.left_over) == (5, (), ())
    taken = to_tensors(read.state)
    assert torch.equal(taken["classifier.weight"], weight)
    assert torch.equal(taken["classifier.bias"], bias)
    assert f"{name}.weight, was taken for the classifier" in str(read)
    assert logit_difference(read, build(read)).relative < ALLOWED
    two = under(prefix, state) | linear(name, 7, weight.shape[1]) | linear("last", 5, 7)
    with pytest.raises(MismatchError, match=rf"several linear layers .*{name}\.weight, last\.weight"):
        read_checkpoint(saved(tmp_path / "b.pth", two))


def test_counters_of_batches_may_be_absent(tmp_path):
    state = {key: tensor for key, tensor in tiny("timm").items() if "num_batches" not in key}
    read = read_checkpoint(saved(tmp_path / "a.pth", state), source="timm")
    assert read.matched == len(state)
    assert all(tensor == 0 for key, tensor in read.state.items() if "num_batches" in key)
    build(read)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_are_read_in_float32(tmp_path, dtype):
    state = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tiny().items()}
    for file in (written(tmp_path / "a", state) / "model.safetensors", saved(tmp_path / "a.pth", state)):
        read = to_tensors(read_checkpoint(file).state)
        assert {tensor.dtype for tensor in read.values()} == {torch.float32, torch.int64}
        assert torch.equal(read["stem.conv.weight"], state["stem.conv.weight"].float())


def test_another_number_of_channels(tmp_path):
    network = small()
    read = read_checkpoint(saved(tmp_path / "a.pth", tiny()), in_channels=1)
    assert read.adapted == ("stem.conv.weight",)
    assert read.input.channels == 1
    grey = torch.randn(2, 1, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(build(read)(grey), network(grey.expand(2, 3, 40, 40)), rtol=1e-4, atol=1e-5)


def test_adapt_stem_keeps_the_answer_to_equal_channels():
    weight = torch.randn(8, 3, 3, 3)
    for channels in (1, 2, 3, 4, 7):
        assert adapt_stem(weight, channels).shape == (8, channels, 3, 3)
    for channels in (1, 3, 6):
        torch.testing.assert_close(adapt_stem(weight, channels).sum(1), weight.sum(1))


def test_bare_keys_of_ours_leave_the_policy_open_and_a_bundle_states_it(tmp_path):
    report = read_checkpoint(saved(tmp_path / "a.pth", tiny()))
    assert (report.source, report.policy) == ("bundle", NumericPolicy())
    assert "a fresh network's was assumed" in str(report)
    network = EfficientNet(spec("b0", width=0.5, depth=0.4, resolution=77), policy=NumericPolicy(1e-5, 0.1, "same"))
    save(network, tmp_path / "bundle", classes=None)
    report = read_checkpoint(tmp_path / "bundle")
    assert (report.spec, report.policy) == (network.spec, network.policy)


def test_the_activation_belongs_to_the_library(tmp_path):
    lite = EfficientNet(spec("lite0", depth=0.4))
    path = saved(tmp_path / "a.pth", tiny("lukemelas", lite))
    assert read_checkpoint(path).spec.activation == "relu6"
    silu = dataclasses.replace(lite.spec, activation="silu")
    with pytest.raises(MismatchError, match="is for a network with relu6, not silu"):
        read_checkpoint(path, silu)


@pytest.mark.parametrize("layout", ["lukemelas", "hf"])
def test_shortcuts_that_a_library_leaves_out(tmp_path, layout):
    narrow = EfficientNet(spec("b0", width=0.25, depth=0.4))
    with pytest.raises(CheckpointError, match=rf"{layout} has no shortcut in the first block .* stages\.2\.0"):
        read_checkpoint(saved(tmp_path / "a.pth", tiny(layout, narrow)))
    assert read_checkpoint(saved(tmp_path / "b.pth", tiny("torchvision", narrow))).fresh == ()

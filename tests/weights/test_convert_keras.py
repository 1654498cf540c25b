"""Reading every type of Keras file: the same logits as Keras's own network."""

from __future__ import annotations

import functools
import json

import h5py
import keras
import numpy as np
import pytest
import torch
from foreign import ALLOWED, IMAGENET_STD

from effnet.arch.spec import InputSpec
from effnet.errors import MismatchError
from effnet.weights.convert import read_checkpoint
from effnet.weights.load import build
from effnet.weights.verify import logit_difference

SIZE = 64
OPTIONS = {"input_shape": (SIZE, SIZE, 3), "classifier_activation": None}
IMAGES = np.random.RandomState(1).uniform(0, 255, (2, SIZE, SIZE, 3)).astype(np.float32)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' way to numpy


@pytest.fixture(scope="module")
def b0():
    return keras_shaken(keras.applications.EfficientNetB0(weights=None, classes=5, **OPTIONS))


def keras_shaken(model):
    random = np.random.RandomState(0)
    for layer in model.layers:
        weights = layer.get_weights()
        if type(layer).__name__ == "BatchNormalization":
            low_high = ((0.5, 0.9), (-0.2, 0.2), (-0.2, 0.2), (0.5, 1.5))
            weights = [random.uniform(*ends, w.shape) for ends, w in zip(low_high, weights, strict=True)]
        elif type(layer).__name__ == "Normalization":
            weights = [np.float32([0.48, 0.45, 0.4]), np.float32([0.05, 0.06, 0.07]), weights[2]]
        elif len(weights) == 2:
            weights = [weights[0], random.normal(0, 0.2, weights[1].shape)]
        layer.set_weights(weights)
    return model


def save_as_older_keras(model, path):
    """By layer name, a depthwise kernel under its own name, as TensorFlow's Keras did."""
    import h5py
    from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group

    with h5py.File(path, "w") as file:
        save_weights_to_hdf5_group(file, model)
        for name, group in file.items():
            if f"{name}/kernel" in group:
                older = f"{name}/{'depthwise_' if 'dwconv' in name else ''}kernel:0"
                group.move(f"{name}/kernel", older)
                names = group.attrs["weight_names"]
                group.attrs["weight_names"] = [older if "kernel" in str(key) else key for key in names]


def assert_same(read, theirs) -> None:
    """Keras' logits, and this network's for the same photos, prepared as the report says."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (read.input.mean, read.input.std))
    with torch.no_grad():
        logits = torch.as_tensor(theirs(IMAGES, training=False))
        ours = build(read)((torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 255 - mean) / std)
    difference = ((ours - logits).abs().max() / logits.abs().max()).item()
    print(f"relative difference {difference:.1e}")  # shown by pytest -rP
    assert difference < ALLOWED


def test_kerass_logits_from_every_type_of_file(tmp_path, b0):
    b0.save_weights(tmp_path / "new.weights.h5")
    b0.save(tmp_path / "model.keras")
    b0.save(tmp_path / "full.h5")
    save_as_older_keras(b0, tmp_path / "old.h5")
    for name in ("new.weights.h5", "model.keras", "full.h5", "old.h5"):
        read = read_checkpoint(tmp_path / name)
        report = read
        assert (report.source, report.spec.name, report.left_over) == ("keras", "b0", ())
        assert report.matched == 360 - 49  # no counters of batches
        assert_same(read, b0)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_the_logit_check(tmp_path, b0, num_classes):
    b0.save_weights(tmp_path / "a.weights.h5")
    read = read_checkpoint(tmp_path / "a.weights.h5", num_classes=num_classes)
    found = logit_difference(read, build(read))
    assert found.against.startswith("keras ")
    assert found.relative < ALLOWED


def test_keras_with_imagenets_preparation(tmp_path, monkeypatch):
    """Published weights hold the std where the variance belongs, and Keras divides by its root once more."""
    plain = keras_shaken(keras.applications.EfficientNetB0(weights=None, **OPTIONS))
    normalization = next(layer for layer in plain.layers if type(layer).__name__ == "Normalization")
    normalization.set_weights([np.float32(InputSpec.mean), np.float32(IMAGENET_STD), normalization.get_weights()[2]])
    normalization.name = "normalization_7"  # counted through all networks of a program
    save_as_older_keras(plain, tmp_path / "published.h5")
    module = __import__("keras.src.applications.efficientnet", fromlist=["file_utils"])
    monkeypatch.setattr(module.file_utils, "get_file", lambda *_, **__: str(tmp_path / "published.h5"))
    monkeypatch.setattr(module.imagenet_utils, "obtain_input_shape", lambda shape, **_: shape)
    theirs = keras.applications.EfficientNetB0(weights="imagenet", **OPTIONS)
    theirs.save(tmp_path / "tuned.keras")
    for name in ("published.h5", "tuned.keras"):
        read = read_checkpoint(tmp_path / name)
        assert read.input.std == pytest.approx(IMAGENET_STD)
        assumed = any("variance is ImageNet's std" in note for note in read.notes)
        assert assumed == (name == "published.h5")  # the other one lists its layers
        assert_same(read, theirs)


def test_keras_network_inside_another(tmp_path):
    base = keras_shaken(
        keras.applications.EfficientNetB0(weights=None, include_top=False, pooling="avg", input_shape=(SIZE, SIZE, 3))
    )
    model = keras.Sequential([base, keras.layers.Dropout(0.3), keras.layers.Dense(5)])
    model(IMAGES)
    model.save_weights(tmp_path / "a.weights.h5")
    read = read_checkpoint(tmp_path / "a.weights.h5")
    assert read.spec.num_classes == 5
    assert all("seed_generator" in name for name in read.left_over)
    assert_same(read, model)
    base.save_weights(tmp_path / "notop.weights.h5")
    with pytest.raises(MismatchError, match="has no classifier"):
        read_checkpoint(tmp_path / "notop.weights.h5")
    assert read_checkpoint(tmp_path / "notop.weights.h5", num_classes=4).fresh


@functools.cache  # Keras takes a second to make one, and a network may be part of several
def base(**options):
    shape = {"include_top": False, "weights": None, "input_shape": (SIZE, SIZE, 3)}
    return keras_shaken(keras.applications.EfficientNetB0(**shape, **options))


def stacked(*layers):
    return keras.Sequential([keras.layers.Input((SIZE, SIZE, 3)), *layers])


dense, kl = keras.layers.Dense, keras.layers
FOLLOWED = {
    "another name": lambda: stacked(
        kl.RandomFlip(), base(), kl.GlobalAveragePooling2D(), kl.Flatten(), dense(5, name="top")
    ),
    "rescaled": lambda: stacked(kl.Rescaling(1 / 127.5, offset=-1), base(pooling="avg"), dense(5)),
    "normalised": lambda: stacked(
        kl.Normalization(mean=[120.0, 110, 100], variance=[60.0, 50, 40]), base(pooling="avg"), dense(5)
    ),
}
REFUSED = {
    "GlobalMaxPooling2D": lambda: stacked(base(pooling="max"), dense(5)),
    "BatchNormalization": lambda: stacked(base(pooling="avg"), kl.BatchNormalization(), dense(5)),
    "Dense, relu": lambda: stacked(base(pooling="avg"), dense(5, activation="relu"), dense(5)),
    "Dense, sigmoid": lambda: stacked(base(pooling="avg"), dense(5, activation="sigmoid")),
    "ReLU": lambda: stacked(base(pooling="avg"), kl.ReLU(), dense(5)),
    "Resizing": lambda: stacked(kl.Resizing(SIZE, SIZE), base(pooling="avg"), dense(5)),
}


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("model", FOLLOWED)
def test_the_layers_that_a_file_lists_are_followed(tmp_path, model, suffix):
    theirs = FOLLOWED[model]()
    theirs.save(tmp_path / f"a{suffix}")
    read = read_checkpoint(tmp_path / f"a{suffix}")
    assert read.input.size == SIZE
    assert_same(read, theirs)


@pytest.mark.parametrize("suffix", [".keras", ".h5"])
@pytest.mark.parametrize("kind", REFUSED)
def test_other_layers_than_an_efficientnets_are_refused(tmp_path, kind, suffix):
    REFUSED[kind]().save(tmp_path / f"a{suffix}")
    with pytest.raises(MismatchError, match=rf"a\{suffix}.* (layer \w+ \({kind}\)|several linear layers)"):
        read_checkpoint(tmp_path / f"a{suffix}")


def test_a_file_of_weights_lists_kinds_only(tmp_path):
    """A group for every layer, even for one without weights: more than Keras' own network has are refused."""
    path = tmp_path / "a.weights.h5"
    again = {"Rescaling": stacked(kl.Rescaling(1 / 255.0), base(pooling="avg"), dense(5))}
    again["Normalization"] = FOLLOWED["normalised"]()
    for kind in ("GlobalMaxPooling2D", "ReLU", "Resizing", *again):
        (again[kind] if kind in again else REFUSED[kind]()).save_weights(path)
        with pytest.raises(MismatchError, match=rf"a\.weights\.h5: it has \d layers? of kind {kind.lower()}"):
            read_checkpoint(path)
    again["Rescaling"].layers[1].save_weights(path)
    assert read_checkpoint(path, num_classes=2).fresh


def test_constants_and_subclassed_models(tmp_path):
    model = stacked(base(pooling="avg"), dense(5))
    path = tmp_path / "a.h5"
    model.save(path)
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = file.attrs["model_config"].replace('"epsilon": 0.001', '"epsilon": 0.0002')
    read = read_checkpoint(path)
    assert read.policy.bn_eps == 2e-4
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = file.attrs["model_config"].replace("2, 2", "1, 1", 1)
    with pytest.raises(MismatchError, match=r"stem_conv .* where b0 has Conv2D, stride 2"):
        read_checkpoint(path)
    with h5py.File(path, "r+") as file:
        file.attrs["model_config"] = '{"class_name": "Mine", "config": {}}'
    with pytest.raises(MismatchError, match="lists no layers"):
        read_checkpoint(path)


def leaves(config, kind, **settings):
    for layer in config["layers"]:
        if layer["class_name"] == kind:
            layer["config"].update(settings)


CHANGED = {  # settings of Keras' own network that change what it computes
    r"stem_conv \(Conv2D, .*zero padding \[\[3, 3\]": lambda c: leaves(c, "ZeroPadding2D", padding=[[3, 3], [3, 3]]),
    r"stem_conv \(Conv2D, .*zero padding": lambda c: leaves(c, "Conv2D", padding="same"),
    r"avg_pool \(Output\) where b0 ends": lambda c: c.update(output_layers=[["avg_pool", 0, 0]]),
    r"\(Normalization, inverted": lambda c: leaves(c, "Normalization", invert=True),
    r"\(Normalization, axis \[1\]": lambda c: leaves(c, "Normalization", axis=[1]),
    r"\(Conv2D, .*channels_first": lambda c: leaves(c, "Conv2D", data_format="channels_first"),
    r"\(Conv2D, stride 2, channels_first": lambda c: leaves(c, "ZeroPadding2D", data_format="channels_first"),
    r"\(GlobalAveragePooling2D, ch": lambda c: leaves(c, "GlobalAveragePooling2D", data_format="channels_first"),
    r"\(BatchNormalization, axis \[1\]": lambda c: leaves(c, "BatchNormalization", axis=[1]),
}


@pytest.mark.parametrize("message", CHANGED)
def test_settings_that_change_what_is_computed(tmp_path, full, message):
    path = tmp_path / "a.h5"
    path.write_bytes(full)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        CHANGED[message](config["config"])
        file.attrs["model_config"] = json.dumps(config)
    with pytest.raises(MismatchError, match=rf"a\.h5: it has the layer .*{message}"):
        read_checkpoint(path)


@pytest.fixture(scope="module")
def full(b0, tmp_path_factory):
    path = tmp_path_factory.mktemp("full") / "a.h5"
    b0.save(path)
    return path.read_bytes()


def test_an_older_file_of_weights_lists_names(tmp_path):
    """Also those of layers without weights: kinds that Keras' own network does not have are refused."""
    body, path = base(), tmp_path / "a.h5"
    heads = {
        "": [kl.GlobalAveragePooling2D(), kl.Dropout(0.1)],
        "globalmaxpooling2d": [kl.GlobalMaxPooling2D()],
        "unitnormalization": [kl.GlobalAveragePooling2D(), kl.UnitNormalization()],
    }
    for kind, layers in heads.items():
        values = body.output
        for layer in (*layers, dense(5, name="predictions")):
            values = layer(values)
        save_as_older_keras(keras.Model(body.input, values), path)
        if kind:
            with pytest.raises(MismatchError, match=f"a.h5: it has 1 layer of kind {kind}"):
                read_checkpoint(path)
            assert read_checkpoint(path, num_classes=3).fresh
        else:
            notes = read_checkpoint(path).notes
            assert any("network was assumed (silu, and behind the classifier softmax or nothing)" in it for it in notes)


@pytest.mark.parametrize("stated", [True, False])
def test_a_classifier_without_bias(tmp_path, stated):
    theirs = stacked(base(pooling="avg"), dense(5, use_bias=False))
    theirs.save(tmp_path / "a.h5")
    if stated:
        assert_same(read_checkpoint(tmp_path / "a.h5"), theirs)
        return
    with h5py.File(tmp_path / "a.h5", "r+") as file:  # a lone weight, which may be of anything
        del file.attrs["model_config"]
    with pytest.raises(MismatchError, match="has no classifier"):
        read_checkpoint(tmp_path / "a.h5")


def test_constants_behind_a_fresh_classifier_do_not_matter(tmp_path):
    stacked(base(pooling="avg"), kl.BatchNormalization(epsilon=0.1), dense(5)).save(tmp_path / "a.h5")
    assert read_checkpoint(tmp_path / "a.h5", num_classes=3).policy.bn_eps == 1e-3

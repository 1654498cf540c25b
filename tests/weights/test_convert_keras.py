"""Reading what Keras wrote, in every kind of its files: the same logits as Keras' own network."""

from __future__ import annotations

import os
import warnings

import numpy as np
import pytest
import torch
from foreign import ALLOWED, IMAGENET_STD

from effnet.arch.spec import InputSpec
from effnet.errors import MismatchError
from effnet.weights.convert import read_checkpoint
from effnet.weights.load import build

os.environ.setdefault("KERAS_BACKEND", "torch")


@pytest.fixture(scope="module")
def keras():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("keras")


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


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras' way to numpy
def test_kerass_logits_from_every_kind_of_file(tmp_path, keras):
    size = 224
    theirs = keras_shaken(
        keras.applications.EfficientNetB0(weights=None, input_shape=(size, size, 3), classifier_activation=None)
    )
    images = np.random.RandomState(1).uniform(0, 255, (2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        logits = torch.as_tensor(theirs(images, training=False))
    theirs.save_weights(tmp_path / "new.weights.h5")
    theirs.save(tmp_path / "model.keras")
    theirs.save(tmp_path / "full.h5")
    save_as_older_keras(theirs, tmp_path / "old.h5")
    for name in ("new.weights.h5", "model.keras", "full.h5", "old.h5"):
        read = read_checkpoint(tmp_path / name)
        report = read.report
        assert (report.source, report.spec.name, report.left_over) == ("keras", "b0", ())
        assert report.matched == 360 - 49  # no counters of batches
        mean, std = (torch.tensor(values)[:, None, None] for values in (report.input.mean, report.input.std))
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
        with torch.no_grad():
            difference = ((build(read)((pixels / 255 - mean) / std) - logits).abs().max() / logits.abs().max()).item()
        print(f"{name}: relative difference {difference:.1e}")
        assert difference < ALLOWED


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_keras_with_imagenets_preparation(tmp_path, keras, monkeypatch):
    """Published weights hold the std where the variance belongs, and Keras divides by its root once more."""
    size = 64
    options = {"input_shape": (size, size, 3), "classifier_activation": None}
    plain = keras_shaken(keras.applications.EfficientNetB0(weights=None, **options))
    normalization = next(layer for layer in plain.layers if type(layer).__name__ == "Normalization")
    normalization.set_weights([np.float32(InputSpec.mean), np.float32(IMAGENET_STD), normalization.get_weights()[2]])
    normalization.name = "normalization_7"  # counted through all networks of a program
    save_as_older_keras(plain, tmp_path / "published.h5")
    module = __import__("keras.src.applications.efficientnet", fromlist=["file_utils"])
    monkeypatch.setattr(module.file_utils, "get_file", lambda *_, **__: str(tmp_path / "published.h5"))
    monkeypatch.setattr(module.imagenet_utils, "obtain_input_shape", lambda shape, **_: shape)
    theirs = keras.applications.EfficientNetB0(weights="imagenet", **options)
    images = np.random.RandomState(1).uniform(0, 255, (2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        logits = torch.as_tensor(theirs(images, training=False))
    theirs.save(tmp_path / "tuned.keras")
    for name in ("published.h5", "tuned.keras"):
        read = read_checkpoint(tmp_path / name)
        assert read.report.input.std == pytest.approx(IMAGENET_STD)
        assert any("variance is ImageNet's std" in note for note in read.report.notes)
        mean, std = (torch.tensor(v)[:, None, None] for v in (read.report.input.mean, read.report.input.std))
        with torch.no_grad():
            ours = build(read)((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std)
        assert (ours - logits).abs().max() < ALLOWED * logits.abs().max()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_keras_network_inside_another(tmp_path, keras):
    base = keras_shaken(
        keras.applications.EfficientNetB0(weights=None, include_top=False, pooling="avg", input_shape=(64, 64, 3))
    )
    model = keras.Sequential([base, keras.layers.Dropout(0.3), keras.layers.Dense(5)])
    images = np.random.RandomState(1).uniform(0, 255, (2, 64, 64, 3)).astype(np.float32)
    with torch.no_grad():
        logits = torch.as_tensor(model(images, training=False))
    model.save_weights(tmp_path / "a.weights.h5")
    read = read_checkpoint(tmp_path / "a.weights.h5")
    assert read.report.spec.num_classes == 5
    assert all("seed_generator" in name for name in read.report.left_over)
    mean, std = (torch.tensor(v)[:, None, None] for v in (read.report.input.mean, read.report.input.std))
    with torch.no_grad():
        ours = build(read)((torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std)
    assert (ours - logits).abs().max() < ALLOWED * logits.abs().max()
    base.save_weights(tmp_path / "notop.weights.h5")
    with pytest.raises(MismatchError, match="has no classifier"):
        read_checkpoint(tmp_path / "notop.weights.h5")
    assert read_checkpoint(tmp_path / "notop.weights.h5", num_classes=4).report.fresh

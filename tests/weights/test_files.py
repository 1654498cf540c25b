"""Opening files: wrappers around the tensors, Keras's kinds of files, and files without weights."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import pickle
import re
import struct
import sys
import warnings
import zipfile
from datetime import UTC, date
from pathlib import PureWindowsPath

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from effnet.arch.variants import spec
from effnet.errors import ArgumentError, CheckpointError, MissingExtraError
from effnet.models.efficientnet import EfficientNet
from effnet.weights.bundle import read_network
from effnet.weights.files import STEMS, open_weights, unwrap

TINY = {"conv_stem.weight": torch.ones(8, 3, 3, 3), "classifier.bias": torch.zeros(2)}


def tiny(value=1.0):
    return {key: torch.full_like(tensor, value) for key, tensor in TINY.items()}


def arrays(content):
    """What a file holds, as it is read: tensors are numpy arrays."""
    if isinstance(content, dict):
        return {key: arrays(value) for key, value in content.items()}
    return content.numpy() if isinstance(content, torch.Tensor) else content


def under(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


def test_plain_state_dicts_of_every_kind(tmp_path):
    for name in ("a.pth", "a.pt", "a.bin", "a.ckpt", "a.pth.tar"):
        torch.save(TINY, tmp_path / name)
        file = open_weights(tmp_path / name)
        assert (file.tensors.keys(), file.notes, file.beside) == (TINY.keys(), (), {})
    torch.save(TINY, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert open_weights(tmp_path / "old.pth").tensors.keys() == TINY.keys()
    save_file(TINY, tmp_path / "a.safetensors")
    assert open_weights(tmp_path / "a.safetensors").tensors.keys() == TINY.keys()


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "model.", "model.module._orig_mod.", "timm_model.", "net.0."],
)
def test_prefixes_come_off_and_are_said(prefix):
    state, beside, _, notes = unwrap(
        arrays(under(prefix, TINY) | {"n_averaged": torch.tensor(3), "loss.weight": torch.ones(2)})
    )
    assert state.keys() == TINY.keys()
    assert list(beside) == ["n_averaged", "loss.weight"]
    assert notes == (f"removed the prefix {prefix!r} from the keys",)


@pytest.mark.parametrize("stem", STEMS)
def test_the_prefix_is_seen_before_every_stem(stem):
    state, *_ = unwrap({f"model.{stem}": np.ones(1)})
    assert list(state) == [stem]


def test_an_averaged_model_goes_before_the_raw_one():
    averaged = torch.optim.swa_utils.AveragedModel(EfficientNet(spec("b0", width=0.1, depth=0.1)))
    state, beside, *_ = unwrap(arrays({"state_dict": averaged.state_dict()}))
    assert state.keys() == averaged.module.state_dict().keys()
    assert list(beside) == ["n_averaged"]
    both = under("model.", tiny(1)) | under("ema_model.module.", tiny(2))
    state, beside, _, notes = unwrap(arrays({"state_dict": both, "epoch": 3, "global_step": torch.tensor(7)}))
    assert np.unique(state["conv_stem.weight"]).item() == 2
    assert beside.keys() == under("model.", TINY).keys()
    assert notes == ("took 'state_dict' out of the checkpoint", "removed the prefix 'ema_model.module.' from the keys")


@pytest.mark.parametrize(
    ("chosen", "other"),  # Lightning's EMA callback stores the average as state_dict and the raw weights beside it
    [("state_dict_ema", "state_dict"), ("ema", "state_dict"), ("state_dict", "current_model_state")],
)
def test_an_averaged_state_dict_goes_before_the_raw_one(chosen, other):
    saved = {"epoch": 1, other: tiny(1), chosen: tiny(2), "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}}}
    state, *_, notes = unwrap(arrays(saved))
    assert np.unique(state["conv_stem.weight"]).item() == 2
    assert notes == (f"took {chosen!r} out of the checkpoint, not {other}",)


def test_dictionaries_without_tensors_are_passed_by():
    saved = {"ema": {"decay": 0.999}, "model": {"state_dict": TINY}, "args": {"lr": 0.1}}
    state, *_, notes = unwrap(arrays(saved))
    assert state.keys() == TINY.keys()
    assert notes == ("took 'model' out of the checkpoint", "took 'state_dict' out of the checkpoint")
    endless = {"args": 1}
    endless["model"] = endless
    for nothing in ({"epoch": 3}, {}, [1, 2], endless, {"state_dict": {"lr": 0.1}}):
        with pytest.raises(CheckpointError, match="no named tensors"):
            unwrap(nothing)


def test_two_networks_in_one_file_are_not_chosen_between():
    for held, end in (
        (under("student.", TINY) | under("teacher.", TINY), "."),
        ({"student": TINY, "teacher": TINY}, ""),
    ):
        with pytest.raises(CheckpointError, match=rf"several networks, under 'student{end}', 'teacher{end}'"):
            unwrap(arrays(held))


def test_folders(tmp_path):
    with pytest.raises(CheckpointError, match=r"the folder .* holds none of model\.safetensors, pytorch_model\.bin"):
        open_weights(tmp_path)
    for inside in ("model", "best"):  # of a fit, and of a training
        (tmp_path / inside).mkdir()
        (tmp_path / inside / "config.json").write_text('{"effnet": "0", "format": 1}')
        advice = f"the model of this run is {tmp_path / inside}"
        with pytest.raises(CheckpointError, match=f"holds none of .*; {re.escape(advice)}$"):
            open_weights(tmp_path)
        with pytest.raises(ArgumentError, match=f"is not a bundle; {re.escape(advice)}$"):
            read_network(str(tmp_path))
    torch.save(TINY, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "efficientnet_b0"}))
    file = open_weights(tmp_path)
    assert file.config == {"architecture": "efficientnet_b0"}
    assert (file.path, file.preprocessor) == (tmp_path, {})
    save_file(tiny(2), tmp_path / "model.safetensors")
    assert np.unique(open_weights(tmp_path).tensors["conv_stem.weight"]).item() == 2
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        open_weights(tmp_path)


class Runs:
    def __reduce__(self):
        return print, ("this must not run",)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("thing", "kind"),
    [(nn.Linear(2, 2), "Linear"), (Runs(), "print"), (argparse.Namespace(lr=Runs()), "print")],
)
def test_pickles_with_python_objects_are_not_opened(tmp_path, capsys, thing, kind, old):
    torch.save({"state_dict": TINY, "args": thing}, tmp_path / "a.pth", _use_new_zipfile_serialization=not old)
    with pytest.raises(CheckpointError, match=rf"holds Python objects .*{kind}.*torch\.save\(model\.state_dict\(\)"):
        open_weights(tmp_path / "a.pth")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("old", [False, True])
def test_settings_beside_the_tensors_are_passed_over(tmp_path, old):
    """What the training scripts of timm and torchvision save."""
    settings = argparse.Namespace(lr=0.1, output=tmp_path, betas=np.array([0.9]), more=argparse.Namespace(a=[1]))
    settings.day, settings.zone, settings.share = date(2026, 1, 2), UTC, PureWindowsPath("c:/a")
    content = {"epoch": 3, "arch": "b0", "args": settings, "metric": np.float64(0.7), "state_dict": TINY}
    torch.save(content, tmp_path / "a.pth.tar", _use_new_zipfile_serialization=not old)
    allowed = set(torch.serialization.get_safe_globals())
    file = open_weights(tmp_path / "a.pth.tar")
    assert (file.tensors.keys(), file.beside) == (TINY.keys(), {})
    assert set(torch.serialization.get_safe_globals()) == allowed
    for hidden in (argparse.Namespace(state_dict=TINY), {key: value.numpy() for key, value in TINY.items()}):
        torch.save({"model": hidden}, tmp_path / "b.pth", _use_new_zipfile_serialization=not old)
        with pytest.raises(CheckpointError, match=r"b\.pth.* no named tensors outside of its arrays of numpy"):
            open_weights(tmp_path / "b.pth")


def test_a_state_dict_under_any_name():
    content = {
        "ema": {"decay": torch.ones(())},
        "optimizer": {"m": torch.ones(2)},
        "my_weights": {"run": under("net.", TINY)},
    }
    state, beside, _, notes = unwrap(arrays(content))
    assert state.keys() == TINY.keys()
    assert beside.keys() == {"optimizer.m"}
    assert notes[0] == "took 'my_weights' out of the checkpoint, not ema, optimizer"
    head = {"weight": torch.ones(5, 8), "bias": torch.ones(5)}
    assert unwrap(arrays({"backbone": TINY, "head": head}))[1].keys() == {"head.weight", "head.bias"}


def test_one_thing_under_many_names_is_looked_at_once(tmp_path):
    """A file of a few kilobytes, which written out would be larger than any memory."""
    for many in (dict, list):
        held = TINY
        for _ in range(7):
            names = [f"n{number}" for number in range(300)]
            held = dict.fromkeys(names, held) if many is dict else [held] * 300
        torch.save({"state_dict": TINY, "x": held, "y": {"z": [held]}}, tmp_path / "a.pth")
        assert open_weights(tmp_path / "a.pth").tensors.keys() == TINY.keys()
        torch.save([held, {"z": held}], tmp_path / "b.pth")
        with pytest.raises(CheckpointError, match="no named tensors"):
            open_weights(tmp_path / "b.pth")


def test_shards(tmp_path):
    shards = {key: f"model-0000{number}-of-00002.safetensors" for number, key in enumerate(TINY, start=1)}
    for key, name in shards.items():
        save_file({key: TINY[key]}, tmp_path / name)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert open_weights(tmp_path).tensors.keys() == TINY.keys()
    (tmp_path / shards["classifier.bias"]).unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002.safetensors is missing.*2 files"):
        open_weights(tmp_path)


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("hello.txt", "hello")
    return buffer.getvalue()


def safetensors(header):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


NO_WEIGHTS = {
    "missing.pth": (None, "does not exist"),
    "empty.pth": (b"", "is empty"),
    "empty.h5": (b"", "is empty"),
    "text.pth": (b"hello world, this is a text\n", "is damaged"),
    "page.pth": (b"<!DOCTYPE html><html>not found</html>", "neither torch.save nor safetensors wrote it"),
    "pickle.pth": (pickle.dumps([1, 2, 3]), "neither torch.save nor safetensors wrote it"),
    "half.pth": (saved(TINY)[:900], "is damaged"),
    "zeros.pth": (bytes(1000), "opening it would run code in it"),
    "zip.pth": (zipped(), "is damaged"),
    "list.pth": (saved([torch.ones(2)]), "no named tensors"),
    "text.safetensors": (b"hello world", "is damaged"),
    "format.safetensors": (
        safetensors({"a": {"dtype": 5000 * "F", "shape": [], "data_offsets": [0, 0]}}),
        "is damaged",
    ),
    "text.h5": (b"hello world", "is damaged"),
    "text.keras": (b"hello world", "is damaged"),
    "zip.keras": (zipped(), "is damaged"),
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_files_that_hold_no_weights(tmp_path, name):
    content, message = NO_WEIGHTS[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_weights(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert "weights_only" not in str(caught.value), "torch advises to switch its protection off"


def test_torchscript_is_not_opened(tmp_path):
    class Doubling(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch no longer likes TorchScript, of another category in each version
        torch.jit.save(torch.jit.script(Doubling()), tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        open_weights(tmp_path / "a.pt")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(suffix=st.sampled_from([".pth", ".safetensors", ".h5", ".keras"]), content=st.binary(max_size=60))
def test_no_bytes_raise_anything_else(tmp_path, suffix, content):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        open_weights(path)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(0, 255))
def test_no_flipped_byte_raises_anything_else(tmp_path, position, value):
    content = bytearray(saved(TINY))
    content[position % len(content)] = value
    (tmp_path / "a.pth").write_bytes(content)
    with contextlib.suppress(CheckpointError):
        open_weights(tmp_path / "a.pth")


def written(path, datasets):
    with h5py.File(path, "w") as file:
        for name, values in datasets.items():
            file[name] = values
    return path


CONV, DEPTHWISE = np.arange(48.0).reshape(2, 2, 3, 4), np.arange(12.0).reshape(2, 2, 3, 1)
DENSE = np.arange(6.0).reshape(3, 2)
# how generations of Keras name the same arrays
KERNELS = (("stem_conv", "kernel:0"), ("block1a_dwconv", "depthwise_kernel:0"), ("predictions", "kernel:0"))
NUMBERED = ("conv2d", "depthwise_conv2d", "dense")
KERAS = {
    "full.h5": tuple(f"model_weights/{layer}/{layer}/{kernel}" for layer, kernel in KERNELS),
    "old.h5": tuple(f"{layer}/{layer}/{kernel}" for layer, kernel in KERNELS),
    "nested.h5": tuple(f"model_weights/efficientnetb0/{layer}/{kernel}" for layer, kernel in KERNELS),
    "new.weights.h5": tuple(f"layers/{layer}/vars/0" for layer in NUMBERED),
    "nested.weights.h5": tuple(f"layers/functional/layers/{layer}/vars/0" for layer in NUMBERED),
    "older.weights.h5": tuple(f"_layer_checkpoint_dependencies/{layer}/vars/0" for layer in NUMBERED),
}


@pytest.mark.parametrize("name", KERAS)
def test_keras_arrays_in_the_order_of_torch(tmp_path, name):
    optimizer = "optimizer/vars/2" if ".weights." in name else "optimizer_weights/Adam/stem_conv/kernel/m:0"
    path = written(tmp_path / name, dict(zip((*KERAS[name], optimizer), (CONV, DEPTHWISE, DENSE, CONV), strict=True)))
    tensors = open_weights(path).tensors
    keys = [f"{layer}/0" for layer in NUMBERED] if ".weights." in name else [f"{layer}/kernel" for layer, _ in KERNELS]
    assert list(tensors) == sorted(keys)
    conv, depthwise, dense = (tensors[key] for key in keys)
    # out, in, row, column; one filter per channel; out, in
    assert conv.shape == (4, 3, 2, 2)
    assert conv[3, 1, 0, 1] == CONV[0, 1, 1, 3]
    assert depthwise.shape == (3, 1, 2, 2)
    assert depthwise[2, 0, 1, 0] == DEPTHWISE[1, 0, 2, 0]
    assert dense[1, 2] == DENSE[2, 1]


def test_keras_archive(tmp_path):
    inner = written(tmp_path / "model.weights.h5", {"layers/conv2d/vars/0": CONV})
    with zipfile.ZipFile(tmp_path / "a.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(inner, "model.weights.h5")
    assert open_weights(tmp_path / "a.keras").tensors["conv2d/0"].shape == (4, 3, 2, 2)


@pytest.mark.parametrize("where", ["external", "virtual", "nowhere"])
def test_keras_numbers_are_in_the_file(tmp_path, where):
    """HDF5 may keep numbers in any other file, and lists any number of zeros in a few bytes."""
    (tmp_path / "secret").write_bytes(bytes(64))
    written(tmp_path / "other.h5", {"a": CONV})
    with h5py.File(tmp_path / "a.h5", "w") as file:
        if where == "external":
            file.create_dataset("stem_conv/kernel", (4,), "f4", external=[(str(tmp_path / "secret"), 0, 16)])
        elif where == "virtual":
            layout = h5py.VirtualLayout(CONV.shape, "f8")
            layout[...] = h5py.VirtualSource(str(tmp_path / "other.h5"), "a", CONV.shape)
            file.create_virtual_dataset("stem_conv/kernel", layout)
        else:
            file.create_dataset("stem_conv/kernel", (1_000_000, 50_000), "f4", chunks=(1000, 1000))
    with pytest.raises(CheckpointError, match=r"a\.h5 .*numbers of stem_conv/kernel are not in the file"):
        open_weights(tmp_path / "a.h5")


def test_a_keras_archive_does_not_fill_the_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.weights.h5", bytes(10_000_000))
    with pytest.raises(CheckpointError, match=r"a\.keras .*unpacks to more than"):
        open_weights(tmp_path / "a.keras")


def test_layers_of_two_networks_are_not_mixed(tmp_path):
    names = [f"layers/{network}/layers/conv2d/vars/0" for network in ("functional", "functional_1")]
    path = written(tmp_path / "a.weights.h5", dict.fromkeys(names, CONV))
    assert list(open_weights(path).tensors) == names


def test_keras_without_h5py(tmp_path, monkeypatch):
    path = written(tmp_path / "a.h5", {"stem_conv/kernel": CONV})
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(MissingExtraError, match=r"effnet\[keras\]"):
        open_weights(path)

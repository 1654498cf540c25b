"""The command line: a table of commands, each a function in the folder of its feature.

Exit codes: 0 all is well; 1 it ran and found something wrong (an unreadable image, a refused result, a missed budget);
2 wrong usage or an error that stopped it; 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys

from cyclopts import App, CycloptsError

from effnet import console
from effnet.errors import EffnetError, RefusedError, translated
from effnet.version import __version__

# name, what it does, where its function lives; a command's module is imported when the command runs
COMMANDS = (
    (
        "info",
        "A network: its stages, costs and memory; without a model, the whole family.",
        "describing.command",
    ),
    ("predict", "Name what photos show.", "predicting.command"),
    ("convert", "Turn a checkpoint of one library into another's, or into a bundle.", "converting.command"),
    ("scale", "Compound scaling: the network of a phi, or the one that fits a budget.", "scaling.command"),
    ("profile", "Where a network's time goes on this machine.", "profiling.command"),
    (
        "check",
        "Find unreadable images, copies and leaks between the splits of a data set.",
        "checking.command",
    ),
    ("train", "Train a network on a folder of images.", "training.command"),
    ("val", "Evaluate a model on labelled images, with intervals; or compare two models.", "evaluating.command"),
    ("export", "Write a model as a file that OpenVINO, ONNX Runtime or torch.export runs.", "exporting.command"),
    (
        "bench",
        "Time every engine and precision on this machine, and compare their answers.",
        "benchmarking.command",
    ),
    ("search", "Search alpha, beta and gamma for a baseline on your images.", "searching.command"),
)


def build_app(summaries: bool) -> App:
    """The application; its root help takes each command's line from the table, so that none is imported for it."""
    app = App(
        name="effnet",
        help="EfficientNet: exact networks, verified weights, and the network that fits your budget.\n\n"
        "An error is one line; --traceback shows where it came from.",
        version=__version__,
        result_action="return_value",
        exit_on_error=False,
        print_error=False,
    )
    for name, summary, module in COMMANDS:
        app.command(f"effnet.{module}:{name}", help=summary if summaries else None)
    return app


def main(arguments: list[str] | None = None) -> None:
    """Run one command and leave with its exit code; `--traceback` shows where an error came from."""
    words = sys.argv[1:] if arguments is None else arguments
    code = console.ERROR
    app = build_app(summaries=not set(words) & {name for name, _, _ in COMMANDS})
    try:
        code = app([console.STDIN if word == "-" else word for word in words if word != "--traceback"]) or console.OK
    except KeyboardInterrupt:
        code = console.INTERRUPTED
    except BrokenPipeError:  # the reader of the pipe has left, so there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if "--traceback" in words:
            raise
        if isinstance(error, ImportError):
            error = translated(error)
        expected = isinstance(error, (EffnetError, CycloptsError, OSError))
        console.remark(f"effnet: {'' if expected else f'unexpected {type(error).__name__}, see --traceback: '}{error}")
        code = console.FINDING if isinstance(error, RefusedError) else console.ERROR
        if isinstance(error, CycloptsError):
            console.remark("effnet --help lists the commands, effnet COMMAND --help the options of one.")
    sys.exit(code)

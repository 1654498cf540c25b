"""The command line: one table of commands, each a module of `commands` with a thin function.

Exit codes: 0 all is well; 1 it ran and something was wrong with the material (an unreadable image, a refused result);
2 wrong usage or an error that stopped it; 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys

from cyclopts import App, CycloptsError

import effnet
from effnet import console
from effnet.commands.arguments import ERROR, FINDING, INTERRUPTED, OK, STDIN
from effnet.errors import EffnetError, RefusedError

COMMANDS = "info", "predict", "convert", "scale", "profile", "check", "train", "val", "export", "bench", "search"

app = App(
    name="effnet",
    help="EfficientNet: exact networks, verified weights, and photos named by them.\n\n"
    "An error is one line; --traceback shows where it came from.",
    version=effnet.__version__,
    result_action="return_value",
    exit_on_error=False,
    print_error=False,
)
for name in COMMANDS:  # by name: a command is imported when it is called
    app.command(f"effnet.commands.{name}:{name}")


def main(arguments: list[str] | None = None) -> None:
    """Run one command and leave with its exit code; `--traceback` shows where an error came from."""
    words = sys.argv[1:] if arguments is None else arguments
    code = ERROR
    if not set(words) & set(COMMANDS):
        for command in COMMANDS:  # which the help of all describes
            app[command]  # imports it
    try:
        code = app([STDIN if word == "-" else word for word in words if word != "--traceback"]) or OK
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:  # the reader of the pipe has left, so there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if "--traceback" in words:
            raise
        expected = isinstance(error, (EffnetError, CycloptsError, OSError))
        console.remark(f"effnet: {'' if expected else f'unexpected {type(error).__name__}, see --traceback: '}{error}")
        code = FINDING if isinstance(error, RefusedError) else ERROR
        if isinstance(error, CycloptsError):
            console.remark("effnet --help lists the commands, effnet COMMAND --help the options of one.")
    sys.exit(code)
